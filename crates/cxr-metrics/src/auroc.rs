//! Area under the ROC curve of a finding, with a confidence interval.

use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::{expect_samples, expect_size};
use crate::interval::Interval;

/// Standard normal quantile of a two-sided 95 % interval.
const Z95: f64 = 1.959_963_984_540_054;

/// How well a score tells images with a finding from those without.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Auroc {
    /// Chance that a positive scores above a negative, ties counted half.
    pub value: f64,
    /// 95 % interval after Hanley and McNeil.
    pub interval: Interval,
    /// Images with the finding.
    pub positives: usize,
    /// Images without it.
    pub negatives: usize,
}

/// AUROC of `scores` (any increasing function of probability, so logits too) against `labels`, as the
/// Mann-Whitney statistic with ties counted half.
///
/// The interval inverts the variance of Hanley and McNeil (1982): its ends are the areas from which the
/// estimate lies 1.96 of *their* standard errors away. Unlike estimate +- 1.96 standard errors it stays in
/// [0, 1] and keeps a width at an estimate of 1.
///
/// # Errors
/// Different lengths, a score that is not finite, no positive or no negative image.
pub fn auroc(scores: &[f32], labels: &[bool]) -> Result<Auroc> {
    expect_size(|| "labels of an AUROC".into(), scores.len(), labels.len())?;
    crate::features::check_finite("scores of an AUROC", scores, 1)?;
    let positives = labels.iter().filter(|label| **label).count();
    let negatives = labels.len() - positives;
    expect_samples("the positives of an AUROC", 1, positives)?;
    expect_samples("the negatives of an AUROC", 1, negatives)?;
    let value = area(scores, labels, positives, negatives);
    let interval = hanley_interval(value, positives, negatives);
    Ok(Auroc { value, interval, positives, negatives })
}

/// AUROC of every column of row-major `scores` `[n, k]` against `labels` `[n, k]`, where a label of `None`
/// leaves the image out of its column. A column with fewer than `needed` positives or negatives has no
/// figure, only its counts.
///
/// # Errors
/// Lengths that are no multiple of `names`, different lengths, a score that is not finite.
pub fn auroc_table(
    names: &[String],
    scores: &[f32],
    labels: &[Option<bool>],
    needed: usize,
) -> Result<Vec<FindingAuroc>> {
    expect_size(|| "labels of an AUROC table".into(), scores.len(), labels.len())?;
    let k = names.len();
    if k == 0 || !scores.len().is_multiple_of(k) {
        return Err(MetricsError::SizeMismatch {
            what: "scores in the last row of an AUROC table".into(),
            expected: k,
            found: if k == 0 { scores.len() } else { scores.len() % k },
        });
    }
    crate::features::check_finite("scores of an AUROC table", scores, k)?;
    let column = |j: usize| -> (Vec<f32>, Vec<bool>) {
        (j..scores.len()).step_by(k).filter_map(|i| Some((scores[i], labels[i]?))).unzip()
    };
    names
        .iter()
        .enumerate()
        .map(|(j, name)| {
            let (scores, labels) = column(j);
            let positives = labels.iter().filter(|label| **label).count();
            let negatives = labels.len() - positives;
            let enough = positives.min(negatives) >= needed.max(1);
            let auroc = if enough { Some(auroc(&scores, &labels)?) } else { None };
            Ok(FindingAuroc { finding: name.clone(), positives, negatives, auroc })
        })
        .collect()
}

/// One line of [`auroc_table`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FindingAuroc {
    /// Name of the finding.
    pub finding: String,
    /// Images with it.
    pub positives: usize,
    /// Images without it.
    pub negatives: usize,
    /// The figure, unless there are too few of either.
    pub auroc: Option<Auroc>,
}

fn area(scores: &[f32], labels: &[bool], positives: usize, negatives: usize) -> f64 {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let (mut wins, mut below) = (0.0, 0.0);
    // `==` rather than the total order: 0.0 and -0.0 tie.
    for tied in order.chunk_by(|&a, &b| scores[a] == scores[b]) {
        let p = tied.iter().filter(|&&i| labels[i]).count() as f64;
        let n = tied.len() as f64 - p;
        wins += p * (below + 0.5 * n);
        below += n;
    }
    wins / (positives as f64 * negatives as f64)
}

fn hanley_interval(value: f64, positives: usize, negatives: usize) -> Interval {
    let end = |mut inside: f64, mut outside: f64| {
        // The estimate is within z standard errors of itself; bisect for where that stops.
        for _ in 0..60 {
            let middle = 0.5 * (inside + outside);
            let within = (value - middle).abs() <= Z95 * hanley_error(middle, positives, negatives);
            if within { inside = middle } else { outside = middle }
        }
        inside
    };
    Interval {
        low: end(value, 0.0),
        high: end(value, 1.0),
        level: 0.95,
        method: "hanley-mcneil".into(),
        replicates: None,
    }
}

