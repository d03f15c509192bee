//! Attention in one pass on the matrix units: no scores leave the registers of the warp that makes them
//! (FlashAttention-2, Dao 2023).
//!
//! A cube has 64 or 128 queries of one head, 16 to a warp, and goes over the keys 64 at a time. Products are
//! `mma.m16n8k16`, whose layout of registers is NVIDIA's: with `g` the lane over four and `t` the rest, a unit has the rows
//! `g` and `g + 8` and the columns `2t` and `2t + 1` of each 8 of a result, which is how the next product wants its left
//! side.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::cubecl::cmma::MmaDefinition;
use burn_cubecl::cubecl::ir::features::MmaConfig;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::layout::empty;

/// Lanes of a warp.
const LANES: u32 = 32;

/// Queries of a warp.
const ROWS: usize = 16;

/// Warps of a cube. Twice as many read the keys half as often, which pays where there are queries for all of the device.
const WARPS: u32 = 4;

/// Queries from which on cubes have twice as many warps.
const MANY: usize = 1024;

/// Keys that a cube takes at a time.
const TILE: usize = 64;

/// The widest head whose keys and values have room in 48 KiB beside each other.
const WIDEST: usize = 160;

/// Below every score, and finite.
const NONE: f32 = -1.0e30;

/// Two numbers beside each other, as the products want them; zeros where there are none.
#[cube]
fn pair<F: Float, N: Size, H: Float, P: Size>(
    x: &Tensor<Vector<F, N>>,
    at: usize,
    there: bool,
    #[comptime] saturate: bool,
) -> Vector<H, P> {
    let mut found = Vector::<H, P>::new(H::cast_from(0.0f32));
    if there {
        let value = x[at / 2];
        found[0] = narrow::<F, H>(value[0], saturate);
        found[1] = narrow::<F, H>(value[1], saturate);
    }
    found
}

/// The nearest number of `H`; the largest instead of infinity if `saturate`.
#[cube]
fn narrow<F: Float, H: Float>(value: F, #[comptime] saturate: bool) -> H {
    if saturate {
        H::cast_from(clamp(f32::cast_from(value), -65504.0f32, 65504.0f32))
    } else {
        H::cast_from(value)
    }
}

