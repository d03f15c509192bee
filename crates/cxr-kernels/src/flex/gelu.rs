//! Exact GELU, GEGLU, and their gradients.

use std::mem::MaybeUninit;

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::blockwise::{Blocks, blockwise};
use super::elementwise::{Binary, CHUNK, Unary, contiguous, filled, map, slice, tensor, zip};
use super::fast_math::{Kernel, dispatch, mul_add, normal};

/// `x * Phi(x)`; relative error below 1e-6, in the lower tail too. NaN at minus infinity, as the definition gives.
struct Gelu;

impl Unary for Gelu {
    #[inline(always)]
    fn apply<const FMA: bool>(x: f32) -> f32 {
        x * normal::<FMA>(x).0
    }
}

/// `grad * (Phi(x) + x * phi(x))`.
struct GeluBackward;

impl Binary for GeluBackward {
    #[inline(always)]
    fn apply<const FMA: bool>(x: f32, grad: f32) -> f32 {
        let (cdf, density) = normal::<FMA>(x);
        grad * mul_add::<FMA>(x, density, cdf)
    }
}

/// GELU of every element.
pub(super) fn forward(x: FlexTensor) -> FlexTensor {
    map::<Gelu>(x)
}

/// Gradient of [`forward`].
pub(super) fn backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
    zip::<GeluBackward>(x, grad)
}

/// Half of the last dimension, and the shape with that half instead.
fn halved(shape: &Shape) -> (usize, Shape) {
    let mut halved = shape.clone();
    let last = halved.num_dims() - 1;
    halved[last] /= 2;
    (halved[last], halved)
}

/// `[.., 2h] -> [.., h]`: the first half times the GELU of the second.
pub(super) fn geglu(x: FlexTensor) -> FlexTensor {
    let (half, shape) = halved(&x.shape());
    let half_or_one = half.max(1);
    let rows = CHUNK.div_ceil(half_or_one);
    let blocks = Blocks { from: rows * 2 * half_or_one, to: rows * half_or_one, per_task: 1 };
    // SAFETY: a block has whole rows, and `Geglu` writes each of them.
    unsafe { blockwise(x, shape, blocks, |_, x, out| dispatch(Geglu { x, out, half: half_or_one })) }
}

/// Rows of `2 * half` to rows of `half`.
struct Geglu<'a> {
    x: &'a [f32],
    out: &'a mut [MaybeUninit<f32>],
    half: usize,
}

impl Kernel for Geglu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (x, out) in self.x.chunks_exact(2 * self.half).zip(self.out.chunks_exact_mut(self.half)) {
            let (hidden, gate) = x.split_at(self.half);
            for ((hidden, gate), out) in hidden.iter().zip(gate).zip(out) {
                out.write(hidden * Gelu::apply::<FMA>(*gate));
            }
        }
    }
}

/// Gradient of [`geglu`] with respect to its `[.., 2h]` input.
pub(super) fn geglu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
    let (x, grad) = (contiguous(x), contiguous(grad));
    let (half, _) = halved(&x.shape());
    let (data, grad) = (slice(&x), slice(&grad));
    assert_eq!(data.len(), 2 * grad.len(), "geglu_backward: elements of x and of the gradient");
    if data.is_empty() {
        return x;
    }
    let rows = CHUNK.div_ceil(half);
    // SAFETY: the rows cover all elements, and `GegluBackward` writes each of its rows.
    let out = unsafe {
        filled(data.len(), |out| {
            let tasks = out.par_chunks_mut(rows * 2 * half).zip(data.par_chunks(rows * 2 * half));
            let tasks = tasks.zip(grad.par_chunks(rows * half));
            tasks.for_each(|((out, x), grad)| dispatch(GegluBackward { x, grad, out, half }));
        })
    };
    tensor(out, x.shape())
}

/// Rows of `2 * half` and of `half` to rows of `2 * half`.
struct GegluBackward<'a> {
    x: &'a [f32],
    grad: &'a [f32],
    out: &'a mut [MaybeUninit<f32>],
    half: usize,
}

impl Kernel for GegluBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let rows = self.x.chunks_exact(2 * self.half).zip(self.out.chunks_exact_mut(2 * self.half));
        for ((x, out), grad) in rows.zip(self.grad.chunks_exact(self.half)) {
            let (hidden, gate) = x.split_at(self.half);
            let (to_hidden, to_gate) = out.split_at_mut(self.half);
            // by index: of five iterators zipped the compiler makes no vectors
            let grad = &grad[..self.half];
            for i in 0..self.half {
                let (cdf, density) = normal::<FMA>(gate[i]);
                to_hidden[i].write(grad[i] * (gate[i] * cdf));
                to_gate[i].write(grad[i] * hidden[i] * mul_add::<FMA>(gate[i], density, cdf));
            }
        }
    }
}
