//! What a run is a function of.

use serde::{Deserialize, Serialize};

use crate::TrainError;

/// The settings of a run of [`train`](crate::train).
///
/// | Setting | Default | Range |
/// |---|---|---|
/// | `steps` | 1000 | optimizer steps, at least 1 |
/// | `batch_size` | 4 | samples per backward pass, at least 1 |
/// | `accumulation` | 1 | backward passes per optimizer step, at least 1 |
/// | `learning_rate` | 5e-5, constant | above 0 |
/// | `optimizer` | Adam | |
/// | `clip_norm` | none | above 0: the largest norm of all gradients together |
/// | `ema` | none | decay of the averaged copy, in (0, 1) |
/// | `seed` | 0 | |
/// | `checkpoint_every` | 500 | optimizer steps, at least 1 |
/// | `keep_checkpoints` | 2 | at least 1 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Samples per backward pass; the last batch of an epoch may be smaller.
    pub batch_size: usize,
    /// Backward passes per optimizer step; each counts by its number of samples.
    pub accumulation: usize,
    /// The learning rate at each step.
    pub learning_rate: LearningRate,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The largest Euclidean norm of all gradients together; larger ones are scaled down to it.
    pub clip_norm: Option<f64>,
    /// Decay of the exponentially averaged copy of the trainable parameters.
    pub ema: Option<f64>,
    /// Seed of every stream of the run.
    pub seed: u64,
    /// Optimizer steps between checkpoints.
    pub checkpoint_every: u64,
    /// How many checkpoints stay.
    pub keep_checkpoints: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 4,
            accumulation: 1,
            learning_rate: LearningRate::constant(5e-5),
            optimizer: OptimizerConfig::default(),
            clip_norm: None,
            ema: None,
            seed: 0,
            checkpoint_every: 500,
            keep_checkpoints: 2,
        }
    }
}

impl TrainConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`TrainError::Setting`] names the first that cannot be meant.
    pub fn validate(&self) -> Result<(), TrainError> {
        let at_least_one = |setting, value: u64| check(setting, value, value >= 1, "at least 1");
        at_least_one("steps", self.steps)?;
        at_least_one("batch_size", self.batch_size as u64)?;
        at_least_one("accumulation", self.accumulation as u64)?;
        at_least_one("checkpoint_every", self.checkpoint_every)?;
        at_least_one("keep_checkpoints", self.keep_checkpoints as u64)?;
        let peak = self.learning_rate.peak;
        check("learning_rate.peak", peak, peak.is_finite() && peak > 0.0, "a number above 0")?;
        let OptimizerConfig { beta_1, beta_2, epsilon, weight_decay } = self.optimizer;
        check("optimizer.beta_1", beta_1, (0.0..1.0).contains(&beta_1), "a number in [0, 1)")?;
        check("optimizer.beta_2", beta_2, (0.0..1.0).contains(&beta_2), "a number in [0, 1)")?;
        check("optimizer.epsilon", epsilon, epsilon > 0.0, "a number above 0")?;
        check("optimizer.weight_decay", weight_decay, weight_decay >= 0.0, "0 or above")?;
        if let Some(norm) = self.clip_norm {
            check("clip_norm", norm, norm.is_finite() && norm > 0.0, "a number above 0")?;
        }
        if let Some(ema) = self.ema {
            check("ema", ema, ema > 0.0 && ema < 1.0, "a number in (0, 1)")?;
        }
        Ok(())
    }
}

pub(crate) fn check(
    setting: &'static str,
    value: impl ToString,
    holds: bool,
    expected: &'static str,
) -> Result<(), TrainError> {
    if holds { Ok(()) } else { Err(TrainError::Setting { setting, value: value.to_string(), expected }) }
}

/// Adam and AdamW (Kingma and Ba, 2015; Loshchilov and Hutter, 2019), with PyTorch's defaults.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Decay of the first moment; 0.9.
    pub beta_1: f32,
    /// Decay of the second moment; 0.999.
    pub beta_2: f32,
    /// Added to the root of the second moment; 1e-8 (burn's own default is 1e-5).
    pub epsilon: f32,
    /// Decoupled weight decay; 0 is Adam, PyTorch's AdamW has 1e-2.
    pub weight_decay: f32,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// The learning rate as a pure function of the step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearningRate {
    /// The highest value.
    pub peak: f64,
    /// Steps of linear rise from 0.
    #[serde(default)]
    pub warmup: u64,
    /// What follows the rise.
    #[serde(default)]
    pub schedule: Schedule,
}

/// What the learning rate does after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays.
    #[default]
    Constant,
    /// Falls to 0 at the last step along half a cosine.
    Cosine,
    /// Falls to 0 at the last step along a line.
    Linear,
}

impl LearningRate {
    /// Always the same.
    pub fn constant(peak: f64) -> Self {
        Self { peak, warmup: 0, schedule: Schedule::Constant }
    }

    /// `warmup` steps of linear rise, then half a cosine down to 0.
    pub fn cosine(peak: f64, warmup: u64) -> Self {
        Self { peak, warmup, schedule: Schedule::Cosine }
    }

    /// The learning rate of `step` (from 0) of `steps`.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / (self.warmup + 1) as f64;
        }
        let rest = steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / rest).min(1.0);
        self.peak
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
                Schedule::Linear => 1.0 - done,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rate_rises_and_falls() {
        let rate = LearningRate::cosine(1.0, 4);
        let at = |step| rate.at(step, 24);
        assert!((0..4).all(|s| at(s) < at(s + 1)));
        assert_eq!(at(4), 1.0);
        assert!((at(14) - 0.5).abs() < 1e-12, "half-way down the cosine");
        assert!((4..23).all(|s| at(s) > at(s + 1)));
        assert!(at(24).abs() < 1e-12);
        let linear = LearningRate { schedule: Schedule::Linear, ..LearningRate::constant(2.0) };
        assert_eq!(linear.at(5, 10), 1.0);
    }

    #[test]
    fn a_setting_that_cannot_be_meant_is_named() {
        let config = TrainConfig { ema: Some(1.0), ..TrainConfig::default() };
        let message = config.validate().unwrap_err().to_string();
        assert_eq!(message, "ema is 1, expected a number in (0, 1)");
        assert!(TrainConfig { batch_size: 0, ..TrainConfig::default() }.validate().is_err());
        assert!(toml::from_str::<TrainConfig>("stepps = 3").unwrap_err().to_string().contains("stepps"));
    }
}
