//! The operations in plain burn operations: the default bodies of [`DiffusionBackend`](crate::DiffusionBackend).
//!
//! They are what a backend without kernels of its own runs, what a backend with some falls back to (for a dtype,
//! say), and what kernels are tested against. Shapes are taken as given: [`ops`](crate::ops) checks them.

use crate::Pool;
use burn::tensor::ops::{ConvOptions, FloatTensor};
use burn::tensor::{DType, FloatDType, Shape, Slice, TensorMetadata, backend::Backend};

/// Scores per head that the default [`attention`] makes at once: 4 MiB, 256 queries of the 4096 keys of a 512-pixel
/// picture, where the whole matrix would be 64 MiB per head. Fewer keys leave room for more queries, and need fewer chunks.
const SCORES: usize = 256 * 4096;

/// The longest row that is averaged at once. GPUs give a row to one group of threads: the few and long rows of a group
/// norm are averaged in parts, or most of the device waits.
const LONG_ROW: usize = 4096;

/// Parts of such a row.
const PARTS: usize = 64;

/// The default of [`kernel_silu`](crate::DiffusionBackend::kernel_silu).
pub fn silu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(x.clone(), B::sigmoid(x))
}

/// The default of [`kernel_silu_backward`](crate::DiffusionBackend::kernel_silu_backward).
pub fn silu_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let s = B::sigmoid(x.clone());
    let one_minus = B::float_add_scalar(B::float_neg(s.clone()), 1.0.into());
    let inner = B::float_add_scalar(B::float_mul(x, one_minus), 1.0.into());
    B::float_mul(grad, B::float_mul(s, inner))
}

/// The default of [`kernel_gelu`](crate::DiffusionBackend::kernel_gelu).
pub fn gelu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let cdf = normal_cdf::<B>(x.clone());
    B::float_mul(x, cdf)
}

/// The default of [`kernel_gelu_backward`](crate::DiffusionBackend::kernel_gelu_backward).
pub fn gelu_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let square = B::float_mul(x.clone(), x.clone());
    let density = B::float_exp(B::float_mul_scalar(square, (-0.5).into()));
    let density = B::float_mul_scalar(
        density,
        (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2).into(),
    );
    let slope = B::float_add(normal_cdf::<B>(x.clone()), B::float_mul(x, density));
    B::float_mul(grad, slope)
}

/// The default of [`kernel_geglu`](crate::DiffusionBackend::kernel_geglu).
pub fn geglu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let (hidden, gate) = halves::<B>(x);
    B::float_mul(hidden, gelu::<B>(gate))
}

/// The default of [`kernel_geglu_backward`](crate::DiffusionBackend::kernel_geglu_backward).
pub fn geglu_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let last = x.shape().num_dims() - 1;
    let (hidden, gate) = halves::<B>(x);
    let to_hidden = B::float_mul(grad.clone(), gelu::<B>(gate.clone()));
    let to_gate = gelu_backward::<B>(gate, B::float_mul(grad, hidden));
    B::float_cat(vec![to_hidden, to_gate], last)
}

/// The default of [`kernel_group_norm`](crate::DiffusionBackend::kernel_group_norm).
pub fn group_norm<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    beta: FloatTensor<B>,
    groups: usize,
    eps: f64,
    silu: bool,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let shape = x.shape();
    let normal = normalize_groups::<B>(to_f32::<B>(x), groups, eps).0;
    let y = B::float_reshape(normal, flat_channels(&shape));
    let y = B::float_add(
        B::float_mul(y, per_channel::<B>(to_f32::<B>(gamma))),
        per_channel::<B>(to_f32::<B>(beta)),
    );
    let y = if silu { self::silu::<B>(y) } else { y };
    B::float_reshape(from_f32::<B>(y, dtype), shape)
}

