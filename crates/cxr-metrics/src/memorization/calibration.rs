//! How near is too near: thresholds from real pictures that the model never saw.

use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::expect_samples;
use crate::interval::quantile;

/// What speaks for a copy when it is small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// Distance to the nearest training picture, in pixels.
    PixelDistance,
    /// That distance over the one to the nearest picture of another group, in pixels.
    PixelRatio,
    /// Distance to the nearest training picture, in features.
    FeatureDistance,
    /// That distance over the one to the nearest picture of another group, in features.
    FeatureRatio,
}

impl Evidence {
    /// All kinds, in the order of what is observed of a picture.
    pub const ALL: [Self; 4] =
        [Self::PixelDistance, Self::PixelRatio, Self::FeatureDistance, Self::FeatureRatio];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::PixelDistance => "pixel_distance",
            Self::PixelRatio => "pixel_ratio",
            Self::FeatureDistance => "feature_distance",
            Self::FeatureRatio => "feature_ratio",
        }
    }
}

/// One value per kind of evidence, where there is one.
pub(super) type Observed = [Option<f64>; 4];

/// What one kind of evidence is among held-out pictures, and where a copy begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// Which kind.
    pub evidence: Evidence,
    /// Median of the held-out pictures.
    pub median: f64,
    /// Median less the 10 % quantile: the unit in which evidence is compared.
    pub spread: f64,
    /// A picture below this is flagged: `median - cutoff * spread`.
    pub threshold: f64,
}

/// Confidence that is aimed at: that more real pictures are not flagged more often than the rate says.
const CONFIDENCE: f64 = 0.95;

/// Thresholds such that few real pictures are flagged.
///
/// A picture's score is the largest `(median - value) / spread` of its evidence; it is flagged if that exceeds
/// `cutoff`, the score that k of the n held-out pictures exceed. If the true share of real pictures above it were
/// more than the rate r, k or fewer of n would exceed it with a chance of at most `P(Binomial(n, r) <= k)`: k is the
/// largest number for which that is 5 % at most (a tolerance bound; Wilks 1941). That takes 299 held-out pictures
/// for r = 1 %; with fewer, none of them is flagged, and `confidence` says what that is worth. A copy is far beyond
/// the cutoff, so this care costs little.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Share that may be flagged.
    pub rate: f64,
    /// Held-out pictures.
    pub held_out: usize,
    /// How many of them are flagged.
    pub flagged: usize,
    /// Confidence with which the share of other real pictures that are flagged is `rate` at most, if they are as
    /// independent of each other as of the training set.
    pub confidence: f64,
    /// Score above which a picture is flagged.
    pub cutoff: f64,
    /// Per kind of evidence that varies among held-out pictures.
    pub scales: Vec<Scale>,
}

impl Calibration {
    pub(super) fn of(held_out: &[Observed], rate: f64) -> Result<Self> {
        let needed = needed(rate);
        expect_samples(&format!("the held-out set of an audit at rate {rate}"), needed, held_out.len())?;
        let scales: Vec<Scale> = Evidence::ALL.into_iter().filter_map(|kind| scale(kind, held_out)).collect();
        if scales.is_empty() {
            return Err(MetricsError::InvalidParameter {
                name: "held_out",
                value: format!("{} pictures, all equally far from the training set", held_out.len()),
                expected: "different pictures".into(),
            });
        }
        let n = held_out.len();
        let mut calibration =
            Self { rate, held_out: n, flagged: 0, confidence: 0.0, cutoff: f64::INFINITY, scales };
        let mut scores: Vec<f64> = held_out.iter().map(|observed| calibration.score(observed)).collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        calibration.cutoff = scores[allowed(n, rate)];
        calibration.flagged = scores.iter().filter(|score| **score > calibration.cutoff).count();
        calibration.confidence = 1.0 - at_most(calibration.flagged, n, rate);
        for scale in &mut calibration.scales {
            scale.threshold = scale.median - calibration.cutoff * scale.spread;
        }
        Ok(calibration)
    }

    /// The largest departure from the medians, in spreads.
    pub(super) fn score(&self, observed: &Observed) -> f64 {
        self.departures(observed).map(|(_, departure)| departure).fold(f64::NEG_INFINITY, f64::max)
    }

    /// The kinds of evidence that exceed the cutoff, the strongest first.
    pub(super) fn evidence(&self, observed: &Observed) -> Vec<Evidence> {
        let mut found: Vec<_> = self.departures(observed).filter(|(_, d)| *d > self.cutoff).collect();
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        found.into_iter().map(|(kind, _)| kind).collect()
    }

    fn departures(&self, observed: &Observed) -> impl Iterator<Item = (Evidence, f64)> {
        self.scales.iter().filter_map(|scale| {
            let value = observed[scale.evidence as usize]?;
            Some((scale.evidence, (scale.median - value) / scale.spread))
        })
    }

    /// The scale of one kind of evidence.
    pub fn scale(&self, evidence: Evidence) -> Option<&Scale> {
        self.scales.iter().find(|scale| scale.evidence == evidence)
    }
}

/// Fewest held-out pictures: of fewer, the largest score says less than the rate asks for even on average.
pub(super) fn needed(rate: f64) -> usize {
    ((1.0 / rate).ceil() as usize).saturating_sub(1).max(2)
}

