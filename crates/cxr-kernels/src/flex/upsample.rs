//! Pictures of twice the size, and what their gradient is to the pixels they came from.

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{CHUNK, contiguous, filled, slice, tensor};
use super::half::{elements, tensor_of};

/// `[n, c, h, w] -> [n, c, 2h, 2w]`, f32 or half precision.
pub(super) fn forward(x: FlexTensor) -> FlexTensor {
    let [n, c, h, w] = x.shape().dims();
    let (x, shape) = (contiguous(x), Shape::new([n, c, 2 * h, 2 * w]));
    match x.dtype() {
        DType::BF16 => tensor_of(doubled::<bf16>(elements(&x), w), shape),
        DType::F16 => tensor_of(doubled::<f16>(elements(&x), w), shape),
        _ => tensor(doubled(slice(&x), w), shape),
    }
}

/// Every line of `w` elements twice, every element of it twice.
fn doubled<T: Copy + Send + Sync>(x: &[T], w: usize) -> Vec<T> {
    if x.is_empty() {
        return Vec::new();
    }
    // SAFETY: the pairs of lines cover the result, and all of each is written.
    unsafe {
        filled(4 * x.len(), |out| {
            let lines = out.par_chunks_mut(4 * w).zip(x.par_chunks(w)).with_min_len(CHUNK.div_ceil(4 * w));
            lines.for_each(|(out, line)| {
                let (upper, lower) = out.split_at_mut(2 * w);
                for (pair, x) in upper.chunks_exact_mut(2).zip(line) {
                    pair[0].write(*x);
                    pair[1].write(*x);
                }
                lower.copy_from_slice(upper);
            });
        })
    }
}

/// `[n, c, 2h, 2w] -> [n, c, h, w]`, f32: the sum of each four.
pub(super) fn backward(grad: FlexTensor) -> FlexTensor {
    let [n, c, height, width] = grad.shape().dims();
    let (grad, w) = (contiguous(grad), width / 2);
    let from = slice(&grad);
    let shape = Shape::new([n, c, height / 2, w]);
    if from.is_empty() {
        return tensor(Vec::new(), shape);
    }
    // SAFETY: the lines cover the result, and all of each is written.
    let sums = unsafe {
        filled(from.len() / 4, |out| {
            let lines = out.par_chunks_mut(w).zip(from.par_chunks(4 * w));
            lines.with_min_len(CHUNK.div_ceil(4 * w)).for_each(|(out, lines)| {
                let (upper, lower) = lines.split_at(2 * w);
                let pairs = upper.chunks_exact(2).zip(lower.chunks_exact(2));
                for (out, (upper, lower)) in out.iter_mut().zip(pairs) {
                    out.write((upper[0] + upper[1]) + (lower[0] + lower[1]));
                }
            });
        })
    };
    tensor(sums, shape)
}
