//! Sums over slices, in f64 and in an order that depends on the length alone.

/// Independent partial sums: enough to fill the vector units whatever their width.
const LANES: usize = 16;

/// Mean and inverse deviation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moments {
    pub(super) mean: f64,
    /// `1 / sqrt(biased variance + eps)`.
    pub(super) inverse: f64,
}

impl Moments {
    /// What to take off each element first: the mean as an f32.
    ///
    /// The difference of two near f32 numbers is exact. `x * scale + shift` instead would lose the digits that a
    /// mean far from zero, or a variance near zero, has in common between its two terms.
    #[inline(always)]
    pub(super) fn centre(self) -> f32 {
        self.mean as f32
    }

    /// What [`centre`](Self::centre) leaves of the mean.
    #[inline(always)]
    pub(super) fn off_centre(self) -> f64 {
        self.mean - self.mean as f32 as f64
    }
}

/// The moments of `x`, in one read: squares of f32 are exact in f64, and so is what their mean loses.
#[inline(always)]
pub(super) fn moments<const FMA: bool>(x: &[f32], eps: f64) -> Moments {
    let [sum, squares] = sums::<FMA>(x, x);
    let count = x.len() as f64;
    let mean = sum / count;
    let variance = squares / count - mean * mean;
    // Not `max`: that would turn NaN into zero.
    let variance = if variance < 0.0 { 0.0 } else { variance };
    Moments { mean, inverse: 1.0 / (variance + eps).sqrt() }
}

/// The sum of `x`.
#[inline(always)]
pub(super) fn sum(x: &[f32]) -> f64 {
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut sum = [0.0_f64; LANES];
    for x in blocks {
        for i in 0..LANES {
            sum[i] += x[i] as f64;
        }
    }
    for (i, x) in rest.iter().enumerate() {
        sum[i] += *x as f64;
    }
    total(sum)
}

/// The sum of `x`, and that of `x * y`.
///
/// The product of two f32 is exact in f64, so that its sum is the same with one rounding or two. But of separate
/// instructions the compiler makes vectors of two numbers, which take seven times as long as those that there are.
#[inline(always)]
pub(super) fn sums<const FMA: bool>(x: &[f32], y: &[f32]) -> [f64; 2] {
    let add_product = |x: f32, y: f32, sum: f64| {
        let (x, y) = (f64::from(x), f64::from(y));
        if FMA { x.mul_add(y, sum) } else { x * y + sum }
    };
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (y_blocks, y_rest) = y.as_chunks::<LANES>();
    let (mut sum, mut product) = ([0.0_f64; LANES], [0.0_f64; LANES]);
    for (x, y) in x_blocks.iter().zip(y_blocks) {
        for i in 0..LANES {
            sum[i] += x[i] as f64;
            product[i] = add_product(x[i], y[i], product[i]);
        }
    }
    for (i, (x, y)) in x_rest.iter().zip(y_rest).enumerate() {
        sum[i] += *x as f64;
        product[i] = add_product(*x, *y, product[i]);
    }
    [total(sum), total(product)]
}

#[inline(always)]
fn total(lanes: [f64; LANES]) -> f64 {
    lanes.iter().sum()
}
