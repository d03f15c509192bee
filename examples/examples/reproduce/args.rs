//! The command line, and the settings that come out of it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use cxr::trainer::{FinetuneConfig, LearningRate, PRESETS};
use cxr_examples::backend::RunArgs;
use cxr_examples::evaluation::InceptionArgs;
use cxr_examples::exit::EXIT_CODES;
use cxr_examples::finetune::float;
use cxr_examples::memory::{MemoryArgs, PictureBatch};
use serde::Serialize;

use crate::stage::Stage;

/// Pictures of each model that `--full` makes.
const FULL: usize = 1000;

/// Repeats the paper: base pictures, LoRA fine-tuning on radiographs, adapted pictures, distances, a search for copies,
/// a check of the findings, report.
///
/// Without arguments it takes the 1,000 embedded thumbnails and the embedded small model. The real one is `--data DIR
/// --model stable-diffusion-v1-5/stable-diffusion-v1-5 --preset paper_128`. Every stage leaves its result in the output
/// folder, and is skipped when that is there, made with the same settings; what was made with others is put aside, not
/// overwritten.
#[derive(Debug, Clone, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// Where everything goes; stages that are done in it already are skipped.
    #[arg(long, value_name = "DIR", default_value = "out/reproduce")]
    pub(crate) out: PathBuf,
    /// Radiographs with reports: a folder as Kaggle unpacks the Indiana collection, in NIH's layout, or with a
    /// metadata.csv or metadata.jsonl, or a table, e.g. the pairs.csv of `prepare` [default: the 1,000 embedded
    /// thumbnails].
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Which pairs are trained on: the split.json of `prepare` [default: 0.8 of the patients or studies].
    #[arg(long, value_name = "FILE")]
    pub(crate) split: Option<PathBuf>,
    /// Leave out and count rows and images that cannot be used, instead of stopping at the first.
    #[arg(long)]
    pub(crate) skip: bool,
    /// Take radiographs that are smaller than the pictures, enlarged.
    #[arg(long)]
    pub(crate) enlarge: bool,
    /// Base model: a folder in diffusers' layout, a single-file checkpoint, or a repository [default: the embedded
    /// small one].
    #[arg(long, value_name = "DIR|FILE|REPO")]
    pub(crate) model: Option<String>,
    /// Revision of a repository: branch, tag or commit [default: main].
    #[arg(long, value_name = "NAME", requires = "model")]
    pub(crate) revision: Option<String>,
    /// Settings of `finetune` to start from, and with them the size of pictures: paper_128 or clinical_512 [default:
    /// paper_128 with --model, otherwise those of the embedded model].
    #[arg(long, value_name = "NAME")]
    pub(crate) preset: Option<String>,
    /// One setting of the fine-tuning in place of the preset's, e.g. learning_rate.peak=1e-4; may be given several
    /// times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// 1,000 pictures of each model, and FID and KID by the Inception network, without whose weights it does not start.
    #[arg(long, conflicts_with = "smoke")]
    pub(crate) full: bool,
    /// Pictures of each model; prompts are those of held-out radiographs, in turn [default: 200; 1000 with --full].
    #[arg(long, value_name = "N")]
    pub(crate) pictures: Option<usize>,
    /// Denoising steps of a picture (DPM-Solver++ 2M) [default: 15; 30 with --model or --preset].
    #[arg(long, value_name = "N")]
    pub(crate) sampling_steps: Option<usize>,
    /// Classifier-free guidance; 1 is none [default: 2; 7.5 with --model or --preset].
    #[arg(long, value_name = "G")]
    pub(crate) guidance: Option<f64>,
    /// Pictures that go through the model at once: memory and speed, not the result [default: 25; 1 with --model or
    /// --preset].
    #[arg(long, value_name = "N")]
    pub(crate) batch: Option<usize>,
    /// Rank of the adapter; alpha becomes the same [default: the preset's, 8].
    #[arg(long, value_name = "N")]
    pub(crate) rank: Option<usize>,
    /// Optimizer steps of the fine-tuning [default: 1500; the preset's epochs with --model or --preset].
    #[arg(long, value_name = "N")]
    pub(crate) lora_steps: Option<u64>,
    /// Radiographs per step of the fine-tuning [default: 8; the preset's with --model or --preset].
    #[arg(long, value_name = "N")]
    pub(crate) lora_batch: Option<usize>,
    /// Learning rate of the fine-tuning [default: 1e-3, as the embedded UNet is small: the paper's 5e-5 is for 860 M
    /// parameters; the preset's with --model or --preset].
    #[arg(long, value_name = "R")]
    pub(crate) lora_rate: Option<f64>,
    /// Share of captions that fine-tuning replaces by an empty one, 0 to 1 [default: 0.1; the preset's, 0, with --model
    /// or --preset].
    #[arg(long, value_name = "F")]
    pub(crate) caption_dropout: Option<f32>,
    #[command(flatten)]
    pub(crate) inception: InceptionArgs,
    /// Resamples of every confidence interval, 0 for none [default: 1000; 200 of the Inception network's distances].
    #[arg(long, value_name = "N")]
    pub(crate) replicates: Option<usize>,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    /// Seed of every random number.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Every stage at its smallest, in about a minute: shows that all works, measures nothing.
    #[arg(long)]
    pub(crate) smoke: bool,
    /// Run this stage alone; those before it that it needs must be done.
    #[arg(long, value_enum, value_name = "STAGE")]
    pub(crate) only: Option<Stage>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What a run is a function of, besides data and model.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Settings {
    pub(crate) pictures: usize,
    pub(crate) sampling_steps: usize,
    pub(crate) guidance: f64,
    pub(crate) batch: usize,
    /// None where the distance has a default of its own.
    pub(crate) replicates: Option<usize>,
    pub(crate) seed: u64,
    pub(crate) smoke: bool,
    /// Of the fine-tuning; `image_size` is that of all pictures.
    pub(crate) finetune: FinetuneConfig,
}

