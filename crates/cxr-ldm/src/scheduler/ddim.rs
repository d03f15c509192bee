//! DDIM (Song et al. 2021), with `eta` from 0 (deterministic) to 1 (DDPM).

use burn::tensor::{Tensor, backend::Backend};

use super::config::TimestepSpacing;
use super::schedule::NoiseSchedule;
use super::{Run, Step};

/// Timesteps as diffusers' `DDIMScheduler` takes them; `leading` unless configured.
pub(super) fn timesteps(schedule: &NoiseSchedule, steps: usize) -> Vec<i64> {
    match schedule.spacing_or(TimestepSpacing::Leading) {
        TimestepSpacing::Linspace => schedule.linspace(steps),
        TimestepSpacing::Leading => schedule.leading(steps, schedule.train_timesteps() / steps),
        TimestepSpacing::Trailing => schedule.trailing(steps),
    }
}

/// Equation (12) of the paper over the timesteps of `run`.
pub(super) fn sample<B: Backend>(run: &mut Run<'_, B>, latents: Tensor<B, 4>, eta: f64) -> Tensor<B, 4> {
    let schedule = run.schedule;
    let config = schedule.config();
    let clip = config.clip_sample.unwrap_or(true).then_some(config.clip_sample_range);
    // diffusers goes back by a whole stride whatever the spacing, so that the "previous" timestep need not be
    // the next one that is visited; its pictures depend on it.
    let stride = (schedule.train_timesteps() / run.count) as i64;
    let mut latents = latents;
    while let Some(Step { index, timestep }) = run.next() {
        let output = run.denoise(latents.clone(), timestep);
        let t = timestep as i64;
        let [now, previous] = [schedule.alpha_bar(t), alpha_bar_or_last(schedule, t - stride, true)];
        let split = config.prediction_type.split(now.sqrt(), (1.0 - now).sqrt());
        let mix = |(x, y): (f64, f64)| combine(latents.clone(), x, output.clone(), y);
        let mut original = mix(split.original);
        if let Some(range) = clip {
            original = original.clamp(-range, range);
        }
        let noise = mix(split.noise);
        let deviation = eta * ((1.0 - previous) / (1.0 - now) * (1.0 - now / previous)).max(0.0).sqrt();
        let direction = (1.0 - previous - deviation * deviation).max(0.0).sqrt();
        latents = combine(original.clone(), previous.sqrt(), noise, direction);
        if eta > 0.0 {
            latents = latents.clone() + run.noise(index, latents.dims()) * deviation;
        }
        if run.report(index, timestep, &latents, &original).is_break() {
            break;
        }
    }
    latents
}

/// `alpha_bar(t)`; before the first timestep 1 or that of timestep 0, as configured, or else as `to_one` says.
pub(super) fn alpha_bar_or_last(schedule: &NoiseSchedule, t: i64, to_one: bool) -> f64 {
    if t >= 0 {
        schedule.alpha_bar(t)
    } else if schedule.config().set_alpha_to_one.unwrap_or(to_one) {
        1.0
    } else {
        schedule.alpha_bar(0)
    }
}

/// `x * weight_x + y * weight_y`, leaving out what is multiplied by 0.
pub(super) fn combine<B: Backend>(
    x: Tensor<B, 4>,
    weight_x: f64,
    y: Tensor<B, 4>,
    weight_y: f64,
) -> Tensor<B, 4> {
    match (weight_x == 0.0, weight_y == 0.0) {
        (true, _) => y * weight_y,
        (_, true) => x * weight_x,
        _ => x * weight_x + y * weight_y,
    }
}
