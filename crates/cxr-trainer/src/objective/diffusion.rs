//! Predicting the noise in noised latents.

use burn::module::AutodiffModule;
use burn::optim::GradientsParams;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use cxr_core::random::Stream;
use cxr_kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr_ldm::scheduler::{NoiseSchedule, PredictionType};
use cxr_ldm::unet::{Context, UNet2dCondition};
use cxr_lora::DropoutStep;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Objective, Sample, blocks, loss_and_gradients};
use crate::gradients::accumulate;

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

    /// The loss of the prediction for such inputs, and its gradients, with as little memory as this model can do with: by
    /// default, as with any other loss.
    fn gradients_by_block(
        &self,
        latents: Tensor<B, 4>,
        timesteps: Tensor<B, 1>,
        conditions: &[&Self::Condition],
        loss: &dyn Fn(Tensor<B, 4>) -> Tensor<B, 1>,
    ) -> (f64, GradientsParams)
    where
        B: DiffusionAutodiff,
        Self: AutodiffModule<B>,
    {
        loss_and_gradients(self, loss(self.denoise(latents, timesteps, conditions)))
    }

    /// What a loss is multiplied by before it goes backward, and its gradients divided by: 1 but where gradients that flow
    /// through the model would have too few digits.
    fn loss_scale(&self) -> f64 {
        1.0
    }

    /// Sets where the masks of adapters with dropout come from; nothing for models without adapters.
    fn set_dropout_step(&mut self, step: DropoutStep) {
        let _ = step;
    }
}

/// [`Denoise::loss_scale`] of a base in f16, whose numbers lose digits below 6e-5: gradients by a prediction are about that, and
/// those by what lies before it less. At 65,504 they end, far above a thousand times as much.
const F16_LOSS_SCALE: f64 = 1024.0;

/// A UNet conditioned on text embeddings that were computed before: `[tokens * width]` each, row by row.
impl<B: DiffusionBackend> Denoise<B> for UNet2dCondition<B> {
    type Condition = (std::sync::Arc<Vec<f32>>, [usize; 2]);

    fn denoise(
        &self,
        latents: Tensor<B, 4>,
        timesteps: Tensor<B, 1>,
        conditions: &[&Self::Condition],
    ) -> Tensor<B, 4> {
        // The frozen weights may be in half precision; what is compared with the target is f32.
        let dtype = self.dtype();
        let hidden = hidden(conditions, &latents.device()).cast(dtype);
        self.forward(latents.cast(dtype), timesteps, &Context::new(hidden)).cast(DType::F32)
    }

    fn gradients_by_block(
        &self,
        latents: Tensor<B, 4>,
        timesteps: Tensor<B, 1>,
        conditions: &[&Self::Condition],
        loss: &dyn Fn(Tensor<B, 4>) -> Tensor<B, 1>,
    ) -> (f64, GradientsParams)
    where
        B: DiffusionAutodiff,
    {
        let dtype = self.dtype();
        let hidden = hidden(conditions, &latents.device()).cast(dtype);
        let loss = |predicted: Tensor<B, 4>| loss(predicted.cast(DType::F32));
        blocks::gradients(self, latents.cast(dtype), timesteps, hidden, &loss)
    }

    fn loss_scale(&self) -> f64 {
        if self.dtype() == DType::F16 { F16_LOSS_SCALE } else { 1.0 }
    }

    fn set_dropout_step(&mut self, step: DropoutStep) {
        for name in cxr_lora::attached(self) {
            // It is attached, so there is nothing that could fail.
            let _ = cxr_lora::set_dropout_step(self, &name, Some(step));
        }
    }
}

