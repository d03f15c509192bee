//! Training on three sets, measuring on one.

use std::collections::HashSet;

use cxr_core::progress::Progress;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::heads::{Fit, Labelled, fit};
use super::logistic::LogisticConfig;
use super::report::{Trained, UsefulnessReport, UsefulnessRow};
use crate::error::{MetricsError, Result};
use crate::extractor::ExtractorId;
use crate::features::{FeatureSet, expect_size};
use crate::findings::Measured;
use crate::interval::{BootstrapConfig, IntervalMethod};
use crate::labels::ImageRecord;
use crate::progress::advance;
use crate::ranked::Ranked;

/// How usefulness is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UsefulnessConfig {
    /// How heads are trained.
    pub logistic: LogisticConfig,
    /// Fewest positives, and fewest negatives, of a training set and of the held-out set.
    pub needed: usize,
    /// Bootstrap resamples of each figure; 0 leaves intervals out.
    pub replicates: usize,
    /// Coverage of intervals.
    pub level: f64,
    /// Seed of intervals.
    pub seed: u64,
}

impl Default for UsefulnessConfig {
    /// Default heads, 10 pictures, 1000 replicates, 95 %, seed 0.
    fn default() -> Self {
        Self { logistic: LogisticConfig::default(), needed: 10, replicates: 1000, level: 0.95, seed: 0 }
    }
}

/// A measurement with one configuration.
#[derive(Debug, Clone)]
pub struct Usefulness {
    config: UsefulnessConfig,
}

impl Usefulness {
    /// # Errors
    /// A configuration that is not valid.
    pub fn new(config: UsefulnessConfig) -> Result<Self> {
        config.logistic.validate()?;
        if config.needed == 0 || !(config.level > 0.0 && config.level < 1.0) {
            return Err(MetricsError::InvalidParameter {
                name: "needed, level",
                value: format!("{}, {}", config.needed, config.level),
                expected: "at least one picture, and a coverage between 0 and 1, as 0.95".into(),
            });
        }
        Ok(Self { config })
    }

    /// Trains a head per finding on `real`, on `synthetic` and on both, and measures it on `held_out`.
    ///
    /// # Errors
    /// Features of different widths, records of another number, a side without pictures or labels, a held-out
    /// picture of a group that `real` has, heads that do not converge, cancellation.
    pub fn measure(
        &self,
        extractor: &ExtractorId,
        findings: &[String],
        (real, synthetic): (Labelled<'_>, Labelled<'_>),
        held_out: Labelled<'_>,
        progress: &dyn Progress,
    ) -> Result<UsefulnessReport> {
        for (what, side) in [("real training", real), ("synthetic", synthetic), ("held-out real", held_out)] {
            side.check(what, findings)?;
            expect_size(
                || format!("features per {what} picture"),
                extractor.feature_dim,
                side.features.width(),
            )?;
        }
        expect_other_groups(real.records, held_out.records)?;
        let values = [real.features.values(), synthetic.features.values()].concat();
        let all = FeatureSet::new(values, real.features.width())?;
        let records = [real.records, synthetic.records].concat();
        let both = Labelled { features: &all, records: &records };
        const STAGE: &str = "usefulness";
        progress.begin(STAGE, Some(findings.len() as u64));
        let mut rows = Vec::with_capacity(findings.len());
        for finding in findings {
            rows.push(self.row(finding, [real, synthetic, both], held_out)?);
            advance(progress, STAGE, rows.len(), findings.len())?;
        }
        progress.end("");
        Ok(UsefulnessReport {
            extractor: extractor.clone(),
            logistic: self.config.logistic.clone(),
            needed: self.config.needed,
            seed: self.config.seed,
            n_real: real.features.len(),
            n_synthetic: synthetic.features.len(),
            n_held_out: held_out.features.len(),
            rows,
            notes: notes(real, held_out),
        })
    }

