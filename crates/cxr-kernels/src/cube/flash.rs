//! Attention in one pass on the matrix units: no scores leave the registers of the warp that makes them
//! (FlashAttention-2, Dao 2023).
//!
//! A cube has 64 or 128 queries of one head, 16 to a warp, and goes over the keys 64 at a time. Products are
//! `mma.m16n8k16`, whose layout of registers is NVIDIA's: with `g` the lane over four and `t` the rest, a unit has the rows
//! `g` and `g + 8` and the columns `2t` and `2t + 1` of each 8 of a result, which is how the next product wants its left
//! side.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::cubecl::cmma::MmaDefinition;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::layout::empty;
use super::mma::{self, LANES};

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

/// The exponential by the device's own instruction, whose error is far below what weights are rounded to.
#[cube(fast_math = FastMath::ReducedPrecision | FastMath::NotNaN | FastMath::NotInf)]
fn quick_exp<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    x.exp()
}

/// Four numbers beside each other as two words of half precision; zeros where there are none.
#[cube]
fn four<W: Numeric, N: Size, H: Float, P: Size>(
    x: &Tensor<Vector<W, N>>,
    at: usize,
    there: bool,
    #[comptime] narrow: bool,
) -> Vector<u32, P> {
    let mut found = Vector::<u32, P>::new(0u32);
    if there {
        let value = x[at / 4];
        #[unroll]
        for word in 0..2usize {
            if narrow {
                let mut both = Vector::<H, P>::empty();
                both[0] = nearest::<W, H>(value[comptime!(2 * word)]);
                both[1] = nearest::<W, H>(value[comptime!(2 * word + 1)]);
                found[word] = u32::reinterpret(both);
            } else {
                found[word] = u32::cast_from(value[word]);
            }
        }
    }
    found
}

/// The nearest number of half precision, the largest instead of infinity.
#[cube]
fn nearest<W: Numeric, H: Float>(value: W) -> H {
    H::cast_from(clamp(f32::cast_from(value), -65504.0f32, 65504.0f32))
}

