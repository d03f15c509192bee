//! Logistic regression with an L2 penalty, by Newton steps in f64.

use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::{FeatureSet, expect_size};

/// How a head is trained. The result is a function of the data alone: there is no random start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogisticConfig {
    /// Weight of the data against the penalty, as scikit-learn's `C`: small for few pictures and many features.
    pub c: f64,
    /// Whether features are brought to mean 0 and deviation 1 over the training pictures first, so that the
    /// penalty treats them alike.
    pub standardize: bool,
    /// Newton steps at most; 10 to 20 are usual.
    pub max_steps: usize,
}

impl Default for LogisticConfig {
    /// `c` 0.01, standardized, 100 steps.
    fn default() -> Self {
        Self { c: 0.01, standardize: true, max_steps: 100 }
    }
}

impl LogisticConfig {
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.c.is_finite() && self.c > 0.0) {
            return Err(MetricsError::InvalidParameter {
                name: "c",
                value: self.c.to_string(),
                expected: "a positive number, as 0.01".into(),
            });
        }
        if self.max_steps == 0 {
            return Err(MetricsError::InvalidParameter {
                name: "max_steps",
                value: "0".into(),
                expected: "at least one".into(),
            });
        }
        Ok(())
    }
}

/// A linear function of features: `score = coefficients . features + intercept`, the logit of the finding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinearHead {
    /// One per feature, of features as they are (standardization is undone).
    pub coefficients: Vec<f64>,
    /// What is added.
    pub intercept: f64,
}

impl LinearHead {
    /// Minimizes `|w|^2 / 2 + c sum ln(1 + exp(-y (w . x + b)))` over the pictures at `rows`, y = 1 where `labels`
    /// is true and -1 elsewhere; the intercept b is free of the penalty. Equal to scikit-learn's
    /// `LogisticRegression(C=c)`.
    ///
    /// # Errors
    /// Lengths that do not agree, pictures of one class alone, a configuration that is not valid, no convergence.
    ///
    /// # Panics
    /// If a row is not below the number of pictures.
    pub fn fit(
        features: &FeatureSet,
        rows: &[usize],
        labels: &[bool],
        config: &LogisticConfig,
    ) -> Result<Self> {
        config.validate()?;
        expect_size(|| "labels of a head's pictures".into(), rows.len(), labels.len())?;
        let positives = labels.iter().filter(|label| **label).count();
        if positives == 0 || positives == labels.len() {
            return Err(MetricsError::OneClass { pictures: labels.len(), positives });
        }
        let (means, scales) = moments(features, rows, config.standardize);
        let width = features.width();
        let mut values = Vec::with_capacity(rows.len() * width);
        for row in rows {
            let row = features.row(*row).iter().zip(means.iter().zip(&scales));
            values.extend(row.map(|(x, (mean, scale))| (f64::from(*x) - mean) * scale));
        }
        let signs: Vec<f64> = labels.iter().map(|label| if *label { 1.0 } else { -1.0 }).collect();
        let problem = Problem { values: &values, width, signs: &signs, c: config.c };
        let mut start = vec![0.0; width + 1];
        // The best constant: from 0 the first steps would go into it alone.
        start[width] = (positives as f64 / (labels.len() - positives) as f64).ln();
        let solution = problem.minimize(start, config.max_steps)?;
        let coefficients: Vec<f64> =
            solution[..width].iter().zip(&scales).map(|(w, scale)| w * scale).collect();
        let moved: f64 = coefficients.iter().zip(&means).map(|(w, mean)| w * mean).sum();
        Ok(Self { intercept: solution[width] - moved, coefficients })
    }

    /// The score of every picture.
    ///
    /// # Errors
    /// Features of another width.
    pub fn scores(&self, features: &FeatureSet) -> Result<Vec<f32>> {
        expect_size(|| "features per picture".into(), self.coefficients.len(), features.width())?;
        let score = |row: &[f32]| {
            let sum: f64 = row.iter().zip(&self.coefficients).map(|(x, w)| f64::from(*x) * w).sum();
            (sum + self.intercept) as f32
        };
        Ok(features.rows().map(score).collect())
    }
}

