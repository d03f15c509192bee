//! The search for copies of training radiographs among the adapted model's pictures.

use std::time::Instant;

use anyhow::Result;
use cxr::kernels::DiffusionBackend;
use cxr::metrics::memorization::{AuditReport, Calibration, Evidence, PromptSummary};
use cxr::metrics::{Extraction, FeatureExtractor};
use cxr_examples::evaluation::Set;
use cxr_examples::evaluation::copies;
use cxr_examples::evaluation::labels::Seen;
use cxr_examples::progress::Counting;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::data::Data;
use crate::distances::{small, small_key};
use crate::picture::Pictures;
use crate::stage::{self, Done, Stage, Stages};

/// What the audit says; `copies.csv` has every picture.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Copies {
    pub(crate) pictures: usize,
    /// Training radiographs.
    pub(crate) train: usize,
    /// Pictures that look like copies.
    pub(crate) flagged: usize,
    /// Of these, in pixels.
    pub(crate) in_pixels: usize,
    /// Of these, in features.
    pub(crate) in_features: usize,
    /// Median distance in pixels of pictures.
    pub(crate) pixel_median: f64,
    /// None where there were too few held-out radiographs: then nothing is flagged.
    pub(crate) calibration: Option<Calibration>,
    /// Pictures whose impression is a training radiograph's.
    pub(crate) prompts: Option<PromptSummary>,
    pub(crate) notes: Vec<String>,
}

/// Looks for copies, or finds that done.
pub(crate) fn audit<B: DiffusionBackend>(
    data: &Data,
    adapted: &Pictures,
    device: &B::Device,
    stages: &Stages<'_>,
) -> Result<Done<Copies>> {
    let key =
        stage::key(&json!({ "adapted": adapted.done.key, "data": data.key(), "network": small_key()? }))?;
    let record = stages.path("audit.json");
    let whole = |_: &Copies| stages.path("copies.csv").is_file();
    if let Some(done) = stages.found(Stage::Audit, &record, &key, whole)? {
        return Ok(done);
    }
    let started = Instant::now();
    let extractor = small::<B>(device)?;
    // five extractions and four searches
    let progress = Counting::begin(stages.progress, "audit", 5 + 4);
    let (made, train, held_out) = (adapted.set("adapted pictures")?, data.train(), data.held_out());
    let take = |set: &Set| -> Result<Extraction> {
        extractor.extract(set, &progress).map_err(|error| set.explain(error))
    };
    let [of_made, of_train, of_held_out] = [take(&made)?, take(&train)?, take(&held_out)?];
    let report = copies::search(
        &extractor,
        Seen::new(&made, &of_made),
        Seen::new(&train, &of_train),
        Some(Seen::new(&held_out, &of_held_out)),
        stages.out,
        &progress,
    )?;
    let copies = summary(report);
    progress.finish(&format!("{} of {} pictures look like copies", copies.flagged, copies.pictures));
    stages.keep(&record, &key, started, copies)
}

fn summary(audit: AuditReport) -> Copies {
    let with = |kinds: [Evidence; 2]| {
        audit.flagged().filter(|entry| entry.evidence.iter().any(|e| kinds.contains(e))).count()
    };
    Copies {
        pictures: audit.n_synthetic,
        train: audit.n_train,
        flagged: audit.flagged().count(),
        in_pixels: with([Evidence::PixelDistance, Evidence::PixelRatio]),
        in_features: with([Evidence::FeatureDistance, Evidence::FeatureRatio]),
        pixel_median: median(audit.entries.iter().map(|entry| entry.pixels.distance).collect()),
        calibration: audit.calibration,
        prompts: audit.prompts,
        notes: audit.notes,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
