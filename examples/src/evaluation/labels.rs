//! What the labels of the images allow: does an image show its findings, and do synthetic images teach them?

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use cxr::core::progress::Progress;
use cxr::dataset::Pair;
use cxr::metrics::findings::{Findings, FindingsConfig, FindingsReport, Scored, ThresholdRule};
use cxr::metrics::labels::{ImageRecord, same_finding};
use cxr::metrics::usefulness::{
    Labelled, LinearHeads, LogisticConfig, Usefulness, UsefulnessConfig, UsefulnessReport,
};
use cxr::metrics::{Extraction, FeatureExtractor, MetricsError};
use serde::{Deserialize, Serialize};

use super::set::Set;

/// Fewest images with a finding, and without it, for a figure of it.
const NEEDED: usize = 10;

/// A figure that is not given, never a made-up number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NotAvailable {
    /// Its name.
    pub figure: String,
    /// The reason.
    pub why: String,
}

/// A set, and what a network says of it.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// The images.
    pub set: &'a Set,
    /// Its features and logits, one for each image.
    pub extraction: &'a Extraction,
}

impl<'a> Seen<'a> {
    /// Both together.
    pub fn new(set: &'a Set, extraction: &'a Extraction) -> Self {
        Self { set, extraction }
    }
}

/// The network whose features (and findings) are used.
pub struct Network<'a> {
    /// The network.
    pub extractor: &'a dyn FeatureExtractor,
    /// Names of its own findings, one for each logit; empty for a network without.
    pub findings: Vec<String>,
    /// From which logit on a finding is there.
    pub threshold: ThresholdRule,
}

/// What was measured, and what cannot be, with the reason.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct OfLabels {
    /// Whether images show their findings.
    pub findings: Option<FindingsReport>,
    /// What a classifier learns from them.
    pub usefulness: Option<UsefulnessReport>,
    /// What cannot be measured.
    pub not_available: Vec<NotAvailable>,
}

impl OfLabels {
    /// Nothing, for one reason.
    pub fn without(why: &str) -> Self {
        let lacking = |figure: &str| NotAvailable { figure: figure.into(), why: why.into() };
        Self { not_available: ["findings", "usefulness"].map(lacking).to_vec(), ..Self::default() }
    }

    /// A result, or none where the images do not allow it: that is said, and the other figures stand.
    ///
    /// # Errors
    /// What is wrong otherwise.
    pub fn available<T>(&mut self, figure: &'static str, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => match error.downcast_ref::<MetricsError>() {
                Some(
                    MetricsError::TooFewSamples { .. }
                    | MetricsError::SharedGroups { .. }
                    | MetricsError::NoLabels { .. }
                    | MetricsError::NotConverged { .. },
                ) => {
                    self.not_available
                        .push(NotAvailable { figure: figure.into(), why: format!("{error:#}") });
                    Ok(None)
                }
                _ => Err(error.context(figure)),
            },
        }
    }
}

/// How intervals are made.
#[derive(Debug, Clone, Copy)]
pub struct Resampling {
    /// Resamples of each interval; 0 leaves intervals out.
    pub replicates: usize,
    /// Seed of every random choice.
    pub seed: u64,
}

