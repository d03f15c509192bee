//! Pictures of one model, one per prompt of a held-out radiograph.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cxr::core::hash::sha256_file;
use cxr::core::metadata::{MetadataRow, write_jsonl};
use cxr::core::progress::Progress;
use cxr::kernels::DiffusionBackend;
use cxr::ldm::pipeline::{LoadOptions, Request, StableDiffusion};
use cxr::ldm::scheduler::Sampler;
use cxr_examples::demo::thumbnails::Thumbnails;
use serde_json::json;

use crate::{Args, stage};

/// Pictures that go through the networks at once.
const BATCH: usize = 25;

/// A folder of pictures.
pub(crate) struct Pictures {
    /// PNG files, in the order of the prompts.
    pub(crate) files: Vec<PathBuf>,
    /// Their prompts.
    pub(crate) prompts: Vec<String>,
    /// Positions in the collection of the radiographs whose prompts these are.
    pub(crate) positions: Vec<usize>,
}

/// Makes the pictures of one model into `args.out/name`; files that are there already, made with the same settings,
/// stay.
pub(crate) fn make<B: DiffusionBackend>(
    args: &Args,
    data: &Thumbnails,
    model: &Path,
    adapter: Option<&Path>,
    name: &str,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<Pictures> {
    let folder = args.out.join(name);
    let file = |i: usize| format!("{i:05}.png");
    let test = &data.split.test;
    let positions: Vec<usize> = (0..args.pictures).map(|i| test[i % test.len()]).collect();
    let prompts = data.prompts(&positions);
    let mut pipeline = StableDiffusion::<B>::load(model, LoadOptions::default(), device)?;
    if let Some(adapter) = adapter {
        pipeline = pipeline.with_lora(adapter, 1.0)?;
    }
    let key = stage::key(&json!({
        "model": pipeline.parts().hash, "adapter": adapter.map(sha256_file).transpose()?, "prompts": prompts,
        "steps": args.sampling_steps, "guidance": args.guidance, "seed": args.seed,
    }))?;
    let settings = folder.join("settings.json");
    if stage::done::<String>(&settings, &key).is_none() {
        // Pictures of other settings would be taken for these.
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
        }
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        stage::keep(&settings, &key, &name)?;
    }

    let title = format!("{name} pictures");
    let missing: Vec<usize> = (0..args.pictures).filter(|i| !folder.join(file(*i)).is_file()).collect();
    if missing.is_empty() && folder.join("metadata.jsonl").is_file() {
        progress.begin(&title, None);
        progress.end("already there");
    } else {
        let batches: Vec<&[usize]> =
            missing.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(BATCH)).collect();
        progress.begin(&title, Some((batches.len() * args.sampling_steps) as u64));
        for (done, batch) in batches.iter().enumerate() {
            let progress = Later { progress, before: (done * args.sampling_steps) as u64 };
            let request = Request::each(batch.iter().map(|i| prompts[*i].as_str()))
                .seed(args.seed.wrapping_add(batch[0] as u64))
                .steps(args.sampling_steps)
                .guidance(args.guidance)
                .sampler(Sampler::DpmPp2m)
                .batch(BATCH);
            let images = pipeline.generate_with(&request, &progress, &mut |_| ControlFlow::Continue(()))?;
            for (image, i) in images.iter().zip(*batch) {
                image.save_png(folder.join(file(*i)))?;
            }
            if images.len() < batch.len() {
                bail!("stopped: the pictures that are finished stay in {}", folder.display());
            }
        }
        progress.end(&format!("{} in {}", missing.len(), folder.display()));
        write_rows(args, data, &folder, &positions, file)?;
    }
    Ok(Pictures { files: (0..args.pictures).map(|i| folder.join(file(i))).collect(), prompts, positions })
}

/// `metadata.jsonl`: the row of the radiograph whose prompt it is, with the picture's name and seed.
fn write_rows(
    args: &Args,
    data: &Thumbnails,
    folder: &Path,
    positions: &[usize],
    file: impl Fn(usize) -> String,
) -> Result<()> {
    let rows: Vec<MetadataRow> = positions
        .iter()
        .enumerate()
        .map(|(i, position)| {
            let pair = &data.collection.pairs[*position];
            MetadataRow {
                file_name: file(i),
                text: pair.text.clone(),
                labels: pair.labels.iter().cloned().collect(),
                seed: Some(args.seed.wrapping_add(i as u64)),
                ..MetadataRow::default()
            }
        })
        .collect();
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
