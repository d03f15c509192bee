//! Fine-tuning: the adapter learns, everything else is frozen. It is `finetune`'s own, in a folder of this run.

use std::time::Instant;

use anyhow::Result;
use cxr::kernels::DiffusionAutodiff;
use cxr::trainer::distributed::Alone;
use cxr_examples::finetune::{Finetune, Finetuned};
use serde_json::json;

use crate::Base;
use crate::args::{Args, Settings};
use crate::data::Data;
use crate::stage::{self, Done, Stage, Stages};

/// The adapter, and the loss curve, in the folder of the run.
pub(crate) const ADAPTER: &str = "lora/adapter.safetensors";
pub(crate) const CURVE: &str = "lora/loss.png";

/// Trains the adapter, or finds it trained.
pub(crate) fn finetune<B: DiffusionAutodiff>(
    args: &Args,
    settings: &Settings,
    data: &Data,
    base: &Base,
    device: &B::Device,
    stages: &Stages<'_>,
) -> Result<Done<Finetuned>> {
    let config = &settings.finetune;
    let key = stage::key(&json!({ "model": base.hash, "data": data.key(), "settings": config }))?;
    stages.recall("lora", &key)?;
    let record = stages.path("lora/done.json");
    let whole = |_: &Finetuned| [ADAPTER, CURVE].iter().all(|file| stages.path(file).is_file());
    if let Some(done) = stages.found(Stage::Finetune, &record, &key, whole)? {
        return Ok(done);
    }
    let started = Instant::now();
    let out = stages.folder("lora", &key)?;
    let run = Finetune {
        config,
        collection: &data.collection,
        split: &data.split,
        files: &base.files,
        options: &base.options,
        model: args.model.as_deref().unwrap_or("the embedded model of this project"),
        hash: &base.hash,
        images: &data.images,
        out: &out,
        // Of all settings: latents and embeddings have keys of their own.
        cache: &stages.path("data/encoded"),
        kohya: false,
        ranks: &Alone,
        quiet: args.run.quiet,
    };
    let made = run.run::<B>(device, stages.progress)?;
    let made = made.ok_or_else(|| anyhow::anyhow!("the fine-tuning of a single process gave no adapter"))?;
    stages.keep(&record, &key, started, made)
}
