//! The fine-tuning that `finetune` and `reproduce` run: an adapter learns from radiographs and their impressions, and a
//! folder gets everything that the run makes.

mod card;
mod data;
mod pictures;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use burn::module::AutodiffModule;
use cxr::core::atomic;
use cxr::core::hash::{sha256_file, sha256_hex};
use cxr::core::progress::Progress;
use cxr::dataset::{Collection, ImageLoader, Split};
use cxr::device::DeviceSpec;
use cxr::kernels::DiffusionAutodiff;
use cxr::kernels::nn::parameters;
use cxr::ldm::pipeline::LoadOptions;
use cxr::ldm::unet::UNet2dCondition;
use cxr::ldm::weights::ModelFiles;
use cxr::lora::{self, Format, Provenance, UNET};
use cxr::trainer::checkpoint::{self, Best};
use cxr::trainer::distributed::Ranks;
use cxr::trainer::{FinetuneConfig, TrainError, Trained, Training, watch};

use self::card::Card;
use self::data::Data;
pub use self::data::{BATCH, check_sizes, float};
use self::pictures::Pictures;
use crate::memory::{self, MemoryArgs, Sizes, TrainingBatch};
use crate::progress::Terminal;

/// A fine-tuning that is about to start or to go on.
pub struct Finetune<'a> {
    /// Its settings, checked.
    pub config: &'a FinetuneConfig,
    /// Pairs whose prompts the text encoder reads whole.
    pub collection: &'a Collection,
    /// Which of them are trained on.
    pub split: &'a Split,
    /// The base model.
    pub files: &'a ModelFiles,
    /// How it is loaded: the dtype is that of the settings.
    pub options: &'a LoadOptions,
    /// The base model as it was asked for, for the card.
    pub model: &'a str,
    /// Hash of its weights.
    pub hash: &'a str,
    /// How pictures are brought to size.
    pub images: &'a ImageLoader,
    /// The folder of the run.
    pub out: &'a Path,
    /// The folder of latents and embeddings.
    pub cache: &'a Path,
    /// Also write the adapter in kohya's format.
    pub kohya: bool,
    /// The processes that train together.
    pub ranks: &'a dyn Ranks,
    /// Show nothing.
    pub quiet: bool,
}

/// What a fine-tuning made.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Finetuned {
    /// The adapter after the last step.
    pub adapter: PathBuf,
    /// Layers with an adapter.
    pub layers: usize,
    /// Parameters that learnt.
    pub trainable: usize,
    /// Parameters of the UNet without the adapter.
    pub frozen: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// Smoothed loss at the end.
    pub loss: f64,
}

/// That the model makes pictures of the size that the settings ask for.
///
/// # Errors
/// If it does not, or its configuration cannot be used.
pub fn check_model(config: &FinetuneConfig, files: &ModelFiles) -> Result<()> {
    let model = files.config().context("--model")?;
    model.validate().context("--model")?;
    let factor = model.vae.factor();
    ensure!(
        (config.image_size as usize).is_multiple_of(factor),
        "image_size is {}, expected a multiple of {factor} for this model",
        config.image_size
    );
    Ok(())
}

/// Says how much memory the run takes, and refuses what does not fit.
///
/// # Errors
/// If more is needed than is free, unless `args` say to go on; if the model's configuration cannot be used.
pub fn check_memory(
    config: &FinetuneConfig,
    files: &ModelFiles,
    device: DeviceSpec,
    args: MemoryArgs,
    quiet: bool,
) -> Result<()> {
    let sizes = Sizes::of(&files.config()?).context("--model")?;
    let needed = sizes.training(&training_batch(config), BATCH) + sizes.packed(args);
    let advice = "a smaller batch_size or image_size takes less, block_checkpointing=true less for the backward pass, \
                  base_dtype=bf16 half the frozen weights";
    memory::check(needed, device, args, quiet, advice)
}

/// What a step of these settings takes at once.
pub fn training_batch(config: &FinetuneConfig) -> TrainingBatch {
    TrainingBatch {
        side: config.image_size as usize,
        batch: config.batch_size,
        by_block: config.block_checkpointing,
        samples: if config.samples.every > 0 { config.samples.prompts.len() } else { 0 },
        dtype: float(config.base_dtype),
    }
}

