//! The command line, and what can be checked of it before anything is loaded.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use cxr::dataset::{Collection, ImageOptions, ReadOptions, Split, SplitConfig, TokenFilter};
use cxr::tokenizer::ClipTokenizer;
use cxr::trainer::{FinetuneConfig, PRESETS};
use cxr_examples::backend::RunArgs;
use cxr_examples::demo;
use cxr_examples::exit::EXIT_CODES;
use cxr_examples::memory::MemoryArgs;

/// Fine-tunes Stable Diffusion 1.x on chest radiographs: a LoRA adapter learns, everything else is frozen.
///
/// The folder gets the settings (config.toml), metrics.jsonl, the validation loss, checkpoints, the loss curve, grids of
/// the same prompts along the way, the adapter in diffusers' format, and a card that says what it is. Given again, the
/// command goes on from the newest checkpoint. Built with --features mpi it trains in several processes, one for each
/// device: mpirun -n 8 finetune ..., or srun.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// Radiographs with reports: a folder as Kaggle unpacks the Indiana collection, in NIH's layout, or with a
    /// metadata.csv or metadata.jsonl, or a table, e.g. the pairs.csv of `prepare`.
    #[arg(long, value_name = "DIR|FILE")]
    data: PathBuf,
    /// Which pairs are trained on: the split.json of `prepare` [default: 0.8 of the groups].
    #[arg(long, value_name = "FILE")]
    split: Option<PathBuf>,
    /// Model: a folder in diffusers' layout, a single-file checkpoint, or a repository [default: the embedded model].
    #[arg(long, value_name = "DIR|FILE|REPO")]
    pub(crate) model: Option<String>,
    /// Settings to start from: paper_128 or clinical_512.
    #[arg(long, value_name = "NAME", default_value = PRESETS[0])]
    preset: String,
    /// TOML file with settings in place of the preset's.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting in place of the preset's and the file's, e.g. batch_size=2 or learning_rate.peak=1e-4; may be given
    /// several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// End after so many optimizer steps: short for --set max_steps=N.
    #[arg(long, value_name = "N")]
    max_steps: Option<u64>,
    /// Folder for everything that the run makes.
    #[arg(long, value_name = "DIR", default_value = "out/finetune")]
    pub(crate) out: PathBuf,
    /// Folder for latents and embeddings, which are made once [default: cache in --out]. Several runs may share it.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// A folder with checkpoints: go on from the newest (auto), or refuse it (no).
    #[arg(long, value_enum, default_value_t = Resume::Auto)]
    pub(crate) resume: Resume,
    /// Take pictures that are smaller than image_size, enlarged.
    #[arg(long)]
    pub(crate) enlarge: bool,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    /// Also write the adapter in kohya's format.
    #[arg(long)]
    pub(crate) kohya: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Resume {
    Auto,
    No,
}

impl Args {
    /// The settings, all of them checked.
    pub(crate) fn settings(&self) -> Result<FinetuneConfig> {
        let mut config = FinetuneConfig::preset(&self.preset).context("--preset")?;
        if let Some(file) = &self.config {
            config = config.with_file(file).context("--config")?;
        }
        for assignment in &self.set {
            config = config.with_setting(assignment).context("--set")?;
        }
        if let Some(steps) = self.max_steps {
            config.max_steps = Some(steps);
        }
        config.validate()?;
        Ok(config)
    }

    pub(crate) fn model(&self) -> String {
        self.model.clone().unwrap_or_else(|| demo::model_folder().display().to_string())
    }

    /// The pairs whose prompts the text encoder reads whole, and which of them are trained on.
    pub(crate) fn data(&self) -> Result<(Collection, Split)> {
        let mut collection = Collection::open(&self.data, &ReadOptions::default())
            .with_context(|| format!("--data {}", self.data.display()))?;
        TokenFilter::default().apply(&mut collection, &ClipTokenizer::embedded())?;
        let split = match &self.split {
            Some(file) => Split::read(file, &collection).context("--split")?,
            None => Split::new(&collection, &SplitConfig::default()).context("--data")?,
        };
        ensure!(!split.train.is_empty(), "--split: no pair is trained on");
        Ok((collection, split))
    }

    /// How pictures are brought to size.
    pub(crate) fn images(config: &FinetuneConfig) -> ImageOptions {
        ImageOptions::new(config.image_size)
    }
}
