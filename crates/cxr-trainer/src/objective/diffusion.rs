//! Predicting the noise in noised latents.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Tensor, TensorData};
use cxr_core::random::Stream;
use cxr_kernels::DiffusionBackend;
use cxr_ldm::scheduler::{NoiseSchedule, PredictionType};
use cxr_ldm::unet::{Context, UNet2dCondition};
use cxr_lora::DropoutStep;
use serde::{Deserialize, Serialize};

use super::{Objective, Sample};

/// A model that predicts the noise in latents, given a condition.
pub trait Denoise<B: Backend> {
    /// What one picture is conditioned on.
    type Condition: Clone + Send + Sync;

    /// `latents` `[n, c, h, w]` (scaled, noised), `timesteps` `[n]`, one condition each: the prediction, same shape.
    fn denoise(
        &self,
        latents: Tensor<B, 4>,
        timesteps: Tensor<B, 1>,
        conditions: &[&Self::Condition],
    ) -> Tensor<B, 4>;

    /// Sets where the masks of adapters with dropout come from; nothing for models without adapters.
    fn set_dropout_step(&mut self, step: DropoutStep) {
        let _ = step;
    }
}

/// A UNet conditioned on text embeddings that were computed before: `[tokens * width]` each, row by row.
impl<B: DiffusionBackend> Denoise<B> for UNet2dCondition<B> {
    type Condition = (std::sync::Arc<Vec<f32>>, [usize; 2]);

    fn denoise(
        &self,
        latents: Tensor<B, 4>,
        timesteps: Tensor<B, 1>,
        conditions: &[&Self::Condition],
    ) -> Tensor<B, 4> {
        let [tokens, width] = conditions.first().map_or([0, 0], |(_, shape)| *shape);
        let values: Vec<f32> = conditions.iter().flat_map(|(values, _)| values.iter().copied()).collect();
        let data = TensorData::new(values, [conditions.len(), tokens, width]);
        let hidden = Tensor::<B, 3>::from_data(data, &latents.device());
        // The frozen weights may be in half precision; what is compared with the target is f32.
        let dtype = self.dtype();
        let predicted = self.forward(latents.cast(dtype), timesteps, &Context::new(hidden.cast(dtype)));
        predicted.cast(DType::F32)
    }

    fn set_dropout_step(&mut self, step: DropoutStep) {
        for name in cxr_lora::attached(self) {
            // It is attached, so there is nothing that could fail.
            let _ = cxr_lora::set_dropout_step(self, &name, Some(step));
        }
    }
}

/// One picture as the autoencoder sees it, and its condition.
#[derive(Debug, Clone)]
pub struct LatentSample<C> {
    /// Mean of the latents, scaled, `[c * h * w]`.
    pub mean: Vec<f32>,
    /// Standard deviation of the latents, scaled, `[c * h * w]`; empty for none.
    pub std: Vec<f32>,
    /// What the picture is conditioned on.
    pub condition: C,
}

/// One picture with everything random about it drawn.
#[derive(Debug, Clone)]
pub struct DrawnSample<'a, C> {
    /// Scaled latents, `[c * h * w]`.
    pub latents: Vec<f32>,
    /// The noise that is added, `[c * h * w]`.
    pub noise: Vec<f32>,
    /// The training timestep, from 0.
    pub timestep: usize,
    /// What the picture is conditioned on.
    pub condition: &'a C,
}

/// How much each timestep counts.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnrWeight {
    /// All the same: the paper's.
    #[default]
    Uniform,
    /// `min(SNR, gamma) / SNR` for noise, `min(SNR, gamma) / (SNR + 1)` for velocity (Hang et al., 2023).
    MinSnr(f64),
}

/// Mean squared error of the predicted noise (Ho et al., 2020, equation 14), or velocity, on cached latents.
///
/// Made by [`new`](Self::new) with the options off. For each sample, from streams named by its position: a timestep uniform in `[0, T)`, noise, and the draw from
/// the autoencoder's posterior.
pub struct Diffusion<B: AutodiffBackend, M: Denoise<B>> {
    /// The pictures.
    pub samples: Vec<LatentSample<M::Condition>>,
    /// Shape of one picture's latents, `[c, h, w]`.
    pub shape: [usize; 3],
    /// Cumulative products of the schedule, `[T]`.
    pub alphas_cumprod: Vec<f64>,
    /// What the model predicts: the schedule's, which is the model's own.
    pub prediction: PredictionType,
    /// A normal number times this is added to the noise of each channel, the same for all its pixels: the model learns
    /// to change the brightness of a whole picture (Guttenberg, 2023, "Diffusion with offset noise"). Usually 0 to 0.1.
    pub noise_offset: f32,
    /// How much each timestep counts.
    pub weight: SnrWeight,
    /// How often the condition is replaced by `unconditional`, so that guidance has something to hold against.
    pub dropout: f32,
    /// The condition of an empty prompt.
    pub unconditional: M::Condition,
    /// Says what data this is.
    pub fingerprint: String,
    /// Where the tensors go.
    pub device: B::Device,
}