/// The default of [`kernel_group_norm_backward`](crate::DiffusionBackend::kernel_group_norm_backward).
pub fn group_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    beta: FloatTensor<B>,
    grad: FloatTensor<B>,
    groups: usize,
    eps: f64,
    silu: bool,
) -> [FloatTensor<B>; 3] {
    let dtype = x.dtype();
    let shape = x.shape();
    let flat = flat_channels(&shape);
    let [n, channels, inner] = [flat[0], flat[1], flat[2]];
    let (normal, inverse) = normalize_groups::<B>(to_f32::<B>(x), groups, eps);
    let normal = B::float_reshape(normal, flat.clone());
    let gamma3 = per_channel::<B>(to_f32::<B>(gamma));
    let mut grad = B::float_reshape(to_f32::<B>(grad), flat);
    if silu {
        let y =
            B::float_add(B::float_mul(normal.clone(), gamma3.clone()), per_channel::<B>(to_f32::<B>(beta)));
        grad = silu_backward::<B>(y, grad);
    }
    let over_batch = |t: FloatTensor<B>| {
        let t = B::float_sum_dim(B::float_sum_dim(t, 2), 0);
        from_f32::<B>(B::float_reshape(t, Shape::new([channels])), dtype)
    };
    let to_gamma = over_batch(B::float_mul(grad.clone(), normal.clone()));
    let to_beta = over_batch(grad.clone());
    let grouped = Shape::new([n, groups, channels / groups * inner]);
    let to_normal = B::float_reshape(B::float_mul(grad, gamma3), grouped.clone());
    let normal = B::float_reshape(normal, grouped);
    let to_x = normalize_backward::<B>(normal, inverse, to_normal, 2);
    [B::float_reshape(from_f32::<B>(to_x, dtype), shape), to_gamma, to_beta]
}

/// The default of [`kernel_layer_norm`](crate::DiffusionBackend::kernel_layer_norm).
pub fn layer_norm<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    beta: FloatTensor<B>,
    eps: f64,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let shape = x.shape();
    let (normal, _) = normalize::<B>(rows::<B>(to_f32::<B>(x)), 1, eps);
    let y = B::float_mul(normal, as_row::<B>(to_f32::<B>(gamma)));
    let y = B::float_add(y, as_row::<B>(to_f32::<B>(beta)));
    B::float_reshape(from_f32::<B>(y, dtype), shape)
}

/// The default of [`kernel_layer_norm_backward`](crate::DiffusionBackend::kernel_layer_norm_backward).
pub fn layer_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    grad: FloatTensor<B>,
    eps: f64,
) -> [FloatTensor<B>; 3] {
    let dtype = x.dtype();
    let shape = x.shape();
    let width = gamma.shape().clone();
    let (normal, inverse) = normalize::<B>(rows::<B>(to_f32::<B>(x)), 1, eps);
    let grad = rows::<B>(to_f32::<B>(grad));
    let over_rows =
        |t: FloatTensor<B>| from_f32::<B>(B::float_reshape(B::float_sum_dim(t, 0), width.clone()), dtype);
    let to_gamma = over_rows(B::float_mul(grad.clone(), normal.clone()));
    let to_beta = over_rows(grad.clone());
    let to_normal = B::float_mul(grad, as_row::<B>(to_f32::<B>(gamma)));
    let to_x = normalize_backward::<B>(normal, inverse, to_normal, 1);
    [B::float_reshape(from_f32::<B>(to_x, dtype), shape), to_gamma, to_beta]
}

/// The default of [`kernel_linear`](crate::DiffusionBackend::kernel_linear).
pub fn linear<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let y = B::float_matmul(x, B::float_swap_dims(weight, 0, 1));
    match bias {
        Some(bias) => B::float_add(y, as_row::<B>(bias)),
        None => y,
    }
}

/// The default of [`kernel_linear_x_backward`](crate::DiffusionBackend::kernel_linear_x_backward).
pub fn linear_x_backward<B: Backend>(weight: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(grad, weight)
}

/// The default of [`kernel_linear_weight_backward`](crate::DiffusionBackend::kernel_linear_weight_backward).
pub fn linear_weight_backward<B: Backend>(x: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(B::float_swap_dims(grad, 0, 1), x)
}

/// The default of [`kernel_conv2d`](crate::DiffusionBackend::kernel_conv2d).
pub fn conv2d<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    stride: usize,
    padding: usize,
) -> FloatTensor<B> {
    B::conv2d(x, weight, bias, conv_options(stride, padding))
}

/// The default of [`kernel_conv2d_x_backward`](crate::DiffusionBackend::kernel_conv2d_x_backward).
pub fn conv2d_x_backward<B: Backend>(
    x_shape: Shape,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    stride: usize,
    padding: usize,
) -> FloatTensor<B> {
    // burn takes the whole input and reads its shape only; zeros of that shape cost next to nothing beside
    // the product, and let the graph forget the input when the weight is frozen.
    let x = B::float_zeros(x_shape, &B::float_device(&grad), float_dtype(grad.dtype()));
    B::conv2d_x_backward(x, weight, grad, conv_options(stride, padding))
}

/// The default of [`kernel_conv2d_weight_backward`](crate::DiffusionBackend::kernel_conv2d_weight_backward).
pub fn conv2d_weight_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    stride: usize,
    padding: usize,
) -> FloatTensor<B> {
    B::conv2d_weight_backward(x, weight, grad, conv_options(stride, padding))
}

