//! The paper's fine-tuning: an adapter learns from radiographs and their impressions.

mod args;
mod card;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use burn::module::AutodiffModule;
use burn::tensor::FloatDType;
use clap::Parser;
use cxr::core::atomic;
use cxr::core::hash::{sha256_file, sha256_hex};
use cxr::core::progress::Progress;
use cxr::dataset::{Collection, ImageLoader, Split};
use cxr::kernels::DiffusionAutodiff;
use cxr::kernels::nn::parameters;
use cxr::ldm::pipeline::{LoadOptions, ModelParts, ModelSource};
use cxr::ldm::unet::UNet2dCondition;
use cxr::ldm::weights::ModelFiles;
use cxr::lora::{self, Format, Provenance, UNET};
use cxr::trainer::{BaseDtype, Diffusion, FinetuneConfig, checkpoint, encode, train, watch};
use cxr_examples::backend::{Job, exit, run};
use cxr_examples::progress::{Terminal, show_warnings, stop_on_interrupt};

use self::args::{Args, Resume};
use self::card::Card;

/// Pictures that go through the autoencoder at once.
const BATCH: usize = 4;

fn main() -> ExitCode {
    let args = Args::parse();
    stop_on_interrupt();
    show_warnings();
    exit(start(args))
}

/// Everything that can be found out in seconds is, before hours of work.
fn start(args: Args) -> Result<()> {
    let config = args.settings()?;
    let (collection, split) = args.data()?;
    let options = LoadOptions::default().with_dtype(float(config.base_dtype));
    let files = ModelFiles::locate(&ModelSource::from(args.model()), &options).context("--model")?;
    let factor = files.config().context("--model")?.vae.factor();
    ensure!(
        (config.image_size as usize).is_multiple_of(factor),
        "image_size is {}, expected a multiple of {factor} for this model",
        config.image_size
    );
    std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
    if args.resume == Resume::No && !checkpoint::list(&args.out)?.is_empty() {
        bail!("--resume no: {} holds checkpoints; choose another folder, or remove it", args.out.display());
    }
    let run_args = args.run.clone();
    run(&run_args, Finetune { args, config, collection, split, options, files })
}

struct Finetune {
    args: Args,
    config: FinetuneConfig,
    collection: Collection,
    split: Split,
    options: LoadOptions,
    files: ModelFiles,
}

impl Job for Finetune {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        let Self { args, config, collection, split, options, files } = self;
        let terminal = Terminal::new(args.run.quiet);
        let out = &args.out;
        let split_file = out.join("split.json");
        split.write(&split_file, &collection)?;
        let toml = config.to_toml();
        atomic::write_bytes(out.join("config.toml"), toml.as_bytes()).context("cannot write config.toml")?;
        let mut provenance = Provenance {
            dataset: Some(sha256_hex(&serde_json::to_vec(&collection.metadata_rows())?)),
            split: Some(sha256_file(&split_file)?),
            rank: Some(config.lora.rank),
            alpha: Some(config.lora.alpha),
            targets: Some(config.lora.targets.to_string()),
            seed: Some(config.seed),
            ..Provenance::default()
        };

        let options = options.with_progress(Terminal::new(args.run.quiet));
        let parts = files.load::<B>(&options, &device).context("--model")?;
        provenance.base_model = Some(parts.hash.clone());
        let data = format!("{} {:?} {}", parts.hash, provenance.dataset, config.image_size);
        let cache = args.cache.clone().unwrap_or_else(|| out.join("cache"));
        let (objective, mut unet) =
            objective::<B>(&config, (&collection, &split), parts, data, &device, &cache, &terminal)?;
        let layers = lora::attach(&mut unet, &config.lora, config.seed)?;
        let (all, trainable) = parameters::count(&unet);
        if !args.run.quiet {
            eprintln!(
                "{} pairs; {trainable} parameters in {layers} layers learn, {} are frozen",
                split.train.len(),
                all - trainable
            );
        }

        let loop_config = config.train_config(split.train.len());
        let trained = train(unet, &objective, &loop_config, out, &terminal)?;
        if trained.stopped {
            bail!("stopped at step {}; the same command goes on from there", trained.step);
        }
        let records = watch::read(&out.join("metrics.jsonl"))?;
        watch::plot_loss(&records, "Fine-tuning: loss", &out.join("loss.png"))?;
        provenance.steps = Some(trained.step);
        let unet = trained.averaged.unwrap_or(trained.model);
        let mut adapter = lora::export(&unet.valid(), &config.lora.name, UNET)?;
        adapter.provenance =
            Provenance { crate_version: adapter.provenance.crate_version.clone(), ..provenance };
        let file = out.join("adapter.safetensors");
        lora::write(&file, &adapter, Format::Diffusers)?;
        if args.kohya {
            lora::write(out.join("adapter_kohya.safetensors"), &adapter, Format::Kohya)?;
        }
        let card = Card {
            model: args.model.as_deref().unwrap_or("the embedded model of this project"),
            provenance: &adapter.provenance,
            settings: &toml,
            pairs: split.train.len(),
            layers,
            trainable,
            loss: records.last().map_or(f64::NAN, |record| record.smoothed),
        };
        atomic::write_bytes(out.join("README.md"), card.text().as_bytes())
            .context("cannot write README.md")?;
        println!("{}", file.display());
        Ok(())
    }
}

/// What is learnt: the noise in latents, by a UNet.
type Noise<B> = Diffusion<B, UNet2dCondition<B>>;

/// Latents and embeddings of what is trained on, and the UNet, which is all that stays in memory of the model.
fn objective<B: DiffusionAutodiff>(
    config: &FinetuneConfig,
    (collection, split): (&Collection, &Split),
    parts: ModelParts<B>,
    fingerprint: String,
    device: &B::Device,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<(Noise<B>, UNet2dCondition<B>)> {
    let ModelParts { text, unet, vae, tokenizer, schedule, config: model, hash, .. } = parts;
    let images = ImageLoader::new(Args::images(config));
    let (dtype, factor) = (float(config.base_dtype), model.vae.scaling_factor);
    let kept = encode::EncodeCache { folder: cache, model: &hash };
    let (moments, shape) = encode::moments::<B::InnerBackend>(
        &vae.valid(),
        dtype,
        factor,
        (collection, &split.train),
        &images,
        BATCH,
        Some(&kept),
        device,
        progress,
    )?;
    drop(vae);
    let prompts = || split.train.iter().map(|&position| collection.pairs[position].text.as_str());
    let text = text.valid();
    let embed = |ids| text.forward(ids);
    let embeddings = encode::embeddings(embed, dtype, &tokenizer, prompts(), Some(&kept), device, progress)?;
    let samples = encode::pair_up(moments, prompts(), &embeddings);
    let unconditional = embeddings[""].clone();
    let plain = Diffusion::new(&schedule, samples, shape, unconditional, fingerprint, device);
    let objective = Diffusion {
        weight: config.weight,
        dropout: config.caption_dropout,
        noise_offset: config.noise_offset,
        ..plain
    };
    Ok((objective, unet))
}

fn float(dtype: BaseDtype) -> FloatDType {
    match dtype {
        BaseDtype::F32 => FloatDType::F32,
        BaseDtype::F16 => FloatDType::F16,
        BaseDtype::Bf16 => FloatDType::BF16,
    }
}
