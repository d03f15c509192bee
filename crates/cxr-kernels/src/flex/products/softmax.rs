//! The softmax of attention whose weights are multiplied in bf16: exponentials in their eight digits, written as they are
//! multiplied, and what their rows have to be divided by afterwards.

use std::arch::x86_64::*;

use burn::tensor::bf16;

use super::super::fast_math::first_lanes;
use super::number::Line;
use super::simd::LANES;

/// Weights of a row that are written at once: a line of the cache.
pub(super) const UNIT: usize = 2 * LANES;

/// Exponentials of some rows, and one divided by the sum of each row.
#[derive(Default)]
pub(super) struct Weights {
    lines: Vec<Line>,
    pub(super) factors: Vec<f32>,
}

impl Weights {
    /// `e^(scale * (score - the largest of its row))` of `count` rows of scores, which begin `step` apart. Of row `i` the first
    /// `seen(i)` count, the others get zero, up to `width`, a multiple of [`UNIT`].
    ///
    /// The exponential has a relative error of 3e-6, of which rounding to bf16 leaves nothing. Sums are of what is not yet
    /// rounded. A row with a NaN, or with infinity, is NaN.
    ///
    /// # Safety
    /// The processor must have these features; a row must have as many scores as it has seen.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn fill(
        &mut self,
        scores: &[f32],
        step: usize,
        count: usize,
        width: usize,
        scale: f32,
        seen: impl Fn(usize) -> usize,
    ) {
        debug_assert!(width.is_multiple_of(UNIT));
        let lines = width / UNIT;
        self.lines.resize(count * lines, Line::ZERO);
        self.factors.clear();
        let scale = _mm512_set1_ps(scale * std::f32::consts::LOG2_E);
        for (i, lines) in self.lines.chunks_exact_mut(lines).take(count).enumerate() {
            let row = &scores[i * step..][..seen(i)];
            let (whole, rest) = row.as_chunks::<UNIT>();
            let most = _mm512_set1_ps(largest(whole, rest));
            let mut sums = [_mm512_setzero_ps(); 2];
            let (of_whole, others) = lines.split_at_mut(whole.len());
            for (scores, line) in whole.iter().zip(of_whole) {
                let powers = powers(halves(scores), most, scale);
                sums = [_mm512_add_ps(sums[0], powers[0]), _mm512_add_ps(sums[1], powers[1])];
                store(powers, line);
            }
            if let [line, others @ ..] = others {
                let [low, high] = powers(masked_or(rest, f32::NEG_INFINITY), most, scale);
                let [of_low, of_high] = masks(rest.len());
                let powers = [_mm512_maskz_mov_ps(of_low, low), _mm512_maskz_mov_ps(of_high, high)];
                sums = [_mm512_add_ps(sums[0], powers[0]), _mm512_add_ps(sums[1], powers[1])];
                store(powers, line);
                others.fill(Line::ZERO);
            }
            self.factors.push(1.0 / _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])));
        }
    }

    /// The exponentials, one row after the other.
    pub(super) fn as_slice(&self) -> &[bf16] {
        Line::numbers(&self.lines)
    }
}

/// The gradients of the scores that `weights` were made of, from those of the weights, whose rows begin `step` apart:
/// `w * (g - sum(w * g)) * scale` with the weights as they are multiplied, rounded, into `to`, whose rows are as long as those
/// of the weights.
///
/// # Safety
/// The processor must have these features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn backward(weights: &Weights, grad: &[f32], step: usize, scale: f32, to: &mut Vec<Line>) {
    let lines = weights.lines.len() / weights.factors.len().max(1);
    to.resize(weights.lines.len(), Line::ZERO);
    let rows = weights.lines.chunks_exact(lines).zip(to.chunks_exact_mut(lines));
    for (i, ((weights, to), factor)) in rows.zip(&weights.factors).enumerate() {
        let grad = &grad[i * step..][..step];
        // past the last key both are zero
        let of = |at: usize| masked_or(grad.get(at * UNIT..).unwrap_or(&[]), 0.0);
        let mut sums = [_mm512_setzero_ps(); 2];
        for (at, weights) in weights.iter().enumerate() {
            let (w, g) = (widened(weights), of(at));
            sums = [_mm512_fmadd_ps(w[0], g[0], sums[0]), _mm512_fmadd_ps(w[1], g[1], sums[1])];
        }
        let mean = _mm512_set1_ps(factor * _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])));
        let factor = _mm512_set1_ps(factor * scale);
        for (at, (weights, to)) in weights.iter().zip(to).enumerate() {
            let (w, g) = (widened(weights), of(at));
            let [low, high] = [0, 1]
                .map(|half| _mm512_mul_ps(_mm512_mul_ps(w[half], factor), _mm512_sub_ps(g[half], mean)));
            // SAFETY: a line has room for 32 numbers, and begins where it should.
            unsafe {
                let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_store_si512(std::ptr::from_mut(to).cast(), rounded);
            }
        }
    }
}

/// 32 numbers of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn widened(line: &Line) -> [__m512; 2] {
    // SAFETY: a line has 32, and begins where it should.
    let line = unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) };
    let half = |half: __m256i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
    [half(_mm512_castsi512_si256(line)), half(_mm512_extracti64x4_epi64::<1>(line))]
}