impl Args {
    /// Whether the settings are those of the embedded model.
    fn demo(&self) -> bool {
        self.model.is_none() && self.preset.is_none()
    }

    /// The settings, all of them checked.
    pub(crate) fn settings(&self) -> Result<Settings> {
        let small = |smallest: usize, demo: usize, real: usize| match (self.smoke, self.demo()) {
            (true, _) => smallest,
            (false, true) => demo,
            (false, false) => real,
        };
        let many = if self.full { FULL } else { 200 };
        let settings = Settings {
            pictures: self.pictures.unwrap_or(small(8, many, many)),
            sampling_steps: self.sampling_steps.unwrap_or(small(3, 15, 30)),
            guidance: self.guidance.unwrap_or(if self.demo() { 2.0 } else { 7.5 }),
            batch: self.batch.unwrap_or(if self.demo() { 25 } else { 1 }),
            replicates: self.replicates.or(self.smoke.then_some(20)),
            seed: self.seed,
            smoke: self.smoke,
            finetune: self.finetune()?,
        };
        let Settings { pictures, sampling_steps, guidance, batch, .. } = settings;
        ensure!(pictures >= 4, "--pictures is {pictures}, expected 4 or more: distances are of sets");
        ensure!(sampling_steps >= 1, "--sampling-steps is 0, expected 1 or more");
        ensure!(guidance.is_finite(), "--guidance is {guidance}, expected a finite number");
        ensure!(batch >= 1, "--batch is 0, expected 1 or more");
        Ok(settings)
    }

    fn finetune(&self) -> Result<FinetuneConfig> {
        let mut config = match &self.preset {
            Some(name) => FinetuneConfig::preset(name).context("--preset")?,
            None if self.model.is_some() => FinetuneConfig::preset(PRESETS[0])?,
            None => embedded(),
        };
        config.seed = self.seed;
        if self.smoke {
            config.max_steps = Some(6);
            config.batch_size = 4;
            config.samples.steps = 3;
            config.validation.pairs = 4;
        }
        for assignment in &self.set {
            config = config.with_setting(assignment).context("--set")?;
        }
        if let Some(rank) = self.rank {
            ensure!(rank >= 1, "--rank is 0, expected 1 or more");
            (config.lora.rank, config.lora.alpha) = (rank, rank as f64);
        }
        if let Some(steps) = self.lora_steps {
            ensure!(steps >= 1, "--lora-steps is 0, expected 1 or more");
            config.max_steps = Some(steps);
        }
        if let Some(batch) = self.lora_batch {
            ensure!(batch >= 1, "--lora-batch is 0, expected 1 or more");
            config.batch_size = batch;
        }
        if let Some(rate) = self.lora_rate {
            ensure!(rate.is_finite() && rate > 0.0, "--lora-rate is {rate}, expected a number above 0");
            config.learning_rate.peak = rate;
        }
        if let Some(dropout) = self.caption_dropout {
            ensure!(
                (0.0..1.0).contains(&dropout),
                "--caption-dropout is {dropout}, expected 0 or more and less than 1"
            );
            config.caption_dropout = dropout;
        }
        config.validate()?;
        Ok(config)
    }
}

impl Settings {
    /// What the stages of pictures take at once.
    pub(crate) fn picture_batch(&self) -> PictureBatch {
        let side = self.finetune.image_size as usize;
        let batch = self.batch.min(self.pictures);
        PictureBatch {
            width: side,
            height: side,
            batch,
            decoded: batch,
            tiled: false,
            guided: self.guidance != 1.0,
            dtype: float(self.finetune.base_dtype),
        }
    }

    /// As many epochs as the steps take that were asked for, where that is more than the preset's.
    pub(crate) fn fit_epochs(&mut self, pairs: usize) {
        let config = &mut self.finetune;
        let per_step = config.batch_size.saturating_mul(config.accumulation).max(1);
        if let Some(steps) = config.max_steps {
            let per_epoch = pairs.div_ceil(per_step).max(1) as u64;
            config.epochs = config.epochs.max(steps.div_ceil(per_epoch));
        }
    }
}

/// What suits the embedded model and the thumbnails.
fn embedded() -> FinetuneConfig {
    let mut config = FinetuneConfig::paper_128();
    config.image_size = 64;
    config.max_steps = Some(1500);
    config.batch_size = 8;
    config.learning_rate = LearningRate::constant(1e-3);
    config.caption_dropout = 0.1;
    config.ema = Some(0.99);
    config.samples.guidance = 2.0;
    config
}
