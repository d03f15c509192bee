//! `scheduler_config.json`: what a model was trained with, and what diffusers would make of it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Sampler;
use crate::Error;

/// How the training timesteps' noise grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// `beta` grows linearly (DDPM).
    Linear,
    /// `sqrt(beta)` grows linearly (latent diffusion).
    ScaledLinear,
}

/// What the UNet's output stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise that was added.
    Epsilon,
    /// The velocity `sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents` (Salimans & Ho 2022).
    VPrediction,
}

/// How the sampler's timesteps are spread over the training ones (Lin et al. 2023, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimestepSpacing {
    /// Multiples of a whole stride from the low end, shifted by `steps_offset`.
    Leading,
    /// Evenly from the last timestep to 0.
    Linspace,
    /// Strides counted from the last timestep down.
    Trailing,
}

/// The noise schedule's configuration, as `scheduler_config.json` has it.
///
/// The file names one of diffusers' scheduler classes, but its settings are used with any sampler, as
/// `OtherScheduler.from_config` does. A key that is absent then takes the default of the class of the sampler in
/// use, not of the class in the file; the keys whose default differs between classes are `Option`s here. The betas are
/// the exception: diffusers' `LCMScheduler` has Stable Diffusion's by default, which every published file spells out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NoiseScheduleConfig {
    /// diffusers' class, which names the model's own [`sampler`](Self::sampler); no setting depends on it.
    #[serde(rename = "_class_name", default = "default_class")]
    pub class_name: String,
    /// The number of training timesteps.
    #[serde(default = "default_timesteps")]
    pub num_train_timesteps: usize,
    /// `beta` at the first timestep.
    #[serde(default = "default_beta_start")]
    pub beta_start: f64,
    /// `beta` at the last timestep.
    #[serde(default = "default_beta_end")]
    pub beta_end: f64,
    /// How it grows between them.
    #[serde(default = "default_beta_schedule")]
    pub beta_schedule: BetaSchedule,
    /// What the UNet predicts.
    #[serde(default = "default_prediction")]
    pub prediction_type: PredictionType,
    /// Whether the last step goes to `alpha_bar = 1` or to that of timestep 0. Absent: DDIM true, PNDM false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_alpha_to_one: Option<bool>,
    /// Added to every timestep in `leading` spacing.
    #[serde(default)]
    pub steps_offset: usize,
    /// The spread of the timesteps. Absent: DDIM and PNDM `leading`, Euler, Euler ancestral and DPM-Solver++
    /// `linspace`. LCM has its own and does not heed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Whether the noise levels are spread as Karras et al. 2022 have them. Absent: no. Euler and DPM-Solver++ heed
    /// it; diffusers' classes of the other samplers do not know the key, and leave it alone as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_karras_sigmas: Option<bool>,
    /// Whether PNDM leaves out its Runge-Kutta warm-up. Absent: no (diffusers' PNDM); published models say yes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_prk_steps: Option<bool>,
    /// Whether DDIM and LCM clip the predicted original to `clip_sample_range`. Absent: DDIM true, LCM false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_sample: Option<bool>,
    /// The bound of that clipping.
    #[serde(default = "default_clip_range")]
    pub clip_sample_range: f64,
    /// The steps of the solver that a latent consistency model was distilled from: the most that LCM takes. Absent: 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_inference_steps: Option<usize>,
    /// What LCM multiplies timesteps by in its boundary condition. Absent: 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestep_scaling: Option<f64>,
}

fn default_class() -> String {
    "DDIMScheduler".into()
}
fn default_timesteps() -> usize {
    1000
}
fn default_beta_start() -> f64 {
    1e-4
}
fn default_beta_end() -> f64 {
    0.02
}
fn default_beta_schedule() -> BetaSchedule {
    BetaSchedule::Linear
}
fn default_prediction() -> PredictionType {
    PredictionType::Epsilon
}
fn default_clip_range() -> f64 {
    1.0
}

impl NoiseScheduleConfig {
    /// As Stable Diffusion 1.4 and 1.5 publish it (for PNDM).
    pub fn sd15() -> Self {
        Self {
            class_name: "PNDMScheduler".into(),
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction_type: PredictionType::Epsilon,
            set_alpha_to_one: Some(false),
            steps_offset: 1,
            timestep_spacing: None,
            use_karras_sigmas: None,
            skip_prk_steps: Some(true),
            clip_sample: Some(false),
            clip_sample_range: 1.0,
            original_inference_steps: None,
            timestep_scaling: None,
        }
    }