    fn row(&self, finding: &str, sets: [Labelled<'_>; 3], held_out: Labelled<'_>) -> Result<UsefulnessRow> {
        let (rows, labels) = held_out.known(finding);
        let positives = labels.iter().filter(|label| **label).count();
        let negatives = labels.len() - positives;
        let groups: Vec<Option<&str>> = rows.iter().map(|i| held_out.records[*i].group.as_deref()).collect();
        let pictures = held_out.features.select(&rows);
        let enough = positives.min(negatives) >= self.config.needed;
        // Trained even where it cannot be measured: how many pictures there were is told all the same.
        let fits = sets
            .into_par_iter()
            .map(|set| fit(finding, set, self.config.needed, &self.config.logistic))
            .collect::<Result<Vec<Fit>>>()?;
        let ranked = fits
            .iter()
            .map(|fit| match &fit.head {
                Some(head) if enough => Ok(Some(Ranked::new(&head.scores(&pictures)?, &labels, &groups))),
                _ => Ok(None),
            })
            .collect::<Result<Vec<Option<Ranked>>>>()?;
        let purpose = |what: &str| format!("usefulness/{finding}/{what}");
        let mut trained = Vec::new();
        for ((fit, ranked), what) in fits.iter().zip(&ranked).zip(["real", "synthetic", "both"]) {
            let found = fit.positives.min(fit.negatives).min(positives.min(negatives));
            let auroc = match ranked {
                None => Measured::TooFew { found, needed: self.config.needed },
                Some(ranked) => self.figure(&purpose(what), ranked, |weights| ranked.area(weights))?,
            };
            trained.push(Trained { positives: fit.positives, negatives: fit.negatives, auroc });
        }
        let gain = match (&ranked[0], &ranked[2]) {
            (Some(real), Some(both)) => {
                self.figure(&purpose("gain"), both, |w| Some(both.area(w)? - real.area(w)?))?
            }
            _ => {
                let least = fits.iter().map(|fit| fit.positives.min(fit.negatives)).min().unwrap_or(0);
                let found = least.min(positives.min(negatives));
                Measured::TooFew { found, needed: self.config.needed }
            }
        };
        let [real, synthetic, both] = <[Trained; 3]>::try_from(trained).map_err(|all| {
            MetricsError::SizeMismatch { what: "trained heads".into(), expected: 3, found: all.len() }
        })?;
        Ok(UsefulnessRow { finding: finding.into(), positives, negatives, real, synthetic, both, gain })
    }

    fn figure(
        &self,
        purpose: &str,
        ranked: &Ranked,
        figure: impl Fn(Option<&[f64]>) -> Option<f64> + Sync,
    ) -> Result<Measured> {
        let UsefulnessConfig { needed, replicates, level, seed, .. } = self.config;
        let Some(value) = figure(None) else {
            return Ok(Measured::TooFew { found: ranked.positives.min(ranked.negatives), needed });
        };
        let config = BootstrapConfig { replicates, level, method: IntervalMethod::Percentile, seed };
        let interval = if replicates > 0 {
            Some(ranked.interval(purpose, value, &config, |weights| figure(Some(weights)))?)
        } else {
            None
        };
        Ok(Measured::Value { value, interval })
    }
}

fn expect_other_groups(train: &[ImageRecord], held_out: &[ImageRecord]) -> Result<()> {
    let known: HashSet<&str> = train.iter().filter_map(|r| r.group.as_deref()).collect();
    let shared: Vec<&str> =
        held_out.iter().filter_map(|r| r.group.as_deref()).filter(|group| known.contains(group)).collect();
    match shared.first() {
        None => Ok(()),
        Some(first) => Err(MetricsError::SharedGroups { pictures: shared.len(), group: (*first).to_owned() }),
    }
}

fn notes(real: Labelled<'_>, held_out: Labelled<'_>) -> Vec<String> {
    let unknown = |side: Labelled<'_>| side.records.iter().any(|r| r.group.is_none());
    let mut notes = Vec::new();
    if unknown(real) || unknown(held_out) {
        notes.push(
            "not every real picture has a patient: that held-out pictures are of other patients than the training \
             pictures was not checked for all of them"
                .to_string(),
        );
    }
    notes
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;
    use cxr_core::random::Stream;

    use super::*;
    use crate::image::ImageSize;
    use crate::testing::StopAfter;

    type Side = (FeatureSet, Vec<ImageRecord>);

    fn extractor() -> ExtractorId {
        ExtractorId {
            name: "toy".into(),
            hash: "00".into(),
            feature_dim: 6,
            input_size: ImageSize::square(8),
            resize: None,
        }
    }

    fn names() -> Vec<String> {
        vec!["Effusion".into(), "Hernia".into()]
    }

    /// The finding moves the first feature by `gap`.
    fn side(name: &str, n: usize, gap: f32) -> Side {
        let mut stream = Stream::new(3, name, 0);
        let mut values = Vec::new();
        let mut records = Vec::new();
        for i in 0..n {
            let present = i % 3 == 0;
            let mut row = stream.normals(6);
            row[0] += if present { gap } else { 0.0 };
            values.extend(row);
            let labels = if present { vec!["Effusion".to_string()] } else { vec!["No Finding".into()] };
            let group = Some(format!("{name} {i}"));
            records.push(ImageRecord {
                labels: Some(labels.into_iter().collect()),
                group,
                ..Default::default()
            });
        }
        (FeatureSet::new(values, 6).unwrap(), records)
    }

    fn labelled(side: &Side) -> Labelled<'_> {
        Labelled { features: &side.0, records: &side.1 }
    }

