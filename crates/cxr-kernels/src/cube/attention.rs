//! Attention: in one pass where the device has matrix units for it, and elsewhere in chunks of queries, two products, and
//! between them a softmax that reads the scores in f32 and writes the weights in the dtype of the values.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::flash;
use super::layout::{UNITS, cubes, empty_of};
use super::product::product;
use crate::plain;

/// Adds up a number of each unit of a cube; every unit may read the sum, in the first place, then.
#[cube]
fn sum_units(shared: &mut SharedMemory<f32>, #[comptime] units: usize) {
    sync_cube();
    let unit = UNIT_POS as usize;
    let mut half = units.runtime() / 2;
    while half > 0 {
        if unit < half {
            shared[unit] = shared[unit] + shared[unit + half];
        }
        half /= 2;
        sync_cube();
    }
}

/// Softmax of `scale` times a row of scores, which a cube has to itself. With `causal`, query `i` of `queries`, of which
/// the first is `first`, sees keys `0..=i`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn softmax_rows<F: Float>(
    scores: &Tensor<f32>,
    weights: &mut Tensor<F>,
    rows: usize,
    keys: usize,
    queries: usize,
    first: usize,
    scale: f32,
    #[comptime] causal: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let origin = row * keys;
    let unit = UNIT_POS as usize;
    let mut seen = keys;
    if causal {
        seen = min(keys, first + row % queries + 1);
    }
    let mut shared = SharedMemory::<f32>::new(units);

    let mut largest = f32::cast_from(-1.0e30f32);
    for i in range_stepped(unit, seen, units) {
        largest = max(largest, scores[origin + i] * scale);
    }
    shared[unit] = largest;
    sync_cube();
    let mut half = units.runtime() / 2;
    while half > 0 {
        if unit < half {
            shared[unit] = max(shared[unit], shared[unit + half]);
        }
        half /= 2;
        sync_cube();
    }
    let largest = shared[0];
    sync_cube();

    let mut sum = 0.0f32;
    for i in range_stepped(unit, seen, units) {
        sum += (scores[origin + i] * scale - largest).exp();
    }
    shared[unit] = sum;
    sum_units(&mut shared, units);
    let inverse = 1.0f32 / shared[0];
    for i in range_stepped(unit, keys, units) {
        if i < seen {
            weights[origin + i] = F::cast_from((scores[origin + i] * scale - largest).exp() * inverse);
        } else {
            weights[origin + i] = F::cast_from(0.0f32);
        }
    }
}

/// The weights of the queries from `first` on: `[b, heads, queries, keys]` in `dtype`.
fn softmax<R: CubeRuntime>(
    scores: CubeTensor<R>,
    dtype: DType,
    scale: f64,
    causal: bool,
    first: usize,
) -> CubeTensor<R> {
    let scores = into_contiguous(scores);
    let shape = scores.shape();
    let [b, heads, queries, keys] = shape.dims();
    let weights = empty_of(&scores, shape, dtype);
    let rows = b * heads * queries;
    // SAFETY: cubes without a row end at once, and units go over a row's keys alone
    unsafe {
        softmax_rows::launch_unchecked::<R>(
            &scores.client,
            cubes(rows),
            CubeDim::new_1d(UNITS),
            scores.required_address_type(),
            scores.clone().into_tensor_arg(),
            weights.clone().into_tensor_arg(),
            rows,
            keys,
            queries,
            first,
            scale as f32,
            causal,
            UNITS as usize,
            dtype.into(),
        );
    }
    weights
}

/// `softmax(q k^T / sqrt(d)) v`.
pub(super) fn attention<B, R>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    causal: bool,
) -> CubeTensor<R>
where
    B: Backend<FloatTensorPrimitive = CubeTensor<R>>,
    R: CubeRuntime,
{
    if let Some(y) = flash::attention(&q, &k, &v, causal) {
        return y;
    }
    let scale = (q.shape()[3] as f64).powf(-0.5);
    let [k, v] = [k, v].map(into_contiguous);
    let turned = B::float_swap_dims(k, 2, 3);
    let chunks = plain::query_chunks(q.shape()[2], v.shape()[2])
        .map(|(start, end)| {
            let queries = plain::queries::<B>(&q, start, end);
            let scores = of_product::<B, R>(into_contiguous(queries), turned.clone(), DType::F32);
            let weights = softmax(scores, v.dtype, scale, causal, start);
            of_product::<B, R>(weights, v.clone(), v.dtype)
        })
        .collect();
    plain::cat_queries::<B>(chunks)
}