/// The default of [`kernel_attention`](crate::DiffusionBackend::kernel_attention).
pub fn attention<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    causal: bool,
) -> FloatTensor<B> {
    let chunks = query_chunks(q.shape()[2], k.shape()[2])
        .map(|(start, end)| {
            let weights = chunk_weights::<B>(queries::<B>(&q, start, end), k.clone(), causal, start);
            B::float_matmul(from_f32::<B>(weights, v.dtype()), v.clone())
        })
        .collect();
    cat_queries::<B>(chunks)
}

/// The default of [`kernel_attention_backward`](crate::DiffusionBackend::kernel_attention_backward).
pub fn attention_backward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    grad: FloatTensor<B>,
    causal: bool,
) -> [FloatTensor<B>; 3] {
    let dtype = q.dtype();
    let scale = (q.shape()[3] as f64).powf(-0.5);
    let (q, k, v, grad) = (to_f32::<B>(q), to_f32::<B>(k), to_f32::<B>(v), to_f32::<B>(grad));
    let mut to_q = Vec::new();
    let mut to_kv: Option<(FloatTensor<B>, FloatTensor<B>)> = None;
    for (start, end) in query_chunks(q.shape()[2], k.shape()[2]) {
        let q = queries::<B>(&q, start, end);
        let grad = queries::<B>(&grad, start, end);
        let weights = chunk_weights::<B>(q.clone(), k.clone(), causal, start);
        let chunk_v = B::float_matmul(B::float_swap_dims(weights.clone(), 2, 3), grad.clone());
        let to_weights = B::float_matmul(grad, B::float_swap_dims(v.clone(), 2, 3));
        let row = B::float_sum_dim(B::float_mul(to_weights.clone(), weights.clone()), 3);
        let to_scores = B::float_mul(weights, B::float_sub(to_weights, row));
        let to_scores = B::float_mul_scalar(to_scores, scale.into());
        to_q.push(B::float_matmul(to_scores.clone(), k.clone()));
        let chunk_k = B::float_matmul(B::float_swap_dims(to_scores, 2, 3), q);
        to_kv = Some(match to_kv {
            None => (chunk_k, chunk_v),
            Some((k, v)) => (B::float_add(k, chunk_k), B::float_add(v, chunk_v)),
        });
    }
    let (to_k, to_v) = to_kv.expect("ops::attention asserts that there is at least one query");
    [cat_queries::<B>(to_q), to_k, to_v].map(|t| from_f32::<B>(t, dtype))
}

/// The default of [`kernel_pool`](crate::DiffusionBackend::kernel_pool).
pub fn pool<B: Backend>(x: FloatTensor<B>, pool: Pool) -> FloatTensor<B> {
    match pool {
        Pool::MaxHalving => B::max_pool2d(x, [3, 3], [2, 2], [0, 0], [1, 1], false),
        Pool::Max => B::max_pool2d(x, [3, 3], [1, 1], [1, 1], [1, 1], false),
        Pool::Mean => B::avg_pool2d(x, [3, 3], [1, 1], [1, 1], false, false),
    }
}

/// The default of [`kernel_add`](crate::DiffusionBackend::kernel_add).
pub fn add<B: Backend>(x: FloatTensor<B>, y: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add(x, y)
}

/// The default of [`kernel_shift`](crate::DiffusionBackend::kernel_shift).
pub fn shift<B: Backend>(x: FloatTensor<B>, shift: FloatTensor<B>) -> FloatTensor<B> {
    let [n, c] = shift.shape().dims();
    B::float_add(x, B::float_reshape(shift, Shape::new([n, c, 1, 1])))
}

/// The default of [`kernel_shift_backward`](crate::DiffusionBackend::kernel_shift_backward).
pub fn shift_backward<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let [n, c, _, _] = grad.shape().dims();
    B::float_reshape(B::float_sum_dim(B::float_sum_dim(grad, 3), 2), Shape::new([n, c]))
}

/// The default of [`kernel_bias_backward`](crate::DiffusionBackend::kernel_bias_backward).
pub fn bias_backward<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let dims = grad.shape().num_dims();
    let channels = grad.shape()[1];
    let sum = (0..dims).rev().filter(|dim| *dim != 1).fold(grad, |sum, dim| B::float_sum_dim(sum, dim));
    B::float_reshape(sum, Shape::new([channels]))
}

/// The default of [`kernel_join`](crate::DiffusionBackend::kernel_join).
pub fn join<B: Backend>(x: FloatTensor<B>, y: FloatTensor<B>) -> FloatTensor<B> {
    B::float_cat(vec![x, y], 1)
}

