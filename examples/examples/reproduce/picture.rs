//! Pictures of one model, one per prompt of a held-out radiograph.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cxr::core::hash::sha256_file;
use cxr::core::metadata::{MetadataRow, write_jsonl};
use cxr::core::progress::Progress;
use cxr::kernels::DiffusionBackend;
use cxr::ldm::pipeline::{Request, StableDiffusion};
use cxr::ldm::scheduler::Sampler;
use cxr_examples::evaluation::Set;
use serde_json::json;

use crate::Base;
use crate::args::Settings;
use crate::data::Data;
use crate::stage::{self, Done, Stage, Stages};

/// A folder of pictures.
pub(crate) struct Pictures {
    pub(crate) folder: PathBuf,
    /// PNG files, in the order of the prompts.
    pub(crate) files: Vec<PathBuf>,
    /// How many there are.
    pub(crate) done: Done<usize>,
}

/// The stage, the folder and the title of a set.
pub(crate) struct Kind {
    pub(crate) stage: Stage,
    pub(crate) folder: &'static str,
    pub(crate) title: &'static str,
}

pub(crate) const BASE: Kind = Kind { stage: Stage::BasePictures, folder: "base", title: "base pictures" };
pub(crate) const ADAPTED: Kind =
    Kind { stage: Stage::LoraPictures, folder: "adapted", title: "adapted pictures" };

impl Pictures {
    /// As they are measured.
    pub(crate) fn set(&self, what: &'static str) -> Result<Set> {
        Set::open(what, &self.folder, None)
    }
}

/// Makes the pictures of one model; those that are there already, made with the same settings, stay.
pub(crate) fn make<B: DiffusionBackend>(
    settings: &Settings,
    data: &Data,
    base: &Base,
    adapter: Option<&Path>,
    kind: &Kind,
    device: &B::Device,
    stages: &Stages<'_>,
) -> Result<Pictures> {
    let Settings { pictures: count, sampling_steps: steps, guidance, seed, .. } = *settings;
    let name = |i: usize| format!("{i:05}.png");
    let positions = data.prompted(count);
    let prompts: Vec<&str> =
        positions.iter().map(|&position| data.collection.pairs[position].text.as_str()).collect();
    let side = settings.finetune.image_size as usize;
    let key = stage::key(&json!({
        "model": base.hash, "adapter": adapter.map(sha256_file).transpose()?, "prompts": prompts, "side": side,
        "dtype": settings.finetune.base_dtype, "steps": steps, "guidance": guidance, "seed": seed,
    }))?;
    stages.recall(kind.folder, &key)?;
    let in_place = stages.path(kind.folder);
    let files = |folder: &Path| (0..count).map(|i| folder.join(name(i))).collect::<Vec<PathBuf>>();
    let whole = |_: &usize| {
        in_place.join("metadata.jsonl").is_file() && files(&in_place).iter().all(|file| file.is_file())
    };
    if let Some(done) = stages.found(kind.stage, &in_place.join("done.json"), &key, whole)? {
        return Ok(Pictures { files: files(&in_place), folder: in_place, done });
    }

    let started = Instant::now();
    let folder = stages.folder(kind.folder, &key)?;
    let missing: Vec<usize> = (0..count).filter(|i| !folder.join(name(*i)).is_file()).collect();
    if !missing.is_empty() {
        let parts = base.files.load::<B>(&base.loading(), device).context("--model")?;
        let mut pipeline = StableDiffusion::new(parts, device)?;
        if let Some(adapter) = adapter {
            pipeline = pipeline.with_lora(adapter, 1.0)?;
        }
        // Seeds of a request follow each other.
        let batches: Vec<&[usize]> =
            missing.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(settings.batch)).collect();
        stages.progress.begin(kind.title, Some((batches.len() * steps) as u64));
        for (done, batch) in batches.iter().enumerate() {
            let progress = Later { progress: stages.progress, before: (done * steps) as u64 };
            let request = Request::each(batch.iter().map(|i| prompts[*i]))
                .seed(seed.wrapping_add(batch[0] as u64))
                .steps(steps)
                .guidance(guidance)
                .size(side, side)
                .sampler(Sampler::DpmPp2m)
                .batch(settings.batch);
            let images = pipeline.generate_with(&request, &progress, &mut |_| ControlFlow::Continue(()))?;
            for (image, i) in images.iter().zip(*batch) {
                image.save_png(folder.join(name(*i)))?;
            }
            if images.len() < batch.len() {
                bail!("stopped: the pictures that are finished stay in {}", folder.display());
            }
        }
        stages.progress.end(&format!("{} in {}", missing.len(), folder.display()));
    }
    write_rows(seed, data, &folder, &positions, name)?;
    let done = stages.keep(&folder.join("done.json"), &key, started, count)?;
    Ok(Pictures { files: files(&folder), folder, done })
}

/// `metadata.jsonl`: the row of the radiograph whose prompt it is, with the picture's name and seed.
fn write_rows(
    seed: u64,
    data: &Data,
    folder: &Path,
    positions: &[usize],
    name: impl Fn(usize) -> String,
) -> Result<()> {
    let row = |(i, position): (usize, &usize)| {
        let pair = &data.collection.pairs[*position];
        MetadataRow {
            file_name: name(i),
            text: pair.text.clone(),
            labels: pair.labels.iter().cloned().collect(),
            view: pair.view.clone(),
            seed: Some(seed.wrapping_add(i as u64)),
            ..MetadataRow::default()
        }
    };
    let rows: Vec<MetadataRow> = positions.iter().enumerate().map(row).collect();
    Ok(write_jsonl(folder.join("metadata.jsonl"), &rows)?)
}

/// The steps of one batch on a bar over all of them: the stage begins and ends outside.
struct Later<'a> {
    progress: &'a dyn Progress,
    before: u64,
}

impl Progress for Later<'_> {
    fn advance(&self, done: u64, message: &str) -> ControlFlow<()> {
        self.progress.advance(self.before + done, message)
    }
}
