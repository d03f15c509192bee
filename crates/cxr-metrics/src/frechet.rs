//! Fréchet distance between the Gaussian fits of two sets of features.
//!
//! The number depends on the network that made the features, so its name carries the extractor: only
//! with the Inception network of Heusel et al. (2017) is it called FID. For N below the feature width the
//! covariance is singular and the distance biased upwards: read it beside the kernel distance and a
//! real-versus-real floor at the same N.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::linalg::qr::no_pivoting::factor as qr;
use faer::linalg::svd;
use faer::{Accum, Mat, MatRef, Par, Side};

use crate::error::{MetricsError, Result};
use crate::features::{FeatureSet, check_finite, expect_samples, expect_size};
use crate::moments::Moments;
use crate::resample::multiplicities;

/// Rows per matrix product when a whole set is added.
const BLOCK: usize = 1024;

/// Streaming mean and covariance of feature vectors, in f64.
///
/// Statistics of shards [`merge`](Self::merge) into those of the whole, up to rounding, in any order.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureStatistics {
    count: usize,
    mean: Vec<f64>,
    /// Sum over samples of (x - mean)(x - mean)^T, row-major `[width, width]`.
    scatter: Vec<f64>,
}

impl FeatureStatistics {
    /// No samples yet, of `width` features each.
    pub fn new(width: usize) -> Self {
        Self { count: 0, mean: vec![0.0; width], scatter: vec![0.0; width * width] }
    }

    /// Statistics of a whole set.
    pub fn of(set: &FeatureSet) -> Self {
        let mut statistics = Self::new(set.width());
        for start in (0..set.len()).step_by(BLOCK) {
            let block = Self::of_block(set.matrix(start, (start + BLOCK).min(set.len())));
            statistics.absorb(&block);
        }
        statistics
    }

    /// Number of features.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// Number of samples so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Adds one sample `[width]` by Welford's update.
    ///
    /// # Errors
    /// Another width, a value that is not finite; the statistics are then unchanged.
    pub fn push(&mut self, row: &[f32]) -> Result<()> {
        expect_size(|| "width of the sample".into(), self.width(), row.len())?;
        check_finite("the sample", row, row.len().max(1))?;
        let before = self.count as f64;
        self.count += 1;
        let n = self.count as f64;
        let delta: Vec<f64> = row.iter().zip(&self.mean).map(|(&x, mean)| f64::from(x) - mean).collect();
        for (mean, d) in self.mean.iter_mut().zip(&delta) {
            *mean += d / n;
        }
        self.add_outer(&delta, before / n);
        Ok(())
    }

    /// Adds the samples of a set, by blocks.
    ///
    /// # Errors
    /// Another width.
    pub fn push_set(&mut self, set: &FeatureSet) -> Result<()> {
        self.merge(&Self::of(set))
    }

    /// Adds the samples of other statistics (Chan, Golub and LeVeque 1979).
    ///
    /// # Errors
    /// Another width.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        expect_size(|| "width of the statistics to merge".into(), self.width(), other.width())?;
        self.absorb(other);
        Ok(())
    }

    /// The mean `[width]`; zeros before the first sample.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The unbiased covariance (divisor N - 1), row-major `[width, width]`.
    ///
    /// # Errors
    /// Fewer than two samples.
    pub fn covariance(&self) -> Result<Vec<f64>> {
        expect_samples("the set of a covariance", 2, self.count)?;
        let divisor = (self.count - 1) as f64;
        Ok(self.scatter.iter().map(|sum| sum / divisor).collect())
    }

    fn of_block(mut block: Mat<f64>) -> Self {
        let (n, width) = block.shape();
        let mut mean = vec![0.0; width];
        for (j, mean) in mean.iter_mut().enumerate() {
            *mean = block.col(j).iter().sum::<f64>() / n.max(1) as f64;
            block.col_mut(j).iter_mut().for_each(|x| *x -= *mean);
        }
        let scatter = product(block.transpose(), block.as_ref());
        let scatter = (0..width * width).map(|i| scatter[(i / width, i % width)]).collect();
        Self { count: n, mean, scatter }
    }

    fn absorb(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        let (a, b) = (self.count as f64, other.count as f64);
        let delta: Vec<f64> = other.mean.iter().zip(&self.mean).map(|(new, old)| new - old).collect();
        for (mean, d) in self.mean.iter_mut().zip(&delta) {
            *mean += d * b / (a + b);
        }
        for (sum, more) in self.scatter.iter_mut().zip(&other.scatter) {
            *sum += more;
        }
        self.add_outer(&delta, a * b / (a + b));
        self.count += other.count;
    }

    fn add_outer(&mut self, delta: &[f64], factor: f64) {
        for (row, left) in self.scatter.chunks_exact_mut(delta.len().max(1)).zip(delta) {
            let left = left * factor;
            for (sum, right) in row.iter_mut().zip(delta) {
                *sum += left * right;
            }
        }
    }
}