    /// The sampler that the file's class stands for; `None` for a class that is not implemented.
    pub fn sampler(&self) -> Option<Sampler> {
        match self.class_name.as_str() {
            "DDIMScheduler" => Some(Sampler::ddim()),
            "PNDMScheduler" => Some(Sampler::Pndm),
            "EulerDiscreteScheduler" => Some(Sampler::Euler),
            "EulerAncestralDiscreteScheduler" => Some(Sampler::EulerAncestral),
            "DPMSolverMultistepScheduler" => Some(Sampler::DpmPp2m),
            "LCMScheduler" => Some(Sampler::Lcm),
            _ => None,
        }
    }

    /// Reads `scheduler_config.json`.
    ///
    /// # Errors
    /// [`Error::SchedulerConfig`] if it is not JSON, has a value of the wrong kind or out of range, or has a key
    /// that changes the mathematics in a way that is not implemented.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        // Python writes infinities, which JSON has no word for; the only key that has one means "no bound".
        let text = text.replace(": -Infinity", ": null");
        let value: Value = serde_json::from_str(&text).map_err(Error::scheduler_json)?;
        refuse_unsupported(&value)?;
        let config: Self = serde_json::from_value(value).map_err(Error::scheduler_json)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::SchedulerConfig`], naming the key, what is there and what would be accepted.
    pub fn validate(&self) -> Result<(), Error> {
        let wrong = |key: &str, found: String, expected: &str| {
            Err(Error::SchedulerConfig { key: key.into(), found, expected: expected.into() })
        };
        if self.num_train_timesteps == 0 || self.num_train_timesteps > 1_000_000 {
            return wrong("num_train_timesteps", self.num_train_timesteps.to_string(), "1 to 1000000");
        }
        if !(self.beta_start > 0.0 && self.beta_start < 1.0) {
            return wrong("beta_start", self.beta_start.to_string(), "between 0 and 1");
        }
        if !(self.beta_end >= self.beta_start && self.beta_end < 1.0) {
            return wrong("beta_end", self.beta_end.to_string(), "from beta_start to below 1");
        }
        if self.clip_sample_range.is_nan() || self.clip_sample_range <= 0.0 {
            return wrong("clip_sample_range", self.clip_sample_range.to_string(), "above 0");
        }
        if let Some(steps) =
            self.original_inference_steps.filter(|s| !(1..=self.num_train_timesteps).contains(s))
        {
            return wrong("original_inference_steps", steps.to_string(), "1 to num_train_timesteps");
        }
        if let Some(scaling) = self.timestep_scaling.filter(|s| !(*s > 0.0 && s.is_finite())) {
            return wrong("timestep_scaling", scaling.to_string(), "above 0");
        }
        if self.steps_offset >= self.num_train_timesteps {
            return wrong("steps_offset", self.steps_offset.to_string(), "below num_train_timesteps");
        }
        Ok(())
    }
}

/// Keys of diffusers' schedulers that change the result, and their values that are implemented beside null.
///
/// `lower_order_final` and `euler_at_final` are not among them: the last step to noise level 0 is of first order
/// whatever they say. `deis`, `logrho`, `bh1` and `bh2` are what other classes write; diffusers' DPM-Solver++ reads
/// them as its defaults.
fn refuse_unsupported(config: &Value) -> Result<(), Error> {
    let implemented: [(&str, &[Value]); 18] = [
        ("trained_betas", &[]),
        ("thresholding", &[false.into()]),
        ("rescale_betas_zero_snr", &[false.into()]),
        ("interpolation_type", &["linear".into()]),
        ("timestep_type", &["discrete".into()]),
        ("sigma_min", &[]),
        ("sigma_max", &[]),
        ("use_exponential_sigmas", &[false.into()]),
        ("use_beta_sigmas", &[false.into()]),
        ("use_lu_lambdas", &[false.into()]),
        ("use_flow_sigmas", &[false.into()]),
        ("use_dynamic_shifting", &[false.into()]),
        ("solver_order", &[2.into()]),
        ("algorithm_type", &["dpmsolver++".into(), "deis".into()]),
        ("solver_type", &["midpoint".into(), "logrho".into(), "bh1".into(), "bh2".into()]),
        ("variance_type", &["fixed_small".into(), "fixed_small_log".into(), "fixed_large".into()]),
        ("final_sigmas_type", &["zero".into()]),
        ("lambda_min_clipped", &[]),
    ];
    for (key, values) in implemented {
        match config.get(key) {
            None | Some(Value::Null) => {}
            Some(found) if values.contains(found) => {}
            Some(found) => {
                let values = values.first().unwrap_or(&Value::Null);
                return Err(Error::SchedulerConfig {
                    key: key.into(),
                    found: found.to_string(),
                    expected: format!("{values}: others are not implemented"),
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: &str = r#"{
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
        "clip_sample": false }"#;

    #[test]
    fn the_published_file_is_the_preset() {
        assert_eq!(NoiseScheduleConfig::from_json(PUBLISHED).unwrap(), NoiseScheduleConfig::sd15());
    }

    #[test]
    fn writing_and_reading_keeps_everything_and_absent_stays_absent() {
        let config = NoiseScheduleConfig::sd15();
        let text = serde_json::to_string(&config).unwrap();
        assert!(!text.contains("timestep_spacing"), "{text}");
        assert_eq!(NoiseScheduleConfig::from_json(&text).unwrap(), config);
    }

    #[test]
    fn an_empty_file_has_the_defaults_of_diffusers() {
        let config = NoiseScheduleConfig::from_json("{}").unwrap();
        assert_eq!((config.beta_start, config.beta_end), (1e-4, 0.02));
        assert_eq!(config.beta_schedule, BetaSchedule::Linear);
        assert_eq!(config.timestep_spacing, None);
    }

    #[test]
    fn python_infinity_is_read() {
        NoiseScheduleConfig::from_json(r#"{"lambda_min_clipped": -Infinity}"#).unwrap();
    }

    #[test]
    fn the_defaults_of_every_class_are_read() {
        for json in [
            r#"{"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "sigma_min": null,
                "sigma_max": null, "timestep_type": "discrete", "final_sigmas_type": "zero",
                "use_karras_sigmas": false, "use_beta_sigmas": false, "timestep_spacing": "linspace"}"#,
            r#"{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2,
                "solver_type": "midpoint", "lower_order_final": true, "euler_at_final": false,
                "variance_type": null, "use_karras_sigmas": true, "lambda_min_clipped": -Infinity}"#,
            r#"{"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}"#,
            r#"{"_class_name": "DDPMScheduler", "variance_type": "fixed_small"}"#,
            r#"{"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0,
                "timestep_spacing": "leading", "rescale_betas_zero_snr": false}"#,
        ] {
            NoiseScheduleConfig::from_json(json).unwrap();
        }
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (json, key) in [
            (r#"{"use_beta_sigmas": true}"#, "use_beta_sigmas"),
            (r#"{"interpolation_type": "log_linear"}"#, "interpolation_type"),
            (r#"{"timestep_type": "continuous"}"#, "timestep_type"),
            (r#"{"sigma_max": 700.0}"#, "sigma_max"),
            (r#"{"final_sigmas_type": "sigma_min"}"#, "final_sigmas_type"),
            (r#"{"sigma_min": 0.01}"#, "sigma_min"),
            (r#"{"use_exponential_sigmas": true}"#, "use_exponential_sigmas"),
            (r#"{"rescale_betas_zero_snr": true}"#, "rescale_betas_zero_snr"),
            (r#"{"algorithm_type": "sde-dpmsolver++"}"#, "algorithm_type"),
            (r#"{"solver_order": 3}"#, "solver_order"),
            (r#"{"solver_type": "heun"}"#, "solver_type"),
            (r#"{"variance_type": "learned_range"}"#, "variance_type"),
            (r#"{"thresholding": true}"#, "thresholding"),
            (r#"{"trained_betas": [0.1]}"#, "trained_betas"),
            (r#"{"lambda_min_clipped": -5.1}"#, "lambda_min_clipped"),
            (r#"{"beta_schedule": "squaredcos_cap_v2"}"#, "squaredcos_cap_v2"),
            (r#"{"prediction_type": "sample"}"#, "sample"),
            (r#"{"beta_start": 0.5, "beta_end": 0.1}"#, "beta_end"),
            (r#"{"num_train_timesteps": 0}"#, "num_train_timesteps"),
            (r#"{"original_inference_steps": 0}"#, "original_inference_steps"),
            (r#"{"original_inference_steps": 1001}"#, "original_inference_steps"),
            (r#"{"timestep_scaling": 0.0}"#, "timestep_scaling"),
            (r#"[1, 2"#, "scheduler_config.json"),
        ] {
            let error = NoiseScheduleConfig::from_json(json).unwrap_err().to_string();
            assert!(error.contains(key), "{json}: {error}");
        }
    }
}