/// The 32 scores of a whole line.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(scores: &[f32; UNIT]) -> [__m512; 2] {
    // SAFETY: there are 32.
    unsafe { [_mm512_loadu_ps(scores.as_ptr()), _mm512_loadu_ps(scores.as_ptr().add(LANES))] }
}

/// Which of 32 there are if there are `count`.
#[inline]
fn masks(count: usize) -> [__mmask16; 2] {
    [first_lanes(count), first_lanes(count.saturating_sub(LANES))]
}

/// The first 32 numbers; `nothing` where there are none.
#[inline]
#[target_feature(enable = "avx512f")]
fn masked_or(rest: &[f32], nothing: f32) -> [__m512; 2] {
    let nothing = _mm512_set1_ps(nothing);
    let [low, high] = masks(rest.len());
    // SAFETY: the masks leave out what is past the end.
    unsafe {
        let from_high = rest.as_ptr().wrapping_add(LANES);
        [_mm512_mask_loadu_ps(nothing, low, rest.as_ptr()), _mm512_mask_loadu_ps(nothing, high, from_high)]
    }
}

/// `2^(scale * (score - most))`.
#[inline]
#[target_feature(enable = "avx512f")]
fn powers(scores: [__m512; 2], most: __m512, scale: __m512) -> [__m512; 2] {
    let power = |score| exp2(_mm512_mul_ps(_mm512_sub_ps(score, most), scale));
    [power(scores[0]), power(scores[1])]
}

/// Rounds 32 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn store([low, high]: [__m512; 2], line: &mut Line) {
    // SAFETY: a line has room for 32 numbers, and begins where it should; both types are 64 bytes of any value.
    unsafe {
        let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
        _mm512_store_si512(std::ptr::from_mut(line).cast(), rounded);
    }
}

/// The largest of a row.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest(whole: &[[f32; UNIT]], rest: &[f32]) -> f32 {
    let larger = |a: [__m512; 2], b: [__m512; 2]| [_mm512_max_ps(a[0], b[0]), _mm512_max_ps(a[1], b[1])];
    // two at a time: each waits for the one before
    let (pairs, last) = whole.as_chunks::<2>();
    let (mut most, mut too) = (
        masked_or(rest, f32::NEG_INFINITY),
        last.first().map_or_else(|| masked_or(&[], f32::NEG_INFINITY), |scores| halves(scores)),
    );
    for [a, b] in pairs {
        (most, too) = (larger(most, halves(a)), larger(too, halves(b)));
    }
    let most = larger(most, too);
    _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1]))
}

/// `2^x` for `x` of 0 and below, with a relative error of 3e-6; never below `2^-126`, since results with fewer digits take the
/// processor a hundred cycles; NaN stays.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    /// `2^r` for `r` of half a unit at most: minimax of the relative error.
    const POLYNOMIAL: [f32; 5] = [0.999_999_3, 0.693_121_8, 0.240_247_44, 0.055_917_86, 0.009_570_102];

    // the second operand stays where one is NaN
    let x = _mm512_max_ps(_mm512_set1_ps(-126.0), x);
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let rest = _mm512_sub_ps(x, whole);
    let [first @ .., last] = POLYNOMIAL;
    let power = first
        .into_iter()
        .rev()
        .fold(_mm512_set1_ps(last), |sum, c| _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(c)));
    _mm512_scalef_ps(power, whole)
}

#[cfg(test)]
mod tests {
    use super::super::number::has_bf16;
    use super::*;

    #[test]
    fn exponentials_are_rounded_once_and_their_sums_not_at_all() {
        if !has_bf16() {
            return eprintln!("skipped: AVX-512 for bf16, which this processor does not have");
        }
        let (keys, width, scale) = (77, 96, 0.3_f32);
        let mut scores: Vec<f32> = (0..4 * 80).map(|i| ((i * 37) % 101) as f32 * 7.0 - 350.0).collect();
        scores[3 * 80 + 5] = f32::NAN;
        let seen = |i: usize| if i == 1 { 3 } else { keys };
        let mut weights = Weights::default();
        // SAFETY: the processor was asked; rows have 80 scores.
        unsafe { weights.fill(&scores, 80, 4, width, scale, seen) };
        for i in 0..3 {
            let row = &scores[i * 80..][..seen(i)];
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected = row.iter().map(|x| (f64::from(scale) * f64::from(x - most)).exp());
            let sum: f64 = expected.clone().sum();
            assert!((f64::from(weights.factors[i]) * sum - 1.0).abs() < 5e-6, "row {i}");
            let found = &weights.as_slice()[i * width..][..width];
            for (j, (found, expected)) in found.iter().zip(expected.chain(std::iter::repeat(0.0))).enumerate()
            {
                let error = (f64::from(found.to_f32()) - expected).abs();
                assert!(
                    error <= expected * 2_f64.powi(-8) * 1.01 + 1e-38,
                    "row {i}, {j}: {found}, {expected}"
                );
            }
        }
        assert!(weights.factors[3].is_nan());
    }
}