/// The default of [`kernel_split`](crate::DiffusionBackend::kernel_split).
pub fn split<B: Backend>(x: FloatTensor<B>, first: usize) -> [FloatTensor<B>; 2] {
    let channels = x.shape()[1];
    [0..first, first..channels].map(|range| B::float_slice(x.clone(), &[Slice::full(), Slice::from(range)]))
}

/// The default of [`kernel_upsample`](crate::DiffusionBackend::kernel_upsample).
pub fn upsample<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [n, c, h, w] = x.shape().dims();
    let twice = B::float_expand(
        B::float_reshape(x, Shape::new([n * c * h, 1, w, 1])),
        Shape::new([n * c * h, 2, w, 2]),
    );
    B::float_reshape(twice, Shape::new([n, c, 2 * h, 2 * w]))
}

/// The default of [`kernel_upsample_backward`](crate::DiffusionBackend::kernel_upsample_backward).
pub fn upsample_backward<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let [n, c, height, width] = grad.shape().dims();
    let (h, w) = (height / 2, width / 2);
    let grad = B::float_reshape(grad, Shape::new([n * c * h, 2, w, 2]));
    let corner = |down: usize, across: usize| {
        let slices =
            [Slice::full(), Slice::from(down..down + 1), Slice::full(), Slice::from(across..across + 1)];
        B::float_slice(grad.clone(), &slices)
    };
    let sum =
        B::float_add(B::float_add(corner(0, 0), corner(0, 1)), B::float_add(corner(1, 0), corner(1, 1)));
    B::float_reshape(sum, Shape::new([n, c, h, w]))
}

/// The default of [`kernel_image_to_tokens`](crate::DiffusionBackend::kernel_image_to_tokens).
pub fn image_to_tokens<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [n, c, h, w] = x.shape().dims();
    B::float_swap_dims(B::float_reshape(x, Shape::new([n, c, h * w])), 1, 2)
}

/// The default of [`kernel_tokens_to_image`](crate::DiffusionBackend::kernel_tokens_to_image).
pub fn tokens_to_image<B: Backend>(x: FloatTensor<B>, height: usize, width: usize) -> FloatTensor<B> {
    let [n, _, c] = x.shape().dims();
    B::float_reshape(B::float_swap_dims(x, 1, 2), Shape::new([n, c, height, width]))
}

/// burn's options for a convolution without dilation and groups.
pub(crate) fn conv_options(stride: usize, padding: usize) -> ConvOptions<2> {
    ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1)
}

fn float_dtype(dtype: DType) -> FloatDType {
    dtype.into()
}

pub(crate) fn to_f32<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    if x.dtype() == DType::F32 { x } else { B::float_cast(x, FloatDType::F32) }
}

pub(crate) fn from_f32<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if x.dtype() == dtype { x } else { B::float_cast(x, float_dtype(dtype)) }
}

/// The distribution function of the standard normal.
fn normal_cdf<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let erf = B::float_erf(B::float_mul_scalar(x, std::f64::consts::FRAC_1_SQRT_2.into()));
    B::float_mul_scalar(B::float_add_scalar(erf, 1.0.into()), 0.5.into())
}

/// The two halves of the last dimension.
fn halves<B: Backend>(x: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let shape = x.shape();
    let last = shape.num_dims() - 1;
    let half = shape[last] / 2;
    let part = |start: usize, end: usize| {
        let mut slices = vec![Slice::full(); last];
        slices.push(Slice::from(start..end));
        B::float_slice(x.clone(), &slices)
    };
    (part(0, half), part(half, 2 * half))
}

/// `[n, c, ...] -> [n, c, rest]`.
fn flat_channels(shape: &Shape) -> Shape {
    let (n, c) = (shape[0], shape[1]);
    Shape::new([n, c, shape.num_elements() / (n * c).max(1)])
}

/// `[c] -> [1, c, 1]`.
fn per_channel<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let c = x.shape()[0];
    B::float_reshape(x, Shape::new([1, c, 1]))
}

/// `[d] -> [1, d]`.
fn as_row<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let d = x.shape()[0];
    B::float_reshape(x, Shape::new([1, d]))
}

/// `[.., d] -> [rows, d]`.
fn rows<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape();
    let d = shape[shape.num_dims() - 1];
    B::float_reshape(x, Shape::new([shape.num_elements() / d.max(1), d]))
}