/// Text embeddings as the UNet takes them, `[n, tokens, width]`.
fn hidden<B: Backend>(
    conditions: &[&(std::sync::Arc<Vec<f32>>, [usize; 2])],
    device: &B::Device,
) -> Tensor<B, 3> {
    let [tokens, width] = conditions.first().map_or([0, 0], |(_, shape)| *shape);
    let values: Vec<f32> = conditions.iter().flat_map(|(values, _)| values.iter().copied()).collect();
    Tensor::from_data(TensorData::new(values, [conditions.len(), tokens, width]), device)
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
/// Made by [`new`](Self::new) with the options off. For each sample, from streams named by its position: a timestep
/// uniform in `[0, T)`, noise, and the draw from the autoencoder's posterior.
pub struct Diffusion<B: Backend, M: Denoise<B>> {
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
    /// Go backward one block of the model at a time: less memory, about a third more time, the same gradients but for
    /// rounding.
    pub by_block: bool,
    /// Says what data this is.
    pub fingerprint: String,
    /// Where the tensors go.
    pub device: B::Device,
}

impl<B: Backend, M: Denoise<B>> Diffusion<B, M> {
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
            by_block: false,
            fingerprint,
            device: device.clone(),
        }
    }

    /// One sample with its timestep, noise, point in the posterior, and condition.
    fn draw(&self, sample: Sample, seed: u64) -> DrawnSample<'_, M::Condition> {
        let stream = |purpose: &str| Stream::new(seed, purpose, sample.position);
        let elements = self.shape.iter().product();
        let item = &self.samples[sample.index];
        let latents = item.latents(&stream("posterior").normals(elements));
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
            latents,
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
        let noised = self.noised(samples);
        let conditions: Vec<&M::Condition> = samples.iter().map(|sample| sample.condition).collect();
        noised.loss(model.denoise(noised.latents.clone(), noised.timesteps.clone(), &conditions))
    }

    /// [`loss_of`](Self::loss_of) with its gradients, one block after the other if [`by_block`](Self::by_block) says so.
    ///
    /// # Panics
    /// As [`loss_of`](Self::loss_of).
    pub fn gradients_of(&self, model: &M, samples: &[DrawnSample<'_, M::Condition>]) -> (f64, GradientsParams)
    where
        B: DiffusionAutodiff,
        M: AutodiffModule<B>,
    {
        let scale = model.loss_scale();
        let scaled = |loss: Tensor<B, 1>| if scale == 1.0 { loss } else { loss.mul_scalar(scale) };
        let (value, from) = if self.by_block {
            let noised = self.noised(samples);
            let conditions: Vec<&M::Condition> = samples.iter().map(|sample| sample.condition).collect();
            let loss = |predicted| scaled(noised.loss(predicted));
            model.gradients_by_block(noised.latents.clone(), noised.timesteps.clone(), &conditions, &loss)
        } else {
            loss_and_gradients(model, scaled(self.loss_of(model, samples)))
        };
        if scale == 1.0 {
            return (value, from);
        }
        let mut gradients = GradientsParams::new();
        accumulate::<B, _>(model, &mut gradients, from, 1.0 / scale);
        (value / scale, gradients)
    }

    /// The mean squared error at fixed timesteps with fixed noise, to be followed over a run: every sample once in each of
    /// `bins` equal parts of the timesteps, with everything random a function of `seed`. Every timestep counts the same,
    /// no caption is dropped, and no offset is added to the noise, whatever this objective's settings.
    ///
    /// A model of an autodiff backend would build graphs: give it and this objective on the inner backend.
    pub fn validation_loss(&self, model: &M, bins: usize, batch_size: usize, seed: u64) -> Vec<TimestepLoss> {
        let (timesteps, elements) = (self.alphas_cumprod.len(), self.shape.iter().product());
        let bins = bins.clamp(1, timesteps);
        (0..bins)
            .map(|bin| {
                let (from, to) = (bin * timesteps / bins, (bin + 1) * timesteps / bins);
                let draw = |index: usize| {
                    let stream = |purpose| Stream::new(seed, purpose, (index * bins + bin) as u64);
                    let sample = &self.samples[index];
                    DrawnSample {
                        latents: sample.latents(&stream("validation posterior").normals(elements)),
                        noise: stream("validation noise").normals(elements),
                        timestep: from + stream("validation timestep").below((to - from) as u64) as usize,
                        condition: &sample.condition,
                    }
                };
                let indices: Vec<usize> = (0..self.samples.len()).collect();
                let mut sum = 0.0;
                for some in indices.chunks(batch_size.max(1)) {
                    let drawn: Vec<_> = some.iter().map(|index| draw(*index)).collect();
                    let noised = Noised { weights: None, ..self.noised(&drawn) };
                    let conditions: Vec<&M::Condition> = drawn.iter().map(|drawn| drawn.condition).collect();
                    let predicted =
                        model.denoise(noised.latents.clone(), noised.timesteps.clone(), &conditions);
                    let loss: f64 = noised.loss(predicted).into_data().iter::<f64>().sum();
                    sum += loss * some.len() as f64;
                }
                TimestepLoss { from, to, loss: sum / self.samples.len() as f64 }
            })
            .collect()
    }

    /// What goes into the model for some samples, and what should come out.
    fn noised(&self, samples: &[DrawnSample<'_, M::Condition>]) -> Noised<B> {
        let [c, h, w] = self.shape;
        let n = samples.len();
        let (mut noised, mut target) = (Vec::with_capacity(n * c * h * w), Vec::with_capacity(n * c * h * w));
        let (mut timesteps, mut weights) = (Vec::new(), Vec::new());
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
        }
        let tensor =
            |values: Vec<f32>| Tensor::<B, 4>::from_data(TensorData::new(values, [n, c, h, w]), &self.device);
        let weights = (self.weight != SnrWeight::Uniform)
            .then(|| Tensor::from_data(TensorData::new(weights, [n, 1, 1, 1]), &self.device));
        Noised {
            latents: tensor(noised),
            timesteps: Tensor::from_data(TensorData::new(timesteps, [n]), (&self.device, DType::F32)),
            target: tensor(target),
            weights,
        }
    }
}

/// What goes into the model, and what should come out.
struct Noised<B: Backend> {
    /// `[n, c, h, w]`.
    latents: Tensor<B, 4>,
    /// `[n]`.
    timesteps: Tensor<B, 1>,
    /// `[n, c, h, w]`.
    target: Tensor<B, 4>,
    /// `[n, 1, 1, 1]`; `None` where all count the same.
    weights: Option<Tensor<B, 4>>,
}

impl<B: Backend> Noised<B> {
    fn loss(&self, predicted: Tensor<B, 4>) -> Tensor<B, 1> {
        let error = predicted.sub(self.target.clone());
        let squared = error.clone().mul(error);
        match &self.weights {
            Some(weights) => squared.mul(weights.clone()).mean(),
            None => squared.mean(),
        }
    }
}

/// The loss over some of the timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TimestepLoss {
    /// The first timestep.
    pub from: usize,
    /// The first that is no longer among them.
    pub to: usize,
    /// Mean squared error.
    #[serde(deserialize_with = "crate::watch::null_is_nan")]
    pub loss: f64,
}

impl<C> LatentSample<C> {
    /// The point of the posterior that `normals` `[c * h * w]` lead to.
    fn latents(&self, normals: &[f32]) -> Vec<f32> {
        let point = |(i, mean): (usize, &f32)| mean + self.std.get(i).map_or(0.0, |std| std * normals[i]);
        self.mean.iter().enumerate().map(point).collect()
    }
}

impl<B: DiffusionAutodiff, M: Denoise<B> + AutodiffModule<B>> Objective<B> for Diffusion<B, M> {
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
        let drawn: Vec<_> = samples.par_iter().map(|sample| self.draw(*sample, seed)).collect();
        self.loss_of(model, &drawn)
    }

    fn gradients(&self, model: &M, samples: &[Sample], seed: u64) -> (f64, GradientsParams) {
        let drawn: Vec<_> = samples.par_iter().map(|sample| self.draw(*sample, seed)).collect();
        self.gradients_of(model, &drawn)
    }
}
