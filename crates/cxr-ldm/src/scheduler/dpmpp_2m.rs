//! DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order, one denoiser call per step, midpoint form.
//!
//! As diffusers' `DPMSolverMultistepScheduler` with its defaults: the last noise level is 0, and the last step,
//! as the first, is of first order.

use burn::tensor::{Tensor, backend::Backend};

use super::config::TimestepSpacing;
use super::ddim::combine;
use super::levels::Levels;
use super::schedule::NoiseSchedule;
use super::{Run, Step};

/// Timesteps and levels as diffusers' `DPMSolverMultistepScheduler` takes them; `linspace` unless configured.
///
/// It divides by one step more than asked for and leaves the last one out.
pub(super) fn levels(schedule: &NoiseSchedule, steps: usize) -> Levels {
    if schedule.config().use_karras_sigmas.unwrap_or(false) {
        // from the ends of the training levels, whatever the spacing
        let last = schedule.train_timesteps() as i64 - 1;
        let karras = Levels::karras(schedule, schedule.sigma(last), schedule.sigma(0), steps);
        let timesteps = karras.timesteps.iter().map(|t| t.round_ties_even()).collect();
        return Levels { timesteps, ..karras };
    }
    let timesteps = match schedule.spacing_or(TimestepSpacing::Linspace) {
        TimestepSpacing::Linspace => without_last(schedule.linspace(steps + 1)),
        TimestepSpacing::Leading => {
            without_last(schedule.leading(steps + 1, schedule.train_timesteps() / (steps + 1)))
        }
        TimestepSpacing::Trailing => schedule.trailing(steps),
    };
    Levels::of(schedule, timesteps.into_iter().map(|t| t as f64).collect())
}

fn without_last(mut timesteps: Vec<i64>) -> Vec<i64> {
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
    fn of(ratio: f64) -> Self {
        let alpha = 1.0 / (ratio * ratio + 1.0).sqrt();
        Self { alpha, sigma: ratio * alpha, lambda: -ratio.ln() }
    }
}

/// The forward process to a level: `alpha * original + sigma * noise`.
pub(super) fn noised<B: Backend>(ratio: f64, original: Tensor<B, 4>, noise: Tensor<B, 4>) -> Tensor<B, 4> {
    let level = Level::of(ratio);
    combine(original, level.alpha, noise, level.sigma)
}

/// Goes over `levels`.
pub(super) fn sample<B: Backend>(
    run: &mut Run<'_, B>,
    latents: Tensor<B, 4>,
    levels: &Levels,
) -> Tensor<B, 4> {
    let schedule = run.schedule;
    let mut latents = latents;
    let mut before: Option<(Level, Tensor<B, 4>)> = None;
    while let Some(Step { index, timestep }) = run.next() {
        let [level, next] = [index, index + 1].map(|i| Level::of(levels.sigmas[i]));
        let output = run.denoise(latents.clone(), timestep);
        let split = schedule.config().prediction_type.split(level.alpha, level.sigma);
        let original = combine(latents.clone(), split.original.0, output, split.original.1);

        let h = next.lambda - level.lambda;
        // -alpha (e^-h - 1), which is 1 when nothing is left
        let gain = -next.alpha * (-h).exp_m1();
        let direction = match before {
            // a level that is visited twice (more steps than `linspace` can tell apart) has no slope
            Some((previous, older)) if next.sigma > 0.0 && level.lambda > previous.lambda => {
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
