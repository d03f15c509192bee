//! What is multiplied: f32, or pairs of bf16 in a word of 32 bits, sixteen words to a line of the cache.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use burn::tensor::{Shape, bf16};
use burn_flex::FlexTensor;

use super::super::elementwise::{slice, tensor};
#[cfg(target_arch = "x86_64")]
use super::super::fast_math::first_lanes;
use super::super::half::{elements, half_tensor};
#[cfg(target_arch = "x86_64")]
use super::simd::Avx512;
use super::simd::{LANES, Simd};

/// What lies in a word.
pub(super) trait Element: Copy + Default + Send + Sync {
    /// How many of them a word has, neighbours along the depth.
    const PER_WORD: usize;

    /// Those of a contiguous tensor.
    fn of(x: &FlexTensor) -> &[Self];

    /// A tensor of them.
    fn tensor(data: Vec<Self>, shape: Shape) -> FlexTensor;
}

impl Element for f32 {
    const PER_WORD: usize = 1;

    fn of(x: &FlexTensor) -> &[Self] {
        slice(x)
    }

    fn tensor(data: Vec<Self>, shape: Shape) -> FlexTensor {
        tensor(data, shape)
    }
}

impl Element for bf16 {
    const PER_WORD: usize = 2;

    fn of(x: &FlexTensor) -> &[Self] {
        elements(x)
    }

    fn tensor(data: Vec<Self>, shape: Shape) -> FlexTensor {
        half_tensor(data, shape)
    }
}

/// A vector's worth of memory, on a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(#[expect(dead_code, reason = "written and read as a vector")] [u32; LANES]);

impl Line {
    pub(super) const ZERO: Self = Self([0; LANES]);

    /// The numbers of some lines.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn numbers<T: Element>(lines: &[Self]) -> &[T] {
        // SAFETY: a line is as many bits of any value, which every number may have.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * LANES * T::PER_WORD) }
    }

    /// The same, to be written.
    pub(super) fn numbers_mut<T: Element>(lines: &mut [Self]) -> &mut [T] {
        // SAFETY: as above.
        unsafe {
            std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LANES * T::PER_WORD)
        }
    }
}

/// A number that the product multiplies, as the instructions of `S` move it.
///
/// # Safety
/// The functions need a processor that has the instructions, and elements that are there.
pub(super) trait Number<S: Simd>: Element {
    /// Sixteen words from `from` on, zeros where there are no more than `count` elements.
    unsafe fn words(from: *const Self, count: usize) -> S::Words;

    /// Sixteen of them.
    type Sixteen: Copy;

    /// Sixteen that lie side by side; zeros where there are no more than `count`.
    unsafe fn sixteen(from: *const Self, count: usize) -> Self::Sixteen;

    /// Eight and eight that lie side by side.
    unsafe fn eights(low: *const Self, high: *const Self) -> Self::Sixteen;

    /// A word for each of sixteen columns: of one line and, where a word has two elements, of the next, or zeros without
    /// it.
    unsafe fn zipped(line: Self::Sixteen, next: Option<Self::Sixteen>) -> S::Words;
}

impl<S: Simd> Number<S> for f32 {
    #[inline(always)]
    unsafe fn words(from: *const Self, count: usize) -> S::Words {
        // SAFETY: the caller's word.
        unsafe { S::load_first(from, count) }
    }

    type Sixteen = S::Words;

    #[inline(always)]
    unsafe fn sixteen(from: *const Self, count: usize) -> S::Words {
        // SAFETY: the caller's word.
        unsafe { S::load_first(from, count) }
    }

    #[inline(always)]
    unsafe fn eights(low: *const Self, high: *const Self) -> S::Words {
        // SAFETY: the caller's word.
        unsafe { S::load_eights(low, high) }
    }

    #[inline(always)]
    unsafe fn zipped(line: S::Words, _: Option<S::Words>) -> S::Words {
        line
    }
}

#[cfg(target_arch = "x86_64")]
impl Number<Avx512> for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn words(from: *const Self, count: usize) -> __m512 {
        let halves = if count >= 2 * LANES { !0 } else { (1 << count) - 1 };
        // SAFETY: the mask leaves out what is not there.
        unsafe { _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(halves, from.cast())) }
    }

    type Sixteen = __m256i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(from: *const Self, count: usize) -> __m256i {
        // SAFETY: the mask leaves out what is not there.
        unsafe { _mm256_maskz_loadu_epi16(first_lanes(count), from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn eights(low: *const Self, high: *const Self) -> __m256i {
        // SAFETY: the caller's word.
        unsafe {
            let [low, high] = [low, high].map(|from| _mm_loadu_si128(from.cast()));
            _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn zipped(line: __m256i, next: Option<__m256i>) -> __m512 {
        let next = next.unwrap_or(_mm256_setzero_si256());
        let pairs = _mm512_or_si512(
            _mm512_cvtepu16_epi32(line),
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(next)),
        );
        _mm512_castsi512_ps(pairs)
    }
}

/// Whether this processor multiplies bf16 by vectors.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_bf16() -> bool {
    Avx512::is_available() && is_x86_feature_detected!("avx512bf16")
}
