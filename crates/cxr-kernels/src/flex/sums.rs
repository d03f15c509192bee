//! Sums of two tensors, and of a gradient over all but its channels, on all cores.

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{Binary, CHUNK, contiguous, is_exclusive, slice, tensor, zip};
use super::fast_math::{Kernel, dispatch};
use super::moments::sum;

struct Add;

impl Binary for Add {
    #[inline(always)]
    fn apply<const FMA: bool>(x: f32, y: f32) -> f32 {
        x + y
    }
}

/// `x + y`, of one shape; into the buffer of either, where nobody else holds it.
pub(super) fn add(x: FlexTensor, mut y: FlexTensor) -> FlexTensor {
    if is_exclusive(&mut y) { zip::<Add>(x, y) } else { zip::<Add>(y, x) }
}

/// `[n, c, ...]` to `[c]`, f32: each sum in an order that depends on the shape alone.
pub(super) fn over_all_but_channels(x: FlexTensor) -> FlexTensor {
    let shape = x.shape();
    let (n, channels) = (shape[0], shape[1]);
    let inner = shape.num_elements() / (n * channels).max(1);
    let x = contiguous(x);
    let data = slice(&x);
    let sums = if inner == 1 { of_columns(data, channels) } else { of_planes(data, n, channels, inner) };
    tensor(sums, Shape::new([channels]))
}

/// Of a matrix with `channels` columns: blocks of rows side by side, then the blocks one after the other.
fn of_columns(data: &[f32], channels: usize) -> Vec<f32> {
    let rows = CHUNK.div_ceil(channels.max(1));
    let blocks: Vec<Vec<f32>> = data
        .par_chunks((rows * channels).max(1))
        .map(|rows| {
            let mut sums = vec![0.0; channels];
            dispatch(Columns { rows, sums: &mut sums });
            sums
        })
        .collect();
    let mut total = vec![0.0_f64; channels];
    for block in blocks {
        total.iter_mut().zip(block).for_each(|(total, sum)| *total += f64::from(sum));
    }
    total.into_iter().map(|sum| sum as f32).collect()
}

struct Columns<'a> {
    rows: &'a [f32],
    sums: &'a mut [f32],
}

impl Kernel for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in self.rows.chunks_exact(self.sums.len()) {
            for (sum, x) in self.sums.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }
}

/// Of `n` pictures of `channels` planes with `inner` pixels: a channel a task.
fn of_planes(data: &[f32], n: usize, channels: usize, inner: usize) -> Vec<f32> {
    let least = CHUNK.div_ceil((n * inner).max(1));
    (0..channels)
        .into_par_iter()
        .with_min_len(least)
        .map(|channel| {
            let planes = (0..n).map(|i| &data[(i * channels + channel) * inner..][..inner]);
            planes.map(|plane| dispatch(Sum(plane))).sum::<f64>() as f32
        })
        .collect()
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        sum(self.0)
    }
}
