//! DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order, one denoiser call per step, midpoint form.
//!
//! As diffusers' `DPMSolverMultistepScheduler` with its defaults: the last noise level is 0, and the last step,
//! as the first, is of first order.

use burn::tensor::{Tensor, backend::Backend};

use super::config::TimestepSpacing;
use super::ddim::combine;
use super::schedule::NoiseSchedule;
use super::{Run, Step};

/// Timesteps as diffusers' `DPMSolverMultistepScheduler` takes them; `linspace` unless configured.
///
/// It divides by one step more than asked for and leaves the last one out.
pub(super) fn timesteps(schedule: &NoiseSchedule, steps: usize) -> Vec<i64> {
    let mut timesteps = match schedule.spacing_or(TimestepSpacing::Linspace) {
        TimestepSpacing::Linspace => schedule.linspace(steps + 1),
        TimestepSpacing::Leading => schedule.leading(steps + 1, schedule.train_timesteps() / (steps + 1)),
        TimestepSpacing::Trailing => return schedule.trailing(steps),
    };
    timesteps.pop();
    timesteps
}

/// A noise level: latents are `alpha * original + sigma * noise`, `lambda = ln(alpha / sigma)`.
#[derive(Debug, Clone, Copy)]
struct Level {
    alpha: f64,
    sigma: f64,
    lambda: f64,
}

impl Level {
    fn at(schedule: &NoiseSchedule, timestep: i64) -> Self {
        let ratio = schedule.sigma(timestep);
        let alpha = 1.0 / (ratio * ratio + 1.0).sqrt();
        Self { alpha, sigma: ratio * alpha, lambda: -ratio.ln() }
    }

    /// No noise left.
    const CLEAN: Self = Self { alpha: 1.0, sigma: 0.0, lambda: f64::INFINITY };
}

/// Goes over the timesteps of `run`.
pub(super) fn sample<B: Backend>(run: &mut Run<'_, B>, latents: Tensor<B, 4>) -> Tensor<B, 4> {
    let schedule = run.schedule;
    let mut latents = latents;
    let mut before: Option<(Level, Tensor<B, 4>)> = None;
    while let Some(Step { index, timestep }) = run.next() {
        let level = Level::at(schedule, timestep);
        let next = run.timestep(index + 1).map_or(Level::CLEAN, |t| Level::at(schedule, t));
        let output = run.denoise(latents.clone(), timestep);
        let split = schedule.config().prediction_type.split(level.alpha, level.sigma);
        let original = combine(latents.clone(), split.original.0, output, split.original.1);

        let h = next.lambda - level.lambda;
        // -alpha (e^-h - 1), which is 1 when nothing is left
        let gain = -next.alpha * (-h).exp_m1();
        let direction = match before {
            Some((previous, older)) if next.sigma > 0.0 => {
                let r = (level.lambda - previous.lambda) / h;
                // D0 + D1 / 2 with D1 = (D0 - older) / r
                combine(original.clone(), 1.0 + 0.5 / r, older, -0.5 / r)
            }
            _ => original.clone(),
        };
        latents = combine(latents, next.sigma / level.sigma, direction, gain);
        let flow = run.report(index, timestep, &latents, &original);
        before = Some((level, original));
        if flow.is_break() {
            break;
        }
    }
    latents
}
