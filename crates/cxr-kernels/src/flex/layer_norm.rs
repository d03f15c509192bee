//! LayerNorm over the last dimension, and its gradients.
//!
//! Rows are shared out by a number that depends on the shape alone, and sums over rows are taken in that order:
//! the number of threads does not change a bit of the results.

use std::mem::MaybeUninit;

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::blockwise::{Blocks, blockwise};
use super::elementwise::{CHUNK, contiguous, filled, slice, tensor, written};
use super::fast_math::{Kernel, dispatch, mul_add};
use super::moments::{Moments, moments, sums};

/// Largest number of partial sums of the gradients of gamma and beta.
const PARTIAL_SUMS: usize = 32;

/// `x` `[.., d]` in f32 or half precision, `gamma` and `beta` `[d]` in f32.
pub(super) fn forward(x: FlexTensor, gamma: FlexTensor, beta: FlexTensor, eps: f64) -> FlexTensor {
    let (gamma, beta, shape) = (contiguous(gamma), contiguous(beta), x.shape());
    let (gamma, beta) = (slice(&gamma), slice(&beta));
    if shape.num_elements() == 0 {
        return x;
    }
    let rows = CHUNK.div_ceil(gamma.len()) * gamma.len();
    let blocks = Blocks { from: rows, to: rows, per_task: 1 };
    // SAFETY: a block has whole rows, and `Forward` writes each of them.
    unsafe { blockwise(x, shape, blocks, |_, x, out| dispatch(Forward { x, out, gamma, beta, eps })) }
}

struct Forward<'a> {
    x: &'a [f32],
    out: &'a mut [MaybeUninit<f32>],
    gamma: &'a [f32],
    beta: &'a [f32],
    eps: f64,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let width = self.gamma.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let moments = moments::<FMA>(x, self.eps);
            let centre = moments.centre();
            let (scale, shift) = normalizing(moments);
            for ((x, out), (gamma, beta)) in x.iter().zip(out).zip(self.gamma.iter().zip(self.beta)) {
                out.write(mul_add::<FMA>(mul_add::<FMA>(x - centre, scale, shift), *gamma, *beta));
            }
        }
    }
}

/// Scale and shift of `x - moments.centre()` that give zero mean and unit variance.
#[inline(always)]
fn normalizing(moments: Moments) -> (f32, f32) {
    (moments.inverse as f32, (-moments.off_centre() * moments.inverse) as f32)
}

/// Gradients of [`forward`] with respect to `x`, `gamma`, `beta`.
pub(super) fn backward(x: FlexTensor, gamma: FlexTensor, grad: FlexTensor, eps: f64) -> [FlexTensor; 3] {
    let (x, gamma, grad) = (contiguous(x), contiguous(gamma), contiguous(grad));
    let shape = x.shape();
    let (x, gamma, grad) = (slice(&x), slice(&gamma), slice(&grad));
    let width = gamma.len();
    assert_eq!(x.len(), grad.len(), "layer_norm_backward: elements of x and of its gradient");
    if x.is_empty() {
        let zeros = || tensor(vec![0.0; width], Shape::new([width]));
        return [tensor(Vec::new(), shape), zeros(), zeros()];
    }
    let rows = CHUNK.div_ceil(width).max((x.len() / width).div_ceil(PARTIAL_SUMS));
    let chunk = rows * width;
    let mut partials = vec![0.0_f64; x.len().div_ceil(chunk) * 2 * width];
    // SAFETY: the rows cover all elements, and `Backward` writes each of its rows.
    let to_x = unsafe {
        filled(x.len(), |out| {
            let tasks = out.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).zip(grad.par_chunks(chunk));
            tasks.zip(partials.par_chunks_mut(2 * width)).for_each(|(((out, x), grad), partials)| {
                dispatch(Backward { x, grad, out, gamma, partials, eps });
            });
        })
    };
    let mut total = vec![0.0_f64; 2 * width];
    for partial in partials.chunks_exact(2 * width) {
        total.iter_mut().zip(partial).for_each(|(total, partial)| *total += partial);
    }
    let half = |range: std::ops::Range<usize>| {
        tensor(total[range].iter().map(|x| *x as f32).collect(), Shape::new([width]))
    };
    [tensor(to_x, shape), half(0..width), half(width..2 * width)]
}

struct Backward<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [MaybeUninit<f32>],
    gamma: &'a [f32],
    /// Gradients of gamma, then of beta, from these rows.
    partials: &'a mut [f64],
    eps: f64,
}

impl Kernel for Backward<'_> {
    type Output = ();

    /// With `h` the normalized row and `g = gamma * grad`: `inverse * (g - mean(g) - h * mean(g * h))`.
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let width = self.gamma.len();
        let (to_gamma, to_beta) = self.partials.split_at_mut(width);
        let rows = self.x.chunks_exact(width).zip(self.grad.chunks_exact(width));
        for ((x, grad), out) in rows.zip(self.out.chunks_exact_mut(width)) {
            let moments = moments::<FMA>(x, self.eps);
            let Moments { mean, inverse } = moments;
            let centre = moments.centre();
            let (scale, shift) = normalizing(moments);
            for (((x, grad), (to_gamma, to_beta)), (out, gamma)) in x
                .iter()
                .zip(grad)
                .zip(to_gamma.iter_mut().zip(&mut *to_beta))
                .zip(out.iter_mut().zip(self.gamma))
            {
                *to_gamma += (grad * mul_add::<FMA>(x - centre, scale, shift)) as f64;
                *to_beta += *grad as f64;
                out.write(grad * gamma);
            }
            // SAFETY: the loop above has written all of `out`.
            let out = unsafe { written(out) };
            let [sum, with_x] = sums::<FMA>(out, x);
            let by_x = -inverse * inverse * inverse * (with_x - mean * sum) / width as f64;
            let constant = (-inverse * sum / width as f64 - by_x * moments.off_centre()) as f32;
            let by_x = by_x as f32;
            for (out, x) in out.iter_mut().zip(x) {
                *out = mul_add::<FMA>(*out, scale, mul_add::<FMA>(x - centre, by_x, constant));
            }
        }
    }
}