/// Mean and one over the deviation of each feature; 0 and 1 where that is not asked for.
fn moments(features: &FeatureSet, rows: &[usize], standardize: bool) -> (Vec<f64>, Vec<f64>) {
    let width = features.width();
    if !standardize {
        return (vec![0.0; width], vec![1.0; width]);
    }
    let n = rows.len() as f64;
    let mut means = vec![0.0; width];
    for row in rows {
        means.iter_mut().zip(features.row(*row)).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    means.iter_mut().for_each(|mean| *mean /= n);
    let mut squares = vec![0.0; width];
    for row in rows {
        let row = features.row(*row).iter().zip(&means);
        squares.iter_mut().zip(row).for_each(|(sum, (x, mean))| *sum += (f64::from(*x) - mean).powi(2));
    }
    // A feature that never varies says nothing: its coefficient stays 0.
    let inverse = |square: f64| if square > 0.0 { (square / n).sqrt().recip() } else { 0.0 };
    (means, squares.into_iter().map(inverse).collect())
}

/// The function that is minimized; the intercept is the last of its `width + 1` variables.
struct Problem<'a> {
    values: &'a [f64],
    width: usize,
    signs: &'a [f64],
    c: f64,
}

/// Value, gradient, and the weight of each picture in the second derivative.
struct Point {
    value: f64,
    gradient: Vec<f64>,
    curvature: Vec<f64>,
}

impl Problem<'_> {
    fn rows(&self) -> impl Iterator<Item = (&[f64], f64)> {
        self.values.chunks_exact(self.width).zip(self.signs.iter().copied())
    }

    fn at(&self, x: &[f64]) -> Point {
        let (weights, intercept) = (&x[..self.width], x[self.width]);
        let mut value = 0.5 * dot(weights, weights);
        let mut gradient = weights.to_vec();
        gradient.push(0.0);
        let mut curvature = Vec::with_capacity(self.signs.len());
        for (row, sign) in self.rows() {
            let margin = sign * (dot(row, weights) + intercept);
            // ln(1 + exp(-m)) without overflow.
            value += self.c * ((-margin).max(0.0) + (-margin.abs()).exp().ln_1p());
            let miss = 1.0 / (1.0 + margin.exp());
            let slope = -self.c * sign * miss;
            axpy(slope, row, &mut gradient[..self.width]);
            gradient[self.width] += slope;
            curvature.push(self.c * miss * (1.0 - miss));
        }
        Point { value, gradient, curvature }
    }

    /// The second derivative times a vector: one pass over the pictures, no matrix.
    fn curve(&self, curvature: &[f64], v: &[f64]) -> Vec<f64> {
        let mut out = v[..self.width].to_vec();
        out.push(0.0);
        for ((row, _), weight) in self.rows().zip(curvature) {
            let along = weight * (dot(row, &v[..self.width]) + v[self.width]);
            axpy(along, row, &mut out[..self.width]);
            out[self.width] += along;
        }
        out
    }

    /// Newton's method, each step by conjugate gradients, halved until the value falls (Nocedal and Wright 2006,
    /// algorithm 7.1).
    fn minimize(&self, mut x: Vec<f64>, max_steps: usize) -> Result<Vec<f64>> {
        let mut point = self.at(&x);
        let first = norm(&point.gradient).max(1e-300);
        for _ in 0..max_steps {
            let size = norm(&point.gradient);
            if size <= 1e-9 * first.max(1.0) {
                return Ok(x);
            }
            let step = self.direction(&point, (0.5f64).min((size / first).sqrt()) * 1e-2 * size);
            let slope = dot(&step, &point.gradient);
            let mut length = 1.0;
            loop {
                let next: Vec<f64> = x.iter().zip(&step).map(|(x, s)| x + length * s).collect();
                let there = self.at(&next);
                if there.value <= point.value + 1e-4 * length * slope {
                    (x, point) = (next, there);
                    break;
                }
                length *= 0.5;
                // Rounding is all that is left: the value cannot fall any more.
                if length < 1e-10 {
                    return if size <= 1e-5 * first.max(1.0) { Ok(x) } else { Err(self.failed(size)) };
                }
            }
        }
        // Steps that move by rounding alone: the last ones fall within the noise of the gradient.
        let size = norm(&point.gradient);
        if size <= 1e-7 * first.max(1.0) { Ok(x) } else { Err(self.failed(size)) }
    }

    /// An approximate solution of `H step = -gradient`.
    fn direction(&self, point: &Point, tolerance: f64) -> Vec<f64> {
        let mut step = vec![0.0; self.width + 1];
        let mut residual: Vec<f64> = point.gradient.iter().map(|g| -g).collect();
        let mut conjugate = residual.clone();
        let mut square = dot(&residual, &residual);
        for _ in 0..10 * (self.width + 1) {
            if square.sqrt() <= tolerance {
                break;
            }
            let curved = self.curve(&point.curvature, &conjugate);
            let along = dot(&conjugate, &curved);
            if along <= 0.0 {
                break;
            }
            let length = square / along;
            axpy(length, &conjugate, &mut step);
            axpy(-length, &curved, &mut residual);
            let next = dot(&residual, &residual);
            let keep = next / square;
            conjugate.iter_mut().zip(&residual).for_each(|(c, r)| *c = r + keep * *c);
            square = next;
        }
        step
    }

    fn failed(&self, gradient: f64) -> MetricsError {
        MetricsError::NotConverged { pictures: self.signs.len(), gradient }
    }
}

