//! Half precision on a processor that computes in single: weights and activations are kept in two bytes, an operation
//! works in f32 on operands that are converted for it and forgotten.
//!
//! So sums, statistics and softmax accumulate in f32. Products convert blocks at a time, or nothing:
//! [`products`](super::products).

use std::mem::MaybeUninit;

use burn::tensor::{DType, Element, Shape, TensorData, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::elementwise::{CHUNK, contiguous, filled, slice, tensor, written};
use super::fast_math::{Kernel, dispatch};

/// `kernel`, which takes and gives f32, for tensors of f32 or half precision; `plain` for f64.
///
/// The results have the dtype of the first tensor.
pub(super) fn by_dtype<const N: usize, const M: usize>(
    tensors: [FlexTensor; N],
    kernel: impl FnOnce([FlexTensor; N]) -> [FlexTensor; M],
    plain: impl FnOnce([FlexTensor; N]) -> [FlexTensor; M],
) -> [FlexTensor; M] {
    match tensors[0].dtype() {
        DType::F32 if tensors.iter().all(|tensor| tensor.dtype() == DType::F32) => kernel(tensors),
        DType::F64 => plain(tensors),
        dtype => kernel(tensors.map(widen)).map(|result| narrow(result, dtype)),
    }
}

/// A number that tensors hold.
pub(super) trait Stored: Element + Copy + Default + Send + Sync {
    /// The whole buffer of a tensor.
    fn buffer(x: &FlexTensor) -> &[Self];
}

impl Stored for f32 {
    fn buffer(x: &FlexTensor) -> &[Self] {
        x.storage()
    }
}

impl Stored for bf16 {
    fn buffer(x: &FlexTensor) -> &[Self] {
        x.storage()
    }
}

impl Stored for f16 {
    fn buffer(x: &FlexTensor) -> &[Self] {
        x.storage()
    }
}

/// A number of two bytes.
pub(super) trait Half: Stored {
    /// `from` in f32, into `to`, which is as long.
    fn widen(from: &[Self], to: &mut [f32]);

    /// `from` rounded to the nearest, ties to even, into `to`, which is as long: all of it is written.
    fn narrow(from: &[f32], to: &mut [MaybeUninit<Self>]);
}

impl Half for bf16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        dispatch(Widen(from, to));
    }

    fn narrow(from: &[f32], to: &mut [MaybeUninit<Self>]) {
        dispatch(Narrow(from, to));
    }
}

impl Half for f16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [MaybeUninit<Self>]) {
        // SAFETY: zeros are numbers, so all of them are initialized when they become a slice of numbers.
        let to = unsafe {
            to.fill(MaybeUninit::new(Self::ZERO));
            &mut *(std::ptr::from_mut(to) as *mut [Self])
        };
        to.convert_from_f32_slice(from);
    }
}

/// bf16 to f32, in a loop that becomes vectors.
struct Widen<'a>(&'a [bf16], &'a mut [f32]);

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (from, to) in self.0.iter().zip(self.1) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
}

/// f32 to bf16, in a loop that becomes vectors.
struct Narrow<'a>(&'a [f32], &'a mut [MaybeUninit<bf16>]);

impl Kernel for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (from, to) in self.0.iter().zip(self.1) {
            let bits = from.to_bits();
            // half a unit, less one if the last kept bit is even: ties go there
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            // a NaN stays one, whichever of its bits are lost
            let kept = if from.is_nan() { bits | 0x0040_0000 } else { rounded };
            to.write(bf16::from_bits((kept >> 16) as u16));
        }
    }
}

/// The elements of a contiguous tensor.
pub(super) fn elements<T: Stored>(x: &FlexTensor) -> &[T] {
    let start = x.layout().start_offset();
    &T::buffer(x)[start..start + x.layout().num_elements()]
}

/// A tensor of these elements.
pub(super) fn tensor_of<T: Stored>(data: Vec<T>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(data, shape))
}

/// The elements of a tensor of any of the three dtypes in f32.
pub(super) fn widened(x: FlexTensor) -> Vec<f32> {
    slice(&contiguous(widen(x))).to_vec()
}

/// A tensor of half precision in f32; one of f32 as it is.
pub(super) fn widen(x: FlexTensor) -> FlexTensor {
    match x.dtype() {
        DType::F16 => widen_as::<f16>(x),
        DType::BF16 => widen_as::<bf16>(x),
        _ => x,
    }
}

/// A tensor of f32 in `dtype`, each value rounded to the nearest.
pub(super) fn narrow(x: FlexTensor, dtype: DType) -> FlexTensor {
    match dtype {
        DType::F16 => narrow_as::<f16>(x),
        DType::BF16 => narrow_as::<bf16>(x),
        _ => x,
    }
}

fn widen_as<T: Half>(x: FlexTensor) -> FlexTensor {
    densely(x, |x| {
        let from = elements::<T>(&x);
        // SAFETY: each chunk's elements are zeros before they are overwritten.
        let to = unsafe {
            filled(from.len(), |to| {
                let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
                chunks.for_each(|(to, from)| {
                    to.fill(MaybeUninit::new(0.0));
                    T::widen(from, written(to));
                });
            })
        };
        tensor(to, x.shape())
    })
}

fn narrow_as<T: Half>(x: FlexTensor) -> FlexTensor {
    densely(x, |x| {
        let from = slice(&x);
        // SAFETY: `narrow` writes each chunk.
        let to = unsafe {
            filled(from.len(), |to| {
                let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
                chunks.for_each(|(to, from)| T::narrow(from, to));
            })
        };
        tensor_of(to, x.shape())
    })
}

/// `f`, which works element by element, of `x` without gaps.
///
/// Queries, keys and values are `[n, heads, tokens, d]` and lie as `[n, tokens, heads, d]`; the result then lies so too,
/// and nothing is copied into another order.
fn densely(x: FlexTensor, f: impl FnOnce(FlexTensor) -> FlexTensor) -> FlexTensor {
    if !x.is_contiguous() && x.layout().num_dims() == 4 {
        let swapped = x.clone().transpose(1, 2);
        if swapped.is_contiguous() {
            return f(swapped).transpose(1, 2);
        }
    }
    f(contiguous(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_to_the_nearest_ties_to_even() {
        let special = [0x0000_0001, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0x7fff_ffff, 0x7fc0_0000];
        let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0x0000_8000, 0x7f7f_8000];
        let spread = (0..10_000_u32).map(|i| i.wrapping_mul(0x9e37_79b9));
        let bits = special.into_iter().chain(ties).flat_map(|bits| [bits, bits | 0x8000_0000]).chain(spread);
        let from: Vec<f32> = bits.map(f32::from_bits).collect();
        // SAFETY: `narrow` writes all of it.
        let to = unsafe { filled(from.len(), |to| bf16::narrow(&from, to)) };
        let mut back = vec![0.0; to.len()];
        bf16::widen(&to, &mut back);
        for ((from, to), back) in from.into_iter().zip(to).zip(back) {
            let expected = bf16::from_f32(from);
            assert_eq!(to.is_nan(), from.is_nan(), "{from} ({:#x})", from.to_bits());
            assert!(from.is_nan() || to.to_bits() == expected.to_bits(), "{from}: {to}, not {expected}");
            assert_eq!(back.to_bits(), to.to_f32().to_bits(), "{to}");
        }
    }
}
