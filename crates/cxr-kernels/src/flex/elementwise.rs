//! Element-wise functions over whole tensors: contiguous, parallel, in place where nobody else holds the buffer.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use burn::tensor::{DType, Shape, TensorData, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::blockwise::{Blocks, blockwise};
use super::fast_math::{Kernel, dispatch};
use super::half::{Half, elements, tensor_of};

/// Elements of one task: enough work to outweigh handing it to another core.
pub(super) const CHUNK: usize = 16 * 1024;

/// The same elements without gaps, copied if need be.
pub(super) fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}

/// The elements of a contiguous f32 tensor.
pub(super) fn slice(x: &FlexTensor) -> &[f32] {
    let start = x.layout().start_offset();
    &x.storage::<f32>()[start..start + x.layout().num_elements()]
}

/// The elements of `x` to write over, if it is contiguous, fills its buffer, and nobody else holds that.
fn exclusive(x: &mut FlexTensor) -> Option<&mut [f32]> {
    let elements = x.layout().num_elements();
    let whole = x.is_contiguous() && x.layout().start_offset() == 0;
    x.try_storage_mut::<f32>().filter(|data| whole && data.len() == elements)
}

/// Whether the f32 elements of `x` can be written over: it is contiguous, fills its buffer, and nobody else holds that.
pub(super) fn is_exclusive(x: &mut FlexTensor) -> bool {
    x.dtype() == DType::F32 && exclusive(x).is_some()
}

/// A vector whose elements `fill` writes: memory that is handed out uninitialized, to be touched once.
///
/// # Safety
/// `fill` must write every element.
pub(super) unsafe fn filled<T>(len: usize, fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut data = Vec::with_capacity(len);
    fill(&mut data.spare_capacity_mut()[..len]);
    // SAFETY: `fill` has written all of them, says the caller.
    unsafe { data.set_len(len) };
    data
}

/// Elements that have been written, as what they are.
///
/// # Safety
/// Every element must have been written.
#[inline(always)]
pub(super) unsafe fn written(data: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    // SAFETY: `MaybeUninit<f32>` lies in memory as f32 does, and the caller says that all are initialized.
    unsafe { &mut *(std::ptr::from_mut(data) as *mut [f32]) }
}

pub(super) fn tensor(data: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(data, shape))
}

/// A function of one number.
pub(super) trait Unary: Send + Sync {
    /// Branch-free and `#[inline(always)]`.
    fn apply<const FMA: bool>(x: f32) -> f32;
}

/// A function of two numbers.
pub(super) trait Binary: Send + Sync {
    /// Branch-free and `#[inline(always)]`.
    fn apply<const FMA: bool>(x: f32, y: f32) -> f32;
}

/// `F` over `from`, into `to`.
pub(super) struct Map<'a, F>(
    pub(super) &'a [f32],
    pub(super) &'a mut [MaybeUninit<f32>],
    pub(super) PhantomData<F>,
);

impl<F: Unary> Kernel for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (x, out) in self.0.iter().zip(self.1) {
            out.write(F::apply::<FMA>(*x));
        }
    }
}

/// `F` over a slice, in place.
struct MapInPlace<'a, F>(&'a mut [f32], PhantomData<F>);

impl<F: Unary> Kernel for MapInPlace<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for x in self.0 {
            *x = F::apply::<FMA>(*x);
        }
    }
}

/// `F` over the first two, into the third.
struct Zip<'a, F>(&'a [f32], &'a [f32], &'a mut [MaybeUninit<f32>], PhantomData<F>);

impl<F: Binary> Kernel for Zip<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for ((x, y), out) in self.0.iter().zip(self.1).zip(self.2) {
            out.write(F::apply::<FMA>(*x, *y));
        }
    }
}

/// `F` over both, into the second.
struct ZipInPlace<'a, F>(&'a [f32], &'a mut [f32], PhantomData<F>);

impl<F: Binary> Kernel for ZipInPlace<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (x, y) in self.0.iter().zip(self.1) {
            *y = F::apply::<FMA>(*x, *y);
        }
    }
}

/// `F` of every element of a tensor of f32 or half precision.
pub(super) fn map<F: Unary>(x: FlexTensor) -> FlexTensor {
    let mut x = contiguous(x);
    if x.dtype() == DType::F32
        && let Some(data) = exclusive(&mut x)
    {
        data.par_chunks_mut(CHUNK).for_each(|data| dispatch(MapInPlace::<F>(data, PhantomData)));
        return x;
    }
    let (shape, blocks) = (x.shape(), Blocks { from: CHUNK, to: CHUNK, per_task: 1 });
    // SAFETY: `Map` writes every element.
    unsafe { blockwise(x, shape, blocks, |_, x, out| dispatch(Map::<F>(x, out, PhantomData))) }
}

/// `F` of the elements of two tensors of one shape and dtype, f32 or half precision; the second's buffer is the one to be
/// used again.
pub(super) fn zip<F: Binary>(x: FlexTensor, y: FlexTensor) -> FlexTensor {
    let (x, mut y) = (contiguous(x), contiguous(y));
    match x.dtype() {
        DType::BF16 => return tensor_of(zip_half::<bf16, F>(elements(&x), elements(&y)), x.shape()),
        DType::F16 => return tensor_of(zip_half::<f16, F>(elements(&x), elements(&y)), x.shape()),
        _ => {}
    }
    let from = slice(&x);
    assert_eq!(from.len(), y.layout().num_elements(), "{:?} against {:?}", x.shape(), y.shape());
    if let Some(data) = exclusive(&mut y) {
        let chunks = data.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
        chunks.for_each(|(y, x)| dispatch(ZipInPlace::<F>(x, y, PhantomData)));
        return y;
    }
    let other = slice(&y);
    // SAFETY: the chunks of all three cover all elements, and `Zip` writes each.
    let out = unsafe {
        filled(from.len(), |out| {
            let chunks = out.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).zip(other.par_chunks(CHUNK));
            chunks.for_each(|((out, x), y)| dispatch(Zip::<F>(x, y, out, PhantomData)));
        })
    };
    tensor(out, x.shape())
}

/// [`zip`] a block at a time: a block of both becomes f32, and the result is rounded.
fn zip_half<T: Half, F: Binary>(x: &[T], y: &[T]) -> Vec<T> {
    assert_eq!(x.len(), y.len(), "two tensors of one shape");
    // SAFETY: the blocks of all three cover all elements, and `narrow` writes each.
    unsafe {
        filled(x.len(), |out| {
            let blocks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(y.par_chunks(CHUNK));
            let buffers = || (vec![0.0_f32; CHUNK], vec![0.0_f32; CHUNK]);
            blocks.for_each_init(buffers, |(wide_x, wide_y), ((out, x), y)| {
                let (wide_x, wide_y) = (&mut wide_x[..x.len()], &mut wide_y[..y.len()]);
                T::widen(x, wide_x);
                T::widen(y, wide_y);
                dispatch(ZipInPlace::<F>(wide_x, wide_y, PhantomData));
                T::narrow(wide_y, out);
            });
        })
    }
}
