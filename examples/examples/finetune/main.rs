//! The paper's fine-tuning: an adapter learns from radiographs and their impressions.

mod args;
mod card;
mod data;
mod pictures;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use burn::module::AutodiffModule;
use cxr::core::atomic;
use cxr::core::hash::{sha256_file, sha256_hex};
use cxr::dataset::{Collection, Split};
use cxr::kernels::DiffusionAutodiff;
use cxr::kernels::nn::parameters;
use cxr::ldm::pipeline::{LoadOptions, ModelSource};
use cxr::ldm::unet::UNet2dCondition;
use cxr::ldm::weights::ModelFiles;
use cxr::lora::{self, Format, Provenance, UNET};
use cxr::trainer::checkpoint::{self, Best};
use cxr::trainer::distributed::Ranks;
use cxr::trainer::{FinetuneConfig, TrainError, Trained, Training, watch};
use cxr_examples::backend::{Job, exit, run};
use cxr_examples::progress::{Terminal, show_warnings, stop_on_interrupt};
use cxr_examples::ranks::Processes;

use self::args::{Args, Resume};
use self::card::Card;
use self::data::{Data, check_sizes, float};
use self::pictures::Pictures;

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    stop_on_interrupt();
    show_warnings();
    let processes = match Processes::start() {
        Ok(processes) => processes,
        Err(error) => return exit(Err(error)),
    };
    let result = start(args, &processes);
    let failed = result.is_err();
    let code = exit(result);
    if failed {
        // The others would wait for this one for ever.
        processes.end_all();
    }
    code
}

/// Everything that can be found out in seconds is, before hours of work.
fn start(mut args: Args, processes: &Processes) -> Result<()> {
    let config = args.settings()?;
    let (collection, split) = args.data()?;
    if !args.enlarge {
        check_sizes(&config, &collection, &split)?;
    }
    let options = LoadOptions::default().with_dtype(float(config.base_dtype));
    let files = ModelFiles::locate(&ModelSource::from(args.model()), &options).context("--model")?;
    let model = files.config().context("--model")?;
    model.validate().context("--model")?;
    let factor = model.vae.factor();
    ensure!(
        (config.image_size as usize).is_multiple_of(factor),
        "image_size is {}, expected a multiple of {factor} for this model",
        config.image_size
    );
    let ranks = processes.ranks();
    if ranks.rank() == 0 {
        std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
        if args.resume == Resume::No && !checkpoint::list(&args.out)?.is_empty() {
            bail!(
                "--resume no: {} holds checkpoints; choose another folder, or remove it",
                args.out.display()
            );
        }
    } else {
        // One process talks.
        args.run.quiet = true;
    }
    if ranks.size() > 1 {
        args.run.device = args.run.device.for_rank(processes.local_rank());
        eprintln!("rank {} of {}: device {}", ranks.rank(), ranks.size(), args.run.device);
    }
    let run_args = args.run.clone();
    run(&run_args, Finetune { args, config, collection, split, options, files, ranks })
}

struct Finetune<'a> {
    args: Args,
    config: FinetuneConfig,
    collection: Collection,
    split: Split,
    options: LoadOptions,
    files: ModelFiles,
    ranks: &'a dyn Ranks,
}

