//! What is learnt from, and what it is held against.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::module::AutodiffModule;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{FloatDType, Int, Tensor};
use cxr::core::progress::Progress;
use cxr::dataset::{Collection, ImageLoader, Split, image};
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::pipeline::LoadOptions;
use cxr::ldm::scheduler::NoiseSchedule;
use cxr::ldm::unet::UNet2dCondition;
use cxr::ldm::weights::ModelFiles;
use cxr::trainer::encode::{self, EncodeCache};
use cxr::trainer::{BaseDtype, Diffusion, FinetuneConfig, LatentSample};

use crate::progress::Titled;

/// Pictures that go through the autoencoder at once.
pub const BATCH: usize = 4;

/// What is learnt: the noise in latents, by a UNet.
pub(super) type Noise<B> = Diffusion<B, UNet2dCondition<B>>;

/// What is trained on, and what is held out, without gradients.
pub(super) type Objectives<B> = (Noise<B>, Option<Noise<<B as AutodiffBackend>::InnerBackend>>);

/// Where everything comes from.
pub(super) struct Data<'a> {
    pub(super) config: &'a FinetuneConfig,
    pub(super) collection: &'a Collection,
    pub(super) split: &'a Split,
    pub(super) files: &'a ModelFiles,
    pub(super) options: &'a LoadOptions,
    /// Hash of the model's weights.
    pub(super) model: &'a str,
    pub(super) cache: &'a Path,
    pub(super) images: &'a ImageLoader,
}

impl Data<'_> {
    /// The objective on what is trained on, and the same on what is held out, where there is a validation.
    pub(super) fn objectives<B: DiffusionAutodiff>(
        &self,
        fingerprint: String,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<Objectives<B>> {
        let Self { config, split, .. } = self;
        let schedule = NoiseSchedule::new(self.files.config()?.schedule)?;
        let held_out = &split.test[..split.test.len().min(config.validation.pairs)];
        let (samples, shape, unconditional) =
            self.encoded::<B::InnerBackend>(&split.train, device, progress)?;
        let plain = Diffusion::new(&schedule, samples, shape, unconditional.clone(), fingerprint, device);
        let objective = Diffusion {
            weight: config.weight,
            dropout: config.caption_dropout,
            noise_offset: config.noise_offset,
            by_block: config.block_checkpointing,
            ..plain
        };
        if config.validation.every == 0 || held_out.is_empty() {
            return Ok((objective, None));
        }
        let titled = Titled { progress, title: "held-out pairs" };
        let (samples, ..) = self.encoded::<B::InnerBackend>(held_out, device, &titled)?;
        let held_out = Diffusion::new(&schedule, samples, shape, unconditional, String::new(), device);
        Ok((objective, Some(held_out)))
    }

    /// Latents and embeddings of some pairs, the latents' shape, and the embedding of the empty prompt.
    fn encoded<B: DiffusionBackend>(
        &self,
        positions: &[usize],
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<(Vec<LatentSample<encode::Embedding>>, [usize; 3], encode::Embedding)> {
        let Self { config, collection, files, options, images, .. } = *self;
        let (dtype, factor) = (float(config.base_dtype), files.config()?.vae.scaling_factor);
        let kept = EncodeCache { folder: self.cache, model: self.model };
        let (moments, shape) = encode::moments::<B>(
            || files.load_vae(options, device),
            dtype,
            factor,
            (collection, positions),
            images,
            BATCH,
            Some(&kept),
            device,
            progress,
        )?;
        let prompts = || positions.iter().map(|&position| collection.pairs[position].text.as_str());
        let text = || {
            let text = files.load_text::<B>(options, device)?;
            Ok(move |ids: Tensor<B, 2, Int>| text.forward(ids))
        };
        let tokenizer = files.tokenizer()?;
        let embeddings: HashMap<String, encode::Embedding> =
            encode::embeddings(text, dtype, &tokenizer, prompts(), Some(&kept), device, progress)?;
        let unconditional = embeddings[""].clone();
        Ok((encode::pair_up(moments, prompts(), &embeddings), shape, unconditional))
    }

    /// The mean squared error on what is held out, of the model as it is.
    pub(super) fn validate<B: DiffusionAutodiff>(
        &self,
        held_out: &Noise<B::InnerBackend>,
        model: &UNet2dCondition<B>,
    ) -> Vec<cxr::trainer::TimestepLoss> {
        let config = self.config;
        held_out.validation_loss(&model.valid(), config.validation.bins, config.batch_size, config.seed)
    }
}

/// That no picture is smaller than what it would be made to: what is learnt from an enlarged one is how to blur.
///
/// # Errors
/// If one is, with the number of them; if one cannot be read.
pub fn check_sizes(config: &FinetuneConfig, collection: &Collection, split: &Split) -> Result<()> {
    let (mut small, mut first) = (0, None);
    for &position in &split.train {
        let path = &collection.pairs[position].image;
        let (width, height) = image::dimensions(path).context("--data")?;
        if width.min(height) < config.image_size {
            small += 1;
            first.get_or_insert((path, width, height));
        }
    }
    let Some((path, width, height)) = first else { return Ok(()) };
    let size = config.image_size;
    ensure!(
        small == 0,
        "--data: {small} of {} pictures are smaller than image_size, which is {size}; the first is {} with {width} x \
         {height} pixels. Choose a smaller --set image_size, leave them out, or have them enlarged with --enlarge",
        split.train.len(),
        path.display()
    );
    Ok(())
}

/// burn's name for it.
pub fn float(dtype: BaseDtype) -> FloatDType {
    match dtype {
        BaseDtype::F32 => FloatDType::F32,
        BaseDtype::F16 => FloatDType::F16,
        BaseDtype::Bf16 => FloatDType::BF16,
    }
}
