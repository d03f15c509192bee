//! Kernel distance: the squared maximum mean discrepancy under a cubic kernel.
//!
//! With Inception features this is KID (Binkowski et al. 2018, <https://arxiv.org/abs/1801.01401>); with
//! others it carries their name. Unlike the Fréchet distance it is unbiased at any N, and so may come out
//! slightly negative for two sets of one distribution.

use cxr_core::random::Stream;
use faer::Mat;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::FeatureSet;
use crate::frechet::product;
use crate::resample::{choose, multiplicities};

/// Rows per matrix product.
const BLOCK: usize = 512;

/// How random subsets are drawn for the mean and standard deviation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubsetConfig {
    /// Number of subsets; more cost proportionally more time and steady the mean. 100 is the custom.
    pub subsets: usize,
    /// Images per subset and set, drawn without replacement. 1000 is the custom.
    pub size: usize,
    /// Seed of the streams that draw them.
    pub seed: u64,
}

impl SubsetConfig {
    /// The custom for sets of these sizes: 100 subsets of 1000 images, or of half the smaller set where
    /// that is less (with all images every subset would be the same, and the deviation a zero that lies).
    pub fn for_sets(n_real: usize, n_fake: usize, seed: u64) -> Self {
        Self { subsets: 100, size: (n_real.min(n_fake) / 2).clamp(2, 1000), seed }
    }
}

/// Kernel distance over random subsets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SubsetDistance {
    /// Mean over subsets.
    pub mean: f64,
    /// Population standard deviation over subsets, as torch-fidelity prints it. Subsets overlap, so this is
    /// no standard error of the mean.
    pub standard_deviation: f64,
    /// Number of subsets.
    pub subsets: usize,
    /// Images per subset and set.
    pub size: usize,
}

/// Unbiased squared MMD of two whole sets under `k(x, y) = (x . y / d + 1)^3`, in f64, by blocks.
///
/// # Errors
/// Different widths, fewer than two images in a set.
pub fn kernel_distance(real: &FeatureSet, fake: &FeatureSet) -> Result<f64> {
    check(real, fake, 2)?;
    let (n, m) = (real.len() as f64, fake.len() as f64);
    let within = |set: &FeatureSet, n: f64| {
        let (total, diagonal) = kernel_sums(set, set);
        (total - diagonal) / (n * (n - 1.0))
    };
    Ok(within(real, n) + within(fake, m) - 2.0 * kernel_sums(real, fake).0 / (n * m))
}

/// Mean and deviation of the kernel distance over random subsets, as torch-fidelity's `kid_mean` and
/// `kid_std` (cubic kernel, `gamma = 1 / d`, `coef0 = 1`). Subset i comes from the streams
/// (`seed`, `kernel-distance/real` or `/fake`, i), so subsets do not depend on how many are drawn.
///
/// # Errors
/// As [`kernel_distance`]; no subsets, a size below two or above the smaller set.
pub fn kernel_distance_subsets(
    real: &FeatureSet,
    fake: &FeatureSet,
    config: &SubsetConfig,
) -> Result<SubsetDistance> {
    let smaller = real.len().min(fake.len());
    if config.size < 2 || config.size > smaller {
        return Err(MetricsError::InvalidParameter {
            name: "size",
            value: config.size.to_string(),
            expected: format!("2 to {smaller}, the images of the smaller set"),
        });
    }
    let draw = |purpose: &str, index: usize, n: usize| {
        choose(&mut Stream::new(config.seed, purpose, index as u64), n, config.size)
    };
    let subsets: Vec<(Vec<usize>, Vec<usize>)> = (0..config.subsets)
        .map(|i| (draw("kernel-distance/real", i, real.len()), draw("kernel-distance/fake", i, fake.len())))
        .collect();
    kernel_distance_on(real, fake, &subsets)
}

/// [`kernel_distance_subsets`] on given subsets: pairs of positions in `real` and in `fake`.
///
/// # Errors
/// As [`kernel_distance`]; no subsets, a subset of fewer than two images, a position outside its set.
pub fn kernel_distance_on(
    real: &FeatureSet,
    fake: &FeatureSet,
    subsets: &[(Vec<usize>, Vec<usize>)],
) -> Result<SubsetDistance> {
    check(real, fake, 2)?;
    if subsets.is_empty() {
        return Err(MetricsError::InvalidParameter {
            name: "subsets",
            value: "0".into(),
            expected: "at least one".into(),
        });
    }
    for (indices, set) in subsets.iter().flat_map(|(r, f)| [(r, real), (f, fake)]) {
        if let Some(outside) = indices.iter().find(|&&i| i >= set.len()) {
            return Err(MetricsError::InvalidParameter {
                name: "subset position",
                value: outside.to_string(),
                expected: format!("below {}, the images of the set", set.len()),
            });
        }
    }
    let values = subsets
        .par_iter()
        .map(|(r, f)| kernel_distance(&real.select(r), &fake.select(f)))
        .collect::<Result<Vec<f64>>>()?;
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / values.len() as f64;
    Ok(SubsetDistance {
        mean,
        standard_deviation: variance.sqrt(),
        subsets: subsets.len(),
        size: subsets[0].0.len(),
    })
}

