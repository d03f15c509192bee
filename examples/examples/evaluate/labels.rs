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
use serde::Serialize;

use crate::args::Args;
use crate::distances::NotAvailable;
use crate::set::Set;

/// Fewest images with a finding, and without it, for a figure of it.
const NEEDED: usize = 10;

/// A set, and what a network says of it.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub(crate) set: &'a Set,
    pub(crate) extraction: &'a Extraction,
}

impl<'a> Seen<'a> {
    pub(crate) fn new(set: &'a Set, extraction: &'a Extraction) -> Self {
        Self { set, extraction }
    }
}

/// The network whose features (and findings) are used.
pub(crate) struct Network<'a> {
    pub(crate) extractor: &'a dyn FeatureExtractor,
    /// Its own findings with the logits from which on they are present; empty for a network without.
    pub(crate) findings: Vec<(String, Option<f32>)>,
}

/// What was measured, and what cannot be, with the reason.
#[derive(Debug, Default, Serialize)]
pub(crate) struct OfLabels {
    pub(crate) findings: Option<FindingsReport>,
    pub(crate) usefulness: Option<UsefulnessReport>,
    pub(crate) not_available: Vec<NotAvailable>,
}

impl OfLabels {
    /// Nothing, for one reason.
    pub(crate) fn without(why: &str) -> Self {
        let lacking = |figure| NotAvailable { figure, why: why.into() };
        Self { not_available: ["findings", "usefulness"].map(lacking).to_vec(), ..Self::default() }
    }

    /// A result, or none where the images do not allow it: that is said, and the other figures stand.
    pub(crate) fn available<T>(&mut self, figure: &'static str, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => match error.downcast_ref::<MetricsError>() {
                Some(
                    MetricsError::TooFewSamples { .. }
                    | MetricsError::SharedGroups { .. }
                    | MetricsError::NoLabels { .. },
                ) => {
                    self.not_available.push(NotAvailable { figure, why: format!("{error:#}") });
                    Ok(None)
                }
                _ => Err(error.context(figure)),
            },
        }
    }
}

pub(crate) fn measure(
    args: &Args,
    network: &Network<'_>,
    fake: Seen<'_>,
    real: Seen<'_>,
    train: Option<Seen<'_>>,
    progress: &dyn Progress,
) -> Result<OfLabels> {
    let mut out = OfLabels::default();
    let (Some(made), Some(held_out)) = (records(fake.set), records(real.set)) else {
        let why = "--fake and --real need a table with `labels` (or prompts that name findings) beside their images";
        for figure in ["findings", "usefulness"] {
            out.not_available.push(NotAvailable { figure, why: why.into() });
        }
        return Ok(out);
    };
    let trained = train.and_then(|seen| Some((seen, records(seen.set)?)));
    let replicates = args.replicates.unwrap_or(1000);
    let names = match &trained {
        Some((_, records)) => frequent(records),
        None => Vec::new(),
    };
    let teaching = trained
        .as_ref()
        .filter(|_| !names.is_empty())
        .map(|(seen, records)| Labelled { features: &seen.extraction.features, records });

    let config = FindingsConfig { needed: NEEDED, replicates, seed: args.seed, ..FindingsConfig::default() };
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
        let (findings, points) = network.findings.iter().cloned().unzip();
        let threshold = ThresholdRule::Given(points);
        let config = FindingsConfig { threshold, ..config };
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
            let why = "they need --densenet, or --train with a table whose `labels` have 10 images with and without a \
                       finding";
            out.not_available.push(NotAvailable { figure: "findings", why: why.into() });
        }
    }
    match teaching {
        Some(teaching) => {
            let config =
                UsefulnessConfig { needed: NEEDED, replicates, seed: args.seed, ..Default::default() };
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
            let why =
                "it needs --train with a table whose `labels` have 10 images with and without a finding";
            out.not_available.push(NotAvailable { figure: "usefulness", why: why.into() });
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
