//! The paper in one command: radiographs, a base model's pictures, LoRA fine-tuning, the adapted model's pictures,
//! distances of both to held-out radiographs, a report page.
//!
//! Without arguments it takes the embedded radiographs and the embedded model. Every stage leaves its result in the
//! output folder and is skipped when that is there already, made with the same settings.

mod lora;
mod measure;
mod page;
mod picture;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use cxr::kernels::DiffusionAutodiff;
use cxr::metrics::small::SmallExtractor;
use cxr_examples::backend::{Job, RunArgs, exit, run};
use cxr_examples::demo;
use cxr_examples::progress::{Terminal, seconds_text, stop_on_interrupt};
use serde::Serialize;

/// Repeats the paper: base pictures, LoRA fine-tuning on radiographs, adapted pictures, distances, report.
#[derive(Debug, Clone, Parser, Serialize)]
#[command(version)]
struct Args {
    /// Where everything goes; stages that are done in it already are skipped.
    #[arg(long, default_value = "out/reproduce")]
    #[serde(skip)]
    out: PathBuf,
    /// Radiographs in NIH's layout (labels.csv and images/); default: the 1,000 embedded thumbnails.
    #[arg(long)]
    #[serde(skip)]
    data: Option<PathBuf>,
    /// Base model in diffusers' layout; default: the embedded small one.
    #[arg(long)]
    #[serde(skip)]
    model: Option<PathBuf>,
    /// Pictures of each model; prompts are those of held-out radiographs, in turn.
    #[arg(long, default_value_t = 200)]
    pictures: usize,
    /// Denoising steps of a picture (DPM-Solver++ 2M).
    #[arg(long, default_value_t = 15)]
    sampling_steps: usize,
    /// Classifier-free guidance; 1 is none.
    #[arg(long, default_value_t = 2.0)]
    guidance: f64,
    /// Rank of the adapter; alpha is the same.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Optimizer steps of the fine-tuning.
    #[arg(long, default_value_t = 1500)]
    lora_steps: u64,
    /// Radiographs per step of the fine-tuning.
    #[arg(long, default_value_t = 8)]
    lora_batch: usize,
    /// Learning rate of the fine-tuning. The paper's 5e-5 is for a UNet of 860 M parameters.
    #[arg(long, default_value_t = 1e-3)]
    lora_rate: f64,
    /// Share of captions that fine-tuning replaces by an empty one; the paper has 0.
    #[arg(long, default_value_t = 0.1)]
    caption_dropout: f32,
    /// Resamples of every confidence interval.
    #[arg(long, default_value_t = 1000)]
    replicates: usize,
    /// Seed of every random number.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Every stage at its smallest, in about a minute: shows that all works, measures nothing.
    #[arg(long)]
    smoke: bool,
    #[command(flatten)]
    #[serde(skip)]
    run: RunArgs,
}

impl Args {
    /// The smallest sizes, where `--smoke` asks for them.
    fn sized(self) -> Self {
        if !self.smoke {
            return self;
        }
        Self { pictures: 8, sampling_steps: 3, lora_steps: 6, lora_batch: 4, replicates: 20, ..self }
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.pictures >= 4,
            "--pictures is {}, expected 4 or more: distances are of sets",
            self.pictures
        );
        ensure!(self.rank >= 1, "--rank is 0, expected 1 or more");
        ensure!(self.sampling_steps >= 1, "--sampling-steps is 0, expected 1 or more");
        ensure!(self.guidance.is_finite(), "--guidance is {}, expected a number", self.guidance);
        let dropout = self.caption_dropout;
        ensure!((0.0..=1.0).contains(&dropout), "--caption-dropout is {dropout}, expected 0 to 1");
        Ok(())
    }
}

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>().sized();
    stop_on_interrupt();
    let run_args = args.run.clone();
    exit(args.check().and_then(|()| run(&run_args, Reproduce(args))))
}

struct Reproduce(Args);

impl Job for Reproduce {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        let args = &self.0;
        let started = Instant::now();
        let progress = Terminal::new(args.run.quiet);
        std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
        let model = args.model.clone().unwrap_or_else(demo::model_folder);
        // Everything that can be missing is looked for before the long work begins.
        let extractor = SmallExtractor::<B::InnerBackend>::load(&demo::extractor_folder(), &device)?;

        let (thumbnails, leakage) = stage::prepare(args)?;
        let base =
            picture::make::<B::InnerBackend>(args, &thumbnails, &model, None, "base", &device, &progress)?;
        let adapter = lora::finetune::<B>(args, &thumbnails, &model, &device, &progress)?;
        let adapted = picture::make::<B::InnerBackend>(
            args,
            &thumbnails,
            &model,
            Some(&adapter.file),
            "adapted",
            &device,
            &progress,
        )?;
        let measured = measure::measure(args, &thumbnails, &extractor, &base, &adapted, &progress)?;
        let seconds = started.elapsed().as_secs_f64();
        page::write(args, (&thumbnails, &leakage), &adapter, &measured, [&base, &adapted], seconds)?;
        print_result(args, &measured);
        eprintln!("done in {}", seconds_text(seconds));
        Ok(())
    }
}

fn print_result(args: &Args, measured: &measure::Measured) {
    for (base, adapted) in measured.base.figures.iter().zip(&measured.adapted.figures) {
        println!("{}: base {:.4}, with LoRA {:.4}", base.name, base.value, adapted.value);
    }
    println!("{}", args.out.join("report.html").display());
}
