//! Sampling of latent consistency models (Luo et al. 2023): the original predicted in one step, noised again to the
//! next timestep, and so on.
//!
//! As diffusers' `LCMScheduler`. The model is one that was distilled for it, in practice any Stable Diffusion 1.x with
//! an LCM-LoRA adapter; 4 to 8 steps, with little or no guidance.

use burn::tensor::{Tensor, backend::Backend};

use super::ddim::combine;
use super::schedule::NoiseSchedule;
use super::{Run, Step};
use crate::Error;

/// Steps of the solver that the model was distilled from, where the configuration does not say.
const ORIGINAL_STEPS: usize = 50;
/// What timesteps are multiplied by in the boundary condition, where the configuration does not say.
const TIMESTEP_SCALING: f64 = 10.0;
/// The deviation of the data that the boundary condition assumes.
const SIGMA_DATA: f64 = 0.5;

/// The steps that the model was distilled over: no run can have more.
pub(super) fn most_steps(schedule: &NoiseSchedule) -> Result<usize, Error> {
    let original = schedule.config().original_inference_steps.unwrap_or(ORIGINAL_STEPS);
    let n = schedule.train_timesteps();
    match original <= n {
        true => Ok(original),
        false => Err(Error::SchedulerConfig {
            key: "original_inference_steps".into(),
            found: format!("{original}, its default"),
            expected: format!("1 to num_train_timesteps, which is {n}"),
        }),
    }
}

/// `steps` of the timesteps that the model was distilled on, evenly, from the last; whatever the spacing.
pub(super) fn timesteps(schedule: &NoiseSchedule, steps: usize, original: usize) -> Vec<i64> {
    let stride = schedule.train_timesteps() / original;
    (0..steps).map(|i| ((original - i * original / steps) * stride - 1) as i64).collect()
}

/// `c_skip` and `c_out`: how much of the latents and of the predicted original the consistency function keeps, so that
/// it leaves alone what is at timestep 0 (Song et al. 2023).
fn boundary(schedule: &NoiseSchedule, timestep: f64) -> (f64, f64) {
    let scaled = timestep * schedule.config().timestep_scaling.unwrap_or(TIMESTEP_SCALING);
    let sum = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
    (SIGMA_DATA * SIGMA_DATA / sum, scaled / sum.sqrt())
}

/// Algorithm 3 of the paper over the timesteps of `run`: fresh noise after every step but the last.
pub(super) fn sample<B: Backend>(run: &mut Run<'_, B>, latents: Tensor<B, 4>) -> Tensor<B, 4> {
    let schedule = run.schedule;
    let config = schedule.config();
    let clip = config.clip_sample.unwrap_or(false).then_some(config.clip_sample_range);
    let mut latents = latents;
    while let Some(Step { index, timestep }) = run.next() {
        let output = run.denoise(latents.clone(), timestep);
        let bar = schedule.alpha_bar(timestep as i64);
        let split = config.prediction_type.split(bar.sqrt(), (1.0 - bar).sqrt());
        let mut original = combine(latents.clone(), split.original.0, output, split.original.1);
        if let Some(range) = clip {
            original = original.clamp(-range, range);
        }
        let (skip, out) = boundary(schedule, timestep);
        let denoised = combine(original, out, latents, skip);
        latents = match run.timesteps.get(index + 1) {
            Some(&next) => {
                let bar = schedule.alpha_bar(next as i64);
                let noise = run.noise(index, denoised.dims());
                combine(denoised.clone(), bar.sqrt(), noise, (1.0 - bar).sqrt())
            }
            None => denoised.clone(),
        };
        if run.report(index, timestep, &latents, &denoised).is_break() {
            break;
        }
    }
    latents
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::NoiseScheduleConfig;

    #[test]
    fn timesteps_are_those_of_the_distillation() {
        let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
        assert_eq!(timesteps(&schedule, 4, 50), [999, 759, 499, 259]);
        assert_eq!(timesteps(&schedule, 1, 50), [999]);
        assert_eq!(timesteps(&schedule, 50, 50)[49], 19);
        assert_eq!(timesteps(&schedule, 1000, 1000)[999], 0);
    }

    #[test]
    fn the_boundary_condition_keeps_what_is_clean() {
        let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
        assert_eq!(boundary(&schedule, 0.0), (1.0, 0.0));
        let (skip, out) = boundary(&schedule, 999.0);
        assert!(skip < 1e-8 && (1.0 - out).abs() < 1e-8, "{skip} {out}");
    }
}