/// Whether the images of `fake` show the findings of their prompts, by a network that is judged on `real` at the same
/// time, and what a classifier learns from them that is trained beside one on `train`.
///
/// # Errors
/// What goes wrong, except that images do not allow a figure: that is in `not_available`.
pub fn measure(
    resampling: Resampling,
    network: &Network<'_>,
    fake: Seen<'_>,
    real: Seen<'_>,
    train: Option<Seen<'_>>,
    progress: &dyn Progress,
) -> Result<OfLabels> {
    let mut out = OfLabels::default();
    let (Some(made), Some(held_out)) = (records(fake.set), records(real.set)) else {
        let why = "the images need a table with `labels` (or prompts that name findings) beside them";
        for figure in ["findings", "usefulness"] {
            out.not_available.push(NotAvailable { figure: figure.into(), why: why.into() });
        }
        return Ok(out);
    };
    let trained = train.and_then(|seen| Some((seen, records(seen.set)?)));
    let Resampling { replicates, seed } = resampling;
    let names = match &trained {
        Some((_, records)) => frequent(records),
        None => Vec::new(),
    };
    let teaching = trained
        .as_ref()
        .filter(|_| !names.is_empty())
        .map(|(seen, records)| Labelled { features: &seen.extraction.features, records });

    let config = FindingsConfig { needed: NEEDED, replicates, seed, ..FindingsConfig::default() };
    let scored = if network.findings.is_empty() {
        match teaching {
            Some(teaching) => {
                let heads = LinearHeads::fit(&names, teaching, NEEDED, &LogisticConfig::default())?;
                let scores = |seen: Seen<'_>| heads.scores(&seen.extraction.features);
                let classifier = format!("linear heads on {}", network.extractor.name());
                Some((classifier, heads.findings.clone(), scores(fake)?, scores(real)?, config))
            }
            None => None,
        }
    } else {
        let logits = |seen: Seen<'_>| seen.extraction.logits.clone().context("the network gave no logits");
        let config = FindingsConfig { threshold: network.threshold.clone(), ..config };
        let findings = network.findings.clone();
        Some((network.extractor.name().to_string(), findings, logits(fake)?, logits(real)?, config))
    };
    match scored {
        Some((classifier, findings, made_scores, real_scores, config)) => {
            let made = Scored { scores: &made_scores, records: &made };
            let real = Scored { scores: &real_scores, records: &held_out };
            let report = Findings::new(config)?.measure(&classifier, &findings, made, real, progress);
            out.findings = out.available("findings", report.map_err(Into::into))?;
        }
        None => {
            let why = "they need a network that knows findings (--densenet), or training images (--train) with a table \
                       whose `labels` have 10 images with and without a finding";
            out.not_available.push(NotAvailable { figure: "findings".into(), why: why.into() });
        }
    }
    match teaching {
        Some(teaching) => {
            let config = UsefulnessConfig { needed: NEEDED, replicates, seed, ..Default::default() };
            let synthetic = Labelled { features: &fake.extraction.features, records: &made };
            let held_out = Labelled { features: &real.extraction.features, records: &held_out };
            let report = Usefulness::new(config)?.measure(
                &network.extractor.id(),
                &names,
                (teaching, synthetic),
                held_out,
                progress,
            );
            out.usefulness = out.available("usefulness", report.map_err(Into::into))?;
        }
        None => {
            let why = "it needs training images (--train) with a table whose `labels` have 10 images with and without \
                       a finding";
            out.not_available.push(NotAvailable { figure: "usefulness".into(), why: why.into() });
        }
    }
    Ok(out)
}

/// What the tables say of each image; none without a table.
fn records(set: &Set) -> Option<Vec<ImageRecord>> {
    let pairs = set.pairs.as_ref()?;
    let record = |pair: &Pair| ImageRecord {
        name: pair.name.clone(),
        path: pair.image.clone(),
        prompt: Some(pair.text.clone()).filter(|text| !text.trim().is_empty()),
        group: pair.group.clone(),
        view: pair.view.clone(),
        side: None,
        labels: (!pair.labels.is_empty()).then(|| pair.labels.clone()),
    };
    Some(pairs.iter().map(record).collect())
}

/// Labels with enough images with and without them, the most frequent first. That nothing was found is no finding.
fn frequent(records: &[ImageRecord]) -> Vec<String> {
    let known = records.iter().filter(|r| r.labels.is_some()).count();
    let mut counts: BTreeMap<&String, usize> = BTreeMap::new();
    for label in records.iter().flat_map(|r| r.labels.iter().flatten()) {
        *counts.entry(label).or_default() += 1;
    }
    let nothing = |label: &str| ["No Finding", "normal"].iter().any(|name| same_finding(name, label));
    let enough = |count: usize| count >= NEEDED && known - count.min(known) >= NEEDED;
    let mut names: Vec<(&String, usize)> =
        counts.into_iter().filter(|(label, count)| enough(*count) && !nothing(label)).collect();
    names.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    names.into_iter().map(|(name, _)| name.clone()).collect()
}
