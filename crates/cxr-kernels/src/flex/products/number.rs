//! What is multiplied: f32, or pairs of bf16 in a word of 32 bits.

use std::arch::x86_64::*;

use burn::tensor::bf16;

use super::super::fast_math::first_lanes;

/// Words of a vector, each for a column of its own.
pub(super) const LANES: usize = 16;

/// A number that the product multiplies.
pub(super) trait Number: Copy + Send + Sync {
    /// How many of them a word has, neighbours along the depth.
    const PER_WORD: usize;

    /// Whether this processor has the instructions that bring it into panels, and that store it.
    fn is_available() -> bool;

    /// Sixteen words from `from` on, zeros where there are no more than `count` elements.
    ///
    /// # Safety
    /// The processor must have what it takes, and the elements must be there.
    unsafe fn words(from: *const Self, count: usize) -> __m512i;

    /// Sixteen of them.
    type Sixteen: Copy;

    /// Sixteen that lie side by side; zeros where the mask has none.
    ///
    /// # Safety
    /// The processor must have what it takes, and those of the mask must be there.
    unsafe fn sixteen(from: *const Self, mask: __mmask16) -> Self::Sixteen;

    /// Eight and eight that lie side by side.
    ///
    /// # Safety
    /// The processor must have what it takes, and they must be there.
    unsafe fn eights(low: *const Self, high: *const Self) -> Self::Sixteen;

    /// A word for each of sixteen columns: of one line and, where a word has two elements, of the next, or zeros without
    /// it.
    ///
    /// # Safety
    /// The processor must have what it takes.
    unsafe fn zipped(line: Self::Sixteen, next: Option<Self::Sixteen>) -> __m512i;
}

/// What both kinds take.
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

impl Number for f32 {
    const PER_WORD: usize = 1;

    fn is_available() -> bool {
        has_avx512()
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn words(from: *const Self, count: usize) -> __m512i {
        // SAFETY: the mask leaves out what is not there.
        unsafe { _mm512_maskz_loadu_epi32(first_lanes(count), from.cast()) }
    }

    type Sixteen = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's word.
        unsafe { _mm512_maskz_loadu_epi32(mask, from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn eights(low: *const Self, high: *const Self) -> __m512i {
        // SAFETY: the caller's word.
        unsafe {
            let [low, high] = [low, high].map(|from| _mm256_loadu_si256(from.cast()));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn zipped(line: __m512i, _: Option<__m512i>) -> __m512i {
        line
    }
}

impl Number for bf16 {
    const PER_WORD: usize = 2;

    fn is_available() -> bool {
        has_avx512() && is_x86_feature_detected!("avx512bf16")
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn words(from: *const Self, count: usize) -> __m512i {
        let halves = if count >= 2 * LANES { !0 } else { (1 << count) - 1 };
        // SAFETY: the mask leaves out what is not there.
        unsafe { _mm512_maskz_loadu_epi16(halves, from.cast()) }
    }

    type Sixteen = __m256i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(from: *const Self, mask: __mmask16) -> __m256i {
        // SAFETY: the caller's word.
        unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) }
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
    unsafe fn zipped(line: __m256i, next: Option<__m256i>) -> __m512i {
        let next = next.unwrap_or(_mm256_setzero_si256());
        _mm512_or_si512(_mm512_cvtepu16_epi32(line), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(next)))
    }
}