impl Finetune<'_> {
    /// Trains until the last step; `None` in all processes but the first.
    ///
    /// # Errors
    /// If the model or a picture cannot be read, a file not written, a run of other settings is in the folder, or the
    /// run was stopped: what is there so far is kept then, and the same call goes on.
    pub fn run<B: DiffusionAutodiff>(
        &self,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<Option<Finetuned>> {
        let Self { config, collection, split, files, options, hash, out, ranks, .. } = *self;
        let writes = ranks.rank() == 0;
        let split_file = out.join("split.json");
        let toml = config.to_toml();
        if writes {
            std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
            split.write(&split_file, collection)?;
            atomic::write_bytes(out.join("config.toml"), toml.as_bytes())
                .context("cannot write config.toml")?;
        }
        let dataset = sha256_hex(&serde_json::to_vec(&collection.metadata_rows())?);
        let trained_on = sha256_hex(format!("{:?}", split.train).as_bytes());
        let fingerprint = format!("{hash} {dataset} {trained_on} {}", config.image_size);
        let (images, cache) = (self.images, self.cache);
        let data = Data { config, collection, split, files, options, model: hash, cache, images };
        // The first process fills the cache, the others read it.
        if !writes {
            ranks.wait();
        }
        let (objective, held_out) = data.objectives::<B>(fingerprint, device, progress)?;
        if writes {
            ranks.wait();
        }
        let loading = options.clone().with_progress(Terminal::new(self.quiet));
        let mut unet = files.load_unet::<B>(&loading, device).context("--model")?;
        let layers = lora::attach(&mut unet, &config.lora, config.seed)?;
        let (all, trainable) = parameters::count(&unet);
        if !self.quiet {
            eprintln!(
                "{} pairs; {trainable} parameters in {layers} layers learn, {} are frozen",
                split.train.len(),
                all - trainable
            );
        }

        let loop_config = config.train_config(split.train.len(), ranks.size());
        let pictures = Pictures { config, files, options: options.clone(), hash, out };
        let mut training =
            Training::new(&objective, &loop_config, out).title("Fine-tuning: loss").ranks(ranks);
        if let Some(held_out) = &held_out {
            let loss = |model: &UNet2dCondition<B>| Ok(data.validate::<B>(held_out, model));
            training = training.validate(config.validation.every, loss);
        }
        if config.samples.every > 0 {
            let show = |step, model: &UNet2dCondition<B>| {
                pictures.make::<B>(step, model, device).map_err(TrainError::from)
            };
            training = training.show(config.samples.every, show);
        }
        let trained = training.run(unet, progress)?;
        if trained.stopped {
            bail!(
                "stopped at step {} of {}, which is kept in {}; the same command goes on from there",
                trained.step,
                loop_config.steps,
                checkpoint::path(out, trained.step).display()
            );
        }
        if !writes {
            return Ok(None);
        }
        let provenance = Provenance {
            base_model: Some(hash.to_owned()),
            dataset: Some(dataset),
            split: Some(sha256_file(&split_file)?),
            rank: Some(config.lora.rank),
            alpha: Some(config.lora.alpha),
            targets: Some(config.lora.targets.to_string()),
            seed: Some(config.seed),
            ..Provenance::default()
        };
        let held_out = held_out.as_ref().map_or(0, |held_out| held_out.samples.len());
        let results =
            Results { run: self, settings: &toml, held_out, layers, trainable, frozen: all - trainable };
        results.write::<B>(trained, provenance).map(Some)
    }
}

/// What a user takes away.
struct Results<'a> {
    run: &'a Finetune<'a>,
    settings: &'a str,
    held_out: usize,
    layers: usize,
    trainable: usize,
    frozen: usize,
}

impl Results<'_> {
    /// Writes the adapters and their card.
    fn write<B: DiffusionAutodiff>(
        &self,
        trained: Trained<UNet2dCondition<B>>,
        provenance: Provenance,
    ) -> Result<Finetuned> {
        let Finetune { config, out, kohya, model, split, .. } = *self.run;
        let last = trained.averaged.unwrap_or(trained.model);
        let export = |unet: &UNet2dCondition<B>, step: u64, name: &str| -> Result<Provenance> {
            let mut adapter = lora::export(&unet.valid(), &config.lora.name, UNET)?;
            let crate_version = adapter.provenance.crate_version.clone();
            adapter.provenance = Provenance { steps: Some(step), crate_version, ..provenance.clone() };
            lora::write(out.join(format!("{name}.safetensors")), &adapter, Format::Diffusers)?;
            if kohya {
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
        let loss = records.last().map_or(f64::NAN, |record| record.smoothed);
        let card = Card {
            model,
            provenance: &provenance,
            settings: self.settings,
            pairs: split.train.len(),
            layers: self.layers,
            trainable: self.trainable,
            loss,
            best: trained.best,
            held_out: self.held_out,
            samples: samples.filter(|_| config.samples.every > 0),
        };
        atomic::write_bytes(out.join("README.md"), card.text().as_bytes())
            .context("cannot write README.md")?;
        Ok(Finetuned {
            adapter: out.join("adapter.safetensors"),
            layers: self.layers,
            trainable: self.trainable,
            frozen: self.frozen,
            steps: trained.step,
            loss,
        })
    }
}

/// The grid of a step as the card names it, if it is there.
fn grid(out: &Path, step: u64) -> Option<String> {
    let file = Pictures::path(out, step);
    let name = file.file_name()?.to_string_lossy().into_owned();
    file.is_file().then(|| format!("samples/{name}"))
}
