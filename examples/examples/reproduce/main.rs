//! The paper in one command: radiographs, a base model's pictures, LoRA fine-tuning, the adapted model's pictures,
//! distances of both to held-out radiographs, a search for copies, a check of the findings, a report page.
//!
//! Without arguments it takes the embedded radiographs and the embedded model. Every stage leaves its result in the
//! output folder and is skipped when that is there already, made with the same settings.

mod args;
mod audit;
mod data;
mod distances;
mod estimate;
mod findings;
mod lora;
mod page;
mod picture;
mod stage;
mod tables;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use cxr::dataset::Collection;
use cxr::kernels::DiffusionAutodiff;
use cxr::ldm::pipeline::{LoadOptions, ModelSource};
use cxr::ldm::weights::ModelFiles;
use cxr_examples::backend::{Job, exit, run};
use cxr_examples::demo;
use cxr_examples::exit::{Code, OrExit};
use cxr_examples::finetune::{BATCH, check_model, float, training_batch};
use cxr_examples::memory::{self, Sizes};
use cxr_examples::progress::{Terminal, seconds_text, show_log, stop_on_interrupt};

use self::args::{Args, Settings};
use self::distances::Network;
use self::page::Parts;
use self::picture::{ADAPTED, BASE};
use self::stage::{Stage, Stages};

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    stop_on_interrupt();
    show_log(args.run.verbose);
    exit(start(args))
}

/// Everything that can be found out in seconds is, before the long work.
fn start(args: Args) -> Result<()> {
    let settings = args.settings().or_exit(Code::Arguments)?;
    let network = Network::new(weights(&args)?)?;
    let collection = data::open(&args)?;
    let mut options = LoadOptions::default().with_dtype(float(settings.finetune.base_dtype));
    if let Some(revision) = &args.revision {
        options = options.with_revision(revision);
    }
    let source = match &args.model {
        Some(model) => ModelSource::from(model.clone()),
        None => ModelSource::from(demo::model_folder()),
    };
    let files = ModelFiles::locate(&source, &options).context("--model")?;
    check_model(&settings.finetune, &files)?;
    check_memory(&args, &settings, &files)?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let run_args = args.run.clone();
    run(&run_args, Reproduce { args, settings, network, collection, files, options })
}

/// Of all stages, the one that needs most.
fn check_memory(args: &Args, settings: &Settings, files: &ModelFiles) -> Result<()> {
    let sizes = Sizes::of(&files.config()?).context("--model")?;
    let pictures = sizes.pictures(&settings.picture_batch());
    let needed =
        pictures.max(sizes.training(&training_batch(&settings.finetune), BATCH)) + sizes.packed(args.memory);
    let advice = "a smaller --batch or --lora-batch takes less, --set block_checkpointing=true less for the fine-tuning, \
                  --set base_dtype=bf16 half the weights";
    memory::check(needed, args.run.device, args.memory, args.run.quiet, advice)
}

/// The weights that define FID and KID, where there are any; what it means that there are none is said.
fn weights(args: &Args) -> Result<Option<PathBuf>> {
    let terminal = Terminal::new(args.run.quiet);
    if args.full {
        return args.inception.weights(&terminal).context("--full").map(Some);
    }
    // A smoke run is to be short, whatever is on the machine.
    if args.smoke && args.inception.inception.is_none() {
        return Ok(None);
    }
    let found = args.inception.weights_if_any(&terminal)?;
    if found.is_none() {
        eprintln!(
            "no weights of the Inception network: distances are taken in the features of the embedded small network, and \
             are not FID or KID. docs/metrics.md says where the weights are; --inception FILE or \
             CXR_INCEPTION_WEIGHTS names them"
        );
    }
    Ok(found)
}

struct Reproduce {
    args: Args,
    settings: Settings,
    network: Network,
    collection: Collection,
    files: ModelFiles,
    options: LoadOptions,
}

/// The base model.
struct Base {
    files: ModelFiles,
    options: LoadOptions,
    /// Hash of its weights.
    hash: String,
    quiet: bool,
}

impl Base {
    /// How it is loaded where nothing else is under way.
    fn loading(&self) -> LoadOptions {
        self.options.clone().with_progress(Terminal::new(self.quiet))
    }
}

impl Job for Reproduce {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        let Self { args, mut settings, network, collection, files, options } = self;
        let started = Instant::now();
        let progress = Terminal::new(args.run.quiet);
        let stages = Stages { out: &args.out, only: args.only, progress: &progress };
        let data = data::prepare(&args, &settings, collection, &stages)?;
        settings.fit_epochs(data.split.train.len());
        if !args.run.quiet {
            let (train, test) = (data.split.train.len(), data.split.test.len());
            eprintln!("radiographs: {train} to train on, {test} held out");
        }
        if args.only == Some(Stage::Prepare) {
            return Ok(());
        }
        let mut base = Base { files, options, hash: String::new(), quiet: args.run.quiet };
        base.hash = base.files.hash::<B>(&base.loading(), &device).context("--model")?;

        // Not where a part of it is there already: what is left is said stage by stage.
        if !args.run.quiet && args.only.is_none() && !stages.path(BASE.folder).exists() {
            estimate::tell::<B::InnerBackend>(&base, &settings, data.split.train.len(), &device)?;
        }
        let of_base = match stages.wants(Stage::BasePictures) {
            true => Some(picture::make::<B::InnerBackend>(
                &settings, &data, &base, None, &BASE, &device, &stages,
            )?),
            false => None,
        };
        let adapter = match stages.wants(Stage::Finetune) {
            true => Some(lora::finetune::<B>(&args, &settings, &data, &base, &device, &stages)?),
            false => None,
        };
        let file = stages.path(lora::ADAPTER);
        let adapted = match stages.wants(Stage::LoraPictures) {
            true => Some(picture::make::<B::InnerBackend>(
                &settings,
                &data,
                &base,
                Some(&file),
                &ADAPTED,
                &device,
                &stages,
            )?),
            false => None,
        };
        let Some(adapted) = adapted else { return Ok(()) };
        let copies = match stages.wants(Stage::Audit) {
            true => Some(audit::audit::<B::InnerBackend>(&data, &adapted, &device, &stages)?),
            false => None,
        };
        let (Some(of_base), Some(adapter)) = (of_base, adapter) else { return Ok(()) };
        let both = (&of_base, &adapted);
        let distances = match stages.wants(Stage::Distances) {
            true => Some(distances::measure::<B::InnerBackend>(
                &settings, &data, &network, both, &device, &stages,
            )?),
            false => None,
        };
        let findings = match stages.wants(Stage::Findings) {
            true => Some(findings::check::<B::InnerBackend>(&settings, &data, both, &device, &stages)?),
            false => None,
        };
        let (Some(copies), Some(distances), Some(findings)) = (copies, distances, findings) else {
            return Ok(());
        };
        let parts = Parts {
            args: &args,
            settings: &settings,
            data: &data,
            model_hash: &base.hash,
            base: &of_base,
            adapter: &adapter,
            adapted: &adapted,
            distances: &distances,
            copies: &copies,
            findings: &findings,
        };
        parts.write(&stages)?;
        for (base, adapted) in distances.result.base.figures.iter().zip(&distances.result.adapted.figures) {
            println!("{}: base {:.4}, with LoRA {:.4}", base.name, base.value, adapted.value);
        }
        println!("{}", args.out.join("report.html").display());
        if !args.run.quiet {
            eprintln!("done in {}", seconds_text(started.elapsed().as_secs_f64()));
        }
        Ok(())
    }
}