    fn run(real: &Side, made: &Side, held_out: &Side, replicates: usize) -> Result<UsefulnessReport> {
        let config = UsefulnessConfig { replicates, ..UsefulnessConfig::default() };
        Usefulness::new(config)?.measure(
            &extractor(),
            &names(),
            (labelled(real), labelled(made)),
            labelled(held_out),
            &Silent,
        )
    }

    #[test]
    fn synthetic_pictures_help_where_they_show_the_finding_and_do_not_where_they_do_not() {
        let held_out = side("held out", 300, 1.5);
        let few = side("real", 40, 1.5);
        let good = run(&few, &side("good", 600, 1.5), &held_out, 300).unwrap();
        let row = good.row("Effusion").unwrap();
        let value = |m: &Measured| m.value().unwrap();
        // 0.856 is the area of the finding itself.
        assert!((value(&row.synthetic.auroc) - 0.856).abs() < 0.06, "{row:?}");
        assert!(value(&row.both.auroc) > value(&row.real.auroc) - 0.01);
        assert!((value(&row.gain) - (value(&row.both.auroc) - value(&row.real.auroc))).abs() < 1e-12);
        let bad = run(&few, &side("bad", 600, -1.5), &held_out, 300).unwrap();
        let row = bad.row("Effusion").unwrap();
        assert!(value(&row.synthetic.auroc) < 0.25 && value(&row.gain) < -0.2, "{row:?}");
        let Measured::Value { interval: Some(gain), .. } = &row.gain else { panic!("{:?}", row.gain) };
        assert!(gain.low < value(&row.gain) && value(&row.gain) < gain.high && gain.high < 0.0, "{gain:?}");
        assert_eq!((row.real.positives, row.synthetic.positives, row.both.positives), (14, 200, 214));
        let text = bad.markdown();
        assert!(text.contains("| Hernia | N = 0 | N = 0 | N = 0 | N = 0 | 0 of 300 |"), "{text}");
        let json = serde_json::to_string(&bad).unwrap();
        assert_eq!(serde_json::from_str::<UsefulnessReport>(&json).unwrap(), bad);
    }

    #[test]
    fn heads_are_a_classifier_of_what_they_were_trained_on() {
        let train = side("train", 200, 2.0);
        let heads =
            super::super::LinearHeads::fit(&names(), labelled(&train), 10, &Default::default()).unwrap();
        assert_eq!((heads.findings.as_slice(), heads.left_out.len()), (&["Effusion".to_string()][..], 1));
        let other = side("other", 100, 2.0);
        let scores = heads.scores(&other.0).unwrap();
        assert_eq!((scores.len(), scores.width()), (100, 1));
        let labels: Vec<bool> = other.1.iter().map(|r| r.has("Effusion") == Some(true)).collect();
        assert!(crate::auroc(scores.values(), &labels).unwrap().value > 0.8);
        let none = super::super::LinearHeads::fit(&names()[1..], labelled(&train), 10, &Default::default());
        assert!(matches!(none, Err(MetricsError::TooFewSamples { needed: 10, found: 0, .. })));
    }

    #[test]
    fn bad_input_is_an_error_that_says_what_to_do() {
        let (real, made, held_out) =
            (side("real", 40, 1.0), side("made", 40, 1.0), side("held out", 40, 1.0));
        let shared = run(&real, &made, &real, 0);
        assert!(matches!(shared, Err(MetricsError::SharedGroups { pictures: 40, .. })));
        let unlabelled = (made.0.clone(), vec![ImageRecord::default(); 40]);
        assert!(matches!(run(&real, &unlabelled, &held_out, 0), Err(MetricsError::NoLabels { .. })));
        let short = (made.0.clone(), made.1[..39].to_vec());
        assert!(matches!(run(&real, &short, &held_out, 0), Err(MetricsError::SizeMismatch { .. })));
        let narrow = (FeatureSet::new(vec![0.0; 80], 2).unwrap(), made.1.clone());
        assert!(matches!(run(&real, &narrow, &held_out, 0), Err(MetricsError::SizeMismatch { .. })));
        let config = UsefulnessConfig { replicates: 0, ..UsefulnessConfig::default() };
        let stopped = Usefulness::new(config.clone()).unwrap().measure(
            &extractor(),
            &names(),
            (labelled(&real), labelled(&made)),
            labelled(&held_out),
            &StopAfter(1),
        );
        assert!(matches!(stopped, Err(MetricsError::Cancelled { done: 1, .. })));
        assert!(Usefulness::new(UsefulnessConfig { needed: 0, ..config.clone() }).is_err());
        assert!(Usefulness::new(UsefulnessConfig { level: 1.0, ..config }).is_err());
    }
}
