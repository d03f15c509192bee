//! Exponential and normal distribution for loops that the compiler vectorizes, and the choice of instruction set.
//!
//! Everything here is branch-free plain Rust. A loop over it becomes a [`Kernel`], and [`dispatch`] runs that
//! kernel compiled for the widest vectors of the processor at hand.

/// A loop that [`dispatch`] compiles once per instruction set.
pub(super) trait Kernel {
    /// What the loop returns.
    type Output;

    /// The loop; must be `#[inline(always)]`, as everything it calls, to be compiled for the caller's vectors.
    ///
    /// `FMA` says whether multiply-add is one instruction; otherwise it would be a library call.
    fn run<const FMA: bool>(self) -> Self::Output;
}

/// The vector instructions that a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vectors {
    /// 512 bits, x86-64 alone.
    Avx512,
    /// 256 bits with multiply-add, x86-64 alone.
    Avx2,
    /// What the target has without asking.
    Portable,
}

impl Vectors {
    /// The widest of this processor: a choice that depends on it alone, so that results repeat.
    pub(super) fn widest() -> Self {
        let widest = [Self::Avx512, Self::Avx2].into_iter().find(|vectors| vectors.are_here());
        widest.unwrap_or(Self::Portable)
    }

    /// Whether this processor has them.
    pub(super) fn are_here(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.are_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Portable => true,
        }
    }

    /// Runs `kernel`, compiled for these vectors.
    ///
    /// # Safety
    /// They must be [here](Self::are_here).
    pub(super) unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY: the processor has these features, says the caller.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(kernel) },
            _ => kernel.run::<{ cfg!(any(target_arch = "aarch64", target_feature = "fma")) }>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<true>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<true>()
}

/// Runs `kernel` with the widest vectors of this processor.
///
/// The choice depends on the processor alone, so that results repeat; every element is computed by the same
/// operations wherever it lies in a vector.
pub(super) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the processor was asked.
    unsafe { Vectors::widest().run(kernel) }
}

/// The mask of the first `count` of sixteen lanes.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn first_lanes(count: usize) -> std::arch::x86_64::__mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// `a * b + c`.
#[inline(always)]
pub(super) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The polynomial with these coefficients, lowest first.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for i in (0..N - 1).rev() {
        sum = mul_add::<FMA>(sum, x, coefficients[i]);
    }
    sum
}

/// `e^(x + low)`, for a `low` that is small beside `x` and beside one.
///
/// Relative error below 2e-7, denormal results included (to their last bit); 0 and infinity beyond; NaN stays.
#[inline(always)]
fn exp_sum<const FMA: bool>(x: f32, low: f32) -> f32 {
    // Comparisons written so that NaN passes.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let (p, n) = parts::<FMA>(x, low);
    // 2^n in two factors: one alone has no room for the results that are denormal or just below the largest.
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `p` and `n` of `e^(x + low) = p * 2^n`, `p` between 0.7 and 1.5, for an `x` whose `n` is that of an f32.
#[inline(always)]
fn parts<const FMA: bool>(x: f32, low: f32) -> (f32, i32) {
    // 1.5 * 2^23: adding it rounds to the nearest integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has nine bits, so that its product with the integer is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: minimax, error 3e-9 of e^r.
    const TAIL: [f32; 5] = [0.499_999_93, 0.166_665_2, 0.041_668_39, 0.008_368_745, 0.001_381_454];

    let shifted = mul_add::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN2_HIGH, x);
    let r = mul_add::<FMA>(n, -LN2_LOW, r) + low;
    let p = mul_add::<FMA>(polynomial::<FMA, 5>(r, TAIL), r * r, r) + 1.0;
    (p, shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32)
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `e^x`; relative error below 2e-7 (denormal results: to their last bit).
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    exp_sum::<FMA>(x, 0.0)
}

/// `e^x` for `x` of zero or less: [`exp`], but never below the smallest normal number, since what has fewer digits takes a
/// step more, and processors a hundred cycles.
#[inline(always)]
pub(super) fn exp_below<const FMA: bool>(x: f32) -> f32 {
    /// `ln(2^-126)`, towards zero.
    const LEAST: f32 = -87.336_54;

    // a comparison that NaN passes
    let x = if x < LEAST { LEAST } else { x };
    let (p, n) = parts::<FMA>(x, 0.0);
    p * power_of_two(n)
}

/// `1 / (1 + e^-x)` and `1 / (1 + e^x)`: each to a relative error below 3e-7, with no cancellation between them.
#[inline(always)]
pub(super) fn sigmoids<const FMA: bool>(x: f32) -> (f32, f32) {
    let z = exp::<FMA>(-x.abs());
    let large = 1.0 / (1.0 + z);
    let small = z * large;
    if x >= 0.0 { (large, small) } else { (small, large) }
}

/// The standard normal's distribution function and its density at `x`; relative errors below 1e-6, in the lower
/// tail too (which `0.5 * (1 + erf(x / sqrt(2)))` loses).
///
/// `Phi(-t) = e^(-t^2 / 2) R(t)` with the Mills ratio `R`, here `P(v) / (t + 3)` with a polynomial in
/// `v = (t - 3) / (t + 3)`, after Shepherd and Laframboise (1981).
#[inline(always)]
pub(super) fn normal<const FMA: bool>(x: f32) -> (f32, f32) {
    // (t + 3) R(t): minimax for 0 <= t <= 16, relative error 2.3e-8.
    const RATIO: [f32; 10] = [
        0.729_083_7,
        -0.509_332_2,
        0.230_017_47,
        -0.047_257_744,
        -0.010_459_727,
        0.006_936_029,
        0.001_006_831_3,
        -0.000_948_607_1,
        -0.000_191_472_27,
        0.000_059_343_727,
    ];
    const DENSITY: f32 = 0.398_942_3;

    let t = x.abs();
    // Beyond 16 both are zero in f32.
    let t = if t > 16.0 { 16.0 } else { t };
    // t^2 to more than 24 bits: the square of the upper half of t's digits is exact.
    let high = f32::from_bits(t.to_bits() & 0xffff_f000);
    let bell = exp_sum::<FMA>(-0.5 * high * high, -0.5 * (t - high) * (t + high));
    let inverse = 1.0 / (t + 3.0);
    let tail = bell * polynomial::<FMA, 10>((t - 3.0) * inverse, RATIO) * inverse;
    (if x > 0.0 { 1.0 - tail } else { tail }, DENSITY * bell)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_of_what_is_not_positive_are_those_of_all_numbers() {
        for i in 0..2_000_000 {
            let x = -87.336_5 * i as f32 / 2e6;
            assert_eq!(exp_below::<true>(x).to_bits(), exp::<true>(x).to_bits(), "{x}");
            assert_eq!(exp_below::<false>(x).to_bits(), exp::<false>(x).to_bits(), "{x}");
        }
        for x in [-88.0, -1e30, f32::NEG_INFINITY] {
            let least = exp_below::<true>(x);
            let bounds = f32::MIN_POSITIVE..1.001 * f32::MIN_POSITIVE;
            assert!(bounds.contains(&least), "{x}: {least:e}");
        }
        assert_eq!(exp_below::<true>(0.0), 1.0);
        assert!(exp_below::<true>(f32::NAN).is_nan());
    }
}
