//! The figures, finding by finding and slice by slice.

use cxr_core::progress::Progress;
use serde::{Deserialize, Serialize};

use super::report::{FindingRow, FindingsReport, Measure, Measured, Slice};
use crate::error::{MetricsError, Result};
use crate::features::{FeatureSet, expect_samples, expect_size};
use crate::interval::{BootstrapConfig, IntervalMethod};
use crate::labels::ImageRecord;
use crate::progress::advance;
use crate::ranked::Ranked;

/// Where the threshold of sensitivity and specificity comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThresholdRule {
    /// Per finding, where sensitivity and specificity of the held-out real pictures have the largest sum. The
    /// real figures are then a little too good, the synthetic ones are not.
    BalancedOnReal,
    /// Per finding, the lowest with at least this specificity on the held-out real pictures.
    RealSpecificity(f64),
    /// One score per finding, none for a finding without: as [`operating_logits`] of a DenseNet.
    ///
    /// [`operating_logits`]: crate::densenet::DenseNetExtractor::operating_logits
    Given(Vec<Option<f32>>),
}

/// How findings are measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FindingsConfig {
    /// Fewest positives, and fewest negatives, of a figure: below, the number is given instead. A sensitivity of
    /// 10 pictures is known to within 0.3.
    pub needed: usize,
    /// Where thresholds come from.
    pub threshold: ThresholdRule,
    /// Bootstrap resamples of each figure; 0 leaves intervals out.
    pub replicates: usize,
    /// Coverage of intervals.
    pub level: f64,
    /// Seed of intervals.
    pub seed: u64,
}

impl Default for FindingsConfig {
    /// 10 pictures, balanced thresholds, 1000 replicates, 95 %, seed 0.
    fn default() -> Self {
        Self { needed: 10, threshold: ThresholdRule::BalancedOnReal, replicates: 1000, level: 0.95, seed: 0 }
    }
}

/// Pictures with a classifier's scores and what is known of them.
#[derive(Debug, Clone, Copy)]
pub struct Scored<'a> {
    /// `[n, findings]`: logits, or any other increasing function of probability.
    pub scores: &'a FeatureSet,
    /// One per picture, in the same order.
    pub records: &'a [ImageRecord],
}

/// A measurement with one configuration.
#[derive(Debug, Clone)]
pub struct Findings {
    config: FindingsConfig,
}

impl Findings {
    /// # Errors
    /// A configuration that is not valid.
    pub fn new(config: FindingsConfig) -> Result<Self> {
        let invalid = |name, value: String, expected: &str| {
            Err(MetricsError::InvalidParameter { name, value, expected: expected.into() })
        };
        if config.needed == 0 {
            return invalid("needed", "0".into(), "at least one positive and one negative");
        }
        if !(config.level > 0.0 && config.level < 1.0) {
            return invalid("level", config.level.to_string(), "a coverage between 0 and 1, as 0.95");
        }
        match &config.threshold {
            ThresholdRule::RealSpecificity(s) if !(*s > 0.0 && *s < 1.0) => {
                invalid("threshold", s.to_string(), "a specificity between 0 and 1, as 0.9")
            }
            ThresholdRule::Given(scores) if scores.iter().flatten().any(|s| !s.is_finite()) => {
                invalid("threshold", format!("{scores:?}"), "finite scores")
            }
            _ => Ok(Self { config }),
        }
    }

    /// Figures of every finding for which both sides have a label. `findings` names the columns of the scores; what
    /// of it a picture has is [`ImageRecord::has`].
    ///
    /// # Errors
    /// Numbers of scores, names, thresholds and records that do not agree; a side without pictures or without any
    /// label for any finding; cancellation.
    pub fn measure(
        &self,
        classifier: &str,
        findings: &[String],
        synthetic: Scored<'_>,
        real: Scored<'_>,
        progress: &dyn Progress,
    ) -> Result<FindingsReport> {
        for (what, side) in [("synthetic", synthetic), ("held-out real", real)] {
            expect_samples(&format!("the {what} set"), 1, side.scores.len())?;
            expect_size(|| format!("scores per {what} picture"), findings.len(), side.scores.width())?;
            expect_size(|| format!("records of {what} pictures"), side.scores.len(), side.records.len())?;
            if findings.iter().all(|finding| side.records.iter().all(|r| r.has(finding).is_none())) {
                return Err(MetricsError::NoLabels { what: what.into(), findings: findings.join(", ") });
            }
        }
        if let ThresholdRule::Given(given) = &self.config.threshold {
            expect_size(|| "given thresholds".into(), findings.len(), given.len())?;
        }
        const STAGE: &str = "findings";
        progress.begin(STAGE, Some(findings.len() as u64));
        let mut rows = Vec::new();
        for (column, finding) in findings.iter().enumerate() {
            self.add_rows(column, finding, synthetic, real, &mut rows)?;
            advance(progress, STAGE, column + 1, findings.len())?;
        }
        progress.end("");
        Ok(FindingsReport {
            classifier: classifier.into(),
            threshold: self.config.threshold.clone(),
            needed: self.config.needed,
            seed: self.config.seed,
            rows,
            notes: self.notes(synthetic, real),
        })
    }