/// The largest number of n flagged pictures with which the rate is held at [`CONFIDENCE`], or 0.
fn allowed(n: usize, rate: f64) -> usize {
    (0..n).take_while(|k| at_most(*k, n, rate) <= 1.0 - CONFIDENCE).last().unwrap_or(0)
}

/// P(Binomial(n, p) <= k).
fn at_most(k: usize, n: usize, p: f64) -> f64 {
    // In logarithms: (1 - p)^n underflows for large n.
    let odds = (p / (1.0 - p)).ln();
    let mut term = n as f64 * (1.0 - p).ln();
    let mut sum = term.exp();
    for i in 1..=k {
        term += odds + ((n + 1 - i) as f64 / i as f64).ln();
        sum += term.exp();
    }
    sum.min(1.0)
}

/// None for evidence that some held-out picture lacks or that does not vary: it cannot tell anything apart.
fn scale(evidence: Evidence, held_out: &[Observed]) -> Option<Scale> {
    let mut values = held_out.iter().map(|o| o[evidence as usize]).collect::<Option<Vec<f64>>>()?;
    values.sort_by(f64::total_cmp);
    let median = quantile(&values, 0.5);
    let spread = median - quantile(&values, 0.1);
    (spread > 1e-9 * median).then_some(Scale { evidence, median, spread, threshold: f64::NEG_INFINITY })
}

#[cfg(test)]
mod tests {
    use cxr_core::random::Stream;

    use super::*;

    fn observations(name: &str, n: usize) -> Vec<Observed> {
        let mut stream = Stream::new(4, name, 0);
        let mut one = || {
            let distance = 5.0 + f64::from(stream.normal());
            [Some(distance), Some(0.9 + 0.02 * distance * f64::from(stream.normal())), None, None]
        };
        (0..n).map(|_| one()).collect()
    }

    #[test]
    fn binomial_tail_is_the_sum_of_its_terms() {
        // 10 throws of 0.3: 0.7^10 + 10 0.3 0.7^9 + 45 0.09 0.7^8.
        let expected = 0.7f64.powi(10) + 3.0 * 0.7f64.powi(9) + 4.05 * 0.7f64.powi(8);
        assert!((at_most(2, 10, 0.3) - expected).abs() < 1e-12);
        assert!((at_most(10, 10, 0.3) - 1.0).abs() < 1e-12);
        assert!((at_most(900, 100_000, 0.01) - 0.0007).abs() < 0.0002);
    }

    #[test]
    fn held_out_pictures_are_flagged_as_often_as_confidence_allows() {
        // 299 and 473 are the sizes of the one-sided 95 % tolerance bounds of 99 % (Wilks).
        for (n, rate, flagged) in
            [(99, 0.01, 0), (298, 0.01, 0), (472, 0.01, 0), (473, 0.01, 1), (93, 0.05, 1)]
        {
            let calibration = Calibration::of(&observations("cal", n), rate).unwrap();
            assert_eq!((calibration.flagged, calibration.held_out), (flagged, n), "{n} {rate}");
            assert!(calibration.confidence > if n == 298 { 0.9499 } else { 0.63 }, "{calibration:?}");
            assert_eq!(calibration.confidence >= CONFIDENCE, n > 298 || n == 93, "{calibration:?}");
        }
        let error = Calibration::of(&observations("cal", 98), 0.01).unwrap_err();
        assert!(matches!(error, MetricsError::TooFewSamples { needed: 99, found: 98, .. }), "{error}");
    }

    #[test]
    fn new_pictures_are_flagged_more_often_than_the_rate_in_few_calibrations() {
        // The share of each calibration on many pictures; more than 5 % of them in 1 of 20 cases.
        let over = (0..200)
            .filter(|i| {
                let calibration = Calibration::of(&observations(&format!("cal {i}"), 199), 0.05).unwrap();
                let new = observations("new", 4000);
                let flagged = new.iter().filter(|o| !calibration.evidence(o).is_empty()).count();
                flagged > 200
            })
            .count();
        assert!((1..=20).contains(&over), "{over} of 200");
    }

    #[test]
    fn thresholds_are_the_scores_cutoff_in_the_evidences_own_unit() {
        let calibration = Calibration::of(&observations("cal", 400), 0.01).unwrap();
        assert_eq!(calibration.scales.len(), 2, "evidence that is not there has no scale");
        let distance = calibration.scale(Evidence::PixelDistance).unwrap();
        let just = |value: f64| calibration.evidence(&[Some(value), Some(0.9), None, None]);
        assert_eq!(just(distance.threshold - 1e-6), [Evidence::PixelDistance]);
        assert!(just(distance.threshold + 1e-6).is_empty());
        let strongest = calibration.evidence(&[Some(distance.threshold - 1e-6), Some(-9.0), None, None]);
        assert_eq!(strongest, [Evidence::PixelRatio, Evidence::PixelDistance]);
    }

    #[test]
    fn evidence_that_never_varies_is_left_out() {
        let mut same = observations("cal", 120);
        same.iter_mut().for_each(|o| o[1] = Some(1.0));
        assert_eq!(Calibration::of(&same, 0.01).unwrap().scales.len(), 1);
        same.iter_mut().for_each(|o| o[0] = Some(1.0));
        assert!(matches!(Calibration::of(&same, 0.01), Err(MetricsError::InvalidParameter { .. })));
    }
}
