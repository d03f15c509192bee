//! Euler's method over noise levels (Karras et al. 2022, algorithm 1 without churn), and its ancestral variant
//! (k-diffusion), which adds fresh noise in every step.
//!
//! As diffusers' `EulerDiscreteScheduler` and `EulerAncestralDiscreteScheduler`. Latents are kept at
//! `original + sigma * noise`; the denoiser gets them divided by `sqrt(sigma^2 + 1)`.

use burn::tensor::{Tensor, backend::Backend};

use super::config::TimestepSpacing;
use super::ddim::combine;
use super::levels::Levels;
use super::schedule::NoiseSchedule;
use super::{Run, Step};

/// Timesteps and levels; `linspace` unless configured.
pub(super) fn levels(schedule: &NoiseSchedule, steps: usize, ancestral: bool) -> Levels {
    let timesteps = match schedule.spacing_or(TimestepSpacing::Linspace) {
        TimestepSpacing::Linspace => schedule.linspace_fractional(steps),
        TimestepSpacing::Leading => whole(schedule.leading(steps, schedule.train_timesteps() / steps)),
        TimestepSpacing::Trailing => whole(schedule.trailing(steps)),
    };
    let levels = Levels::of(schedule, timesteps);
    // the ancestral class of diffusers does not know the key
    if ancestral || !schedule.config().use_karras_sigmas.unwrap_or(false) {
        return levels;
    }
    let count = levels.timesteps.len();
    let karras = Levels::karras(schedule, levels.sigmas[0], levels.sigmas[count - 1], steps);
    // diffusers hands the timesteps on in f32
    let timesteps = karras.timesteps.iter().map(|&t| f64::from(t as f32)).collect();
    Levels { timesteps, ..karras }
}

fn whole(timesteps: Vec<i64>) -> Vec<f64> {
    timesteps.into_iter().map(|t| t as f64).collect()
}

/// The standard deviation of the latents that the first step takes.
pub(super) fn initial_scale(schedule: &NoiseSchedule, levels: &Levels) -> f64 {
    let largest = levels.sigmas.iter().copied().fold(0.0, f64::max);
    match schedule.spacing_or(TimestepSpacing::Linspace) {
        TimestepSpacing::Linspace | TimestepSpacing::Trailing => largest,
        TimestepSpacing::Leading => (largest * largest + 1.0).sqrt(),
    }
}

/// Goes over `levels`.
pub(super) fn sample<B: Backend>(
    run: &mut Run<'_, B>,
    latents: Tensor<B, 4>,
    levels: &Levels,
    ancestral: bool,
) -> Tensor<B, 4> {
    let prediction = run.schedule.config().prediction_type;
    let mut latents = latents;
    while let Some(Step { index, timestep }) = run.next() {
        let (sigma, next) = (levels.sigmas[index], levels.sigmas[index + 1]);
        let scale = (sigma * sigma + 1.0).sqrt();
        let output = run.denoise(latents.clone() / scale, timestep);
        let split = prediction.split(1.0 / scale, sigma / scale);
        // the split is in terms of the scaled latents
        let original = combine(latents.clone(), split.original.0 / scale, output, split.original.1);
        let (up, down) = match ancestral {
            true => {
                let up = (next * next * (sigma * sigma - next * next) / (sigma * sigma)).max(0.0).sqrt();
                (up, (next * next - up * up).max(0.0).sqrt())
            }
            false => (0.0, next),
        };
        // latents + (latents - original) / sigma * (down - sigma)
        let kept = down / sigma;
        latents = combine(latents, kept, original.clone(), 1.0 - kept);
        if ancestral {
            // asked for in the last step as well, where it counts nothing: diffusers draws it
            let noise = run.noise(index, latents.dims());
            if up > 0.0 {
                latents = latents + noise * up;
            }
        }
        if run.report(index, timestep, &latents, &original).is_break() {
            break;
        }
    }
    latents
}
