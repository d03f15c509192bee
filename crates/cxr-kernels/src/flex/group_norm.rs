//! GroupNorm, alone or followed by SiLU, and its gradients.
//!
//! One task per sample and group, which stays in the cache between its passes. Sums are taken in f64, in an order
//! that depends on the shape alone: the number of threads does not change a bit of the results.

use std::mem::MaybeUninit;

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::blockwise::{Blocks, blockwise};
use super::elementwise::{Binary, CHUNK, Unary, contiguous, filled, slice, tensor, written};
use super::fast_math::{Kernel, dispatch, mul_add};
use super::moments::{Moments, moments, sums};
use super::silu::{Silu, SiluBackward};

/// The sizes of one normalization.
#[derive(Clone, Copy)]
struct Geometry {
    samples: usize,
    channels: usize,
    groups: usize,
    /// Elements of one channel of one sample.
    plane: usize,
}

impl Geometry {
    fn new(shape: &Shape, groups: usize) -> Self {
        let (samples, channels) = (shape[0], shape[1]);
        let plane = shape.num_elements() / (samples * channels).max(1);
        Self { samples, channels, groups, plane }
    }

    /// Channels of one group.
    fn width(&self) -> usize {
        self.channels / self.groups
    }

    /// Elements of one group of one sample.
    fn block(&self) -> usize {
        self.width() * self.plane
    }

    /// How many groups are worth handing to another core.
    fn blocks_per_task(&self) -> usize {
        CHUNK.div_ceil(self.block().max(1))
    }

    /// The channels of block `i`, blocks counted over samples and groups.
    fn channels_of(&self, i: usize) -> std::ops::Range<usize> {
        let first = i % self.groups * self.width();
        first..first + self.width()
    }
}

/// `x` `[n, c, ...]` in f32 or half precision, `gamma` and `beta` `[c]` in f32.
pub(super) fn forward(
    x: FlexTensor,
    gamma: FlexTensor,
    beta: FlexTensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> FlexTensor {
    let (shape, geometry) = (x.shape(), Geometry::new(&x.shape(), groups));
    let (gamma, beta) = (contiguous(gamma), contiguous(beta));
    let (gamma, beta) = (slice(&gamma), slice(&beta));
    let block = geometry.block();
    if shape.num_elements() == 0 {
        return x;
    }
    let blocks = Blocks { from: block, to: block, per_task: geometry.blocks_per_task() };
    // SAFETY: `Forward` writes all of its block.
    unsafe {
        blockwise(x, shape, blocks, |i, x, out| {
            let of = geometry.channels_of(i);
            let affine = Affine { gamma: &gamma[of.clone()], beta: &beta[of], plane: geometry.plane };
            dispatch(Forward { x, out, affine, eps, silu });
        })
    }
}

/// Scale and shift of the channels of one group.
#[derive(Clone, Copy)]
struct Affine<'a> {
    gamma: &'a [f32],
    beta: &'a [f32],
    plane: usize,
}

impl Affine<'_> {
    /// Scale and shift of `x - moments.centre()` that normalize and then apply gamma and beta, for channel `c` of
    /// the group.
    #[inline(always)]
    fn of(&self, c: usize, moments: Moments) -> (f32, f32) {
        let scale = self.gamma[c] as f64 * moments.inverse;
        (scale as f32, (self.beta[c] as f64 - moments.off_centre() * scale) as f32)
    }
}

struct Forward<'a> {
    x: &'a [f32],
    out: &'a mut [MaybeUninit<f32>],
    affine: Affine<'a>,
    eps: f64,
    silu: bool,
}

impl Kernel for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let moments = moments::<FMA>(self.x, self.eps);
        let (plane, centre) = (self.affine.plane, moments.centre());
        for (c, (x, out)) in self.x.chunks_exact(plane).zip(self.out.chunks_exact_mut(plane)).enumerate() {
            let (scale, shift) = self.affine.of(c, moments);
            if self.silu {
                for (x, out) in x.iter().zip(out) {
                    out.write(Silu::apply::<FMA>(mul_add::<FMA>(x - centre, scale, shift)));
                }
            } else {
                for (x, out) in x.iter().zip(out) {
                    out.write(mul_add::<FMA>(x - centre, scale, shift));
                }
            }
        }
    }
}

