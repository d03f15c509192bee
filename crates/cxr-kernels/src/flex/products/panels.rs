//! The product on any processor: blocks of both operands become f32 in a buffer that stays in the cache, and are
//! multiplied there.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::super::elementwise::filled;
use super::super::gemm::{Matrix, product as f32_product};
use super::super::half::Half;
use super::linear::Order;
use super::{Target, Weights, blocks};

/// Depth of a block: with 384 columns, 384 KiB of a weight in f32.
const DEPTH: usize = 256;
/// Rows and columns are multiplied in multiples of this, padded with zeros: kernels for a single row, which sum in
/// another order, never run.
const UNIT: usize = 16;
/// Sums of a block: 384 KiB, to stay in the second-level cache beside the operands.
const SUMS: usize = 96 * 1024;

/// `x` `[rows, depth]` times `weight`, plus a bias for each column: `[rows, columns]`.
pub(super) fn product<T: Half>(
    x: &[T],
    weight: &[T],
    bias: Option<&[f32]>,
    order: Order,
    sizes: [usize; 3],
) -> Vec<T> {
    let [rows, columns, _] = sizes;
    let [height, width] = blocks([rows, columns], SUMS, [UNIT; 2], Weights::Columns);
    let starts = |count: usize, size: usize| (0..count).step_by(size).map(move |s| s..(s + size).min(count));
    let tasks: Vec<_> =
        starts(columns, width).flat_map(|c| starts(rows, height).map(move |r| (r, c.clone()))).collect();
    // SAFETY: the blocks cover all rows and columns, and each writes all of its own.
    unsafe {
        filled(rows * columns, |out| {
            let target = Target::<T>::new(out);
            tasks.into_par_iter().for_each_init(Buffers::default, |buffers, (r, c)| {
                buffers.multiply(x, weight, order, sizes, r.clone(), c.clone());
                for (row, sums) in r.zip(buffers.sums.chunks_exact_mut(buffers.step)) {
                    let sums = &mut sums[..c.len()];
                    if let Some(bias) = bias {
                        sums.iter_mut().zip(&bias[c.clone()]).for_each(|(sum, bias)| *sum += bias);
                    }
                    let place = target.at(row * columns + c.start);
                    T::narrow(sums, std::slice::from_raw_parts_mut(place.cast::<MaybeUninit<T>>(), c.len()));
                }
            });
        })
    }
}

/// What one thread works in.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    weight: Vec<f32>,
    sums: Vec<f32>,
    /// From one row of the sums to the next.
    step: usize,
}

impl Buffers {
    /// One block of the product, into `sums`.
    fn multiply<T: Half>(
        &mut self,
        x: &[T],
        weight: &[T],
        order: Order,
        [_, columns, depth]: [usize; 3],
        of_rows: Range<usize>,
        of_columns: Range<usize>,
    ) {
        let [height, width] = [&of_rows, &of_columns].map(|range| range.len().next_multiple_of(UNIT));
        self.step = width;
        self.sums.clear();
        self.sums.resize(height * width, 0.0);
        for start in (0..depth).step_by(DEPTH) {
            let of_depth = start..(start + DEPTH).min(depth);
            let lines = of_depth.len();
            widen_block(x, depth, of_rows.clone(), of_depth.clone(), lines, height, &mut self.x);
            let weights = match order {
                Order::Transposed => {
                    widen_block(weight, depth, of_columns.clone(), of_depth, lines, width, &mut self.weight);
                    Matrix::rows(&self.weight, lines).transposed()
                }
                Order::Plain => {
                    let lines = of_depth.len();
                    widen_block(
                        weight,
                        columns,
                        of_depth,
                        of_columns.clone(),
                        width,
                        lines,
                        &mut self.weight,
                    );
                    Matrix::rows(&self.weight, width)
                }
            };
            let rows = Matrix::rows(&self.x, lines);
            // SAFETY: the buffers hold `[height, lines]`, `[lines, width]` and `[height, width]`.
            unsafe {
                f32_product([height, width, lines], rows, weights, self.sums.as_mut_ptr(), width, true)
            };
        }
    }
}

/// Rows and columns of `from`, whose rows are `step` apart, into `to` `[height, width]`; zeros where nothing is.
fn widen_block<T: Half>(
    from: &[T],
    step: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    width: usize,
    height: usize,
    to: &mut Vec<f32>,
) {
    to.clear();
    to.resize(height * width, 0.0);
    for (row, to) in rows.zip(to.chunks_exact_mut(width)) {
        T::widen(&from[row * step..][columns.clone()], &mut to[..columns.len()]);
    }
}