/// Fréchet distance between two Gaussians, squared as is the custom:
/// `|mu1 - mu2|^2 + Tr S1 + Tr S2 - 2 Tr (S1^1/2 S2 S1^1/2)^1/2` (Dowson and Landau 1982).
///
/// The last trace is the sum of the square roots of the eigenvalues of `S1^1/2 S2 S1^1/2`. With
/// `Si = Wi Wi^T` those roots are the singular values of `W1^T W2`, and that is how they are computed: an
/// eigenvalue that should be zero comes out as 1e-16 of the largest, its square root as 1e-8, and hundreds
/// of them would show in the sum. Eigenvalues of `Si` at or below rounding (negative ones among them) count
/// as zero.
///
/// # Errors
/// Different widths, fewer than two samples, a decomposition that does not converge.
pub fn frechet_distance(first: &FeatureStatistics, second: &FeatureStatistics) -> Result<f64> {
    frechet_distance_of_moments(&Moments::of(first, None)?, &Moments::of(second, None)?)
}

/// [`frechet_distance`] of means and covariances, as files of statistics hold them.
///
/// # Errors
/// Different widths, a decomposition that does not converge.
pub fn frechet_distance_of_moments(first: &Moments, second: &Moments) -> Result<f64> {
    expect_size(|| "width of the second statistics".into(), first.width(), second.width())?;
    let [one, two] = [Root::of_moments(first)?, Root::of_moments(second)?];
    one.distance(&two)
}

/// [`frechet_distance`] between the statistics of one set and the features of another.
///
/// # Errors
/// Different widths, fewer than two images, a decomposition that does not converge.
pub fn frechet_distance_to_set(first: &Moments, second: &FeatureSet) -> Result<f64> {
    expect_size(|| "width of the features".into(), first.width(), second.width())?;
    second.expect_at_least(2, "the second set")?;
    let all: Vec<(usize, f64)> = (0..second.len()).map(|i| (i, 1.0)).collect();
    Root::of_moments(first)?.distance(&Root::of(second, &all))
}

/// [`frechet_distance`] of two sets of features.
///
/// With X the centred features over sqrt(N - 1), the covariance is `X^T X = R^T R`, R the triangle of `X = Q R`: the
/// last trace is the sum of the singular values of `R1 R2^T`, without an eigenvalue problem and its rounding. A set
/// of fewer images than features is its own root: `X` stands for `R`.
///
/// # Errors
/// Different widths, fewer than two images in a set, a decomposition that does not converge.
pub fn frechet_distance_of_sets(first: &FeatureSet, second: &FeatureSet) -> Result<f64> {
    let all = |set: &FeatureSet| (0..set.len()).collect::<Vec<usize>>();
    frechet_distance_on(first, &all(first), second, &all(second))
}

/// [`frechet_distance_of_sets`] on some images: positions in `first` and in `second`, repetitions allowed.
///
/// A repeated image is one row of greater weight, so that a bootstrap sample costs its 63 % different images.
///
/// # Errors
/// As [`frechet_distance_of_sets`].
///
/// # Panics
/// If a position is outside its set.
pub fn frechet_distance_on(
    first: &FeatureSet,
    first_positions: &[usize],
    second: &FeatureSet,
    second_positions: &[usize],
) -> Result<f64> {
    first.expect_width_of(second)?;
    expect_samples("the first set", 2, first_positions.len())?;
    expect_samples("the second set", 2, second_positions.len())?;
    let one = Root::of(first, &multiplicities(first_positions, first.len()));
    let two = Root::of(second, &multiplicities(second_positions, second.len()));
    one.distance(&two)
}

fn assemble(mean1: &[f64], mean2: &[f64], traces: f64, overlap: f64) -> f64 {
    let means: f64 = mean1.iter().zip(mean2).map(|(a, b)| (a - b) * (a - b)).sum();
    // Equal sets cancel to a rounding error of either sign; a distance is not negative.
    (means + traces - 2.0 * overlap).max(0.0)
}

/// Mean and covariance of a sample, the covariance as a root of it.
struct Root {
    /// `[d]`
    mean: Vec<f64>,
    /// `[min(n, d), d]` with `root^T root` the covariance, n the number of different images.
    root: Mat<f64>,
    /// Trace of the covariance.
    trace: f64,
}

impl Root {
    /// Of a covariance: `root` has as many rows as its rank.
    fn of_moments(moments: &Moments) -> Result<Self> {
        let width = moments.width();
        let covariance = MatRef::from_row_major_slice(&moments.covariance, width, width);
        Ok(Self {
            mean: moments.mean.clone(),
            root: square_root(covariance)?.transpose().to_owned(),
            trace: trace(covariance),
        })
    }

