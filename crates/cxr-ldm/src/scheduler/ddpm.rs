//! The forward process: what training adds to latents, and what the UNet is asked to predict.

use burn::tensor::{Tensor, TensorData, backend::Backend};

use super::config::PredictionType;
use super::schedule::NoiseSchedule;

impl NoiseSchedule {
    /// `sqrt(alpha_bar(t)) latents + sqrt(1 - alpha_bar(t)) noise`, one timestep per latent (Ho et al. 2020, eq. 4).
    ///
    /// `latents` (scaled) and `noise` (standard normal) are `[n, c, h, w]` of one dtype, which the result keeps.
    ///
    /// # Panics
    /// If there are not `n` timesteps, the shapes differ, or a timestep is not in `0..train_timesteps`.
    pub fn add_noise<B: Backend>(
        &self,
        latents: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[i64],
    ) -> Tensor<B, 4> {
        let [alpha, sigma] = self.factors(&latents, &noise, timesteps);
        latents * alpha + noise * sigma
    }

    /// `sqrt(alpha_bar(t)) noise - sqrt(1 - alpha_bar(t)) latents` (Salimans & Ho 2022), one timestep per latent.
    ///
    /// # Panics
    /// As [`add_noise`](Self::add_noise).
    pub fn velocity<B: Backend>(
        &self,
        latents: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[i64],
    ) -> Tensor<B, 4> {
        let [alpha, sigma] = self.factors(&latents, &noise, timesteps);
        noise * alpha - latents * sigma
    }

    /// What the UNet is to predict: `noise` itself, or the velocity, as configured.
    ///
    /// # Panics
    /// As [`add_noise`](Self::add_noise).
    pub fn target<B: Backend>(
        &self,
        latents: Tensor<B, 4>,
        noise: Tensor<B, 4>,
        timesteps: &[i64],
    ) -> Tensor<B, 4> {
        match self.config().prediction_type {
            PredictionType::Epsilon => noise,
            PredictionType::VPrediction => self.velocity(latents, noise, timesteps),
        }
    }

    /// `sqrt(alpha_bar)` and `sqrt(1 - alpha_bar)` as `[n, 1, 1, 1]` in the dtype of `latents`.
    fn factors<B: Backend>(
        &self,
        latents: &Tensor<B, 4>,
        noise: &Tensor<B, 4>,
        timesteps: &[i64],
    ) -> [Tensor<B, 4>; 2] {
        let n = latents.dims()[0];
        assert_eq!(timesteps.len(), n, "one timestep per latent: {} for {n}", timesteps.len());
        assert_eq!(latents.dims(), noise.dims(), "latents and noise have one shape");
        let column = |of: fn(f64) -> f64| {
            let values: Vec<f32> = timesteps.iter().map(|&t| of(self.alpha_bar(t)) as f32).collect();
            Tensor::from_data(TensorData::new(values, [n, 1, 1, 1]), (&latents.device(), latents.dtype()))
        };
        [column(f64::sqrt), column(|bar| (1.0 - bar).sqrt())]
    }
}
