//! Kernels that go over a tensor block by block, in f32: a block of half precision is converted in the cache, on its way
//! in and on its way out, and the whole tensor never exists in f32.

use std::mem::MaybeUninit;

use burn::tensor::{DType, Shape, bf16, f16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{contiguous, filled, slice, tensor, written};
use super::half::{Half, elements, tensor_of};

/// How a tensor and the result are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    /// Elements of a block of the tensor.
    pub(super) from: usize,
    /// Elements of a block of the result.
    pub(super) to: usize,
    /// Blocks that are worth handing to another core.
    pub(super) per_task: usize,
}

/// `kernel` of the number, and the elements, of every block of `x`, into that block of a result of `shape` with the
/// dtype of `x`: f32 or half precision. The last block is the shorter one.
///
/// # Safety
/// `kernel` must write all of the block that it is given.
pub(super) unsafe fn blockwise(
    x: FlexTensor,
    shape: Shape,
    blocks: Blocks,
    kernel: impl Fn(usize, &[f32], &mut [MaybeUninit<f32>]) + Sync,
) -> FlexTensor {
    let x = contiguous(x);
    match x.dtype() {
        // SAFETY: the caller's word.
        DType::BF16 => tensor_of(unsafe { converted::<bf16>(elements(&x), &shape, blocks, kernel) }, shape),
        // SAFETY: the caller's word.
        DType::F16 => tensor_of(unsafe { converted::<f16>(elements(&x), &shape, blocks, kernel) }, shape),
        _ => {
            let data = slice(&x);
            // SAFETY: the blocks cover all elements, and the kernel writes all of each.
            let out = unsafe {
                filled(shape.num_elements(), |out| {
                    let tasks = out.par_chunks_mut(blocks.to).zip(data.par_chunks(blocks.from)).enumerate();
                    tasks.with_min_len(blocks.per_task).for_each(|(i, (out, x))| kernel(i, x, out));
                })
            };
            tensor(out, shape)
        }
    }
}

/// # Safety
/// As [`blockwise`].
unsafe fn converted<T: Half>(
    data: &[T],
    shape: &Shape,
    blocks: Blocks,
    kernel: impl Fn(usize, &[f32], &mut [MaybeUninit<f32>]) + Sync,
) -> Vec<T> {
    // SAFETY: the blocks cover all elements, and the kernel writes all of each, which is then converted.
    unsafe {
        filled(shape.num_elements(), |out| {
            let tasks = out.par_chunks_mut(blocks.to).zip(data.par_chunks(blocks.from)).enumerate();
            let buffers = || (vec![0.0_f32; blocks.from], vec![MaybeUninit::<f32>::uninit(); blocks.to]);
            tasks.with_min_len(blocks.per_task).for_each_init(buffers, |(wide, result), (i, (out, x))| {
                let (wide, result) = (&mut wide[..x.len()], &mut result[..out.len()]);
                T::widen(x, wide);
                kernel(i, wide, result);
                T::narrow(written(result), out);
            });
        })
    }
}