    fn add_rows(
        &self,
        column: usize,
        finding: &str,
        synthetic: Scored<'_>,
        real: Scored<'_>,
        rows: &mut Vec<FindingRow>,
    ) -> Result<()> {
        let all = real.ranked(column, finding, Slice::All);
        let enough = all.positives.min(all.negatives) >= self.config.needed;
        let threshold = match &self.config.threshold {
            ThresholdRule::Given(given) => given[column],
            ThresholdRule::BalancedOnReal if enough => all.youden(),
            ThresholdRule::RealSpecificity(s) if enough => all.at_specificity(*s),
            _ => None,
        };
        for slice in Slice::ALL {
            let sides = [synthetic, real].map(|side| side.ranked(column, finding, slice));
            let some = |ranked: &Ranked| match slice {
                // Its positives are those of all pictures: without a negative it says nothing of its own.
                Slice::Denied => ranked.negatives > 0,
                _ => ranked.positives + ranked.negatives > 0,
            };
            if slice != Slice::All && !sides.iter().any(some) {
                continue;
            }
            let purpose = |side: &str| format!("findings/{finding}/{}/{side}", slice.name());
            rows.push(FindingRow {
                finding: finding.into(),
                slice,
                threshold,
                synthetic: self.figures(&purpose("synthetic"), &sides[0], threshold)?,
                real: self.figures(&purpose("real"), &sides[1], threshold)?,
            });
        }
        Ok(())
    }

    fn figures(&self, purpose: &str, ranked: &Ranked, threshold: Option<f32>) -> Result<Measure> {
        let (positives, negatives) = (ranked.positives, ranked.negatives);
        let share = |label: bool| {
            let found = if label { positives } else { negatives };
            let Some(threshold) = threshold else { return Ok(Measured::NoThreshold) };
            let sign = |above: f64| if label { above } else { 1.0 - above };
            let figure = |weights: Option<&[f64]>| ranked.share_above(label, threshold, weights).map(sign);
            self.figure(&format!("{purpose}/{label}"), found, ranked, figure)
        };
        Ok(Measure {
            n: positives + negatives,
            positives,
            negatives,
            auroc: self.figure(purpose, positives.min(negatives), ranked, |weights| ranked.area(weights))?,
            sensitivity: share(true)?,
            specificity: share(false)?,
        })
    }

    fn figure(
        &self,
        purpose: &str,
        found: usize,
        ranked: &Ranked,
        figure: impl Fn(Option<&[f64]>) -> Option<f64> + Sync,
    ) -> Result<Measured> {
        let too_few = Measured::TooFew { found, needed: self.config.needed };
        if found < self.config.needed {
            return Ok(too_few);
        }
        let Some(value) = figure(None) else { return Ok(too_few) };
        let FindingsConfig { replicates, level, seed, .. } = self.config;
        let interval = if replicates > 0 {
            let config = BootstrapConfig { replicates, level, method: IntervalMethod::Percentile, seed };
            Some(ranked.interval(purpose, value, &config, |weights| figure(Some(weights)))?)
        } else {
            None
        };
        Ok(Measured::Value { value, interval })
    }

    fn notes(&self, synthetic: Scored<'_>, real: Scored<'_>) -> Vec<String> {
        let mut notes = vec![match &self.config.threshold {
            ThresholdRule::BalancedOnReal => {
                "thresholds: largest sum of sensitivity and specificity on the real pictures, whose own figures are \
                 a little too good for it"
                    .to_string()
            }
            ThresholdRule::RealSpecificity(s) => format!("thresholds: specificity of {s} on the real pictures"),
            ThresholdRule::Given(_) => "thresholds: given".to_string(),
        }];
        for (what, side) in [("synthetic", synthetic), ("real", real)] {
            let unlabelled = side.records.iter().filter(|r| r.labels.is_none()).count();
            if unlabelled > 0 {
                notes.push(format!(
                    "{unlabelled} of {} {what} pictures have no labels: their text says what they show, and where \
                     it says nothing they are left out",
                    side.records.len()
                ));
            }
            if side.records.iter().all(|r| r.group.is_none()) {
                notes.push(format!(
                    "the {what} pictures have no patients: their intervals take every picture for independent"
                ));
            }
        }
        notes
    }
}

