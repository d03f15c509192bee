//! What is stored and what is multiplied: words of 32 bits, sixteen to a line of the cache, each an f32 or a pair of bf16. Half
//! precision that is not multiplied in pairs becomes f32 on its way into registers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use burn::tensor::{bf16, f16};

use super::super::half::{Half, Stored};
use super::product::{Engine, Words};
use super::simd::{LANES, Simd};
use super::store::{Bias, narrow, write};
use super::vectors::Vectors;
#[cfg(target_arch = "x86_64")]
use super::{super::fast_math::first_lanes, simd::Avx512, store::round, tiles::Tiles, vectors::Pairs};

/// A vector's worth of memory, on a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(#[expect(dead_code, reason = "written and read as a vector")] [u32; LANES]);

impl Line {
    pub(super) const ZERO: Self = Self([0; LANES]);

    /// The numbers of some lines.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn numbers<T: Stored>(lines: &[Self]) -> &[T] {
        // SAFETY: a line is as many bits of any value, which every number may have.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines) / size_of::<T>()) }
    }

    /// The same, to be written.
    pub(super) fn numbers_mut<T: Stored>(lines: &mut [Self]) -> &mut [T] {
        let count = size_of_val(lines) / size_of::<T>();
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), count) }
    }
}

/// A number that comes from memory to be multiplied by `E`, and goes back.
///
/// # Safety
/// The functions need a processor that has the engine's instructions, and elements that are there.
pub(super) trait Number<E: Engine>: Stored {
    /// Whether the engine multiplies it as it is stored, so that rows of it may be read where they lie.
    const AS_STORED: bool;

    /// Sixteen words from `from` on, zeros where there are no more than `count` elements.
    unsafe fn words(from: *const Self, count: usize) -> Words<E>;

    /// Sixteen of them.
    type Sixteen: Copy;

    /// Sixteen that lie side by side; zeros where there are no more than `count`.
    unsafe fn sixteen(from: *const Self, count: usize) -> Self::Sixteen;

    /// Eight and eight that lie side by side.
    unsafe fn eights(low: *const Self, high: *const Self) -> Self::Sixteen;

    /// A word for each of sixteen columns: of one line and, where a word has two elements, of the next, or zeros without
    /// it.
    unsafe fn zipped(line: Self::Sixteen, next: Option<Self::Sixteen>) -> Words<E>;

    /// Writes `sums + bias`, each rounded once, to `out`, which must be valid for writing as many elements.
    unsafe fn write(sums: &[f32], bias: Bias<'_>, out: *mut Self);
}

impl<S: Simd> Number<Vectors<S>> for f32 {
    const AS_STORED: bool = true;

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

    #[inline(always)]
    unsafe fn write(sums: &[f32], bias: Bias<'_>, out: *mut Self) {
        // SAFETY: the caller's word.
        unsafe { write::<S>(sums, bias, out) }
    }
}

/// Half precision that becomes f32.
pub(super) trait Widened: Half {
    /// Sixteen that begin at `from`, zeros where there are no more than `count`.
    ///
    /// # Safety
    /// As those of [`Number`].
    unsafe fn load<S: Simd>(from: *const Self, count: usize) -> S::Words;
}

impl Widened for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self, count: usize) -> S::Words {
        // SAFETY: the caller's word.
        unsafe { S::load_bf16(from, count) }
    }
}

impl Widened for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self, count: usize) -> S::Words {
        // SAFETY: the caller's word.
        unsafe { S::load_f16(from, count) }
    }
}

impl<S: Simd, H: Widened> Number<Vectors<S>> for H {
    const AS_STORED: bool = false;

    #[inline(always)]
    unsafe fn words(from: *const Self, count: usize) -> S::Words {
        // SAFETY: the caller's word.
        unsafe { H::load::<S>(from, count) }
    }

    type Sixteen = S::Words;

    #[inline(always)]
    unsafe fn sixteen(from: *const Self, count: usize) -> S::Words {
        // SAFETY: the caller's word.
        unsafe { H::load::<S>(from, count) }
    }

    #[inline(always)]
    unsafe fn eights(low: *const Self, high: *const Self) -> S::Words {
        const HALF: usize = LANES / 2;
        let mut both = [H::default(); LANES];
        // SAFETY: the caller's word; both have room.
        unsafe {
            low.copy_to_nonoverlapping(both.as_mut_ptr(), HALF);
            high.copy_to_nonoverlapping(both.as_mut_ptr().add(HALF), HALF);
            H::load::<S>(both.as_ptr(), LANES)
        }
    }

    #[inline(always)]
    unsafe fn zipped(line: S::Words, _: Option<S::Words>) -> S::Words {
        line
    }

    #[inline(always)]
    unsafe fn write(sums: &[f32], bias: Bias<'_>, out: *mut Self) {
        // SAFETY: the caller's word.
        unsafe { narrow::<S, H>(sums, bias, out) }
    }
}

/// bf16 that is multiplied in pairs.
macro_rules! in_pairs {
    ($($engine:ty),*) => { $(
        #[cfg(target_arch = "x86_64")]
        impl Number<$engine> for bf16 {
            const AS_STORED: bool = true;

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

            #[inline(always)]
            unsafe fn write(sums: &[f32], bias: Bias<'_>, out: *mut Self) {
                // SAFETY: the caller's word.
                unsafe { round(sums, bias, out) }
            }
        }
    )* };
}
in_pairs!(Pairs, Tiles);

/// Whether this processor multiplies bf16 by vectors.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_bf16() -> bool {
    Avx512::is_available() && is_x86_feature_detected!("avx512bf16")
}
