//! PNDM (Liu et al. 2022): linear multistep of fourth order, with or without a Runge-Kutta warm-up.
//!
//! As diffusers' `PNDMScheduler`. With `skip_prk_steps`, as Stable Diffusion is published, the second timestep is
//! visited twice, so that there is one denoiser call more than steps; without, the first three steps take four calls
//! each.

use burn::tensor::{Tensor, backend::Backend};

use super::config::TimestepSpacing;
use super::ddim::{alpha_bar_or_last, combine};
use super::schedule::NoiseSchedule;
use super::{Run, Step};

/// Steps that the warm-up looks at.
const ORDER: usize = 4;

/// Fewest steps: with the warm-up there have to be as many as it takes.
pub(super) fn fewest_steps(schedule: &NoiseSchedule) -> usize {
    if skips_warm_up(schedule) { 1 } else { ORDER }
}

fn skips_warm_up(schedule: &NoiseSchedule) -> bool {
    schedule.config().skip_prk_steps.unwrap_or(false)
}

/// Timesteps of the warm-up, and all; `leading` unless configured.
pub(super) fn timesteps(schedule: &NoiseSchedule, steps: usize) -> (Vec<i64>, Vec<i64>) {
    let n = schedule.train_timesteps();
    let mut rising = match schedule.spacing_or(TimestepSpacing::Leading) {
        TimestepSpacing::Linspace => schedule.linspace(steps),
        TimestepSpacing::Leading => schedule.leading(steps, n / steps),
        TimestepSpacing::Trailing => schedule.trailing(steps),
    };
    rising.reverse();
    let count = rising.len();
    if skips_warm_up(schedule) {
        let mut all: Vec<i64> = rising.iter().rev().copied().collect();
        if count > 1 {
            all.insert(1, rising[count - 2]);
        }
        return (Vec::new(), all);
    }
    // each of the last four timesteps, and half a stride above it, but for the very last; the inner ones twice
    let half = (n / steps / 2) as i64;
    let mut points: Vec<i64> = rising[count - ORDER..].iter().flat_map(|&t| [t, t + half]).collect();
    points.pop();
    let twice: Vec<i64> = points.iter().flat_map(|&t| [t, t]).collect();
    let warm_up: Vec<i64> = twice[1..twice.len() - 1].iter().rev().copied().collect();
    let all = warm_up.iter().chain(rising[..count - 3].iter().rev()).copied().collect();
    (warm_up, all)
}

/// The outputs that the multistep formula looks back at, the newest last.
struct History<B: Backend> {
    outputs: Vec<Tensor<B, 4>>,
    /// Where a step began that takes several calls.
    start: Option<Tensor<B, 4>>,
    /// Sum of a Runge-Kutta step's outputs so far.
    sum: Option<Tensor<B, 4>>,
}

/// Goes over the timesteps of `run`, of which the first `warm_up` are Runge-Kutta's.
pub(super) fn sample<B: Backend>(
    run: &mut Run<'_, B>,
    latents: Tensor<B, 4>,
    warm_up: &[i64],
) -> Tensor<B, 4> {
    let schedule = run.schedule;
    let stride = (schedule.train_timesteps() / run.count) as i64;
    let mut history = History { outputs: Vec::new(), start: None, sum: None };
    let mut latents = latents;
    let mut call = 0;
    while let Some(Step { index, timestep }) = run.next() {
        let output = run.denoise(latents.clone(), timestep);
        let t = timestep as i64;
        let step = match warm_up.get(call / ORDER * ORDER) {
            Some(&from) if call < warm_up.len() => {
                let to = if call % 2 == 0 { t - stride / 2 } else { t };
                history.runge_kutta(call, output, &latents).over(from, to)
            }
            _ => history.multistep(call, output, &latents, t, stride),
        };
        let (next, original) = step.take(schedule);
        latents = next;
        call += 1;
        if run.report(index, timestep, &latents, &original).is_break() {
            break;
        }
    }
    latents
}

/// From where, with which output, between which timesteps.
struct Move<B: Backend> {
    sample: Tensor<B, 4>,
    output: Tensor<B, 4>,
    from: i64,
    to: i64,
}

impl<B: Backend> Move<B> {
    fn over(self, from: i64, to: i64) -> Self {
        Self { from, to, ..self }
    }

    /// Equation (9) of the paper: latents at `to`, and the original as predicted at `from`.
    fn take(self, schedule: &NoiseSchedule) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let [now, then] = [self.from, self.to].map(|t| alpha_bar_or_last(schedule, t, false));
        let split = schedule.config().prediction_type.split(now.sqrt(), (1.0 - now).sqrt());
        let original = combine(self.sample.clone(), split.original.0, self.output.clone(), split.original.1);
        let denominator = now * (1.0 - then).sqrt() + (now * (1.0 - now) * then).sqrt();
        let change = -(then - now) / denominator;
        let kept = (then / now).sqrt();
        let next = combine(self.sample, kept + change * split.noise.0, self.output, change * split.noise.1);
        (next, original)
    }
}

impl<B: Backend> History<B> {
    /// One of the four calls of a Runge-Kutta step.
    fn runge_kutta(&mut self, call: usize, output: Tensor<B, 4>, latents: &Tensor<B, 4>) -> Move<B> {
        let place = call % ORDER;
        if place == 0 {
            self.outputs.push(output.clone());
            self.start = Some(latents.clone());
        }
        let weighted = output.clone() * if place == 0 || place == 3 { 1.0 / 6.0 } else { 1.0 / 3.0 };
        let sum = match self.sum.take() {
            Some(sum) => sum + weighted,
            None => weighted,
        };
        let output = if place == 3 {
            sum
        } else {
            self.sum = Some(sum);
            output
        };
        let sample = self.start.clone().unwrap_or_else(|| latents.clone());
        Move { sample, output, from: 0, to: 0 }
    }

    /// Adams-Bashforth of as high an order as there are outputs, up to four.
    fn multistep(
        &mut self,
        call: usize,
        output: Tensor<B, 4>,
        latents: &Tensor<B, 4>,
        t: i64,
        stride: i64,
    ) -> Move<B> {
        let (mut from, mut to) = (t, t - stride);
        if call == 1 {
            // the second call makes the first step again, with the mean of both outputs
            (from, to) = (t + stride, t);
        } else {
            let old = self.outputs.len().saturating_sub(3);
            self.outputs.drain(..old);
            self.outputs.push(output.clone());
        }
        let mut sample = latents.clone();
        let e = &self.outputs;
        let newest = |back: usize| e[e.len() - 1 - back].clone();
        let output = match e.len() {
            1 if call == 0 => {
                self.start = Some(latents.clone());
                output
            }
            1 if call == 1 => {
                sample = self.start.take().unwrap_or(sample);
                (output + newest(0)) / 2.0
            }
            // the fallback is for a run that starts within the warm-up: one output, of first order
            0 | 1 => output,
            2 => combine(newest(0), 1.5, newest(1), -0.5),
            3 => combine(newest(0), 23.0 / 12.0, newest(1), -16.0 / 12.0) + newest(2) * (5.0 / 12.0),
            _ => {
                combine(newest(0), 55.0 / 24.0, newest(1), -59.0 / 24.0)
                    + combine(newest(2), 37.0 / 24.0, newest(3), -9.0 / 24.0)
            }
        };
        Move { sample, output, from, to }
    }
}
