//! The loop over batches and steps.

use std::ops::{ControlFlow, Range};

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use cxr_core::progress::{Progress, Silent};
use cxr_kernels::DiffusionBackend;

use super::{Image, ImageNoise, ImageSettings, Request, StableDiffusion};
use crate::Error;
use crate::scheduler::{Sampler, StepInfo, Steps, sample};
use crate::unet::Context;

/// What the callback of [`StableDiffusion::generate_with`] gets after every step.
#[derive(Debug)]
pub struct Preview<'a, B: Backend> {
    /// The pictures of the batch, by index in the request.
    pub images: Range<usize>,
    /// The step; [`StableDiffusion::decode`] makes pixels of its latents.
    pub step: StepInfo<'a, B>,
}

/// A request, checked against the model.
struct Plan {
    width: usize,
    height: usize,
    /// Channels, height and width of a picture's latents.
    latents: [usize; 3],
}

impl<B: DiffusionBackend> StableDiffusion<B> {
    /// Makes the pictures.
    ///
    /// # Errors
    /// As [`generate_with`](Self::generate_with).
    pub fn generate(&self, request: &Request) -> Result<Vec<Image>, Error> {
        self.generate_with(request, &Silent, &mut |_| ControlFlow::Continue(()))
    }

    /// Makes the pictures, telling how far it is.
    ///
    /// `progress` counts the steps of all batches. When it or `on_step` answers `Break`, the step that is running
    /// is the last one, and the pictures of the batches that were finished before it are returned.
    ///
    /// # Errors
    /// - [`Error::Request`], [`Error::Size`], [`Error::Steps`] or [`Error::PromptTooLong`] for a request that
    ///   cannot be met, before any work is done;
    /// - [`Error::NotFinite`] if a picture is not finite.
    pub fn generate_with(
        &self,
        request: &Request,
        progress: &dyn Progress,
        on_step: &mut dyn FnMut(Preview<'_, B>) -> ControlFlow<()>,
    ) -> Result<Vec<Image>, Error> {
        let plan = self.plan(request)?;
        let steps = request.sampler.timesteps(&self.parts.schedule, request.steps)?.len();
        let batches = request.count.div_ceil(request.batch);
        progress.begin("pictures", Some((batches * steps) as u64));
        let mut pictures = Vec::new();
        let mut prepared: Option<(Vec<&str>, Context<B>)> = None;
        let mut stopped = false;
        for batch in 0..batches {
            let first = batch * request.batch;
            let images = first..request.count.min(first + request.batch);
            let prompts: Vec<&str> = images.clone().map(|index| request.prompt(index)).collect();
            // keys and values are made once for all batches of the same prompts
            let (_, context) = match prepared.take() {
                Some(found) if found.0 == prompts => prepared.insert(found),
                _ => {
                    let context = self.parts.unet.prepare(self.hidden(request, &prompts)?);
                    prepared.insert((prompts, context))
                }
            };
            let mut report = |step: StepInfo<'_, B>| {
                let done = (batch * steps + step.index + 1) as u64;
                let message =
                    format!("{}/{} pictures, step {}/{steps}", images.start, request.count, step.index + 1);
                let flow = match progress.advance(done, &message) {
                    ControlFlow::Continue(()) => on_step(Preview { images: images.clone(), step }),
                    stop => stop,
                };
                stopped |= flow.is_break();
                flow
            };
            let latents = self.denoise(request, &plan, images.clone(), context, &mut report)?;
            let Some(latents) = latents else { break };
            pictures.extend(self.pictures(request, &plan, images, latents)?);
            if stopped {
                break;
            }
        }
        progress.end(&format!("{}/{} pictures", pictures.len(), request.count));
        Ok(pictures)
    }

    /// Checks the request against the model.
    fn plan(&self, request: &Request) -> Result<Plan, Error> {
        request.validate()?;
        if request.strict_prompt {
            let prompts = request.prompts.iter().chain([&request.negative_prompt]);
            prompts.into_iter().try_for_each(|prompt| self.tokens(prompt, true).map(drop))?;
        }
        let side = self.default_side();
        let (width, height) = request.size.unwrap_or((side, side));
        let unit = self.size_unit();
        for found in [width, height] {
            if found == 0 || found % unit != 0 {
                return Err(Error::Size { width, height, unit });
            }
        }
        let factor = self.vae_factor();
        let latents = [self.parts.config.vae.latent_channels, height / factor, width / factor];
        Ok(Plan { width, height, latents })
    }

