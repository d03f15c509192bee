//! Whether pictures show the findings of their prompts, and what a classifier learns from them: by the embedded
//! extractor, whose heads are judged on held-out radiographs at the same time.

use std::time::Instant;

use anyhow::Result;
use cxr::dataset::impression::NO_FINDING;
use cxr::kernels::DiffusionBackend;
use cxr::metrics::findings::ThresholdRule;
use cxr::metrics::{Extraction, FeatureExtractor, FeatureSet};
use cxr_examples::evaluation::Set;
use cxr_examples::evaluation::labels::{self, Network, OfLabels, Resampling, Seen};
use cxr_examples::progress::Counting;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::Settings;
use crate::data::Data;
use crate::distances::{small, small_key};
use crate::picture::Pictures;
use crate::stage::{self, Done, Stage, Stages};

/// Of both sets of pictures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Checked {
    pub(crate) base: OfLabels,
    pub(crate) adapted: OfLabels,
}

/// Checks, or finds it checked.
pub(crate) fn check<B: DiffusionBackend>(
    settings: &Settings,
    data: &Data,
    (base, adapted): (&Pictures, &Pictures),
    device: &B::Device,
    stages: &Stages<'_>,
) -> Result<Done<Checked>> {
    let resampling = Resampling { replicates: settings.replicates.unwrap_or(1000), seed: settings.seed };
    let key = stage::key(&json!({
        "base": base.done.key, "adapted": adapted.done.key, "data": data.key(), "network": small_key()?,
        "replicates": resampling.replicates, "seed": resampling.seed,
    }))?;
    let record = stages.path("findings.json");
    if let Some(done) = stages.found(Stage::Findings, &record, &key, |_: &Checked| true)? {
        return Ok(done);
    }
    let started = Instant::now();
    let extractor = small::<B>(device)?;
    // That nothing was found is no finding: a label of it would be the absence of all others.
    let columns: Vec<usize> = (0..extractor.logit_names().len())
        .filter(|&column| extractor.logit_names()[column] != NO_FINDING)
        .collect();
    let network = Network {
        extractor: &extractor,
        findings: columns.iter().map(|&column| extractor.logit_names()[column].clone()).collect(),
        threshold: ThresholdRule::BalancedOnReal,
    };
    // four extractions; findings and usefulness of two sets
    let progress = Counting::begin(stages.progress, "findings", 4 + 2 * 2);
    let take = |set: &Set| -> Result<Extraction> {
        let extraction = extractor.extract(set, &progress).map_err(|error| set.explain(error))?;
        let logits = extraction.logits.as_ref().map(|logits| chosen(logits, &columns)).transpose()?;
        Ok(Extraction { logits, ..extraction })
    };
    let (train, held_out) = (data.train(), data.held_out());
    let (of_train, of_held_out) = (take(&train)?, take(&held_out)?);
    let measure = |set: &Set| -> Result<OfLabels> {
        let extraction = take(set)?;
        let (real, train) = (Seen::new(&held_out, &of_held_out), Seen::new(&train, &of_train));
        labels::measure(resampling, &network, Seen::new(set, &extraction), real, Some(train), &progress)
    };
    let checked = Checked {
        base: measure(&base.set("base pictures")?)?,
        adapted: measure(&adapted.set("adapted pictures")?)?,
    };
    progress.finish(&format!("in {}", record.display()));
    stages.keep(&record, &key, started, checked)
}

/// Some columns of the logits.
fn chosen(logits: &FeatureSet, columns: &[usize]) -> Result<FeatureSet> {
    let values = logits.rows().flat_map(|row| columns.iter().map(|&column| row[column])).collect();
    Ok(FeatureSet::new(values, columns.len())?)
}
