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
    /// All kinds, in the order of [`Observed`].
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

/// Thresholds such that few held-out real pictures are flagged.
///
/// A picture's score is the largest `(median - value) / spread` of its evidence; it is flagged if that exceeds
/// `cutoff`. With n held-out pictures and a rate r, the cutoff is the score that `floor(r (n + 1)) - 1` of them
/// exceed: the chance that one more picture like them is flagged is then r at most (conformal prediction; Vovk et
/// al. 2005), exactly so but for the medians and spreads being of the same pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Share that may be flagged.
    pub rate: f64,
    /// Held-out pictures.
    pub held_out: usize,
    /// How many of them are flagged.
    pub flagged: usize,
    /// Score above which a picture is flagged.
    pub cutoff: f64,
    /// Per kind of evidence that varies among held-out pictures.
    pub scales: Vec<Scale>,
}

impl Calibration {
    pub(super) fn of(held_out: &[Observed], rate: f64) -> Result<Self> {
        // The smallest n for which floor(rate (n + 1)) is 1.
        let needed = ((1.0 / rate).ceil() as usize).saturating_sub(1).max(2);
        expect_samples(&format!("the held-out set of an audit at rate {rate}"), needed, held_out.len())?;
        let scales: Vec<Scale> = Evidence::ALL.into_iter().filter_map(|kind| scale(kind, held_out)).collect();
        if scales.is_empty() {
            return Err(MetricsError::InvalidParameter {
                name: "held_out",
                value: format!("{} pictures, all equally far from the training set", held_out.len()),
                expected: "different pictures".into(),
            });
        }
        let mut calibration = Self { rate, held_out: held_out.len(), flagged: 0, cutoff: f64::INFINITY, scales };
        let mut scores: Vec<f64> = held_out.iter().map(|observed| calibration.score(observed)).collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        // The margin is for 0.01 * 100, which is below 1 in floating point for some rates.
        let allowed = (rate * (held_out.len() + 1) as f64 + 1e-9).floor() as usize;
        calibration.cutoff = scores[allowed.saturating_sub(1)];
        calibration.flagged = scores.iter().filter(|score| **score > calibration.cutoff).count();
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
    fn held_out_pictures_are_flagged_at_the_rate_and_no_more() {
        for (n, rate, allowed) in [(99, 0.01, 0), (100, 0.01, 0), (199, 0.01, 1), (1000, 0.01, 9), (19, 0.1, 1)] {
            let calibration = Calibration::of(&observations("cal", n), rate).unwrap();
            assert_eq!((calibration.flagged, calibration.held_out), (allowed, n), "{n} {rate}");
        }
        let error = Calibration::of(&observations("cal", 98), 0.01).unwrap_err();
        assert!(matches!(error, MetricsError::TooFewSamples { needed: 99, found: 98, .. }), "{error}");
    }

    #[test]
    fn new_pictures_are_flagged_about_as_often_as_promised() {
        // 200 calibrations of 199 pictures at 5 %: 10 of 200 each on average, 2000 of 40000 in all.
        let flagged: usize = (0..200)
            .map(|i| {
                let calibration = Calibration::of(&observations(&format!("cal {i}"), 199), 0.05).unwrap();
                let new = observations(&format!("new {i}"), 200);
                new.iter().filter(|o| !calibration.evidence(o).is_empty()).count()
            })
            .sum();
        let share = flagged as f64 / 40_000.0;
        assert!((0.04..0.055).contains(&share), "{share}");
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
