//! What becomes of sums: a bias is added, and they are written as they are or rounded.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

#[cfg(target_arch = "x86_64")]
use burn::tensor::bf16;

#[cfg(target_arch = "x86_64")]
use super::super::fast_math::first_lanes;
use super::super::half::Half;
use super::product::WIDTH;
#[cfg(target_arch = "x86_64")]
use super::simd::Avx512;
use super::simd::{LANES, Simd};

/// Writes `sums + bias` to `out`.
///
/// # Safety
/// The processor must have the instructions; `out` must be valid for writing as many elements.
#[inline(always)]
pub(super) unsafe fn write<S: Simd>(sums: &[f32], bias: Bias<'_>, out: *mut f32) {
    for start in (0..sums.len()).step_by(LANES) {
        let count = sums.len() - start;
        // SAFETY: nothing past the end of the slices and of `out` is read or written.
        unsafe {
            let sum = S::load_first(sums.as_ptr().add(start), count);
            S::store_first(S::add(sum, bias.load::<S>(start, count)), out.add(start), count);
        }
    }
}

/// Rounds `sums + bias` to `out`, with a bias for each or one for all.
///
/// # Safety
/// The processor must have these features; `out` must be valid for writing as many elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
pub(super) unsafe fn round(sums: &[f32], bias: Bias<'_>, out: *mut bf16) {
    for start in (0..sums.len()).step_by(LANES) {
        let count = sums.len() - start;
        let mask = first_lanes(count);
        // SAFETY: the mask leaves out what is past the end of the slices and of `out`.
        unsafe {
            let sum = _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(start));
            let rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum, bias.load::<Avx512>(start, count)));
            let rounded = std::mem::transmute::<__m256bh, __m256i>(rounded);
            _mm256_mask_storeu_epi16(out.add(start).cast(), mask, rounded);
        }
    }
}

/// Rounds `sums + bias` to `out`, as many at a time as a panel has of a row.
///
/// # Safety
/// As [`write`].
#[inline(always)]
pub(super) unsafe fn narrow<S: Simd, H: Half>(sums: &[f32], bias: Bias<'_>, out: *mut H) {
    let mut whole = [0.0; WIDTH];
    for (at, sums) in sums.chunks(WIDTH).enumerate() {
        let start = at * WIDTH;
        // SAFETY: the caller's word; `whole` has room for a chunk.
        let out = unsafe {
            write::<S>(sums, bias.from(start), whole.as_mut_ptr());
            std::slice::from_raw_parts_mut(out.add(start).cast::<MaybeUninit<H>>(), sums.len())
        };
        H::narrow(&whole[..sums.len()], out);
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
    /// For the sums from `start` on.
    #[inline(always)]
    fn from(self, start: usize) -> Self {
        match self {
            Self::Each(bias) => Self::Each(&bias[start..]),
            Self::All(_) => self,
        }
    }

    /// For the first `count` of sixteen sums, from `start` on.
    ///
    /// # Panics
    /// If there are fewer.
    ///
    /// # Safety
    /// The processor must have the instructions.
    #[inline(always)]
    unsafe fn load<S: Simd>(self, start: usize, count: usize) -> S::Words {
        match self.from(start) {
            Self::Each(bias) => {
                assert!(bias.len() >= count.min(LANES), "a bias for every sum");
                // SAFETY: so many are there.
                unsafe { S::load_first(bias.as_ptr(), count) }
            }
            // SAFETY: the caller's word.
            Self::All(bias) => unsafe { S::splat(bias) },
        }
    }
}