    fn distance(&self, other: &Self) -> Result<f64> {
        let overlap = nuclear_norm(product(self.root.as_ref(), other.root.transpose()).as_ref())?;
        Ok(assemble(&self.mean, &other.mean, self.trace + other.trace, overlap))
    }

    /// Of the images at some positions, each with how often it counts.
    fn of(set: &FeatureSet, sample: &[(usize, f64)]) -> Self {
        let width = set.width();
        let n: f64 = sample.iter().map(|(_, weight)| weight).sum();
        let mut mean = vec![0.0; width];
        for &(i, weight) in sample {
            mean.iter_mut().zip(set.row(i)).for_each(|(sum, x)| *sum += weight * f64::from(*x));
        }
        mean.iter_mut().for_each(|sum| *sum /= n);
        let mut root = Mat::<f64>::zeros(0, width);
        let mut trace = 0.0;
        // By blocks, each under the triangle of those before: a large set is never whole in f64. Twice the width
        // at least, or most of the work would be done on the triangle.
        for block in sample.chunks(BLOCK.max(2 * width)) {
            let above = root.nrows();
            root.resize_with(above + block.len(), width, |_, _| 0.0);
            for (row, &(i, weight)) in block.iter().enumerate() {
                let scale = (weight / (n - 1.0)).sqrt();
                for (j, (x, mean)) in set.row(i).iter().zip(&mean).enumerate() {
                    let x = (f64::from(*x) - mean) * scale;
                    root[(above + row, j)] = x;
                    trace += x * x;
                }
            }
            if root.nrows() > width {
                root = triangle(root);
            }
        }
        Self { mean, root, trace }
    }
}

/// `R` `[d, d]` of the QR decomposition of a matrix of more rows than columns.
fn triangle(mut matrix: Mat<f64>) -> Mat<f64> {
    let (rows, width) = matrix.shape();
    let par = parallelism(width);
    let block = qr::recommended_block_size::<f64>(rows, width);
    let mut householder = Mat::zeros(block, width);
    let scratch = qr::qr_in_place_scratch::<f64>(rows, width, block, par, Default::default());
    let mut memory = MemBuffer::new(scratch);
    qr::qr_in_place(
        matrix.as_mut(),
        householder.as_mut(),
        par,
        MemStack::new(&mut memory),
        Default::default(),
    );
    Mat::from_fn(width, width, |i, j| if i <= j { matrix[(i, j)] } else { 0.0 })
}

/// Threads for a decomposition of this width. A small one loses more to waiting for them than it gains, above all
/// where a bootstrap keeps every core busy already.
fn parallelism(width: usize) -> Par {
    if width <= 512 { Par::Seq } else { Par::rayon(0) }
}

/// `W` `[d, r]` with `W W^T` the covariance, r its numerical rank.
fn square_root(covariance: MatRef<'_, f64>) -> Result<Mat<f64>> {
    let width = covariance.nrows();
    let eigen = covariance
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| MetricsError::Decomposition { what: "a covariance" })?;
    let values: Vec<f64> = eigen.S().column_vector().iter().copied().collect();
    let largest = values.iter().copied().fold(0.0, f64::max);
    let rounding = largest * width as f64 * f64::EPSILON;
    let kept: Vec<usize> = (0..width).filter(|&i| values[i] > rounding).collect();
    let vectors = eigen.U();
    Ok(Mat::from_fn(width, kept.len(), |i, j| vectors[(i, kept[j])] * values[kept[j]].sqrt()))
}

/// Sum of the singular values.
fn nuclear_norm(matrix: MatRef<'_, f64>) -> Result<f64> {
    let (rows, columns) = matrix.shape();
    if rows == 0 || columns == 0 {
        return Ok(0.0);
    }
    let par = parallelism(rows.max(columns));
    let mut values = Diag::<f64>::zeros(rows.min(columns));
    let no = svd::ComputeSvdVectors::No;
    let mut memory = MemBuffer::new(svd::svd_scratch::<f64>(rows, columns, no, no, par, Default::default()));
    svd::svd(matrix, values.as_mut(), None, None, par, MemStack::new(&mut memory), Default::default())
        .map_err(|_| MetricsError::Decomposition { what: "the product of two covariances" })?;
    Ok(values.column_vector().iter().sum())
}

fn trace(matrix: MatRef<'_, f64>) -> f64 {
    (0..matrix.nrows()).map(|i| matrix[(i, i)]).sum()
}