impl Job for Finetune<'_> {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        let Self { args, config, collection, split, options, files, ranks } = self;
        let terminal = Terminal::new(args.run.quiet);
        let out = &args.out;
        let writes = ranks.rank() == 0;
        let split_file = out.join("split.json");
        let toml = config.to_toml();
        if writes {
            split.write(&split_file, &collection)?;
            atomic::write_bytes(out.join("config.toml"), toml.as_bytes())
                .context("cannot write config.toml")?;
        }

        let loading = options.clone().with_progress(Terminal::new(args.run.quiet));
        let hash = files.hash::<B>(&loading, &device).context("--model")?;
        let dataset = sha256_hex(&serde_json::to_vec(&collection.metadata_rows())?);
        let trained_on = sha256_hex(format!("{:?}", split.train).as_bytes());
        let fingerprint = format!("{hash} {dataset} {trained_on} {}", config.image_size);
        let cache = args.cache.clone().unwrap_or_else(|| out.join("cache"));
        let data = Data {
            config: &config,
            collection: &collection,
            split: &split,
            files: &files,
            options: &options,
            model: &hash,
            cache: &cache,
        };
        // The first process fills the cache, the others read it.
        if !writes {
            ranks.wait();
        }
        let (objective, held_out) = data.objectives::<B>(fingerprint, &device, &terminal)?;
        if writes {
            ranks.wait();
        }
        let mut unet = files.load_unet::<B>(&loading, &device).context("--model")?;
        let layers = lora::attach(&mut unet, &config.lora, config.seed)?;
        let (all, trainable) = parameters::count(&unet);
        if !args.run.quiet {
            eprintln!(
                "{} pairs; {trainable} parameters in {layers} layers learn, {} are frozen",
                split.train.len(),
                all - trainable
            );
        }

        let loop_config = config.train_config(split.train.len(), ranks.size());
        let options = options.clone();
        let pictures = Pictures { config: &config, files: &files, options, hash: &hash, out };
        let mut training =
            Training::new(&objective, &loop_config, out).title("Fine-tuning: loss").ranks(ranks);
        if let Some(held_out) = &held_out {
            let loss = |model: &UNet2dCondition<B>| Ok(data.validate::<B>(held_out, model));
            training = training.validate(config.validation.every, loss);
        }
        if config.samples.every > 0 {
            let show = |step, model: &UNet2dCondition<B>| {
                pictures.make::<B>(step, model, &device).map_err(TrainError::from)
            };
            training = training.show(config.samples.every, show);
        }
        let trained = training.run(unet, &terminal)?;
        if trained.stopped {
            bail!(
                "stopped at step {} of {}, which is kept in {}; the same command goes on from there",
                trained.step,
                loop_config.steps,
                checkpoint::path(out, trained.step).display()
            );
        }
        if !writes {
            return Ok(());
        }
        let provenance = Provenance {
            base_model: Some(hash.clone()),
            dataset: Some(dataset),
            split: Some(sha256_file(&split_file)?),
            rank: Some(config.lora.rank),
            alpha: Some(config.lora.alpha),
            targets: Some(config.lora.targets.to_string()),
            seed: Some(config.seed),
            ..Provenance::default()
        };
        let results = Results {
            args: &args,
            config: &config,
            settings: &toml,
            pairs: split.train.len(),
            held_out: held_out.as_ref().map_or(0, |held_out| held_out.samples.len()),
            layers,
            trainable,
        };
        println!("{}", results.write::<B>(trained, provenance)?.display());
        Ok(())
    }
}

/// What a user takes away.
struct Results<'a> {
    args: &'a Args,
    config: &'a FinetuneConfig,
    settings: &'a str,
    pairs: usize,
    held_out: usize,
    layers: usize,
    trainable: usize,
}

impl Results<'_> {
    /// Writes the adapters and their card; the file of the last step.
    fn write<B: DiffusionAutodiff>(
        &self,
        trained: Trained<UNet2dCondition<B>>,
        provenance: Provenance,
    ) -> Result<PathBuf> {
        let Self { args, config, .. } = *self;
        let out = &args.out;
        let last = trained.averaged.unwrap_or(trained.model);
        let export = |unet: &UNet2dCondition<B>, step: u64, name: &str| -> Result<Provenance> {
            let mut adapter = lora::export(&unet.valid(), &config.lora.name, UNET)?;
            let crate_version = adapter.provenance.crate_version.clone();
            adapter.provenance = Provenance { steps: Some(step), crate_version, ..provenance.clone() };
            lora::write(out.join(format!("{name}.safetensors")), &adapter, Format::Diffusers)?;
            if args.kohya {
                lora::write(out.join(format!("{name}_kohya.safetensors")), &adapter, Format::Kohya)?;
            }
            Ok(adapter.provenance)
        };
        let provenance = export(&last, trained.step, "adapter")?;
        if let Some(best @ Best { step, .. }) = trained.best {
            let weights = checkpoint::load_weights(last, &best.checkpoint(out))?;
            export(&weights, step, "adapter_best")?;
        }
        let samples = grid(out, trained.step).map(|file| (file, config.samples.prompts.as_slice()));
        let records: Vec<watch::Record> = watch::read(&out.join("metrics.jsonl"))?;
        let card = Card {
            model: args.model.as_deref().unwrap_or("the embedded model of this project"),
            provenance: &provenance,
            settings: self.settings,
            pairs: self.pairs,
            layers: self.layers,
            trainable: self.trainable,
            loss: records.last().map_or(f64::NAN, |record| record.smoothed),
            best: trained.best,
            held_out: self.held_out,
            samples: samples.filter(|_| config.samples.every > 0),
        };
        atomic::write_bytes(out.join("README.md"), card.text().as_bytes())
            .context("cannot write README.md")?;
        Ok(out.join("adapter.safetensors"))
    }
}

/// The grid of a step as the card names it, if it is there.
fn grid(out: &Path, step: u64) -> Option<String> {
    let file = Pictures::path(out, step);
    let name = file.file_name()?.to_string_lossy().into_owned();
    file.is_file().then(|| format!("samples/{name}"))
}
