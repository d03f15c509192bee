//! Half precision on a processor that computes in single: weights and activations are kept in two bytes, every
//! operation works in f32 on operands that are converted for it and forgotten.
//!
//! So sums, statistics and softmax accumulate in f32, and no more than one layer's weights exist in both at a time.

use burn::tensor::{DType, TensorData, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::elementwise::{CHUNK, contiguous, slice, tensor};

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

/// A tensor of half precision in f32; one of f32 as it is.
pub(super) fn widen(x: FlexTensor) -> FlexTensor {
    match x.dtype() {
        DType::F16 => widen_f16(x),
        DType::BF16 => widen_bf16(x),
        _ => x,
    }
}

/// A tensor of f32 in `dtype`, each value rounded to the nearest.
pub(super) fn narrow(x: FlexTensor, dtype: DType) -> FlexTensor {
    match dtype {
        DType::F16 => narrow_f16(x),
        DType::BF16 => narrow_bf16(x),
        _ => x,
    }
}

/// The two directions for one format.
macro_rules! conversions {
    ($widen:ident, $narrow:ident, $half:ty) => {
        fn $widen(x: FlexTensor) -> FlexTensor {
            let x = contiguous(x);
            let (start, count) = (x.layout().start_offset(), x.layout().num_elements());
            let from = &x.storage::<$half>()[start..start + count];
            let mut to = vec![0.0_f32; count];
            let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
            chunks.for_each(|(to, from)| from.convert_to_f32_slice(to));
            tensor(to, x.shape())
        }

        fn $narrow(x: FlexTensor) -> FlexTensor {
            let x = contiguous(x);
            let from = slice(&x);
            let mut to = vec![<$half>::ZERO; from.len()];
            let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
            chunks.for_each(|(to, from)| to.convert_from_f32_slice(from));
            FlexTensor::from_data(TensorData::new(to, x.shape()))
        }
    };
}
conversions!(widen_f16, narrow_f16, f16);
conversions!(widen_bf16, narrow_bf16, bf16);
