//! What becomes of sums: a bias is added, and they are written as they are or rounded.

use std::arch::x86_64::*;

use burn::tensor::bf16;

use super::super::fast_math::first_lanes;
use super::number::LANES;

/// Writes `sums + bias` to `out`.
///
/// # Safety
/// The processor must have these features; `out` must be valid for writing as many elements.
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
pub(super) unsafe fn write(sums: &[f32], bias: Bias<'_>, out: *mut f32) {
    for start in (0..sums.len()).step_by(LANES) {
        let mask = first_lanes(sums.len() - start);
        // SAFETY: the mask leaves out what is past the end of the slices and of `out`.
        unsafe {
            let sum = _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(start));
            _mm512_mask_storeu_ps(out.add(start), mask, _mm512_add_ps(sum, bias.load(mask, start)));
        }
    }
}

/// Rounds `sums + bias` to `out`, with a bias for each or one for all.
///
/// # Safety
/// The processor must have these features; `out` must be valid for writing as many elements.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
pub(super) unsafe fn round(sums: &[f32], bias: Bias<'_>, out: *mut bf16) {
    for start in (0..sums.len()).step_by(LANES) {
        let mask = first_lanes(sums.len() - start);
        // SAFETY: the mask leaves out what is past the end of the slices and of `out`.
        unsafe {
            let sum = _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(start));
            let rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum, bias.load(mask, start)));
            let rounded = std::mem::transmute::<__m256bh, __m256i>(rounded);
            _mm256_mask_storeu_epi16(out.add(start).cast(), mask, rounded);
        }
    }
}

/// What is added to sums at the end.
#[derive(Clone, Copy)]
pub(super) enum Bias<'a> {
    /// A number for each.
    Each(&'a [f32]),
    /// The same for all.
    All(f32),
}

impl Bias<'_> {
    /// For the sums of the mask, from `start` on.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(self, mask: __mmask16, start: usize) -> __m512 {
        match self {
            Self::Each(bias) => {
                let bias = &bias[start..];
                assert!(first_lanes(bias.len()) & mask == mask, "a bias for every sum");
                // SAFETY: the mask has no more lanes than there are.
                unsafe { _mm512_maskz_loadu_ps(mask, bias.as_ptr()) }
            }
            Self::All(bias) => _mm512_set1_ps(bias),
        }
    }
}