/// Gradients of [`forward`] with respect to `x`, `gamma`, `beta`.
pub(super) fn backward(
    x: FlexTensor,
    gamma: FlexTensor,
    beta: FlexTensor,
    grad: FlexTensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> [FlexTensor; 3] {
    let shape = x.shape();
    let geometry = Geometry::new(&shape, groups);
    let (x, grad) = (contiguous(x), contiguous(grad));
    let (gamma, beta) = (contiguous(gamma), contiguous(beta));
    let (x, grad, gamma, beta) = (slice(&x), slice(&grad), slice(&gamma), slice(&beta));
    assert_eq!(x.len(), grad.len(), "group_norm_backward: elements of x and of its gradient");
    let channels = Shape::new([geometry.channels]);
    if x.is_empty() {
        let zeros = || tensor(vec![0.0; geometry.channels], channels.clone());
        return [tensor(Vec::new(), shape), zeros(), zeros()];
    }
    let (block, width) = (geometry.block(), geometry.width());
    let mut partials = vec![[0.0_f64; 2]; geometry.samples * geometry.channels];
    // SAFETY: the blocks cover all elements, and `Backward` writes each of its block.
    let to_x = unsafe {
        filled(x.len(), |out| {
            let blocks = out.par_chunks_mut(block).zip(x.par_chunks(block)).zip(grad.par_chunks(block));
            let blocks = blocks.zip(partials.par_chunks_mut(width)).enumerate();
            blocks.with_min_len(geometry.blocks_per_task()).for_each(|(i, (((out, x), grad), partials))| {
                let of = geometry.channels_of(i);
                let affine = Affine { gamma: &gamma[of.clone()], beta: &beta[of], plane: geometry.plane };
                dispatch(Backward { x, grad, out, partials, affine, eps, silu });
            });
        })
    };
    let over_samples = |part: usize| -> Vec<f32> {
        let of_channel = |c| partials.iter().skip(c).step_by(geometry.channels).map(|p| p[part]).sum::<f64>();
        (0..geometry.channels).map(|c| of_channel(c) as f32).collect()
    };
    [tensor(to_x, shape), tensor(over_samples(0), channels.clone()), tensor(over_samples(1), channels)]
}

struct Backward<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [MaybeUninit<f32>],
    /// Per channel, the gradients of gamma and beta from this sample.
    partials: &'a mut [[f64; 2]],
    affine: Affine<'a>,
    eps: f64,
    silu: bool,
}

impl Kernel for Backward<'_> {
    type Output = ();

    /// With `h = (x - mean) * inverse` and `g` the gradient of `gamma * h + beta`, the gradient of `x` is
    /// `inverse * (gamma * g - mean(gamma * g) - h * mean(gamma * g * h))`: linear in `g` and `x` once the two
    /// means are known, which the first pass collects while it leaves `g` in `out`.
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let moments = moments::<FMA>(self.x, self.eps);
        let Moments { mean, inverse } = moments;
        let (plane, centre) = (self.affine.plane, moments.centre());
        let (mut along_one, mut along_h) = (0.0, 0.0);
        for (c, out) in self.out.chunks_exact_mut(plane).enumerate() {
            let of = c * plane..(c + 1) * plane;
            let (x, grad) = (&self.x[of.clone()], &self.grad[of]);
            if self.silu {
                let (scale, shift) = self.affine.of(c, moments);
                for ((x, grad), out) in x.iter().zip(grad).zip(&mut *out) {
                    out.write(SiluBackward::apply::<FMA>(mul_add::<FMA>(x - centre, scale, shift), *grad));
                }
            } else {
                for (grad, out) in grad.iter().zip(&mut *out) {
                    out.write(*grad);
                }
            }
            // SAFETY: the loops above have written all of `out`.
            let g = unsafe { written(out) };
            let [sum, with_x] = sums::<FMA>(g, x);
            let to_gamma = (with_x - mean * sum) * inverse;
            self.partials[c] = [to_gamma, sum];
            along_one += self.affine.gamma[c] as f64 * sum;
            along_h += self.affine.gamma[c] as f64 * to_gamma;
        }
        let count = self.x.len() as f64;
        let by_x = -inverse * inverse * along_h / count;
        let constant = (-inverse * along_one / count - by_x * moments.off_centre()) as f32;
        let by_x = by_x as f32;
        for (c, (out, x)) in self.out.chunks_exact_mut(plane).zip(self.x.chunks_exact(plane)).enumerate() {
            let by_g = (inverse * self.affine.gamma[c] as f64) as f32;
            // SAFETY: the first pass has written all of `out`.
            let out = unsafe { written(out) };
            for (out, x) in out.iter_mut().zip(x) {
                *out = mul_add::<FMA>(*out, by_g, mul_add::<FMA>(x - centre, by_x, constant));
            }
        }
    }
}