/// In eight partial sums, which the compiler keeps in registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + rest
}

fn axpy(factor: f64, x: &[f64], y: &mut [f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

fn norm(v: &[f64]) -> f64 {
    dot(v, v).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_set;

    fn labels(features: &FeatureSet) -> Vec<bool> {
        features.rows().map(|row| row[0] + 0.5 * row[1] > 0.3).collect()
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_value_and_the_curve_that_of_the_gradient() {
        let features = random_set("x", 30, 5, 1.0);
        let values: Vec<f64> = features.values().iter().map(|v| f64::from(*v)).collect();
        let signs: Vec<f64> = labels(&features).iter().map(|l| if *l { 1.0 } else { -1.0 }).collect();
        let problem = Problem { values: &values, width: 5, signs: &signs, c: 0.7 };
        let x = [0.3, -0.2, 0.5, 0.1, -0.4, 0.2];
        let point = problem.at(&x);
        for i in 0..6 {
            let moved = |by: f64| {
                let mut x = x.to_vec();
                x[i] += by;
                problem.at(&x)
            };
            let (up, down) = (moved(1e-5), moved(-1e-5));
            assert!(((up.value - down.value) / 2e-5 - point.gradient[i]).abs() < 1e-7);
            let mut unit = vec![0.0; 6];
            unit[i] = 1.0;
            let curved = problem.curve(&point.curvature, &unit);
            for (curved, (up, down)) in curved.iter().zip(up.gradient.iter().zip(&down.gradient)) {
                assert!(((up - down) / 2e-5 - curved).abs() < 1e-7);
            }
        }
    }

    #[test]
    fn standardized_heads_do_not_depend_on_the_features_units() {
        let features = random_set("x", 80, 4, 1.0);
        let labels = labels(&features);
        let scaled: Vec<f32> = features
            .values()
            .iter()
            .enumerate()
            .map(|(i, v)| v * [1.0, 64.0, 0.25, 2.0][i % 4] + 8.0)
            .collect();
        let scaled = FeatureSet::new(scaled, 4).unwrap();
        let rows: Vec<usize> = (0..80).collect();
        let scores = |features: &FeatureSet| {
            LinearHead::fit(features, &rows, &labels, &LogisticConfig::default())
                .unwrap()
                .scores(features)
                .unwrap()
        };
        for (a, b) in scores(&features).iter().zip(scores(&scaled)) {
            assert!((a - b).abs() < 1e-5, "{a} against {b}");
        }
    }

    #[test]
    fn constant_features_and_separable_labels_have_a_solution() {
        let features = FeatureSet::from_rows(&[[1.0, 2.0], [2.0, 2.0], [3.0, 2.0], [4.0, 2.0]]).unwrap();
        let labels = [false, false, true, true];
        let config = LogisticConfig { c: 100.0, ..LogisticConfig::default() };
        let head = LinearHead::fit(&features, &[0, 1, 2, 3], &labels, &config).unwrap();
        assert_eq!(head.coefficients[1], 0.0);
        let scores = head.scores(&features).unwrap();
        assert!(scores[1] < -1.0 && scores[2] > 1.0, "{scores:?}");
    }

    #[test]
    fn bad_input_is_an_error() {
        let features = random_set("x", 4, 2, 1.0);
        let fit = |labels: &[bool], config| LinearHead::fit(&features, &[0, 1, 2], labels, &config);
        let config = LogisticConfig::default();
        assert!(matches!(
            fit(&[true; 3], config.clone()),
            Err(MetricsError::OneClass { pictures: 3, positives: 3 })
        ));
        assert!(matches!(fit(&[true, false], config.clone()), Err(MetricsError::SizeMismatch { .. })));
        assert!(fit(&[true, false, true], LogisticConfig { c: -1.0, ..config.clone() }).is_err());
        assert!(fit(&[true, false, true], LogisticConfig { max_steps: 0, ..config.clone() }).is_err());
        let few = LogisticConfig { max_steps: 1, c: 1e6, ..config };
        assert!(matches!(fit(&[true, false, true], few), Err(MetricsError::NotConverged { .. })));
        let head = LinearHead { coefficients: vec![1.0], intercept: 0.0 };
        assert!(matches!(head.scores(&features), Err(MetricsError::SizeMismatch { .. })));
    }
}