/// `softmax(scale q k^T) v`, all of `[b, heads, rows, d]` with `d` beside each other, in pairs.
#[cube(launch_unchecked, address_type = "dynamic")]
fn flash<F: Float, H: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    y: &mut Tensor<Vector<F, N>>,
    scale: f32,
    #[comptime] d: usize,
    #[comptime] causal: bool,
    #[comptime] saturate: bool,
    #[comptime] warps: u32,
    #[define(F, H)] _dtypes: [StorageType; 2],
) {
    let size!(P) = comptime!(2usize);
    // steps of 16 along the head in `q k^T`, and of 16 keys in `weights v`
    let steps = comptime!(d.div_ceil(16));
    let key_row = comptime!(steps * 8 + 4);
    let value_row = comptime!(TILE / 2 + 4);
    // rows four words out of step: the 32 words that a warp reads at once lie in 32 banks
    let mut keys = SharedMemory::<Vector<H, P>>::new(comptime!(TILE * key_row));
    let mut values = SharedMemory::<Vector<H, P>>::new(comptime!(steps * 16 * value_row));

    let (queries, all_keys) = (q.shape(2), k.shape(2));
    let (image, head) = (CUBE_POS_Y as usize / q.shape(1), CUBE_POS_Y as usize % q.shape(1));
    let (lane, warp) = (UNIT_POS_X as usize, UNIT_POS_Y as usize);
    let unit = UNIT_POS as usize;
    let (g, t) = (lane / 4, lane % 4);
    let rows = comptime!(warps as usize * ROWS);
    let first = CUBE_POS_X as usize * rows;
    let upper = first + warp * ROWS + g;
    let lower = upper + 8;

    let q_origin = image * q.stride(0) + head * q.stride(1);
    let k_origin = image * k.stride(0) + head * k.stride(1);
    let v_origin = image * v.stride(0) + head * v.stride(1);

    let mut left = Array::<Vector<H, P>>::new(comptime!(4 * steps));
    #[unroll]
    for step in 0..steps {
        #[unroll]
        for part in 0..4usize {
            let column = step * 16 + comptime!(part / 2 * 8) + 2 * t;
            let mut row = upper;
            if comptime!(part % 2 == 1) {
                row = lower;
            }
            let there = row < queries && column < d;
            left[step * 4 + part] =
                pair::<F, N, H, P>(q, q_origin + row * q.stride(2) + column, there, saturate);
        }
    }

    let product = MmaDefinition::<H, H, f32>::new(16usize, 8usize, 16usize);
    let mut sum = Array::<Vector<f32, P>>::new(comptime!(4 * steps));
    #[unroll]
    for i in 0..comptime!(4 * steps) {
        sum[i] = Vector::new(0.0f32);
    }
    let mut upper_largest = NONE.runtime();
    let mut lower_largest = NONE.runtime();
    let mut upper_total = 0.0f32;
    let mut lower_total = 0.0f32;

    let mut end = all_keys;
    if causal {
        end = min(all_keys, first + rows);
    }
    for start in range_stepped(0, end, TILE) {
        sync_cube();
        for i in range_stepped(unit, comptime!(TILE * steps * 8), comptime!((LANES * warps) as usize)) {
            let (row, column) = (i / comptime!(steps * 8), i % comptime!(steps * 8));
            let there = start + row < all_keys && 2 * column < d;
            let at = k_origin + (start + row) * k.stride(2) + 2 * column;
            keys[row * key_row + column] = pair::<F, N, H, P>(k, at, there, saturate);
        }
        // values are turned: pairs of keys beside each other, which the product wants, and not pairs of columns
        for i in range_stepped(unit, comptime!(TILE / 2 * steps * 8), comptime!((LANES * warps) as usize)) {
            let (row, column) = (2 * (i % comptime!(TILE / 2)), i / comptime!(TILE / 2));
            let at = v_origin + (start + row) * v.stride(2) + 2 * column;
            let within = 2 * column < d;
            let one = pair::<F, N, H, P>(v, at, within && start + row < all_keys, saturate);
            let two = pair::<F, N, H, P>(v, at + v.stride(2), within && start + row + 1 < all_keys, saturate);
            let mut even = Vector::<H, P>::empty();
            even[0] = one[0];
            even[1] = two[0];
            let mut odd = Vector::<H, P>::empty();
            odd[0] = one[1];
            odd[1] = two[1];
            values[2 * column * value_row + row / 2] = even;
            values[(2 * column + 1) * value_row + row / 2] = odd;
        }
        sync_cube();

        let mut scores = Array::<Vector<f32, P>>::new(16usize);
        let mut upper_here = NONE.runtime();
        let mut lower_here = NONE.runtime();
        #[unroll]
        for tile in 0..8usize {
            let mut accumulated = Array::<Vector<f32, P>>::new(2usize);
            accumulated[0] = Vector::new(0.0f32);
            accumulated[1] = Vector::new(0.0f32);
            #[unroll]
            for step in 0..steps {
                let mut a = Array::<Vector<H, P>>::new(4usize);
                #[unroll]
                for part in 0..4usize {
                    a[part] = left[step * 4 + part];
                }
                let mut b = Array::<Vector<H, P>>::new(2usize);
                let at = (tile * 8 + g) * key_row + step * 8 + t;
                b[0] = keys[at];
                b[1] = keys[at + 4];
                let c = product.execute(&a, &b, &accumulated);
                accumulated[0] = c[0];
                accumulated[1] = c[1];
            }
            // an item of a vector that lies in an array cannot be written to
            let mut of_upper = accumulated[0] * Vector::new(scale);
            let mut of_lower = accumulated[1] * Vector::new(scale);
            #[unroll]
            for column in 0..2usize {
                let key = start + tile * 8 + 2 * t + column;
                if key >= all_keys || (causal && key > upper) {
                    of_upper[column] = NONE.runtime();
                }
                if key >= all_keys || (causal && key > lower) {
                    of_lower[column] = NONE.runtime();
                }
                upper_here = max(upper_here, of_upper[column]);
                lower_here = max(lower_here, of_lower[column]);
            }
            scores[tile * 2] = of_upper;
            scores[tile * 2 + 1] = of_lower;
        }
        // the four lanes of a row
        upper_here = max(upper_here, plane_shuffle_xor(upper_here, 1u32));
        upper_here = max(upper_here, plane_shuffle_xor(upper_here, 2u32));
        lower_here = max(lower_here, plane_shuffle_xor(lower_here, 1u32));
        lower_here = max(lower_here, plane_shuffle_xor(lower_here, 2u32));
        upper_here = max(upper_here, upper_largest);
        lower_here = max(lower_here, lower_largest);
        let upper_fade = (upper_largest - upper_here).exp();
        let lower_fade = (lower_largest - lower_here).exp();
        upper_largest = upper_here;
        lower_largest = lower_here;
        upper_total *= upper_fade;
        lower_total *= lower_fade;
        #[unroll]
        for tile in 0..8usize {
            let of_upper = (scores[tile * 2] - Vector::new(upper_here)).exp();
            let of_lower = (scores[tile * 2 + 1] - Vector::new(lower_here)).exp();
            upper_total += of_upper[0] + of_upper[1];
            lower_total += of_lower[0] + of_lower[1];
            scores[tile * 2] = of_upper;
            scores[tile * 2 + 1] = of_lower;
        }
        #[unroll]
        for i in 0..comptime!(2 * steps) {
            sum[i * 2] = sum[i * 2] * Vector::new(upper_fade);
            sum[i * 2 + 1] = sum[i * 2 + 1] * Vector::new(lower_fade);
        }
        #[unroll]
        for step in 0..comptime!(TILE / 16) {
            let mut a = Array::<Vector<H, P>>::new(4usize);
            #[unroll]
            for part in 0..4usize {
                a[part] = Vector::<H, P>::cast_from(scores[step * 4 + part]);
            }
            #[unroll]
            for i in 0..comptime!(2 * steps) {
                let mut b = Array::<Vector<H, P>>::new(2usize);
                let at = (i * 8 + g) * value_row + step * 8 + t;
                b[0] = values[at];
                b[1] = values[at + 4];
                let mut c = Array::<Vector<f32, P>>::new(2usize);
                c[0] = sum[i * 2];
                c[1] = sum[i * 2 + 1];
                let c = product.execute(&a, &b, &c);
                sum[i * 2] = c[0];
                sum[i * 2 + 1] = c[1];
            }
        }
    }

    upper_total += plane_shuffle_xor(upper_total, 1u32);
    upper_total += plane_shuffle_xor(upper_total, 2u32);
    lower_total += plane_shuffle_xor(lower_total, 1u32);
    lower_total += plane_shuffle_xor(lower_total, 2u32);
    let y_origin = image * y.stride(0) + head * y.stride(1);
    #[unroll]
    for i in 0..comptime!(2 * steps) {
        let column = i * 8 + 2 * t;
        if column < d {
            if upper < queries {
                let value = sum[i * 2] / Vector::new(upper_total);
                y[(y_origin + upper * y.stride(2) + column) / 2] = Vector::<F, N>::cast_from(value);
            }
            if lower < queries {
                let value = sum[i * 2 + 1] / Vector::new(lower_total);
                y[(y_origin + lower * y.stride(2) + column) / 2] = Vector::<F, N>::cast_from(value);
            }
        }
    }
}