/// `softmax(scale q k^T) v`, all of `[b, heads, rows, d]` with `d` beside each other, four numbers of `q`, `k` and `v` at a time:
/// two words of half precision (`W` is `u32`), or f32 to be made `narrow`. `y` is in pairs.
///
/// In which order the terms of a product are taken is free, as long as it is one for both sides: a unit takes words that
/// lie beside each other, two at once from shared memory.
#[cube(launch_unchecked, address_type = "dynamic")]
fn flash<W: Numeric, H: Float, F: Float, N: Size, P: Size>(
    q: &Tensor<Vector<W, N>>,
    k: &Tensor<Vector<W, N>>,
    v: &Tensor<Vector<W, N>>,
    y: &mut Tensor<Vector<F, P>>,
    scale: f32,
    #[comptime] d: usize,
    #[comptime] causal: bool,
    #[comptime] narrow: bool,
    #[comptime] warps: u32,
    #[define(W, H, F)] _dtypes: [StorageType; 3],
) {
    // steps of 16 along the head in `q k^T`, and columns of the result, eight at a time
    let steps = comptime!(d.div_ceil(16));
    let across = comptime!(d.div_ceil(8));
    // rows of an odd number of fours: what half a warp reads at once lies in banks of its own
    let key_row = comptime!(4 * (steps | 1));
    let value_row = comptime!(4 * ((TILE / 16) | 1));
    let mut keys = SharedMemory::<Vector<u32, P>>::new(comptime!(TILE * key_row));
    let mut values = SharedMemory::<Vector<u32, P>>::new(comptime!(steps * 16 * value_row));

    let (queries, all_keys) = (q.shape(2), k.shape(2));
    let (image, head) = (CUBE_POS_Y as usize / q.shape(1), CUBE_POS_Y as usize % q.shape(1));
    let (lane, warp) = (UNIT_POS_X as usize, UNIT_POS_Y as usize);
    let unit = UNIT_POS as usize;
    let units = comptime!((LANES * warps) as usize);
    let (g, t) = (lane / 4, lane % 4);
    let rows = comptime!(warps as usize * ROWS);
    let first = CUBE_POS_X as usize * rows;
    let upper = first + warp * ROWS + g;
    let lower = upper + 8;

    let q_origin = image * q.stride(0) + head * q.stride(1);
    let k_origin = image * k.stride(0) + head * k.stride(1);
    let v_origin = image * v.stride(0) + head * v.stride(1);

    let mut left = Array::<Vector<u32, P>>::new(comptime!(2 * steps));
    #[unroll]
    for step in 0..steps {
        let column = step * 16 + 4 * t;
        let (of_upper, of_lower) = (upper < queries && column < d, lower < queries && column < d);
        left[step * 2] = four::<W, N, H, P>(q, q_origin + upper * q.stride(2) + column, of_upper, narrow);
        left[step * 2 + 1] = four::<W, N, H, P>(q, q_origin + lower * q.stride(2) + column, of_lower, narrow);
    }

    let product = MmaDefinition::<H, H, f32>::new(16usize, 8usize, 16usize);
    let mut sum = Array::<Vector<f32, P>>::new(comptime!(2 * across));
    #[unroll]
    for i in 0..comptime!(2 * across) {
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
        for i in range_stepped(unit, comptime!(TILE * steps * 4), units) {
            let (row, column) = (i / comptime!(steps * 4), i % comptime!(steps * 4));
            let there = start + row < all_keys && 4 * column < d;
            let at = k_origin + (start + row) * k.stride(2) + 4 * column;
            keys[row * key_row + column] = four::<W, N, H, P>(k, at, there, narrow);
        }
        // values are turned: pairs of keys beside each other, which the product wants, and not pairs of columns
        for i in range_stepped(unit, comptime!(TILE / 4 * steps * 4), units) {
            let (group, column) = (i % comptime!(TILE / 4), i / comptime!(TILE / 4));
            // keys 2t, 2t + 1, 2t + 8 and 2t + 9 of 16
            let row = start + group / 4 * 16 + group % 4 * 2;
            let within = 4 * column < d;
            let at = v_origin + row * v.stride(2) + 4 * column;
            let mut of_key = Array::<Vector<u32, P>>::new(4usize);
            #[unroll]
            for key in 0..4usize {
                let below = comptime!(key / 2 * 8 + key % 2);
                let there = within && row + below < all_keys;
                of_key[key] = four::<W, N, H, P>(v, at + below * v.stride(2), there, narrow);
            }
            #[unroll]
            for word in 0..2usize {
                let mut even = Vector::<u32, P>::empty();
                let mut odd = Vector::<u32, P>::empty();
                #[unroll]
                for pair in 0..2usize {
                    let one = of_key[comptime!(2 * pair)][word];
                    let two = of_key[comptime!(2 * pair + 1)][word];
                    even[pair] = (one & 0xffffu32) | (two << 16u32);
                    odd[pair] = (one >> 16u32) | (two & 0xffff0000u32);
                }
                values[(4 * column + comptime!(2 * word)) * value_row + group] = even;
                values[(4 * column + comptime!(2 * word + 1)) * value_row + group] = odd;
            }
        }
        sync_cube();

        let mut scores = Array::<Vector<f32, P>>::new(16usize);
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
                    let words = left[step * 2 + comptime!(part % 2)];
                    a[part] = Vector::<H, P>::reinterpret(words[comptime!(part / 2)]);
                }
                let words = keys[(tile * 8 + g) * key_row + step * 4 + t];
                let mut b = Array::<Vector<H, P>>::new(2usize);
                b[0] = Vector::<H, P>::reinterpret(words[0]);
                b[1] = Vector::<H, P>::reinterpret(words[1]);
                let c = product.execute(&a, &b, &accumulated);
                accumulated[0] = c[0];
                accumulated[1] = c[1];
            }
            scores[tile * 2] = accumulated[0];
            scores[tile * 2 + 1] = accumulated[1];
        }
        if start + TILE > all_keys || (causal && start + TILE > first) {
            #[unroll]
            for tile in 0..8usize {
                // an item of a vector that lies in an array cannot be written to
                let mut of_upper = scores[tile * 2];
                let mut of_lower = scores[tile * 2 + 1];
                #[unroll]
                for column in 0..2usize {
                    let key = start + tile * 8 + 2 * t + column;
                    if key >= all_keys || (causal && key > upper) {
                        of_upper[column] = NONE.runtime();
                    }
                    if key >= all_keys || (causal && key > lower) {
                        of_lower[column] = NONE.runtime();
                    }
                }
                scores[tile * 2] = of_upper;
                scores[tile * 2 + 1] = of_lower;
            }
        }
        let mut upper_here = NONE.runtime();
        let mut lower_here = NONE.runtime();
        #[unroll]
        for tile in 0..8usize {
            let (of_upper, of_lower) = (scores[tile * 2], scores[tile * 2 + 1]);
            upper_here = max(upper_here, max(of_upper[0], of_upper[1]));
            lower_here = max(lower_here, max(of_lower[0], of_lower[1]));
        }
        // the four lanes of a row
        upper_here = max(upper_here, plane_shuffle_xor(upper_here, 1u32));
        upper_here = max(upper_here, plane_shuffle_xor(upper_here, 2u32));
        lower_here = max(lower_here, plane_shuffle_xor(lower_here, 1u32));
        lower_here = max(lower_here, plane_shuffle_xor(lower_here, 2u32));
        upper_here = max(upper_here, upper_largest);
        lower_here = max(lower_here, lower_largest);
        // of scores before they are scaled
        let mut fades = Vector::<f32, P>::empty();
        fades[0] = (upper_largest - upper_here) * scale;
        fades[1] = (lower_largest - lower_here) * scale;
        let fades = quick_exp::<P>(fades);
        let (upper_fade, lower_fade) = (fades[0], fades[1]);
        upper_largest = upper_here;
        lower_largest = lower_here;
        upper_total *= upper_fade;
        lower_total *= lower_fade;
        let (upper_shift, lower_shift) = (upper_here * scale, lower_here * scale);
        #[unroll]
        for tile in 0..8usize {
            let of_upper = quick_exp::<P>(scores[tile * 2] * Vector::new(scale) - Vector::new(upper_shift));
            let of_lower =
                quick_exp::<P>(scores[tile * 2 + 1] * Vector::new(scale) - Vector::new(lower_shift));
            upper_total += of_upper[0] + of_upper[1];
            lower_total += of_lower[0] + of_lower[1];
            scores[tile * 2] = of_upper;
            scores[tile * 2 + 1] = of_lower;
        }
        #[unroll]
        for i in 0..across {
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
            for i in 0..across {
                let words = values[(i * 8 + g) * value_row + step * 4 + t];
                let mut b = Array::<Vector<H, P>>::new(2usize);
                b[0] = Vector::<H, P>::reinterpret(words[0]);
                b[1] = Vector::<H, P>::reinterpret(words[1]);
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
    for i in 0..across {
        let column = i * 8 + 2 * t;
        if column < d {
            if upper < queries {
                let value = sum[i * 2] / Vector::new(upper_total);
                y[(y_origin + upper * y.stride(2) + column) / 2] = Vector::<F, P>::cast_from(value);
            }
            if lower < queries {
                let value = sum[i * 2 + 1] / Vector::new(lower_total);
                y[(y_origin + lower * y.stride(2) + column) / 2] = Vector::<F, P>::cast_from(value);
            }
        }
    }
}

/// Whether four numbers can be read at once: the head lies without gaps, and every row of one begins at a multiple of four.
fn in_fours<R: CubeRuntime>(x: &CubeTensor<R>) -> bool {
    let strides = x.meta.strides();
    strides[3] == 1 && strides[..3].iter().all(|stride| stride.is_multiple_of(4))
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
    let narrow = q.dtype == DType::F32;
    let half = if narrow { DType::F16 } else { q.dtype };
    if d % 4 != 0 || d > WIDEST || !mma::is_there(q, half.into(), 16) || ![q, k, v].into_iter().all(in_fours)
    {
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
            if narrow { 4 } else { 2 },
            2,
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            y.clone().into_tensor_arg(),
            (d as f32).powf(-0.5),
            d,
            causal,
            narrow,
            warps,
            [if narrow { q.dtype } else { DType::U32 }.into(), half.into(), q.dtype.into()],
        );
    }
    Some(y)
}
