//! Inception Score: how sure a classifier is of each picture, and how different the pictures are to it.
//!
//! It knows no real pictures, and its classes are everyday objects: on radiographs it says next to nothing of quality
//! (Barratt and Sharma 2018). It is here because papers print it.

use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::{FeatureSet, expect_samples};

/// Splits that are the custom.
pub const INCEPTION_SCORE_SPLITS: usize = 10;

/// An Inception Score (Salimans et al. 2016).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InceptionScore {
    /// Mean over splits.
    pub mean: f64,
    /// Population standard deviation over splits, as torch-fidelity prints it.
    pub standard_deviation: f64,
    /// Number of splits.
    pub splits: usize,
}

/// `exp(mean KL(p(class | picture) || p(class)))` of each split of the pictures at `positions`, in that order, as
/// torch-fidelity (which shuffles first: give it the order that is wanted).
///
/// `logits` `[n, 1008]` are those without the last layer's bias; the arithmetic is in f64. A split i has the
/// positions from `i n / splits` to `(i + 1) n / splits`.
///
/// # Errors
/// No splits, fewer than two pictures per split, a position outside the set.
pub fn inception_score(logits: &FeatureSet, positions: &[usize], splits: usize) -> Result<InceptionScore> {
    if splits == 0 {
        return Err(MetricsError::InvalidParameter {
            name: "splits",
            value: "0".into(),
            expected: "at least one; 10 is the custom".into(),
        });
    }
    let n = positions.len();
    expect_samples(&format!("the set of an Inception Score in {splits} splits"), 2 * splits, n)?;
    if let Some(outside) = positions.iter().find(|position| **position >= logits.len()) {
        return Err(MetricsError::InvalidParameter {
            name: "position",
            value: outside.to_string(),
            expected: format!("below {}, the pictures of the set", logits.len()),
        });
    }
    let scores: Vec<f64> =
        (0..splits).map(|i| score(logits, &positions[i * n / splits..(i + 1) * n / splits])).collect();
    let mean = scores.iter().sum::<f64>() / splits as f64;
    let variance = scores.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / splits as f64;
    Ok(InceptionScore { mean, standard_deviation: variance.sqrt(), splits })
}

fn score(logits: &FeatureSet, positions: &[usize]) -> f64 {
    let mut marginal = vec![0.0; logits.width()];
    // The mean of KL(p || q) is the mean of sum p ln p, less sum q ln q, q being the mean of p.
    let mut inner = 0.0;
    for &position in positions {
        let row = logits.row(position);
        let largest = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
        let total: f64 = row.iter().map(|x| (f64::from(*x) - largest).exp()).sum();
        for (q, x) in marginal.iter_mut().zip(row) {
            let log_p = f64::from(*x) - largest - total.ln();
            let p = log_p.exp();
            *q += p;
            inner += p * log_p;
        }
    }
    let n = positions.len() as f64;
    let outer: f64 = marginal.iter().map(|q| q / n).filter(|q| *q > 0.0).map(|q| q * q.ln()).sum();
    (inner / n - outer).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_set;

    #[test]
    fn sure_and_different_pictures_score_their_number_and_equal_ones_one() {
        let sure = |class: usize| (0..5).map(|c| if c == class { 80.0 } else { 0.0 }).collect::<Vec<f32>>();
        let different = FeatureSet::from_rows(&(0..5).map(sure).collect::<Vec<_>>()).unwrap();
        let all = [0, 1, 2, 3, 4];
        let score = inception_score(&different, &all, 1).unwrap();
        assert!((score.mean - 5.0).abs() < 1e-9 && score.standard_deviation == 0.0, "{score:?}");
        let equal = inception_score(&different, &[2, 2, 2, 2], 2).unwrap();
        assert!((equal.mean - 1.0).abs() < 1e-9, "{equal:?}");
    }

    #[test]
    fn order_and_splits_matter_and_bad_ones_are_refused() {
        let logits = random_set("logits", 23, 7, 2.0);
        let order: Vec<usize> = (0..23).collect();
        let plain = inception_score(&logits, &order, 10).unwrap();
        let reversed: Vec<usize> = order.iter().rev().copied().collect();
        assert_ne!(plain.mean, inception_score(&logits, &reversed, 10).unwrap().mean);
        let few = inception_score(&logits, &order[..19], 10).unwrap_err();
        assert!(matches!(few, MetricsError::TooFewSamples { needed: 20, found: 19, .. }), "{few}");
        assert!(inception_score(&logits, &order, 0).is_err());
        assert!(inception_score(&logits, &[0, 1, 23, 2], 1).is_err());
    }
}