impl<B: AutodiffBackend, M: Denoise<B>> Diffusion<B, M> {
    /// The objective of a model that was trained with `schedule`, on pictures of `shape`: every timestep counts the
    /// same, every caption is kept, no offset noise. `unconditional` is the condition of an empty prompt, and
    /// `fingerprint` says what data this is.
    pub fn new(
        schedule: &NoiseSchedule,
        samples: Vec<LatentSample<M::Condition>>,
        shape: [usize; 3],
        unconditional: M::Condition,
        fingerprint: String,
        device: &B::Device,
    ) -> Self {
        Self {
            samples,
            shape,
            alphas_cumprod: schedule.alphas_cumprod().to_vec(),
            prediction: schedule.config().prediction_type,
            noise_offset: 0.0,
            weight: SnrWeight::Uniform,
            dropout: 0.0,
            unconditional,
            fingerprint,
            device: device.clone(),
        }
    }

    /// One sample with its timestep, noise, point in the posterior, and condition.
    fn draw(&self, sample: Sample, seed: u64) -> DrawnSample<'_, M::Condition> {
        let stream = |purpose: &str| Stream::new(seed, purpose, sample.position);
        let elements = self.shape.iter().product();
        let item = &self.samples[sample.index];
        let posterior = stream("posterior").normals(elements);
        let latent = |(i, mean): (usize, &f32)| mean + item.std.get(i).map_or(0.0, |std| std * posterior[i]);
        let unconditional = stream("caption dropout").uniform() < self.dropout;
        let mut noise = stream("noise").normals(elements);
        if self.noise_offset != 0.0 {
            let [channels, ..] = self.shape;
            let offsets = stream("noise offset").normals(channels);
            for (channel, offset) in noise.chunks_mut(elements / channels).zip(offsets) {
                channel.iter_mut().for_each(|value| *value += self.noise_offset * offset);
            }
        }
        DrawnSample {
            latents: item.mean.iter().enumerate().map(latent).collect(),
            noise,
            timestep: stream("timestep").below(self.alphas_cumprod.len() as u64) as usize,
            condition: if unconditional { &self.unconditional } else { &item.condition },
        }
    }

    /// The mean loss over samples that are drawn, `[1]`: the formula without the draws, to be held against others'.
    ///
    /// # Panics
    /// If a timestep is not below the schedule's length, or the latents are not of this objective's shape.
    pub fn loss_of(&self, model: &M, samples: &[DrawnSample<'_, M::Condition>]) -> Tensor<B, 1> {
        let [c, h, w] = self.shape;
        let n = samples.len();
        let (mut noised, mut target) = (Vec::with_capacity(n * c * h * w), Vec::with_capacity(n * c * h * w));
        let (mut timesteps, mut weights, mut conditions) = (Vec::new(), Vec::new(), Vec::new());
        for sample in samples {
            let alpha_bar = self.alphas_cumprod[sample.timestep];
            let (signal, noise) = (alpha_bar.sqrt() as f32, (1.0 - alpha_bar).sqrt() as f32);
            noised.extend(sample.latents.iter().zip(&sample.noise).map(|(x, eps)| signal * x + noise * eps));
            match self.prediction {
                PredictionType::Epsilon => target.extend(&sample.noise),
                PredictionType::VPrediction => target.extend(
                    sample.latents.iter().zip(&sample.noise).map(|(x, eps)| signal * eps - noise * x),
                ),
            }
            timesteps.push(sample.timestep as f32);
            weights.push(match self.weight {
                SnrWeight::Uniform => 1.0,
                SnrWeight::MinSnr(gamma) => {
                    let snr = alpha_bar / (1.0 - alpha_bar);
                    let of_target = match self.prediction {
                        PredictionType::Epsilon => snr,
                        PredictionType::VPrediction => snr + 1.0,
                    };
                    (snr.min(gamma) / of_target) as f32
                }
            });
            conditions.push(sample.condition);
        }
        let tensor =
            |values: Vec<f32>| Tensor::<B, 4>::from_data(TensorData::new(values, [n, c, h, w]), &self.device);
        let timesteps = Tensor::from_data(TensorData::new(timesteps, [n]), (&self.device, DType::F32));
        let predicted = model.denoise(tensor(noised), timesteps, &conditions);
        let error = predicted.sub(tensor(target));
        let squared = error.clone().mul(error);
        if self.weight == SnrWeight::Uniform {
            return squared.mean();
        }
        let weights = Tensor::<B, 4>::from_data(TensorData::new(weights, [n, 1, 1, 1]), &self.device);
        squared.mul(weights).mean()
    }
}

impl<B: AutodiffBackend, M: Denoise<B> + burn::module::AutodiffModule<B>> Objective<B> for Diffusion<B, M> {
    type Model = M;

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn fingerprint(&self) -> String {
        // what the schedule is, told by its two ends and length: no two in use agree in all three
        let ends = (self.alphas_cumprod.first(), self.alphas_cumprod.last(), self.alphas_cumprod.len());
        let Self { fingerprint, weight, dropout, prediction, noise_offset, .. } = self;
        format!("{fingerprint} {weight:?} dropout {dropout} {ends:?} {prediction:?} offset {noise_offset}")
    }

    fn prepare(&self, model: &mut M, position: u64, seed: u64) {
        model.set_dropout_step(DropoutStep { seed, step: position });
    }

    fn loss(&self, model: &M, samples: &[Sample], seed: u64) -> Tensor<B, 1> {
        let drawn: Vec<_> = samples.iter().map(|sample| self.draw(*sample, seed)).collect();
        self.loss_of(model, &drawn)
    }
}