/// Whether the device has what [`attention`] is made of.
fn is_supported<R: CubeRuntime>(x: &CubeTensor<R>, half: DType) -> bool {
    let properties = x.client.properties();
    let config = MmaConfig {
        a_type: half.into(),
        b_type: half.into(),
        cd_type: DType::F32.into(),
        m: 16,
        n: 8,
        k: 16,
    };
    let hardware = &properties.hardware;
    hardware.plane_size_min == LANES
        && hardware.plane_size_max == LANES
        && properties.features.matmul.mma.contains(&config)
}

/// Whether pairs of numbers can be read: the head lies without gaps, and every row of one begins at an even number.
fn in_pairs<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    let strides = x.meta.strides();
    strides[3] == 1 && strides[..3].iter().all(|stride| stride.is_multiple_of(2))
}

/// Attention; `None` where the device or the tensors are not made for it.
///
/// f32 is rounded to f16, whose mantissa is that of TF32, which other products of f32 are taken in; sums are in f32.
pub(super) fn attention<R: CubeRuntime>(
    q: &CubeTensor<R>,
    k: &CubeTensor<R>,
    v: &CubeTensor<R>,
    causal: bool,
) -> Option<CubeTensor<R>> {
    let [b, heads, queries, d] = q.shape().dims();
    let half = if q.dtype == DType::F32 { DType::F16 } else { q.dtype };
    if d % 2 != 0 || d > WIDEST || !is_supported(q, half) || ![q, k, v].into_iter().all(in_pairs) {
        return None;
    }
    let warps = if queries >= MANY { 2 * WARPS } else { WARPS };
    // heads of a token beside each other, as the layer behind wants them
    let mut y = empty(q, Shape::new([b, queries, heads, d]));
    y.meta.swap(1, 2);
    let address = [q, k, v, &y].map(|x| x.required_address_type()).into_iter().max()?;
    // SAFETY: rows and columns beyond the tensors are neither read nor written
    unsafe {
        flash::launch_unchecked::<R>(
            &q.client,
            CubeCount::Static(queries.div_ceil(ROWS * warps as usize) as u32, (b * heads) as u32, 1),
            CubeDim::new_2d(LANES, warps),
            address,
            2,
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            y.clone().into_tensor_arg(),
            (d as f32).powf(-0.5),
            d,
            causal,
            half != q.dtype,
            warps,
            [q.dtype.into(), half.into()],
        );
    }
    Some(y)
}
