//! Channels of two pictures behind one another, and apart again.

use std::mem::MaybeUninit;

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{CHUNK, contiguous, filled, slice, tensor};
use super::half::{elements, tensor_of};

/// `[n, a, h, w]` and `[n, b, h, w]` as `[n, a + b, h, w]`.
pub(super) fn join(x: FlexTensor, y: FlexTensor) -> FlexTensor {
    let ([n, a, h, w], [_, b, _, _]): ([usize; 4], [usize; 4]) = (x.shape().dims(), y.shape().dims());
    let (x, y) = (contiguous(x), contiguous(y));
    let (shape, sizes) = (Shape::new([n, a + b, h, w]), [a * h * w, b * h * w]);
    match x.dtype() {
        DType::BF16 => tensor_of(joined::<bf16>([elements(&x), elements(&y)], sizes), shape),
        DType::F16 => tensor_of(joined::<f16>([elements(&x), elements(&y)], sizes), shape),
        _ => tensor(joined([slice(&x), slice(&y)], sizes), shape),
    }
}

/// The first `a` channels, and the others.
pub(super) fn split(x: FlexTensor, a: usize) -> [FlexTensor; 2] {
    let [n, c, h, w] = x.shape().dims();
    let x = contiguous(x);
    let parts = [(0, a), (a, c - a)];
    parts.map(|(from, count)| {
        let shape = Shape::new([n, count, h, w]);
        let (all, from, count) = (c * h * w, from * h * w, count * h * w);
        match x.dtype() {
            DType::BF16 => tensor_of(taken::<bf16>(elements(&x), all, from, count), shape),
            DType::F16 => tensor_of(taken::<f16>(elements(&x), all, from, count), shape),
            _ => tensor(taken(slice(&x), all, from, count), shape),
        }
    })
}

fn joined<T: Copy + Send + Sync>([x, y]: [&[T]; 2], [a, b]: [usize; 2]) -> Vec<T> {
    if x.is_empty() || y.is_empty() {
        return [x, y].concat();
    }
    // SAFETY: the pictures cover the result, and both parts of each are written.
    unsafe {
        filled(x.len() + y.len(), |out| {
            let pictures = out.par_chunks_mut(a + b).zip(x.par_chunks(a)).zip(y.par_chunks(b));
            pictures.for_each(|((out, x), y)| {
                let (first, second) = out.split_at_mut(a);
                copy(x, first);
                copy(y, second);
            });
        })
    }
}

/// `count` elements from `from` on of every picture of `all` elements.
fn taken<T: Copy + Send + Sync>(x: &[T], all: usize, from: usize, count: usize) -> Vec<T> {
    if x.is_empty() || count == 0 {
        return Vec::new();
    }
    // SAFETY: the pictures cover the result, and each is written.
    unsafe {
        filled(x.len() / all * count, |out| {
            let pictures = out.par_chunks_mut(count).zip(x.par_chunks(all));
            pictures.for_each(|(out, x)| copy(&x[from..from + count], out));
        })
    }
}

fn copy<T: Copy + Send + Sync>(from: &[T], to: &mut [MaybeUninit<T>]) {
    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
    chunks.for_each(|(to, from)| {
        for (to, from) in to.iter_mut().zip(from) {
            to.write(*from);
        }
    });
}