/// Standard error of an AUROC (Hanley and McNeil 1982, equation 1).
fn hanley_error(area: f64, positives: usize, negatives: usize) -> f64 {
    let (p, n) = (positives as f64, negatives as f64);
    let q1 = area / (2.0 - area);
    let q2 = 2.0 * area * area / (1.0 + area);
    let square = area * area;
    ((area * (1.0 - area) + (p - 1.0) * (q1 - square) + (n - 1.0) * (q2 - square)) / (p * n)).max(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    use cxr_core::random::Stream;

    use super::*;

    #[test]
    fn counts_pairs_and_half_ties() {
        let scores = [0.1, 0.4, 0.35, 0.8, 0.4];
        let labels = [false, false, true, true, true];
        // Pairs won: 0.35 beats one, 0.8 beats two, 0.4 beats one and ties one.
        assert!((auroc(&scores, &labels).unwrap().value - 4.5 / 6.0).abs() < 1e-12);
        let flipped: Vec<bool> = labels.iter().map(|l| !l).collect();
        assert!((auroc(&scores, &flipped).unwrap().value - 1.5 / 6.0).abs() < 1e-12);
        let constant = auroc(&[0.0, -0.0, 0.0], &[true, false, true]).unwrap();
        assert_eq!(constant.value, 0.5);
    }

    #[test]
    fn standard_error_is_the_spread_of_exponential_scores() {
        // The paper's model: both kinds of score are exponential, of rates area and 1 - area. Unequal numbers
        // tell its two terms apart.
        let (truth, positives, negatives, runs) = (0.85f64, 12, 45, 4000);
        let labels: Vec<bool> = (0..positives + negatives).map(|i| i < positives).collect();
        let values: Vec<f64> = (0..runs)
            .map(|run| {
                let mut stream = Stream::new(2, "exponential", run);
                let score = |label: &bool| {
                    let rate = if *label { 1.0 - truth } else { truth };
                    -(1.0 - stream.uniform()).ln() / rate as f32
                };
                let scores: Vec<f32> = labels.iter().map(score).collect();
                area(&scores, &labels, positives, negatives)
            })
            .collect();
        let mean = values.iter().sum::<f64>() / runs as f64;
        let spread = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / runs as f64).sqrt();
        let expected = hanley_error(truth, positives, negatives);
        assert!((mean - truth).abs() < 0.005, "{mean}");
        assert!((spread / expected - 1.0).abs() < 0.05, "{spread} against {expected}");
    }

    #[test]
    fn interval_covers_the_truth_about_as_often_as_it_says() {
        // Scores N(1.19, 1) against N(0, 1): area = Phi(1.19 / sqrt 2) = 0.8.
        let (mut covered, runs) = (0, 400);
        for run in 0..runs {
            let mut stream = Stream::new(1, "auroc", run);
            let labels: Vec<bool> = (0..70).map(|i| i < 30).collect();
            let scores: Vec<f32> =
                labels.iter().map(|l| stream.normal() + if *l { 1.1902 } else { 0.0 }).collect();
            let interval = auroc(&scores, &labels).unwrap().interval;
            covered += usize::from(interval.low <= 0.8 && 0.8 <= interval.high);
        }
        let share = covered as f64 / runs as f64;
        assert!((0.92..=0.985).contains(&share), "{share}");
    }

    #[test]
    fn a_perfect_score_on_few_images_is_not_certain() {
        let perfect = auroc(&[0.0, 0.1, 0.9, 1.0], &[false, false, true, true]).unwrap();
        assert_eq!(perfect.value, 1.0);
        assert!(perfect.interval.low < 0.7 && perfect.interval.high == 1.0, "{perfect:?}");
    }

    #[test]
    fn table_leaves_out_unknown_labels_and_small_columns() {
        let names = ["effusion".to_string(), "nodule".to_string()];
        let scores = [0.9, 0.1, 0.2, 0.2, 0.8, 0.3, 0.1, 0.4];
        let labels =
            [Some(true), Some(true), Some(false), Some(false), Some(true), Some(false), None, Some(false)];
        let table = auroc_table(&names, &scores, &labels, 1).unwrap();
        assert_eq!((table[0].positives, table[0].negatives), (2, 1));
        assert_eq!(table[0].auroc.as_ref().unwrap().value, 1.0);
        assert_eq!(table[1].auroc.as_ref().unwrap().value, 0.0);
        assert_eq!(auroc_table(&names, &scores, &labels, 2).unwrap()[0].auroc, None);
    }

    #[test]
    fn bad_input_is_an_error() {
        assert!(matches!(auroc(&[0.0, 1.0], &[true]), Err(MetricsError::SizeMismatch { .. })));
        assert!(matches!(auroc(&[0.0, 1.0], &[true, true]), Err(MetricsError::TooFewSamples { .. })));
        assert!(matches!(auroc(&[f32::NAN, 1.0], &[true, false]), Err(MetricsError::NonFinite { .. })));
        assert!(auroc_table(&[], &[0.0], &[None], 1).is_err());
    }
}