    /// The hidden states of a batch, `[2 n, 77, d]`: the negative prompt `n` times, then the prompts; without
    /// guidance `[n, 77, d]`. Each text is encoded once.
    fn hidden(&self, request: &Request, prompts: &[&str]) -> Result<Tensor<B, 3>, Error> {
        let negative = is_guided(request).then_some(request.negative_prompt.as_str());
        let rows: Vec<&str> =
            std::iter::repeat_n(negative, prompts.len()).flatten().chain(prompts.iter().copied()).collect();
        let mut texts = rows.clone();
        texts.sort_unstable();
        texts.dedup();
        let encoded = self.encode_prompts(&texts, request.strict_prompt)?;
        let places: Vec<i64> =
            rows.iter().map(|row| texts.binary_search(row).map_or(0, |place| place as i64)).collect();
        let count = places.len();
        let places = Tensor::<B, 1, Int>::from_data(TensorData::new(places, [count]), &self.device);
        Ok(encoded.select(0, places))
    }

    /// The latents of some pictures; `None` if it was stopped before the last step.
    fn denoise(
        &self,
        request: &Request,
        plan: &Plan,
        images: Range<usize>,
        context: &Context<B>,
        on_step: &mut dyn FnMut(StepInfo<'_, B>) -> ControlFlow<()>,
    ) -> Result<Option<Tensor<B, 4>>, Error> {
        let mut noise = ImageNoise::new(images.map(|index| request.seed.wrapping_add(index as u64)));
        // standard normal at the first timestep of both samplers: neither scales it
        let start = noise.next(plan.latents, &self.device);
        let sampled = sample(
            &request.sampler,
            &self.parts.schedule,
            Steps::new(request.steps),
            start,
            |latents, timestep| self.guided(latents, timestep, context, request),
            |_step, _shape| noise.next(plan.latents, &self.device),
            on_step,
        )?;
        Ok(sampled.finished.then_some(sampled.latents))
    }

    /// The UNet's output with classifier-free guidance (Ho & Salimans 2022), both halves in one call.
    ///
    /// The sampler's latents are f32, whatever the dtype of the weights.
    fn guided(
        &self,
        latents: Tensor<B, 4>,
        timestep: i64,
        context: &Context<B>,
        request: &Request,
    ) -> Tensor<B, 4> {
        let latents = latents.cast(self.parts.dtype);
        let n = latents.dims()[0];
        if !is_guided(request) {
            return self.predict(latents, timestep, context);
        }
        let both = self.predict(Tensor::cat(vec![latents.clone(), latents], 0), timestep, context);
        let unconditional = both.clone().slice(0..n);
        let conditional = both.slice(n..2 * n);
        unconditional.clone() + (conditional - unconditional) * request.guidance
    }

    fn predict(&self, latents: Tensor<B, 4>, timestep: i64, context: &Context<B>) -> Tensor<B, 4> {
        let n = latents.dims()[0];
        let timesteps = TensorData::new(vec![timestep; n], [n]);
        let timesteps = Tensor::<B, 1, Int>::from_data(timesteps, &self.device);
        self.parts.unet.forward(latents, timesteps, context).cast(DType::F32)
    }

    fn pictures(
        &self,
        request: &Request,
        plan: &Plan,
        images: Range<usize>,
        latents: Tensor<B, 4>,
    ) -> Result<Vec<Image>, Error> {
        let (width, height) = (plan.width, plan.height);
        let pixels: Vec<f32> = self.decode(latents)?.iter::<f32>().collect();
        let size = 3 * width * height;
        let image = |(planes, index): (&[f32], usize)| {
            Image::from_planes(planes, width, height, self.settings(request, index))
        };
        Ok(pixels.chunks_exact(size).zip(images).map(image).collect())
    }

    fn settings(&self, request: &Request, index: usize) -> ImageSettings {
        let eta = if let Sampler::Ddim { eta } = request.sampler { eta } else { 0.0 };
        ImageSettings {
            prompt: request.prompt(index).into(),
            negative_prompt: request.negative_prompt.clone(),
            seed: request.seed.wrapping_add(index as u64),
            steps: request.steps,
            guidance: request.guidance,
            sampler: request.sampler.name().into(),
            eta,
            model_hash: self.parts.hash.clone(),
            lora: self.lora.clone(),
            software: concat!("cxr ", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

/// At guidance 1 the unconditional half cancels out.
fn is_guided(request: &Request) -> bool {
    request.guidance != 1.0
}