/// The three kernel matrices of two sets, for statistics over many resamples of them. Takes
/// `8 (N^2 + M^2 + N M)` bytes: 24 MB for two thousand images in all, 2.4 GB for twenty thousand.
#[derive(Debug, Clone)]
pub struct KernelMatrices {
    real: Mat<f64>,
    fake: Mat<f64>,
    cross: Mat<f64>,
}

impl KernelMatrices {
    /// Evaluates the kernel on all pairs.
    ///
    /// # Errors
    /// As [`kernel_distance`].
    pub fn new(real: &FeatureSet, fake: &FeatureSet) -> Result<Self> {
        check(real, fake, 2)?;
        let matrix = |a: &FeatureSet, b: &FeatureSet| {
            let mut k = product(a.matrix(0, a.len()).as_ref(), b.matrix(0, b.len()).transpose());
            let scale = (a.width() as f64).recip();
            for j in 0..k.ncols() {
                k.col_mut(j).iter_mut().for_each(|dot| *dot = cubic(*dot, scale));
            }
            k
        };
        Ok(Self { real: matrix(real, real), fake: matrix(fake, fake), cross: matrix(real, fake) })
    }

    /// Kernel distance between images `real` and `fake` (positions, repetitions allowed).
    ///
    /// Pairs of an image with itself are left out, its repetitions included: a bootstrap sample repeats
    /// images, and counting those pairs would move every replicate upwards. Without repetitions this is
    /// [`kernel_distance`] of the selected images.
    ///
    /// # Errors
    /// Fewer than two different images in a sample.
    ///
    /// # Panics
    /// If a position is outside its set.
    pub fn distance_on(&self, real: &[usize], fake: &[usize]) -> Result<f64> {
        let (r, f) = (multiplicities(real, self.real.nrows()), multiplicities(fake, self.fake.nrows()));
        crate::features::expect_samples("the resampled real set", 2, r.len())?;
        crate::features::expect_samples("the resampled fake set", 2, f.len())?;
        let mut cross = 0.0;
        for &(j, weight) in &f {
            let column = self.cross.col(j);
            cross += weight * r.iter().map(|&(i, weight)| weight * column[i]).sum::<f64>();
        }
        let pairs = (real.len() * fake.len()) as f64;
        Ok(within(&self.real, &r) + within(&self.fake, &f) - 2.0 * cross / pairs)
    }
}

/// Weighted mean of the kernel over pairs of different images.
fn within(kernel: &Mat<f64>, weights: &[(usize, f64)]) -> f64 {
    let mut total = 0.0;
    for (position, &(j, weight)) in weights.iter().enumerate() {
        let column = kernel.col(j);
        total += weight * weights[..position].iter().map(|&(i, weight)| weight * column[i]).sum::<f64>();
    }
    let n: f64 = weights.iter().map(|(_, w)| w).sum();
    let same: f64 = weights.iter().map(|(_, w)| w * w).sum();
    2.0 * total / (n * n - same)
}

/// Sum of the kernel over all pairs, and over pairs of equal position.
fn kernel_sums(a: &FeatureSet, b: &FeatureSet) -> (f64, f64) {
    let scale = (a.width() as f64).recip();
    let starts = |n: usize| (0..n).step_by(BLOCK);
    let (mut total, mut diagonal) = (0.0, 0.0);
    for i in starts(a.len()) {
        let left = a.matrix(i, (i + BLOCK).min(a.len()));
        for j in starts(b.len()) {
            let right = b.matrix(j, (j + BLOCK).min(b.len()));
            let dots = product(left.as_ref(), right.transpose());
            for column in dots.col_iter() {
                total += column.iter().map(|&dot| cubic(dot, scale)).sum::<f64>();
            }
            if i == j {
                let n = dots.nrows().min(dots.ncols());
                diagonal += (0..n).map(|k| cubic(dots[(k, k)], scale)).sum::<f64>();
            }
        }
    }
    (total, diagonal)
}

fn cubic(dot: f64, scale: f64) -> f64 {
    let base = dot * scale + 1.0;
    base * base * base
}

