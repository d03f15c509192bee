//! The loop over batches and steps.

use std::ops::{ControlFlow, Range};

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use cxr_core::progress::{Progress, Silent};
use cxr_kernels::DiffusionBackend;

use super::guidance::{Rows, guide, is_guided};
use super::image::InitialUse;
use super::{Image, ImageNoise, ImageSettings, InitialImage, Request, StableDiffusion};
use crate::Error;
use crate::scheduler::{Sampler, StepInfo, Steps, sample};
use crate::unet::Context;
use crate::vae::Tiling;

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
    sampler: Sampler,
    steps: Steps,
    width: usize,
    height: usize,
    /// Channels, height and width of a picture's latents.
    latents: [usize; 3],
    /// What all pictures start from.
    initial: Option<InitialUse>,
}

/// What a batch is conditioned on.
struct Condition<B: Backend> {
    /// The negative prompts, then the prompts; without guidance the prompts alone.
    all: Context<B>,
    /// The prompts, for noise levels outside of the guidance interval.
    prompts: Option<Context<B>>,
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
        let steps = self.steps_per_batch(request)?;
        let count = request.count();
        let batches = count.div_ceil(request.batch);
        progress.begin("pictures", Some((batches * steps) as u64));
        let mut pictures = Vec::new();
        let mut prepared: Option<(Vec<&str>, Condition<B>)> = None;
        let mut stopped = false;
        for batch in 0..batches {
            let first = batch * request.batch;
            let images = first..count.min(first + request.batch);
            let prompts: Vec<&str> = images.clone().map(|index| request.prompt(index)).collect();
            // keys and values are made once for all batches of the same prompts
            let (_, condition) = match prepared.take() {
                Some(found) if found.0 == prompts => prepared.insert(found),
                _ => {
                    let condition = self.condition(request, &prompts)?;
                    prepared.insert((prompts, condition))
                }
            };
            let mut made = 0;
            let mut report = |step: StepInfo<'_, B>| {
                made += 1;
                let done = (batch * steps + made) as u64;
                let message = format!("{}/{count} pictures, step {made}/{steps}", images.start);
                let flow = match progress.advance(done, &message) {
                    ControlFlow::Continue(()) => on_step(Preview { images: images.clone(), step }),
                    stop => stop,
                };
                stopped |= flow.is_break();
                flow
            };
            let latents = self.denoise(request, &plan, images.clone(), condition, &mut report)?;
            let Some(latents) = latents else { break };
            pictures.extend(self.pictures(request, &plan, images, latents)?);
            if stopped {
                break;
            }
        }
        progress.end(&format!("{}/{count} pictures", pictures.len()));
        Ok(pictures)
    }

    /// How often the UNet is called for a batch of the request: what progress counts in.
    ///
    /// # Errors
    /// [`Error::Steps`] for a number of steps that the schedule cannot have.
    pub fn steps_per_batch(&self, request: &Request) -> Result<usize, Error> {
        let all = self.sampler(request).timesteps(&self.parts.schedule, request.steps)?.len();
        Ok(all - steps_of(request)?.skipped().min(all - 1))
    }

    /// What the pictures of a request will have been made from, one for each, without making them.
    ///
    /// # Errors
    /// As [`generate_with`](Self::generate_with) for a request that cannot be met.
    pub fn settings(&self, request: &Request) -> Result<Vec<ImageSettings>, Error> {
        let plan = self.plan(request)?;
        Ok((0..request.count()).map(|index| self.settings_of(request, &plan, index)).collect())
    }

    /// The pictures of a batch as a step predicts them.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if one is not finite; as [`generate_with`](Self::generate_with) if the request is not
    /// the one that the step is of.
    pub fn preview(&self, request: &Request, preview: &Preview<'_, B>) -> Result<Vec<Image>, Error> {
        let plan = self.plan(request)?;
        self.pictures(request, &plan, preview.images.clone(), preview.step.predicted_original.clone())
    }

    /// The sampler of a request: its own, else the one that the model names, else DPM-Solver++ 2M.
    fn sampler(&self, request: &Request) -> Sampler {
        request.sampler.or_else(|| self.parts.config.schedule.sampler()).unwrap_or(Sampler::DpmPp2m)
    }

    /// Checks the request against the model.
    fn plan(&self, request: &Request) -> Result<Plan, Error> {
        request.validate()?;
        if request.strict_prompt {
            let prompts = request.prompts.iter().chain([&request.negative_prompt]);
            prompts.into_iter().try_for_each(|prompt| self.tokens(prompt, true).map(drop))?;
        }
        let sampler = self.sampler(request);
        sampler.timesteps(&self.parts.schedule, request.steps)?;
        let side = self.default_side();
        let initial = request.initial.as_ref();
        let own = initial.map_or((side, side), |image| (image.width(), image.height()));
        let (width, height) = request.size.unwrap_or(own);
        let unit = self.size_unit();
        for found in [width, height] {
            if found == 0 || found % unit != 0 {
                return Err(Error::Size { width, height, unit });
            }
        }
        if initial.is_some() && own != (width, height) {
            return Err(Error::Request {
                setting: "size".into(),
                found: format!("{width}x{height}"),
                expected: format!("that of the initial image, {}x{}", own.0, own.1),
            });
        }
        let steps = steps_of(request)?;
        if let Some(image) = initial.filter(|_| steps.skipped() == request.steps) {
            return Err(Error::Request {
                setting: "strength".into(),
                found: format!("{} of {} steps, which is none", image.strength(), request.steps),
                expected: "enough for one step".into(),
            });
        }
        let used = |image: &InitialImage| InitialUse { sha256: image.sha256(), strength: image.strength() };
        let initial = initial.map(used);
        let factor = self.vae_factor();
        let latents = [self.parts.config.vae.latent_channels, height / factor, width / factor];
        Ok(Plan { sampler, steps, width, height, latents, initial })
    }

    /// Keys and values of a batch. Each text is encoded once.
    fn condition(&self, request: &Request, prompts: &[&str]) -> Result<Condition<B>, Error> {
        let encode = |texts: &[&str]| self.encode_prompts(texts, request.strict_prompt);
        if !is_guided(request) {
            return Ok(Condition {
                all: self.parts.unet.prepare(select(texts_of(prompts), encode)?),
                prompts: None,
            });
        }
        let negative = std::iter::repeat_n(request.negative_prompt.as_str(), prompts.len());
        let rows: Vec<&str> = negative.chain(prompts.iter().copied()).collect();
        let all = self.parts.unet.prepare(select(texts_of(&rows), encode)?);
        let n = prompts.len();
        let prompts = request.guidance_interval.map(|_| all.rows_of(n..2 * n));
        Ok(Condition { all, prompts })
    }

    /// The latents of some pictures; `None` if it was stopped before the last step.
    fn denoise(
        &self,
        request: &Request,
        plan: &Plan,
        images: Range<usize>,
        condition: &Condition<B>,
        on_step: &mut dyn FnMut(StepInfo<'_, B>) -> ControlFlow<()>,
    ) -> Result<Option<Tensor<B, 4>>, Error> {
        let n = images.len();
        let mut noise = ImageNoise::new(images.map(|index| request.seed_of(index)));
        let schedule = &self.parts.schedule;
        let start = match &request.initial {
            None => noise.next(plan.latents, &self.device),
            Some(image) => {
                // diffusers draws the encoder's sample first, then the noise, from each picture's stream
                let sample = noise.next(plan.latents, &self.device);
                let original = self.encode_initial(request, plan, image, n, sample)?;
                let noise = noise.next(plan.latents, &self.device);
                plan.sampler.add_noise(schedule, plan.steps, original, noise)?
            }
        };
        let sampled = sample(
            &plan.sampler,
            schedule,
            plan.steps,
            start,
            |latents, timestep| self.guided(latents, timestep, condition, request),
            |_step, _shape| noise.next(plan.latents, &self.device),
            on_step,
        )?;
        Ok(sampled.finished.then_some(sampled.latents))
    }

    /// Scaled latents of the initial image, `n` draws of them, f32.
    fn encode_initial(
        &self,
        request: &Request,
        plan: &Plan,
        image: &InitialImage,
        n: usize,
        noise: Tensor<B, 4>,
    ) -> Result<Tensor<B, 4>, Error> {
        let pixels = TensorData::new(image.planes(), [1, 3, plan.height, plan.width]);
        let pixels = Tensor::<B, 4>::from_data(pixels, (&self.device, DType::F32)).cast(self.parts.dtype);
        let vae = &self.parts.vae;
        let moments = match request.vae_tiling {
            true => Tiling::new(&self.parts.config.vae).encode(vae, pixels),
            false => vae.encode(pixels),
        };
        let row = |x: Tensor<B, 4>| x.cast(DType::F32).repeat_dim(0, n);
        let latents = row(moments.mean.clone()) + row(moments.std()) * noise;
        let latents = latents * self.parts.config.vae.scaling_factor;
        match super::is_finite(&latents.to_data()) {
            true => Ok(latents),
            false => Err(Error::NotFinite { what: "the encoded initial image".into() }),
        }
    }

    /// The UNet's output, guided as the request has it. The sampler's latents are f32, whatever the dtype of the weights.
    fn guided(
        &self,
        latents: Tensor<B, 4>,
        timestep: f64,
        condition: &Condition<B>,
        request: &Request,
    ) -> Tensor<B, 4> {
        let latents = latents.cast(self.parts.dtype);
        let sigma = self.parts.schedule.sigma_at(timestep);
        guide(request, sigma, latents, |latents, rows| match (rows, &condition.prompts) {
            (Rows::Prompts, Some(prompts)) => self.predict(latents, timestep, prompts),
            _ => self.predict(latents, timestep, &condition.all),
        })
    }

    fn predict(&self, latents: Tensor<B, 4>, timestep: f64, context: &Context<B>) -> Tensor<B, 4> {
        let n = latents.dims()[0];
        let timesteps = TensorData::new(vec![timestep as f32; n], [n]);
        let timesteps = Tensor::<B, 1>::from_data(timesteps, (&self.device, DType::F32));
        self.parts.unet.forward(latents, timesteps, context).cast(DType::F32)
    }

    fn pictures(
        &self,
        request: &Request,
        plan: &Plan,
        images: Range<usize>,
        latents: Tensor<B, 4>,
    ) -> Result<Vec<Image>, Error> {
        let n = images.len();
        let slices: Vec<Tensor<B, 4>> = match request.vae_slicing {
            true => latents.split(1, 0),
            false => vec![latents],
        };
        let size = 3 * plan.width * plan.height;
        let mut pictures = Vec::with_capacity(n);
        let mut indices = images;
        for latents in slices {
            let pixels: Vec<f32> = self.decode_with(latents, request.vae_tiling)?.iter::<f32>().collect();
            for (planes, index) in pixels.chunks_exact(size).zip(&mut indices) {
                let settings = self.settings_of(request, plan, index);
                pictures.push(Image::from_planes(planes, plan.width, plan.height, settings));
            }
        }
        Ok(pictures)
    }

    fn settings_of(&self, request: &Request, plan: &Plan, index: usize) -> ImageSettings {
        let eta = if let Sampler::Ddim { eta } = plan.sampler { eta } else { 0.0 };
        ImageSettings {
            prompt: request.prompt(index).into(),
            negative_prompt: request.negative_prompt.clone(),
            seed: request.seed_of(index),
            steps: request.steps,
            width: plan.width,
            height: plan.height,
            guidance: request.guidance,
            guidance_interval: request.guidance_interval,
            sampler: plan.sampler.name().into(),
            eta,
            initial: plan.initial.clone(),
            vae_tiling: request.vae_tiling,
            dtype: format!("{:?}", self.parts.dtype).to_lowercase(),
            model_hash: self.parts.hash.clone(),
            schedule: self.parts.config.schedule.clone(),
            lora: self.lora.clone(),
            software: concat!("cxr ", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

/// All steps, or for an initial image those that its strength leaves.
fn steps_of(request: &Request) -> Result<Steps, Error> {
    match &request.initial {
        Some(image) => Steps::with_strength(request.steps, image.strength()),
        None => Ok(Steps::new(request.steps)),
    }
}

/// The distinct texts, and for every row the place of its own.
fn texts_of<'a>(rows: &[&'a str]) -> (Vec<&'a str>, Vec<i64>) {
    let mut texts = rows.to_vec();
    texts.sort_unstable();
    texts.dedup();
    let places = rows.iter().map(|row| texts.binary_search(row).map_or(0, |place| place as i64)).collect();
    (texts, places)
}

/// What `encode` makes of the texts, in the order of the rows.
fn select<B: Backend>(
    (texts, places): (Vec<&str>, Vec<i64>),
    encode: impl Fn(&[&str]) -> Result<Tensor<B, 3>, Error>,
) -> Result<Tensor<B, 3>, Error> {
    let encoded = encode(&texts)?;
    let count = places.len();
    let places = Tensor::<B, 1, Int>::from_data(TensorData::new(places, [count]), &encoded.device());
    Ok(encoded.select(0, places))
}
