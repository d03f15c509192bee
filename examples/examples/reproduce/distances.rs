//! Distances of both sets of pictures to held-out radiographs.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use cxr::core::hash::sha256_file;
use cxr::kernels::DiffusionBackend;
use cxr::metrics::inception::{InceptionExtractor, ResizeMode};
use cxr::metrics::small::SmallExtractor;
use cxr::metrics::{Card, Evaluation, Extraction, FeatureExtractor};
use cxr_examples::demo;
use cxr_examples::evaluation::Set;
use cxr_examples::progress::Counting;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::Settings;
use crate::data::Data;
use crate::picture::Pictures;
use crate::stage::{self, Done, Stage, Stages};

/// Three comparisons with the same held-out radiographs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Distances {
    /// Of the base model's pictures.
    pub(crate) base: Card,
    /// Of the adapted model's pictures.
    pub(crate) adapted: Card,
    /// Of as many training radiographs: what perfect pictures would score.
    pub(crate) train: Card,
}

/// The network in whose features distances are taken.
pub(crate) enum Network {
    /// That which defines FID and KID: its weights, and their hash.
    Inception(PathBuf, String),
    /// The embedded one.
    Small,
}

impl Network {
    /// Inception, where there are weights.
    pub(crate) fn new(weights: Option<PathBuf>) -> Result<Self> {
        let Some(file) = weights else { return Ok(Self::Small) };
        let hash = sha256_file(&file).context("--inception")?;
        Ok(Self::Inception(file, hash))
    }

    fn key(&self) -> Result<String> {
        match self {
            Self::Inception(_, hash) => Ok(format!("inception {hash} {}", ResizeMode::default())),
            Self::Small => small_key(),
        }
    }

    fn load<B: DiffusionBackend>(&self, device: &B::Device) -> Result<Box<dyn FeatureExtractor>> {
        match self {
            Self::Inception(file, _) => {
                let network = InceptionExtractor::<B>::load(file, ResizeMode::default(), device);
                Ok(Box::new(network.context("--inception")?))
            }
            Self::Small => Ok(Box::new(small::<B>(device)?)),
        }
    }
}

/// The embedded extractor.
pub(crate) fn small<B: DiffusionBackend>(device: &B::Device) -> Result<SmallExtractor<B>> {
    let folder = demo::extractor_folder();
    SmallExtractor::load(&folder, device).with_context(|| folder.display().to_string())
}

/// What results in its features depend on.
pub(crate) fn small_key() -> Result<String> {
    let folder = demo::extractor_folder();
    let of = |name: &str| sha256_file(folder.join(name)).with_context(|| folder.display().to_string());
    Ok(format!("small {} {}", of("config.json")?, of("model.safetensors")?))
}

/// Measures, or finds it measured.
pub(crate) fn measure<B: DiffusionBackend>(
    settings: &Settings,
    data: &Data,
    network: &Network,
    (base, adapted): (&Pictures, &Pictures),
    device: &B::Device,
    stages: &Stages<'_>,
) -> Result<Done<Distances>> {
    // A replicate in 2,048 dimensions takes longer, and 200 are enough for an interval.
    let usual = if matches!(network, Network::Small) { 1000 } else { 200 };
    let replicates = settings.replicates.unwrap_or(usual);
    let key = stage::key(&json!({
        "base": base.done.key, "adapted": adapted.done.key, "data": data.key(), "network": network.key()?,
        "replicates": replicates, "seed": settings.seed,
    }))?;
    let record = stages.path("distances.json");
    if let Some(done) = stages.found(Stage::Distances, &record, &key, |_: &Distances| true)? {
        return Ok(done);
    }
    let started = Instant::now();
    let extractor = network.load::<B>(device)?;
    // four extractions; an interval and a floor of two distances, of three sets
    let progress = Counting::begin(stages.progress, "distances", 4 + 3 * 4);
    let take = |set: Set| extractor.extract(&set, &progress).map_err(|error| set.explain(error));
    let held_out = take(data.held_out())?;
    let evaluation = Evaluation { replicates, seed: settings.seed, ..Evaluation::default() };
    let compare = |fake: Extraction| evaluation.compare(&held_out, &fake, &extractor.id(), &progress);
    let distances = Distances {
        base: compare(take(base.set("base pictures")?)?)?,
        adapted: compare(take(adapted.set("adapted pictures")?)?)?,
        train: compare(take(data.some_of_train(settings.pictures))?)?,
    };
    progress.finish(&format!("{} pictures of each model, in {}", settings.pictures, shown(&record)));
    stages.keep(&record, &key, started, distances)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