/// A product in `dtype`.
fn of_product<B, R>(lhs: CubeTensor<R>, rhs: CubeTensor<R>, dtype: DType) -> CubeTensor<R>
where
    B: Backend<FloatTensorPrimitive = CubeTensor<R>>,
    R: CubeRuntime,
{
    product(lhs.clone(), rhs.clone(), dtype)
        .unwrap_or_else(|| plain::from_f32::<B>(B::float_matmul(lhs, rhs), dtype))
}

/// The gradient of a row of scores: `scale * weights * (g - sum(g * weights))`, `g` the gradient of the weights, in whose
/// place it is written.
#[cube(launch_unchecked, address_type = "dynamic")]
fn score_gradients(
    weights: &Tensor<f32>,
    gradients: &mut Tensor<f32>,
    rows: usize,
    keys: usize,
    scale: f32,
    #[comptime] units: usize,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let origin = row * keys;
    let unit = UNIT_POS as usize;
    let mut sum = 0.0f32;
    for i in range_stepped(unit, keys, units) {
        sum += weights[origin + i] * gradients[origin + i];
    }
    let mut shared = SharedMemory::<f32>::new(units);
    shared[unit] = sum;
    sum_units(&mut shared, units);
    let along = shared[0];
    for i in range_stepped(unit, keys, units) {
        gradients[origin + i] = scale * weights[origin + i] * (gradients[origin + i] - along);
    }
}

/// Gradients of [`attention`] with respect to `q`, `k`, `v`, in f32; weights are computed again, a chunk at a time.
pub(super) fn attention_backward<B, R>(
    q: CubeTensor<R>,
    k: CubeTensor<R>,
    v: CubeTensor<R>,
    grad: CubeTensor<R>,
    causal: bool,
) -> [CubeTensor<R>; 3]
where
    B: Backend<FloatTensorPrimitive = CubeTensor<R>>,
    R: CubeRuntime,
{
    let dtype = q.dtype;
    let scale = (q.shape()[3] as f64).powf(-0.5);
    let [q, k, v, grad] = [q, k, v, grad].map(|x| into_contiguous(plain::to_f32::<B>(x)));
    let turn = |x: CubeTensor<R>| B::float_swap_dims(x, 2, 3);
    let times = |lhs, rhs| of_product::<B, R>(lhs, rhs, DType::F32);
    let mut to_q = Vec::new();
    let mut to_kv: Option<(CubeTensor<R>, CubeTensor<R>)> = None;
    for (start, end) in plain::query_chunks(q.shape()[2], k.shape()[2]) {
        let [q, grad] = [&q, &grad].map(|x| into_contiguous(plain::queries::<B>(x, start, end)));
        let scores = times(q.clone(), turn(k.clone()));
        let weights = softmax(scores, DType::F32, scale, causal, start);
        let gradients = times(grad.clone(), turn(v.clone()));
        let [b, heads, queries, keys] = gradients.shape().dims();
        let rows = b * heads * queries;
        // SAFETY: cubes without a row end at once, and units go over a row's keys alone
        unsafe {
            score_gradients::launch_unchecked::<R>(
                &q.client,
                cubes(rows),
                CubeDim::new_1d(UNITS),
                gradients.required_address_type(),
                weights.clone().into_tensor_arg(),
                gradients.clone().into_tensor_arg(),
                rows,
                keys,
                scale as f32,
                UNITS as usize,
            );
        }
        to_q.push(times(gradients.clone(), k.clone()));
        let chunk = (times(turn(gradients), q), times(turn(weights), grad));
        to_kv = Some(match to_kv {
            None => chunk,
            Some((k, v)) => (B::float_add(k, chunk.0), B::float_add(v, chunk.1)),
        });
    }
    let (to_k, to_v) = to_kv.expect("ops::attention asserts that there is at least one query");
    [plain::cat_queries::<B>(to_q), to_k, to_v].map(|x| plain::from_f32::<B>(x, dtype))
}
