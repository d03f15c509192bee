//! Fine-tuning: the adapter learns, everything else is frozen.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use burn::module::AutodiffModule;
use cxr::core::hash::{sha256_file, sha256_hex};
use cxr::core::progress::Progress;
use cxr::kernels::nn::parameters;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::pipeline::{LoadOptions, ModelFolder, ModelParts, StableDiffusion};
use cxr::ldm::unet::UNet2dCondition;
use cxr::lora::{self, Format, LoraConfig, Provenance, UNET};
use cxr::trainer::{Diffusion, LatentSample, LearningRate, TrainConfig, train, watch};
use cxr_examples::demo::{latents, thumbnails::Thumbnails};
use cxr_examples::progress::Titled;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{Args, stage};

/// The adapter's name in the model while it learns.
const NAME: &str = "default";

/// What the fine-tuning made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Finetuned {
    /// The adapter.
    pub(crate) file: PathBuf,
    /// The loss curve.
    pub(crate) curve: PathBuf,
    /// Layers with an adapter.
    pub(crate) layers: usize,
    /// Parameters that learnt.
    pub(crate) parameters: usize,
    /// Parameters of the UNet without the adapter.
    pub(crate) unet_parameters: usize,
    /// Hash of the base model's weights.
    pub(crate) model_hash: String,
    /// Smoothed loss at the end.
    pub(crate) loss: f64,
}

/// Text embeddings of a prompt `[tokens * width]`, and their shape.
type Condition = (Arc<Vec<f32>>, [usize; 2]);

/// Trains the adapter, or finds it trained.
pub(crate) fn finetune<B: DiffusionAutodiff>(
    args: &Args,
    data: &Thumbnails,
    model: &Path,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<Finetuned> {
    let folder = args.out.join("lora");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let parts = ModelFolder::open(model)?.load::<B>(&LoadOptions::default(), device)?;
    let split = sha256_file(args.out.join("data/split.json"))?;
    let key = stage::key(&json!({
        "model": parts.hash, "split": split, "rank": args.rank, "steps": args.lora_steps,
        "batch": args.lora_batch, "rate": args.lora_rate, "dropout": args.caption_dropout, "seed": args.seed,
    }))?;
    let record = folder.join("done.json");
    if let Some(done) = stage::done::<Finetuned>(&record, &key)
        && done.file.is_file()
        && done.curve.is_file()
    {
        progress.begin("fine-tuning", None);
        progress.end("already done");
        return Ok(done);
    }

    // Runs of other settings keep their folders: checkpoints are never mixed.
    let run_folder = folder.join(&key);
    let mut unet = parts.unet.clone();
    let unet_parameters = parameters::count(&unet).0;
    let layers = lora::attach(&mut unet, &LoraConfig::new(args.rank), args.seed)?;
    let trainable = parameters::count(&unet).1;
    let model_hash = parts.hash.clone();
    let objective = objective::<B>(args, data, parts, &split, device, progress)?;
    let config = TrainConfig {
        steps: args.lora_steps,
        batch_size: args.lora_batch,
        learning_rate: LearningRate::constant(args.lora_rate),
        seed: args.seed,
        ema: Some(0.99),
        ..TrainConfig::default()
    };
    let trained = train(unet, &objective, &config, &run_folder, &Titled { progress, title: "fine-tuning" })?;
    if trained.stopped {
        bail!("stopped at step {}; the same command goes on from there", trained.step);
    }

    let records = watch::read(&run_folder.join("metrics.jsonl"))?;
    let curve = folder.join("loss.png");
    watch::plot_loss(&records, &[], "Fine-tuning: loss", &curve)?;
    let unet = trained.averaged.unwrap_or(trained.model);
    let mut adapter = lora::export(&unet.valid(), NAME, UNET)?;
    adapter.provenance = Provenance {
        base_model: Some(model_hash.clone()),
        dataset: Some(sha256_hex(&serde_json::to_vec(&data.collection.metadata_rows())?)),
        split: Some(split),
        rank: Some(args.rank),
        alpha: Some(args.rank as f64),
        targets: Some(LoraConfig::new(args.rank).targets.to_string()),
        steps: Some(args.lora_steps),
        seed: Some(args.seed),
        ..adapter.provenance
    };
    let file = folder.join("adapter.safetensors");
    lora::write(&file, &adapter, Format::Diffusers)?;
    let loss = records.last().map_or(f64::NAN, |record| record.smoothed);
    let done = Finetuned { file, curve, layers, parameters: trainable, unet_parameters, model_hash, loss };
    stage::keep(&record, &key, &done)?;
    Ok(done)
}

/// Latents of the training radiographs and embeddings of their prompts: neither autoencoder nor text encoder is
/// needed after this.
fn objective<B: DiffusionAutodiff>(
    args: &Args,
    data: &Thumbnails,
    parts: ModelParts<B>,
    split: &str,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<Diffusion<B, UNet2dCondition<B>>> {
    let pipeline = StableDiffusion::<B::InnerBackend>::new(valid(parts), device)?;
    let train = &data.split.train;
    let mut cache = HashMap::new();
    let mut condition = |prompt: &str| -> Result<Condition> {
        if let Some(found) = cache.get(prompt) {
            return Ok(Clone::clone(found));
        }
        let made = embed(&pipeline, prompt)?;
        cache.insert(prompt.to_string(), made.clone());
        Ok(made)
    };
    let pictures = train
        .iter()
        .map(|&i| Ok((data.pixels[i].clone(), condition(&data.collection.pairs[i].text)?)))
        .collect::<Result<Vec<_>>>()?;
    let unconditional = condition("")?;
    let vae = &pipeline.parts().vae;
    let mut samples: Vec<LatentSample<Condition>> = latents::encode(vae, &pictures, device, progress)?;
    let config = &pipeline.parts().config;
    latents::scale(&mut samples, config.vae.scaling_factor);
    let side = config.unet.sample_size;
    let shape = [config.vae.latent_channels, side, side];
    let fingerprint = format!("{} {}", pipeline.parts().hash, split);
    let schedule = &pipeline.parts().schedule;
    let plain = Diffusion::new(schedule, samples, shape, unconditional, fingerprint, device);
    Ok(Diffusion { dropout: args.caption_dropout, ..plain })
}

fn embed<B: DiffusionBackend>(pipeline: &StableDiffusion<B>, prompt: &str) -> Result<Condition> {
    let hidden = pipeline.encode_prompts(&[prompt], false)?;
    let [_, tokens, width] = hidden.dims();
    Ok((Arc::new(hidden.into_data().iter::<f32>().collect()), [tokens, width]))
}

/// The same model without gradients.
fn valid<B: DiffusionAutodiff>(parts: ModelParts<B>) -> ModelParts<B::InnerBackend> {
    ModelParts {
        text: parts.text.valid(),
        unet: parts.unet.valid(),
        vae: parts.vae.valid(),
        tokenizer: parts.tokenizer,
        schedule: parts.schedule,
        config: parts.config,
        dtype: parts.dtype,
        hash: parts.hash,
    }
}