/// Zero mean and unit (biased) variance along `dim`; also the inverse deviation, with `dim` of size one.
fn normalize<B: Backend>(x: FloatTensor<B>, dim: usize, eps: f64) -> (FloatTensor<B>, FloatTensor<B>) {
    let mean = mean_dim::<B>(x.clone(), dim);
    let centred = B::float_sub(x, mean);
    let variance = mean_dim::<B>(B::float_mul(centred.clone(), centred.clone()), dim);
    let inverse = B::float_recip(B::float_sqrt(B::float_add_scalar(variance, eps.into())));
    (B::float_mul(centred, inverse.clone()), inverse)
}

/// The mean along `dim`, which becomes one; of long rows in parts, where the parts are equal.
fn mean_dim<B: Backend>(x: FloatTensor<B>, dim: usize) -> FloatTensor<B> {
    let shape = x.shape();
    let length = shape[dim];
    if length <= LONG_ROW || !length.is_multiple_of(PARTS) || dim + 1 != shape.num_dims() {
        return B::float_mean_dim(x, dim);
    }
    let rows = shape.num_elements() / length;
    let parts = B::float_mean_dim(B::float_reshape(x, Shape::new([rows * PARTS, length / PARTS])), 1);
    let mean = B::float_mean_dim(B::float_reshape(parts, Shape::new([rows, PARTS])), 1);
    let mut reduced = shape;
    reduced[dim] = 1;
    B::float_reshape(mean, reduced)
}

/// [`normalize`] over the groups of `[n, c, ...]`: `[n, groups, rest]` and `[n, groups, 1]`.
fn normalize_groups<B: Backend>(
    x: FloatTensor<B>,
    groups: usize,
    eps: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let shape = x.shape();
    let n = shape[0];
    let rest = shape.num_elements() / (n * groups).max(1);
    normalize::<B>(B::float_reshape(x, Shape::new([n, groups, rest])), 2, eps)
}

/// Gradient through [`normalize`]: `inverse * (g - mean(g) - normal * mean(g * normal))`.
fn normalize_backward<B: Backend>(
    normal: FloatTensor<B>,
    inverse: FloatTensor<B>,
    grad: FloatTensor<B>,
    dim: usize,
) -> FloatTensor<B> {
    let mean = mean_dim::<B>(grad.clone(), dim);
    let along = mean_dim::<B>(B::float_mul(grad.clone(), normal.clone()), dim);
    let centred = B::float_sub(B::float_sub(grad, mean), B::float_mul(normal, along));
    B::float_mul(centred, inverse)
}

pub(crate) fn query_chunks(queries: usize, keys: usize) -> impl Iterator<Item = (usize, usize)> {
    let chunk = (SCORES / keys.max(1)).max(1);
    (0..queries).step_by(chunk).map(move |start| (start, (start + chunk).min(queries)))
}

/// Queries `start..end` of `[b, heads, n, d]`.
pub(crate) fn queries<B: Backend>(q: &FloatTensor<B>, start: usize, end: usize) -> FloatTensor<B> {
    if start == 0 && end == q.shape()[2] {
        return q.clone();
    }
    B::float_slice(q.clone(), &[Slice::full(), Slice::full(), Slice::from(start..end), Slice::full()])
}

pub(crate) fn cat_queries<B: Backend>(mut chunks: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    if chunks.len() == 1 { chunks.remove(0) } else { B::float_cat(chunks, 2) }
}

/// Attention weights of one chunk of queries, in f32: `[b, heads, chunk, keys]`, rows summing to one.
fn chunk_weights<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    causal: bool,
    first_query: usize,
) -> FloatTensor<B> {
    let scale = (q.shape()[3] as f64).powf(-0.5);
    let scores = B::float_matmul(q, B::float_swap_dims(k, 2, 3));
    let mut scores = B::float_mul_scalar(to_f32::<B>(scores), scale.into());
    if causal {
        let [_, _, n, m] = scores.shape().dims();
        // Additive: -1e30 is far below any score, and stays finite through the subtraction of the maximum.
        let mask: Vec<f32> =
            (0..n * m).map(|i| if i % m > first_query + i / m { -1e30 } else { 0.0 }).collect();
        let data = burn::tensor::TensorData::new(mask, [1, 1, n, m]);
        let mask = B::float_from_data(data, &B::float_device(&scores));
        scores = B::float_add(scores, to_f32::<B>(mask));
    }
    let maximum = B::float_max_dim(scores.clone(), 3);
    let exponentials = B::float_exp(B::float_sub(scores, maximum));
    let sum = B::float_sum_dim(exponentials.clone(), 3);
    B::float_div(exponentials, sum)
}