fn check(real: &FeatureSet, fake: &FeatureSet, needed: usize) -> Result<()> {
    real.expect_width_of(fake)?;
    real.expect_at_least(needed, "the real set")?;
    fake.expect_at_least(needed, "the fake set")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_set;

    /// The definition, pair by pair.
    fn naive(x: &FeatureSet, y: &FeatureSet) -> f64 {
        let k = |a: &[f32], b: &[f32]| {
            let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            (dot / a.len() as f64 + 1.0).powi(3)
        };
        let mean = |x: &FeatureSet, y: &FeatureSet, same: bool| {
            let mut sum = (0.0, 0.0);
            for (i, a) in x.rows().enumerate() {
                for (j, b) in y.rows().enumerate() {
                    if !(same && i == j) {
                        sum = (sum.0 + k(a, b), sum.1 + 1.0);
                    }
                }
            }
            sum.0 / sum.1
        };
        mean(x, x, true) + mean(y, y, true) - 2.0 * mean(x, y, false)
    }

    #[test]
    fn blocks_and_matrices_follow_the_definition() {
        let (x, y) = (random_set("x", 600, 7, 1.0), random_set("y", 530, 7, 1.2));
        let expected = naive(&x, &y);
        assert!((kernel_distance(&x, &y).unwrap() - expected).abs() < 1e-10);
        let matrices = KernelMatrices::new(&x, &y).unwrap();
        let (all_x, all_y): (Vec<_>, Vec<_>) = ((0..600).collect(), (0..530).collect());
        assert!((matrices.distance_on(&all_x, &all_y).unwrap() - expected).abs() < 1e-10);
    }

    #[test]
    fn repeated_images_do_not_move_the_distance_upwards() {
        let (x, y) = (random_set("x", 40, 7, 1.0), random_set("y", 40, 7, 1.0));
        let matrices = KernelMatrices::new(&x, &y).unwrap();
        let plain: Vec<usize> = (0..40).collect();
        let twice: Vec<usize> = (0..80).map(|i| i / 2).collect();
        let single = matrices.distance_on(&plain, &plain).unwrap();
        assert!((matrices.distance_on(&twice, &twice).unwrap() - single).abs() < 1e-12);
        // The same repetitions as if they were new images do move it.
        assert!((kernel_distance(&x.select(&twice), &y.select(&twice)).unwrap() - single).abs() > 1e-2);
    }

    #[test]
    fn unbiased_where_the_sets_agree() {
        let values: Vec<f64> = (0..60)
            .map(|i| {
                let (x, y) =
                    (random_set(&format!("x{i}"), 25, 4, 1.0), random_set(&format!("y{i}"), 25, 4, 1.0));
                kernel_distance(&x, &y).unwrap()
            })
            .collect();
        let mean = values.iter().sum::<f64>() / 60.0;
        let error = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 60.0).sqrt() / 60f64.sqrt();
        assert!(mean.abs() < 4.0 * error, "{mean} with standard error {error}");
        assert!(values.iter().any(|v| *v < 0.0));
    }

    #[test]
    fn subsets_are_named_by_seed_and_index() {
        let (x, y) = (random_set("x", 30, 4, 1.0), random_set("y", 24, 4, 1.5));
        let config = SubsetConfig { subsets: 10, size: 12, seed: 3 };
        let first = kernel_distance_subsets(&x, &y, &config).unwrap();
        assert_eq!(first, kernel_distance_subsets(&x, &y, &config).unwrap());
        let other = kernel_distance_subsets(&x, &y, &SubsetConfig { seed: 4, ..config.clone() }).unwrap();
        assert_ne!(first.mean, other.mean);
        assert!(first.standard_deviation > 0.0);
        assert_eq!(SubsetConfig::for_sets(30, 24, 0).size, 12);
        assert_eq!(SubsetConfig::for_sets(9000, 5000, 0).size, 1000);
    }

    #[test]
    fn bad_input_is_an_error() {
        let (x, y) = (random_set("x", 8, 4, 1.0), random_set("y", 8, 5, 1.0));
        assert!(matches!(kernel_distance(&x, &y), Err(MetricsError::SizeMismatch { .. })));
        assert!(matches!(kernel_distance(&x, &x.select(&[0])), Err(MetricsError::TooFewSamples { .. })));
        for config in [(0, 4), (3, 9), (3, 1)] {
            let config = SubsetConfig { subsets: config.0, size: config.1, seed: 0 };
            assert!(kernel_distance_subsets(&x, &x, &config).is_err());
        }
        assert!(kernel_distance_on(&x, &x, &[(vec![0, 8], vec![0, 1])]).is_err());
        let matrices = KernelMatrices::new(&x, &x).unwrap();
        assert!(matrices.distance_on(&[1, 1, 1], &[0, 1]).is_err());
    }
}
