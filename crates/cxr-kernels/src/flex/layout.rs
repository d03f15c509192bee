//! Images to tokens and back: transposes, tile by tile.

use std::mem::MaybeUninit;

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{CHUNK, contiguous, filled, slice, tensor};
use super::fast_math::{Kernel, dispatch};
use super::half::{elements, tensor_of};

/// Side of a tile: a cache line of f32.
pub(super) const TILE: usize = 16;

/// `[n, c, h, w] -> [n, h * w, c]`.
pub(super) fn image_to_tokens(x: FlexTensor) -> FlexTensor {
    let [n, c, h, w] = x.shape().dims();
    transpose(x, [n, c, h * w], Shape::new([n, h * w, c]))
}

/// `[n, height * width, c] -> [n, c, height, width]`.
pub(super) fn tokens_to_image(x: FlexTensor, height: usize, width: usize) -> FlexTensor {
    let [n, tokens, c] = x.shape().dims();
    transpose(x, [n, tokens, c], Shape::new([n, c, height, width]))
}

/// `[n, rows, columns]` with the last two exchanged, as a tensor of `shape`; f32 or half precision.
fn transpose(x: FlexTensor, sizes: [usize; 3], shape: Shape) -> FlexTensor {
    let x = contiguous(x);
    match x.dtype() {
        DType::BF16 => tensor_of(transposed::<bf16>(elements(&x), sizes), shape),
        DType::F16 => tensor_of(transposed::<f16>(elements(&x), sizes), shape),
        _ => tensor(transposed(slice(&x), sizes), shape),
    }
}

fn transposed<T: Copy + Default + Send + Sync>(data: &[T], [_, rows, columns]: [usize; 3]) -> Vec<T> {
    let matrix = rows * columns;
    if data.is_empty() {
        return Vec::new();
    }
    // Whole bands of tiles of the output: `lines` of its lines, `rows` elements each.
    let lines = CHUNK.div_ceil(rows).next_multiple_of(TILE).min(columns);
    // SAFETY: the bands cover all elements, and `Band` writes each of its band.
    unsafe {
        filled(data.len(), |out| {
            out.par_chunks_mut(matrix).zip(data.par_chunks(matrix)).for_each(|(out, from)| {
                out.par_chunks_mut(lines * rows).enumerate().for_each(|(band, out)| {
                    dispatch(Band { from, out, rows, columns, first: band * lines });
                });
            });
        })
    }
}

/// Columns of `from` `[rows, columns]` from `first` on, as lines of `out`.
struct Band<'a, T> {
    from: &'a [T],
    out: &'a mut [MaybeUninit<T>],
    rows: usize,
    columns: usize,
    first: usize,
}

impl<T: Copy + Default> Kernel for Band<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, out, rows, columns, first } = self;
        let lines = out.len() / rows;
        for row in (0..rows).step_by(TILE) {
            for line in (0..lines).step_by(TILE) {
                if row + TILE <= rows && line + TILE <= lines {
                    let from = &from[row * columns + first + line..];
                    whole_tile(from, columns, &mut out[line * rows + row..], rows);
                    continue;
                }
                for l in line..(line + TILE).min(lines) {
                    for r in row..(row + TILE).min(rows) {
                        out[l * rows + r].write(from[r * columns + first + l]);
                    }
                }
            }
        }
    }
}

/// One tile by way of registers, so that memory is read and written in whole cache lines.
#[inline(always)]
fn whole_tile<T: Copy + Default>(from: &[T], from_step: usize, out: &mut [MaybeUninit<T>], out_step: usize) {
    assert!((TILE - 1) * from_step + TILE <= from.len() && (TILE - 1) * out_step + TILE <= out.len());
    // SAFETY: both tiles lie in their slices, as was just checked.
    unsafe { transpose_tile(from.as_ptr(), from_step, out.as_mut_ptr().cast(), out_step) };
}

/// Rows of [`TILE`] elements, `from_step` apart, as columns of `out`, whose rows are `out_step` apart.
///
/// # Safety
/// `from` must hold [`TILE`] such rows, and `out` be valid for writes of as many.
#[inline(always)]
pub(super) unsafe fn transpose_tile<T: Copy + Default>(
    from: *const T,
    from_step: usize,
    out: *mut T,
    out_step: usize,
) {
    let mut tile = [[T::default(); TILE]; TILE];
    // SAFETY: the caller's.
    unsafe {
        for (i, line) in tile.iter_mut().enumerate() {
            *line = from.add(i * from_step).cast::<[T; TILE]>().read();
        }
        let turned: [[T; TILE]; TILE] = std::array::from_fn(|j| std::array::from_fn(|i| tile[i][j]));
        for (j, line) in turned.into_iter().enumerate() {
            out.add(j * out_step).cast::<[T; TILE]>().write(line);
        }
    }
}