pub(crate) fn product(left: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(left.nrows(), right.ncols());
    let par = parallelism(left.nrows().max(left.ncols()).max(right.ncols()));
    matmul(&mut out, Accum::Replace, left, right, 1.0, par);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_set;

    fn close(left: &[f64], right: &[f64], tolerance: f64) {
        for (a, b) in left.iter().zip(right) {
            assert!((a - b).abs() <= tolerance * (1.0 + a.abs()), "{a} against {b}");
        }
    }

    #[test]
    fn distance_to_itself_is_zero_in_both_forms_and_any_rank() {
        for (n, width) in [(300, 16), (40, 64), (2, 8), (500, 200)] {
            let set = random_set("self", n, width, 1.0);
            let statistics = FeatureStatistics::of(&set);
            assert!(frechet_distance(&statistics, &statistics).unwrap() < 1e-6);
            assert!(frechet_distance_of_sets(&set, &set).unwrap() < 1e-6);
        }
    }

    #[test]
    fn merged_shards_and_single_pushes_equal_the_whole_in_any_order() {
        let set = random_set("shards", 1500, 6, 3.0);
        let whole = FeatureStatistics::of(&set);
        let mut order: Vec<usize> = (0..set.len()).rev().collect();
        order.rotate_left(411);
        let shuffled = set.select(&order);
        let mut pushed = FeatureStatistics::new(6);
        shuffled.rows().take(700).for_each(|row| pushed.push(row).unwrap());
        let mut rest = FeatureStatistics::new(6);
        shuffled.rows().skip(700).for_each(|row| rest.push(row).unwrap());
        rest.merge(&pushed).unwrap();
        assert_eq!(rest.count(), whole.count());
        close(rest.mean(), whole.mean(), 1e-12);
        close(&rest.covariance().unwrap(), &whole.covariance().unwrap(), 1e-12);
        let other = FeatureStatistics::of(&random_set("other", 50, 6, 1.0));
        let [a, b] = [&whole, &rest].map(|s| frechet_distance(s, &other).unwrap());
        assert!((a - b).abs() < 1e-10 * a, "{a} against {b}");
    }

    #[test]
    fn both_forms_agree_below_full_rank_above_it_and_over_several_blocks() {
        for (n, m, width) in [(12, 17, 20), (12, 60, 20), (200, 2500, 6)] {
            let (x, y) = (random_set("x", n, width, 1.0), random_set("y", m, width, 1.5));
            let roots = frechet_distance_of_sets(&x, &y).unwrap();
            let moments = frechet_distance(&FeatureStatistics::of(&x), &FeatureStatistics::of(&y)).unwrap();
            assert!((roots - moments).abs() < 1e-6 * moments, "{roots} against {moments}");
        }
    }

    #[test]
    fn repetitions_count_as_images_of_their_own() {
        let (x, y) = (random_set("x", 40, 9, 1.0), random_set("y", 30, 9, 1.5));
        // More and fewer different images than features.
        for different in [25, 4] {
            let (a, b): (Vec<_>, Vec<_>) = (0..30).map(|i| (i * 7 % different, 29 - i % different)).unzip();
            let on = frechet_distance_on(&x, &a, &y, &b).unwrap();
            let copied = frechet_distance_of_sets(&x.select(&a), &y.select(&b)).unwrap();
            assert!((on - copied).abs() < 1e-10 * copied, "{on} against {copied}");
        }
    }

    #[test]
    fn a_shift_adds_its_square_and_the_distance_is_symmetric() {
        let x = random_set("x", 200, 5, 1.0);
        let moved = FeatureSet::new(x.values().iter().map(|v| v + 2.0).collect(), 5).unwrap();
        let there = frechet_distance_of_sets(&x, &moved).unwrap();
        assert!((there - 20.0).abs() < 1e-5, "{there}");
        let y = random_set("y", 100, 5, 2.0);
        let (a, b) = (frechet_distance_of_sets(&x, &y).unwrap(), frechet_distance_of_sets(&y, &x).unwrap());
        assert!((a - b).abs() < 1e-9 * a);
    }

    #[test]
    fn bad_input_is_an_error() {
        let mut one = FeatureStatistics::new(2);
        one.push(&[1.0, 2.0]).unwrap();
        assert!(matches!(one.covariance(), Err(MetricsError::TooFewSamples { needed: 2, found: 1, .. })));
        assert!(matches!(one.push(&[f32::NAN, 0.0]), Err(MetricsError::NonFinite { .. })));
        assert!(matches!(one.push(&[0.0]), Err(MetricsError::SizeMismatch { .. })));
        assert_eq!(one.count(), 1);
        assert!(one.merge(&FeatureStatistics::new(3)).is_err());
        let (a, b) = (random_set("a", 5, 3, 1.0), random_set("b", 5, 4, 1.0));
        assert!(matches!(frechet_distance_of_sets(&a, &b), Err(MetricsError::SizeMismatch { .. })));
        assert!(matches!(
            frechet_distance_of_sets(&a, &a.select(&[1])),
            Err(MetricsError::TooFewSamples { .. })
        ));
    }
}
