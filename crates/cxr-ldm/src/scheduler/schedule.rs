//! The noise schedule: `alpha_bar` of every training timestep.

use super::config::{BetaSchedule, NoiseScheduleConfig, PredictionType, TimestepSpacing};
use crate::Error;

/// `alpha_bar(t)` for every training timestep, in f64, with the configuration that it comes from.
///
/// Latents at timestep `t` are `sqrt(alpha_bar(t)) latents + sqrt(1 - alpha_bar(t)) noise` (Ho et al. 2020, eq. 4).
/// diffusers keeps the same numbers in f32; the difference is below 1e-5 relative in the latents.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseSchedule {
    config: NoiseScheduleConfig,
    alphas_cumprod: Vec<f64>,
}

impl NoiseSchedule {
    /// Computes the schedule.
    ///
    /// # Errors
    /// [`Error::SchedulerConfig`] if the configuration is out of range.
    pub fn new(config: NoiseScheduleConfig) -> Result<Self, Error> {
        config.validate()?;
        let n = config.num_train_timesteps;
        let (start, end) = (config.beta_start, config.beta_end);
        let between = |from: f64, to: f64, i: usize| {
            if n == 1 { from } else { from + (to - from) * i as f64 / (n - 1) as f64 }
        };
        let alphas_cumprod = (0..n)
            .scan(1.0, |product, i| {
                let beta = match config.beta_schedule {
                    BetaSchedule::Linear => between(start, end, i),
                    BetaSchedule::ScaledLinear => between(start.sqrt(), end.sqrt(), i).powi(2),
                };
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        Ok(Self { config, alphas_cumprod })
    }

    /// The configuration that it was made from.
    pub fn config(&self) -> &NoiseScheduleConfig {
        &self.config
    }

    /// `alpha_bar` by training timestep.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// The number of training timesteps: they are `0..train_timesteps`.
    pub fn train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// `alpha_bar(t)`.
    ///
    /// # Panics
    /// If `t` is not in `0..train_timesteps`.
    pub fn alpha_bar(&self, t: i64) -> f64 {
        let n = self.train_timesteps();
        let index = usize::try_from(t).ok().filter(|&i| i < n);
        self.alphas_cumprod[index.unwrap_or_else(|| panic!("timestep {t} is not in 0..{n}"))]
    }

    /// The signal-to-noise ratio `alpha_bar / (1 - alpha_bar)`.
    ///
    /// # Panics
    /// If `t` is not in `0..train_timesteps`.
    pub fn snr(&self, t: i64) -> f64 {
        let alpha_bar = self.alpha_bar(t);
        alpha_bar / (1.0 - alpha_bar)
    }

    /// The loss weight of min-SNR (Hang et al. 2023): `min(snr, gamma) / snr` for epsilon, `/ (snr + 1)` for v.
    ///
    /// # Panics
    /// If `t` is not in `0..train_timesteps`.
    pub fn min_snr_weight(&self, t: i64, gamma: f64) -> f64 {
        let snr = self.snr(t);
        match self.config.prediction_type {
            PredictionType::Epsilon => snr.min(gamma) / snr,
            PredictionType::VPrediction => snr.min(gamma) / (snr + 1.0),
        }
    }

    /// `sqrt((1 - alpha_bar) / alpha_bar)`, the noise level in the scale of k-diffusion and DPM-Solver.
    pub(crate) fn sigma(&self, t: i64) -> f64 {
        self.snr(t).sqrt().recip()
    }

    /// The noise level at a timestep, by linear interpolation between whole ones.
    ///
    /// # Panics
    /// If `t` is not in `0..train_timesteps`.
    pub fn sigma_at(&self, t: f64) -> f64 {
        let (low, high) = (self.sigma(t.floor() as i64), self.sigma(t.ceil() as i64));
        low + (high - low) * t.fract()
    }

    /// The spacing that is configured, or `default`.
    pub(crate) fn spacing_or(&self, default: TimestepSpacing) -> TimestepSpacing {
        self.config.timestep_spacing.unwrap_or(default)
    }

    /// Checks the number of steps against the fewest and the most that a sampler takes.
    pub(crate) fn check_steps(&self, steps: usize, fewest: usize, limit: usize) -> Result<(), Error> {
        if steps < fewest || steps > limit {
            return Err(Error::Steps { found: steps, fewest, limit });
        }
        Ok(())
    }

    /// Evenly from `train_timesteps - 1` down to 0, `count` values (`np.linspace(..).round()` reversed).
    pub(crate) fn linspace(&self, count: usize) -> Vec<i64> {
        let last = (self.train_timesteps() - 1) as f64;
        let stride = if count > 1 { last / (count - 1) as f64 } else { 0.0 };
        (0..count)
            .rev()
            .map(|i| if i > 0 && i == count - 1 { last } else { i as f64 * stride })
            .map(|t| t.round_ties_even() as i64)
            .collect()
    }

    /// [`linspace`](Self::linspace) without rounding to whole timesteps (`np.linspace(.., dtype=np.float32)` reversed).
    pub(crate) fn linspace_fractional(&self, count: usize) -> Vec<f64> {
        let last = (self.train_timesteps() - 1) as f64;
        let stride = if count > 1 { last / (count - 1) as f64 } else { 0.0 };
        (0..count)
            .rev()
            .map(|i| if i > 0 && i == count - 1 { last } else { i as f64 * stride })
            .map(|t| f64::from(t as f32))
            .collect()
    }

    /// Multiples of a whole `stride` from `count - 1` down to 0, plus the configured offset.
    pub(crate) fn leading(&self, count: usize, stride: usize) -> Vec<i64> {
        (0..count).rev().map(|i| (i * stride + self.config.steps_offset) as i64).collect()
    }

    /// `np.arange(train_timesteps, 0, -stride).round() - 1` for the stride of `steps`.
    pub(crate) fn trailing(&self, steps: usize) -> Vec<i64> {
        let n = self.train_timesteps() as f64;
        let stride = n / steps as f64;
        // numpy fixes the length by division and takes the stride from the first two values.
        let count = (n / stride).ceil() as usize;
        let delta = (n - stride) - n;
        (0..count).map(|i| (n + i as f64 * delta).round_ties_even() as i64 - 1).collect()
    }
}

/// What a denoiser's output means at one timestep: original and noise as combinations of input and output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Split {
    /// Weights of (latents, model output) in the predicted original.
    pub(crate) original: (f64, f64),
    /// Weights of (latents, model output) in the predicted noise.
    pub(crate) noise: (f64, f64),
}

impl PredictionType {
    /// For latents `alpha * original + sigma * noise` with `alpha^2 + sigma^2 = 1`.
    pub(crate) fn split(self, alpha: f64, sigma: f64) -> Split {
        match self {
            Self::Epsilon => Split { original: (1.0 / alpha, -sigma / alpha), noise: (0.0, 1.0) },
            Self::VPrediction => Split { original: (alpha, -sigma), noise: (sigma, alpha) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sd15_has_the_published_ends() {
        let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
        let bar = schedule.alphas_cumprod();
        assert_eq!(bar.len(), 1000);
        assert!((bar[0] - 0.99915).abs() < 1e-9);
        // diffusers: alphas_cumprod[-1] = 0.0046600
        assert!((bar[999] - 0.004_660_0).abs() < 1e-6, "{}", bar[999]);
        assert!(bar.windows(2).all(|w| w[0] > w[1] && w[1] > 0.0));
    }

    #[test]
    fn snr_and_its_weights() {
        let mut config = NoiseScheduleConfig::sd15();
        let schedule = NoiseSchedule::new(config.clone()).unwrap();
        let snr = schedule.snr(0);
        assert!((snr - 0.99915 / 0.00085).abs() / snr < 1e-9);
        assert!((schedule.min_snr_weight(0, 5.0) - 5.0 / snr).abs() < 1e-12);
        assert_eq!(schedule.min_snr_weight(999, 5.0), 1.0);
        config.prediction_type = PredictionType::VPrediction;
        let v = NoiseSchedule::new(config).unwrap();
        assert!((v.min_snr_weight(999, 5.0) - v.snr(999) / (v.snr(999) + 1.0)).abs() < 1e-15);
    }

    #[test]
    fn both_predictions_give_original_and_noise_back() {
        let (alpha, sigma): (f64, f64) = (0.6, 0.8);
        let (original, noise) = (0.3, -1.7);
        let latents = alpha * original + sigma * noise;
        for (kind, output) in [
            (PredictionType::Epsilon, noise),
            (PredictionType::VPrediction, alpha * noise - sigma * original),
        ] {
            let split = kind.split(alpha, sigma);
            assert!((split.original.0 * latents + split.original.1 * output - original).abs() < 1e-12);
            assert!((split.noise.0 * latents + split.noise.1 * output - noise).abs() < 1e-12);
        }
    }

    #[test]
    #[should_panic(expected = "timestep 1000 is not in 0..1000")]
    fn a_timestep_out_of_range_panics_with_both_values() {
        NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap().alpha_bar(1000);
    }
}