impl Scored<'_> {
    /// The pictures of a slice whose label is known.
    fn ranked(&self, column: usize, finding: &str, slice: Slice) -> Ranked {
        let (mut scores, mut labels, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        for (row, record) in self.scores.rows().zip(self.records) {
            let Some(present) = record.has(finding) else { continue };
            if slice.holds(record, finding, present) {
                scores.push(row[column]);
                labels.push(present);
                groups.push(record.group.as_deref());
            }
        }
        Ranked::new(&scores, &labels, &groups)
    }
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;
    use cxr_core::random::Stream;

    use super::*;

    fn names() -> Vec<String> {
        ["Effusion", "Cardiomegaly", "Hernia"].map(String::from).to_vec()
    }

    /// Effusions score `gap` higher, cardiomegaly does not; every fourth picture is lateral; one hernia.
    fn side(name: &str, n: usize, gap: f32) -> (FeatureSet, Vec<ImageRecord>) {
        let mut stream = Stream::new(9, name, 0);
        let mut scores = Vec::new();
        let mut records = Vec::new();
        for i in 0..n {
            let (effusion, heart) = (i % 3 == 0, i % 2 == 0);
            scores.push(stream.normal() + if effusion { gap } else { 0.0 });
            scores.extend([stream.normal(), stream.normal()]);
            let labels = [("Pleural Effusion", effusion), ("cardiomegaly", heart), ("Hernia", i == 5)];
            records.push(ImageRecord {
                name: format!("{i}.png"),
                prompt: Some(if !effusion && i % 5 == 1 { "No effusion." } else { "Chest." }.into()),
                group: Some(format!("{name} {}", i / 2)),
                view: Some(if i % 4 == 3 { "Lateral" } else { "PA" }.into()),
                labels: Some(labels.iter().filter(|l| l.1).map(|l| l.0.to_string()).collect()),
                ..ImageRecord::default()
            });
        }
        (FeatureSet::new(scores, 3).unwrap(), records)
    }

    fn measure(config: FindingsConfig, gap: f32) -> Result<FindingsReport> {
        let (made, real) = (side("made", 240, gap), side("real", 300, 1.5));
        let scored = |s: &'static (FeatureSet, Vec<ImageRecord>)| Scored { scores: &s.0, records: &s.1 };
        let leak = |s| -> &'static (FeatureSet, Vec<ImageRecord>) { Box::leak(Box::new(s)) };
        Findings::new(config)?.measure("toy", &names(), scored(leak(made)), scored(leak(real)), &Silent)
    }

    fn value(measured: &Measured) -> (f64, f64, f64) {
        match measured {
            Measured::Value { value, interval: Some(i) } => (i.low, *value, i.high),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_the_prompt_asks_for_is_seen_or_not_with_an_interval() {
        let config = FindingsConfig { replicates: 200, ..FindingsConfig::default() };
        let shown = measure(config.clone(), 1.5).unwrap();
        let ignored = measure(config, 0.0).unwrap();
        // Two normal scores 1.5 apart: area Phi(1.5 / sqrt 2) = 0.856.
        let row = shown.row("Effusion", Slice::All).unwrap();
        assert_eq!((row.synthetic.n, row.synthetic.positives, row.real.positives), (240, 80, 100));
        for measure in [&row.synthetic, &row.real] {
            let (low, _, high) = value(&measure.auroc);
            assert!(low < 0.856 && 0.856 < high && high - low < 0.15, "{low} to {high}");
            // The best threshold lies in the middle: sensitivity and specificity Phi(0.75) = 0.77 each.
            let sum = value(&measure.sensitivity).1 + value(&measure.specificity).1;
            assert!((sum - 1.55).abs() < 0.12, "{sum}");
        }
        let row = ignored.row("Effusion", Slice::All).unwrap();
        let (low, _, high) = value(&row.synthetic.auroc);
        assert!(low < 0.55 && 0.45 < high && high < 0.65, "{low} to {high}");
        assert!(value(&row.synthetic.sensitivity).1 < 0.4);
    }

    #[test]
    fn too_few_is_a_state_and_slices_have_their_own_numbers() {
        let report = measure(FindingsConfig { replicates: 20, ..FindingsConfig::default() }, 1.5).unwrap();
        let hernia = report.row("Hernia", Slice::All).unwrap();
        assert_eq!(hernia.synthetic.auroc, Measured::TooFew { found: 1, needed: 10 });
        assert_eq!((&hernia.synthetic.sensitivity, hernia.threshold), (&Measured::NoThreshold, None));
        let of = |slice| report.row("Effusion", slice).unwrap();
        assert_eq!(of(Slice::Frontal).synthetic.n + of(Slice::Lateral).synthetic.n, 240);
        assert_eq!(of(Slice::Lateral).synthetic.n, 60);
        // i % 5 == 1 and i % 3 != 0: 32 of 240.
        assert_eq!((of(Slice::Denied).synthetic.negatives, of(Slice::Denied).synthetic.positives), (32, 80));
        assert!(report.row("Hernia", Slice::Denied).is_none(), "no prompt denies a hernia");
        let text = report.markdown();
        assert!(text.contains("| Hernia | all | N = 1 |") && !text.contains("NaN"), "{text}");
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.contains("\"too_few\""));
        assert_eq!(serde_json::from_str::<FindingsReport>(&json).unwrap(), report);
    }

    #[test]
    fn thresholds_may_be_given_or_follow_specificity() {
        let at = |threshold| {
            let config = FindingsConfig { replicates: 0, threshold, ..FindingsConfig::default() };
            measure(config, 1.5).unwrap().row("Effusion", Slice::All).unwrap().clone()
        };
        let given = at(ThresholdRule::Given(vec![Some(100.0), None, None]));
        assert_eq!((given.real.sensitivity.value(), given.real.specificity.value()), (Some(0.0), Some(1.0)));
        let strict = at(ThresholdRule::RealSpecificity(0.9));
        assert!((strict.real.specificity.value().unwrap() - 0.9).abs() < 0.01);
        assert!(matches!(strict.real.auroc, Measured::Value { interval: None, .. }));
    }

    #[test]
    fn bad_input_is_an_error_that_says_what_to_do() {
        let config = FindingsConfig { replicates: 0, ..FindingsConfig::default() };
        let findings = Findings::new(config.clone()).unwrap();
        let (made, real) = (side("made", 30, 1.0), side("real", 30, 1.0));
        let run = |made: &(FeatureSet, Vec<ImageRecord>), names: &[String]| {
            let scored = |s| -> Scored<'_> {
                let (a, b): &(FeatureSet, Vec<ImageRecord>) = s;
                Scored { scores: a, records: b }
            };
            findings.measure("toy", names, scored(made), scored(&real), &Silent).map(|_| ())
        };
        assert!(matches!(run(&made, &names()[..2]), Err(MetricsError::SizeMismatch { .. })));
        let short = (made.0.clone(), made.1[..29].to_vec());
        assert!(matches!(run(&short, &names()), Err(MetricsError::SizeMismatch { .. })));
        let none = (made.0.clone(), vec![ImageRecord::default(); 30]);
        let message = run(&none, &names()).unwrap_err().to_string();
        assert!(message.contains("synthetic") && message.contains("metadata.jsonl"), "{message}");
        let empty = (made.0.select(&[]), vec![]);
        assert!(matches!(run(&empty, &names()), Err(MetricsError::TooFewSamples { .. })));
        // One class alone and one picture alone are no errors: their rows say what is missing.
        let one = (made.0.select(&[0]), made.1[..1].to_vec());
        run(&one, &names()).unwrap();
        for broken in [
            FindingsConfig { needed: 0, ..config.clone() },
            FindingsConfig { level: 95.0, ..config.clone() },
            FindingsConfig { threshold: ThresholdRule::RealSpecificity(1.0), ..config.clone() },
            FindingsConfig { threshold: ThresholdRule::Given(vec![Some(f32::NAN)]), ..config.clone() },
        ] {
            assert!(matches!(Findings::new(broken), Err(MetricsError::InvalidParameter { .. })));
        }
        let given =
            Findings::new(FindingsConfig { threshold: ThresholdRule::Given(vec![None]), ..config }).unwrap();
        let scored = Scored { scores: &real.0, records: &real.1 };
        assert!(given.measure("toy", &names(), scored, scored, &Silent).is_err());
    }
}
