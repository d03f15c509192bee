//! Sixteen words of 32 bits at a time, by the instructions of a processor.

use burn::tensor::{bf16, f16};

/// Words of a vector, each for a column of its own.
pub(super) const LANES: usize = 16;

/// How a processor moves, multiplies and adds sixteen words, in as many registers as it takes.
///
/// What is generic over it is `#[inline(always)]` all the way down to here: only what becomes a part of [`run`](Self::run) is
/// compiled for these instructions.
///
/// # Safety
/// Every function but [`is_available`](Self::is_available) needs a processor that has the instructions, and memory that is as
/// it says.
pub(super) trait Simd: 'static {
    /// Sixteen words.
    type Words: Copy;

    /// Vectors of a panel that are multiplied at once: with six rows, as many sums as the registers hold.
    const TILE: usize;

    /// Whether this processor has the instructions.
    fn is_available() -> bool;

    /// Runs `f`, which must be `#[inline(always)]`, compiled for the instructions.
    unsafe fn run<R>(f: impl FnOnce() -> R) -> R;

    /// Those that begin at `from`.
    unsafe fn load(from: *const f32) -> Self::Words;

    /// The first `count` of them that begin at `from`, and then zeros.
    unsafe fn load_first(from: *const f32, count: usize) -> Self::Words;

    /// Eight and eight.
    unsafe fn load_eights(low: *const f32, high: *const f32) -> Self::Words;

    /// The first `count` numbers that begin at `from`, and then zeros.
    unsafe fn load_bf16(from: *const bf16, count: usize) -> Self::Words;

    /// The same.
    unsafe fn load_f16(from: *const f16, count: usize) -> Self::Words;

    /// Writes all.
    unsafe fn store(words: Self::Words, to: *mut f32);

    /// Writes the first `count`.
    unsafe fn store_first(words: Self::Words, to: *mut f32, count: usize);

    /// The same in all.
    unsafe fn splat(x: f32) -> Self::Words;

    /// `a + b`
    unsafe fn add(a: Self::Words, b: Self::Words) -> Self::Words;

    /// `a * b + sum`, rounded once where the processor can.
    unsafe fn multiply_add(a: Self::Words, b: Self::Words, sum: Self::Words) -> Self::Words;

    /// Sixteen vectors: word `i` of vector `j` becomes word `j` of vector `i`.
    unsafe fn transpose(x: [Self::Words; LANES]) -> [Self::Words; LANES];
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use burn::tensor::{bf16, f16};

    use super::{LANES, Simd};
    use crate::flex::fast_math::{Vectors, first_lanes};

    /// A register for all sixteen.
    pub(in super::super) struct Avx512;

    impl Simd for Avx512 {
        type Words = __m512;

        /// 24 of 32 registers hold sums.
        const TILE: usize = 4;

        fn is_available() -> bool {
            Vectors::Avx512.are_here() && is_x86_feature_detected!("avx512bw")
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        unsafe fn run<R>(f: impl FnOnce() -> R) -> R {
            f()
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: the caller's word.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn load_first(from: *const f32, count: usize) -> __m512 {
            // SAFETY: the mask leaves out what is not there.
            unsafe { _mm512_maskz_loadu_ps(first_lanes(count), from) }
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn load_eights(low: *const f32, high: *const f32) -> __m512 {
            // SAFETY: the caller's word.
            unsafe {
                let [low, high] = [low, high].map(|from| _mm256_loadu_pd(from.cast()));
                _mm512_castpd_ps(_mm512_insertf64x4::<1>(_mm512_castpd256_pd512(low), high))
            }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        unsafe fn load_bf16(from: *const bf16, count: usize) -> __m512 {
            // SAFETY: the mask leaves out what is not there.
            let halves = unsafe { _mm256_maskz_loadu_epi16(first_lanes(count), from.cast()) };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        unsafe fn load_f16(from: *const f16, count: usize) -> __m512 {
            // SAFETY: the mask leaves out what is not there.
            _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(first_lanes(count), from.cast()) })
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn store(words: __m512, to: *mut f32) {
            // SAFETY: the caller's word.
            unsafe { _mm512_storeu_ps(to, words) }
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn store_first(words: __m512, to: *mut f32, count: usize) {
            // SAFETY: the mask leaves out what is not there.
            unsafe { _mm512_mask_storeu_ps(to, first_lanes(count), words) }
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, sum)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn transpose(x: [__m512; LANES]) -> [__m512; LANES] {
            // SAFETY: both are as many bits of any value.
            let x = unsafe { std::mem::transmute::<[__m512; LANES], [__m512i; LANES]>(x) };
            let mut pairs = x;
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
            }
            let mut fours = pairs;
            for i in 0..4 {
                fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
                fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
                fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
                fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
            }
            // quarter `q` of `fours[4 * i + j]` now has words `4 * q + j` of vectors `4 * i` to `4 * i + 3`
            let mut out = fours;
            for j in 0..4 {
                let even = _mm512_shuffle_i32x4::<0x88>(fours[j], fours[4 + j]);
                let odd = _mm512_shuffle_i32x4::<0xdd>(fours[j], fours[4 + j]);
                let even_too = _mm512_shuffle_i32x4::<0x88>(fours[8 + j], fours[12 + j]);
                let odd_too = _mm512_shuffle_i32x4::<0xdd>(fours[8 + j], fours[12 + j]);
                out[j] = _mm512_shuffle_i32x4::<0x88>(even, even_too);
                out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even_too);
                out[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd_too);
                out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_too);
            }
            // SAFETY: as above.
            unsafe { std::mem::transmute::<[__m512i; LANES], [__m512; LANES]>(out) }
        }
    }

    /// Two registers for sixteen.
    pub(in super::super) struct Avx2;

    /// The lanes of one register.
    const HALF: usize = LANES / 2;

    /// A mask of the first `count` lanes of one register.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn mask(count: usize) -> __m256i {
        const BITS: [i32; 2 * HALF] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        // SAFETY: eight of sixteen, from the eighth at most.
        unsafe { _mm256_loadu_si256(BITS.as_ptr().add(HALF - count.min(HALF)).cast()) }
    }

    impl Simd for Avx2 {
        type Words = [__m256; 2];

        /// Twelve of sixteen registers hold sums.
        const TILE: usize = 1;

        fn is_available() -> bool {
            Vectors::Avx2.are_here() && is_x86_feature_detected!("f16c")
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn run<R>(f: impl FnOnce() -> R) -> R {
            f()
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn load(from: *const f32) -> [__m256; 2] {
            // SAFETY: the caller's word.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(HALF))] }
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn load_first(from: *const f32, count: usize) -> [__m256; 2] {
            let part = |from, count| {
                // SAFETY: the mask leaves out what is not there.
                unsafe { _mm256_maskload_ps(from, mask(count)) }
            };
            [part(from, count), part(from.wrapping_add(HALF), count.saturating_sub(HALF))]
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn load_eights(low: *const f32, high: *const f32) -> [__m256; 2] {
            // SAFETY: the caller's word.
            unsafe { [_mm256_loadu_ps(low), _mm256_loadu_ps(high)] }
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn load_bf16(from: *const bf16, count: usize) -> [__m256; 2] {
            // SAFETY: the caller's word.
            unsafe { eights(from, count) }
                .map(|halves| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))))
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn load_f16(from: *const f16, count: usize) -> [__m256; 2] {
            // SAFETY: the caller's word.
            unsafe { eights(from, count) }.map(|halves| _mm256_cvtph_ps(halves))
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn store([low, high]: [__m256; 2], to: *mut f32) {
            // SAFETY: the caller's word.
            unsafe {
                _mm256_storeu_ps(to, low);
                _mm256_storeu_ps(to.add(HALF), high);
            }
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn store_first([low, high]: [__m256; 2], to: *mut f32, count: usize) {
            // SAFETY: the masks leave out what is not there.
            unsafe {
                _mm256_maskstore_ps(to, mask(count), low);
                _mm256_maskstore_ps(to.wrapping_add(HALF), mask(count.saturating_sub(HALF)), high);
            }
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn splat(x: f32) -> [__m256; 2] {
            [_mm256_set1_ps(x); 2]
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
        }

        #[inline]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn multiply_add(a: [__m256; 2], b: [__m256; 2], sum: [__m256; 2]) -> [__m256; 2] {
            [_mm256_fmadd_ps(a[0], b[0], sum[0]), _mm256_fmadd_ps(a[1], b[1], sum[1])]
        }

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn transpose(x: [[__m256; 2]; LANES]) -> [[__m256; 2]; LANES] {
            let mut out = x;
            for (from, to) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let square = std::array::from_fn(|i| x[to * HALF + i][from]);
                for (i, words) in eight_by_eight(square).into_iter().enumerate() {
                    out[from * HALF + i][to] = words;
                }
            }
            out
        }
    }

    /// The first `count` of sixteen numbers of two bytes, and then zeros.
    ///
    /// # Safety
    /// The processor must have the instructions, and the numbers be there.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn eights<T: Copy + Default>(from: *const T, count: usize) -> [__m128i; 2] {
        let load = |from: *const T| {
            // SAFETY: there are sixteen.
            unsafe { [_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(HALF).cast())] }
        };
        if count >= LANES {
            return load(from);
        }
        let mut first = [T::default(); LANES];
        // SAFETY: so many are there.
        unsafe { from.copy_to_nonoverlapping(first.as_mut_ptr(), count) };
        load(first.as_ptr())
    }

    /// Word `i` of vector `j` becomes word `j` of vector `i`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn eight_by_eight(x: [__m256; HALF]) -> [__m256; HALF] {
        let mut fours = x;
        for i in [0, 4] {
            let pairs = [
                _mm256_unpacklo_ps(x[i], x[i + 1]),
                _mm256_unpackhi_ps(x[i], x[i + 1]),
                _mm256_unpacklo_ps(x[i + 2], x[i + 3]),
                _mm256_unpackhi_ps(x[i + 2], x[i + 3]),
            ];
            fours[i] = _mm256_shuffle_ps::<0x44>(pairs[0], pairs[2]);
            fours[i + 1] = _mm256_shuffle_ps::<0xee>(pairs[0], pairs[2]);
            fours[i + 2] = _mm256_shuffle_ps::<0x44>(pairs[1], pairs[3]);
            fours[i + 3] = _mm256_shuffle_ps::<0xee>(pairs[1], pairs[3]);
        }
        // half `h` of `fours[i + j]` now has words `4 * h + j` of vectors `i` to `i + 3`
        std::array::from_fn(|i| {
            let (low, high) = (fours[i % 4], fours[4 + i % 4]);
            if i < 4 {
                _mm256_permute2f128_ps::<0x20>(low, high)
            } else {
                _mm256_permute2f128_ps::<0x31>(low, high)
            }
        })
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use burn::tensor::{bf16, f16};

    use super::{LANES, Portable, Simd};

    /// Four registers for sixteen.
    pub(in super::super) struct Neon;

    type Words = [float32x4_t; 4];

    /// From what every processor has.
    #[inline(always)]
    fn from_numbers(numbers: [f32; LANES]) -> Words {
        // SAFETY: both are 64 bytes that may have any value.
        unsafe { std::mem::transmute(numbers) }
    }

    /// And to it.
    #[inline(always)]
    fn numbers(words: Words) -> [f32; LANES] {
        // SAFETY: as above.
        unsafe { std::mem::transmute(words) }
    }

    impl Simd for Neon {
        type Words = Words;

        /// 24 of 32 registers hold sums.
        const TILE: usize = 1;

        fn is_available() -> bool {
            std::arch::is_aarch64_feature_detected!("neon")
        }

        #[inline(always)]
        unsafe fn run<R>(f: impl FnOnce() -> R) -> R {
            f()
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Words {
            // SAFETY: the caller's word.
            unsafe { [0, 4, 8, 12].map(|i| vld1q_f32(from.add(i))) }
        }

        #[inline(always)]
        unsafe fn load_first(from: *const f32, count: usize) -> Words {
            // SAFETY: the caller's word.
            from_numbers(unsafe { Portable::load_first(from, count) })
        }

        #[inline(always)]
        unsafe fn load_eights(low: *const f32, high: *const f32) -> Words {
            // SAFETY: the caller's word.
            unsafe { [low, low.add(4), high, high.add(4)].map(|from| vld1q_f32(from)) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16, count: usize) -> Words {
            // SAFETY: the caller's word.
            from_numbers(unsafe { Portable::load_bf16(from, count) })
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const f16, count: usize) -> Words {
            // SAFETY: the caller's word.
            from_numbers(unsafe { Portable::load_f16(from, count) })
        }

        #[inline(always)]
        unsafe fn store(words: Words, to: *mut f32) {
            for (i, words) in words.into_iter().enumerate() {
                // SAFETY: the caller's word.
                unsafe { vst1q_f32(to.add(4 * i), words) };
            }
        }

        #[inline(always)]
        unsafe fn store_first(words: Words, to: *mut f32, count: usize) {
            // SAFETY: the caller's word.
            unsafe { Portable::store_first(numbers(words), to, count) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Words {
            // SAFETY: every processor of this architecture that runs Rust's standard library has it.
            unsafe { [vdupq_n_f32(x); 4] }
        }

        #[inline(always)]
        unsafe fn add(a: Words, b: Words) -> Words {
            // SAFETY: as above.
            std::array::from_fn(|i| unsafe { vaddq_f32(a[i], b[i]) })
        }

        #[inline(always)]
        unsafe fn multiply_add(a: Words, b: Words, sum: Words) -> Words {
            // SAFETY: as above.
            unsafe {
                [
                    vfmaq_f32(sum[0], a[0], b[0]),
                    vfmaq_f32(sum[1], a[1], b[1]),
                    vfmaq_f32(sum[2], a[2], b[2]),
                    vfmaq_f32(sum[3], a[3], b[3]),
                ]
            }
        }

        #[inline(always)]
        unsafe fn transpose(x: [Words; LANES]) -> [Words; LANES] {
            let mut out = x;
            for row in 0..4 {
                for column in 0..4 {
                    let square = std::array::from_fn(|i| x[4 * row + i][column]);
                    for (i, words) in four_by_four(square).into_iter().enumerate() {
                        out[4 * column + i][row] = words;
                    }
                }
            }
            out
        }
    }

    /// Word `i` of vector `j` becomes word `j` of vector `i`.
    #[inline(always)]
    fn four_by_four(x: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: every processor of this architecture that runs Rust's standard library has these.
        unsafe {
            let pairs = [
                vtrn1q_f32(x[0], x[1]),
                vtrn2q_f32(x[0], x[1]),
                vtrn1q_f32(x[2], x[3]),
                vtrn2q_f32(x[2], x[3]),
            ]
            .map(|pairs| vreinterpretq_f64_f32(pairs));
            [
                vtrn1q_f64(pairs[0], pairs[2]),
                vtrn1q_f64(pairs[1], pairs[3]),
                vtrn2q_f64(pairs[0], pairs[2]),
                vtrn2q_f64(pairs[1], pairs[3]),
            ]
            .map(|fours| vreinterpretq_f32_f64(fours))
        }
    }
}

/// What every processor has; the compiler makes vectors of it where it can.
pub(super) struct Portable;

impl Simd for Portable {
    type Words = [f32; LANES];

    const TILE: usize = 1;

    fn is_available() -> bool {
        true
    }

    #[inline(always)]
    unsafe fn run<R>(f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; LANES] {
        // SAFETY: the caller's word.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> [f32; LANES] {
        // SAFETY: the caller's word.
        unsafe { first(from, count) }
    }

    #[inline(always)]
    unsafe fn load_eights(low: *const f32, high: *const f32) -> [f32; LANES] {
        // SAFETY: the caller's word.
        std::array::from_fn(|i| unsafe { if i < 8 { *low.add(i) } else { *high.add(i - 8) } })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16, count: usize) -> [f32; LANES] {
        // SAFETY: the caller's word.
        unsafe { first(from, count) }.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16, count: usize) -> [f32; LANES] {
        /// What exponents of the two kinds differ by.
        const SCALE: f32 = f32::from_bits((127 + 112) << 23);

        // SAFETY: the caller's word.
        unsafe { first(from, count) }.map(|x| {
            let bits = u32::from(x.to_bits());
            let size = f32::from_bits((bits & 0x7fff) << 13) * SCALE;
            // infinity and NaN have become a number of the next exponent
            let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
            f32::from_bits(size.to_bits() | special | (bits & 0x8000) << 16)
        })
    }

    #[inline(always)]
    unsafe fn store(words: [f32; LANES], to: *mut f32) {
        // SAFETY: the caller's word.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(words) };
    }

    #[inline(always)]
    unsafe fn store_first(words: [f32; LANES], to: *mut f32, count: usize) {
        for (i, word) in words.into_iter().enumerate().take(count) {
            // SAFETY: the caller's word.
            unsafe { *to.add(i) = word };
        }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn add(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn multiply_add(a: [f32; LANES], b: [f32; LANES], sum: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] * b[i] + sum[i])
    }

    #[inline(always)]
    unsafe fn transpose(x: [[f32; LANES]; LANES]) -> [[f32; LANES]; LANES] {
        std::array::from_fn(|i| std::array::from_fn(|j| x[j][i]))
    }
}

/// The first `count` of sixteen, and then zeros.
///
/// # Safety
/// They must be there.
#[inline(always)]
unsafe fn first<T: Copy + Default>(from: *const T, count: usize) -> [T; LANES] {
    if count >= LANES {
        // SAFETY: all are there.
        return unsafe { from.cast::<[T; LANES]>().read_unaligned() };
    }
    // SAFETY: as many are there.
    std::array::from_fn(|i| if i < count { unsafe { *from.add(i) } } else { T::default() })
}
