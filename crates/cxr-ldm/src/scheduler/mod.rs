//! Noise schedules and samplers: functions over one denoiser, with the noise handed in.
//!
//! A sampler holds no state and draws no numbers. [`sample`] goes from noisy latents to clean ones by calling a
//! denoiser once per timestep; whoever calls it owns the model, the guidance and the random numbers.
//!
//! ```
//! use std::ops::ControlFlow;
//! use burn::tensor::Tensor;
//! use cxr_ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, Sampler, Steps, sample};
//! # type B = cxr_kernels::Flex;
//!
//! let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15())?;
//! assert_eq!(Sampler::ddim().timesteps(&schedule, 50)?[..3], [981.0, 961.0, 941.0]);
//!
//! let noise = Tensor::<B, 4>::ones([1, 4, 8, 8], &Default::default());
//! let sampled = sample(
//!     &Sampler::DpmPp2m,
//!     &schedule,
//!     Steps::new(10),
//!     noise,
//!     |latents, _timestep| latents, // a UNet stands here
//!     |_step, shape| Tensor::zeros(shape, &Default::default()),
//!     |step| if step.index < 4 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) },
//! )?;
//! assert!(!sampled.finished); // stopped in the fifth step
//! # Ok::<(), cxr_ldm::Error>(())
//! ```

mod config;
mod ddim;
mod ddpm;
mod dpmpp_2m;
mod euler;
mod lcm;
mod levels;
mod pndm;
mod schedule;

use std::ops::ControlFlow;
use std::str::FromStr;

use burn::tensor::{Tensor, backend::Backend};

use levels::Levels;

pub use config::{BetaSchedule, NoiseScheduleConfig, PredictionType, TimestepSpacing};
pub use schedule::NoiseSchedule;

use crate::Error;

/// A sampler.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Sampler {
    /// DDIM (Song et al. 2021).
    Ddim {
        /// How much fresh noise each step adds: 0 none, 1 as much as DDPM.
        eta: f64,
    },
    /// PNDM (Liu et al. 2022): what Stable Diffusion is published with.
    Pndm,
    /// Euler's method over noise levels (Karras et al. 2022).
    Euler,
    /// Euler's method with fresh noise in every step: pictures go on changing with the number of steps.
    EulerAncestral,
    /// DPM-Solver++ 2M (Lu et al. 2022): better than the rest below some 30 steps.
    DpmPp2m,
    /// Latent consistency sampling (Luo et al. 2023): 4 to 8 steps of a model, or an adapter, that was distilled for it,
    /// with a guidance of 1 to 2; fresh noise in every step but the last.
    Lcm,
}

/// What a sampler goes over.
enum Plan {
    /// Whole timesteps; of those of PNDM the first are a warm-up's.
    Timesteps { all: Vec<i64>, warm_up: Vec<i64> },
    /// Noise levels.
    Levels(Levels),
}

impl Plan {
    fn timesteps(&self) -> Vec<f64> {
        match self {
            Self::Timesteps { all, .. } => all.iter().map(|&t| t as f64).collect(),
            Self::Levels(levels) => levels.timesteps.clone(),
        }
    }
}

impl Sampler {
    /// All of them, DDIM without fresh noise.
    pub const ALL: [Self; 6] =
        [Self::Ddim { eta: 0.0 }, Self::Pndm, Self::Euler, Self::EulerAncestral, Self::DpmPp2m, Self::Lcm];

    /// Deterministic DDIM.
    pub fn ddim() -> Self {
        Self::Ddim { eta: 0.0 }
    }

    /// The name in flags and metadata, which [`FromStr`] reads: `ddim`, `pndm`, `euler`, `euler-a`, `dpmpp-2m`,
    /// `lcm`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ddim { .. } => "ddim",
            Self::Pndm => "pndm",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-a",
            Self::DpmPp2m => "dpmpp-2m",
            Self::Lcm => "lcm",
        }
    }

    /// The timesteps at which the denoiser is called, in order; Euler's may have fractions.
    ///
    /// As diffusers has them, quirks included: there can be more of them than `steps` (PNDM, `trailing` spacing).
    ///
    /// # Errors
    /// [`Error::Steps`] if there are none or more than training timesteps, fewer than the four of PNDM's warm-up, or
    /// more than a latent consistency model was distilled over (50); also if an offset or very many steps would leave
    /// the trained range. [`Error::SchedulerConfig`] if there are fewer training timesteps than those 50.
    pub fn timesteps(&self, schedule: &NoiseSchedule, steps: usize) -> Result<Vec<f64>, Error> {
        Ok(self.plan(schedule, steps)?.timesteps())
    }

    fn plan(&self, schedule: &NoiseSchedule, steps: usize) -> Result<Plan, Error> {
        let fewest = if *self == Self::Pndm { pndm::fewest_steps(schedule) } else { 1 };
        let limit = if *self == Self::Lcm { lcm::most_steps(schedule)? } else { schedule.train_timesteps() };
        schedule.check_steps(steps, fewest, limit)?;
        let plan = match self {
            Self::Ddim { .. } => {
                Plan::Timesteps { all: ddim::timesteps(schedule, steps), warm_up: Vec::new() }
            }
            Self::Pndm => {
                let (warm_up, all) = pndm::timesteps(schedule, steps);
                Plan::Timesteps { all, warm_up }
            }
            Self::Euler | Self::EulerAncestral => {
                check_range(schedule, steps, steps)?;
                Plan::Levels(euler::levels(schedule, steps, *self == Self::EulerAncestral))
            }
            Self::DpmPp2m => {
                check_range(schedule, steps, steps + 1)?;
                Plan::Levels(dpmpp_2m::levels(schedule, steps))
            }
            Self::Lcm => Plan::Timesteps { all: lcm::timesteps(schedule, steps, limit), warm_up: Vec::new() },
        };
        // a large offset or very many steps can leave the trained range, where diffusers would fail too
        let n = schedule.train_timesteps();
        match plan.timesteps().iter().all(|&t| t >= 0.0 && t <= (n - 1) as f64) {
            true => Ok(plan),
            false => Err(Error::Steps { found: steps, fewest, limit: n - 1 }),
        }
    }

    /// Noised latents for a run from [`Steps::starting_at`] or [`Steps::with_strength`]: what image-to-image begins
    /// with.
    ///
    /// `original` (scaled latents of a picture) and `noise` (standard normal) are `[n, c, h, w]` of one dtype. The
    /// result is in the sampler's own scale, as `add_noise` of diffusers' class at the first timestep that is
    /// visited: `original + sigma noise` for Euler and Euler ancestral, `sqrt(alpha_bar) original +
    /// sqrt(1 - alpha_bar) noise` for the others.
    ///
    /// # Errors
    /// As [`sample`].
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn add_noise<B: Backend>(
        &self,
        schedule: &NoiseSchedule,
        steps: Steps,
        original: Tensor<B, 4>,
        noise: Tensor<B, 4>,
    ) -> Result<Tensor<B, 4>, Error> {
        let plan = self.plan(schedule, steps.count)?;
        let start = steps.checked_start(plan.timesteps().len())?;
        let n = original.dims()[0];
        Ok(match &plan {
            Plan::Timesteps { all, .. } => schedule.add_noise(original, noise, &vec![all[start]; n]),
            Plan::Levels(levels) if *self == Self::DpmPp2m => {
                dpmpp_2m::noised(levels.sigmas[start], original, noise)
            }
            Plan::Levels(levels) => original + noise * levels.sigmas[start],
        })
    }
}

/// That `leading` timesteps stay in the trained range and apart, before their noise levels are asked for.
///
/// `divisions` is what the training timesteps are divided by.
fn check_range(schedule: &NoiseSchedule, steps: usize, divisions: usize) -> Result<(), Error> {
    let n = schedule.train_timesteps();
    let is_leading = schedule.config().timestep_spacing == Some(TimestepSpacing::Leading);
    let stride = n / divisions;
    let last = (divisions - 1) * stride + schedule.config().steps_offset;
    match is_leading && (stride == 0 || last >= n) {
        true => Err(Error::Steps { found: steps, fewest: 1, limit: n - 1 }),
        false => Ok(()),
    }
}

impl FromStr for Sampler {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|sampler| sampler.name() == name);
        found.ok_or_else(|| Error::Sampler { found: name.into() })
    }
}

/// How many steps, and from which on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    count: usize,
    start: Option<usize>,
}

impl Steps {
    /// All of `count` steps, from noise alone.
    pub fn new(count: usize) -> Self {
        Self { count, start: None }
    }

    /// Leaves out the first `start` of the sampler's timesteps: for latents made by [`Sampler::add_noise`], which are
    /// already at that step's noise level, at `start` 0 too.
    ///
    /// PNDM starts over there, warm-up and twice visited step included, as in diffusers.
    pub fn starting_at(self, start: usize) -> Self {
        Self { start: Some(start), ..self }
    }

    /// The last `count * strength` of `count` steps, rounded down, as `get_timesteps` of diffusers'
    /// `StableDiffusionImg2ImgPipeline` has it; latents are made by [`Sampler::add_noise`].
    ///
    /// At strength 1 nothing is left out, and the picture shows through only as far as the first noise level leaves
    /// it. At strength 0, and wherever less than one step is left, everything is left out, which [`sample`] and
    /// [`Sampler::add_noise`] refuse.
    ///
    /// # Errors
    /// [`Error::Request`] if `strength` is not in 0 to 1.
    pub fn with_strength(count: usize, strength: f64) -> Result<Self, Error> {
        if !(0.0..=1.0).contains(&strength) {
            return Err(Error::Request {
                setting: "strength".into(),
                found: strength.to_string(),
                expected: "0 to 1".into(),
            });
        }
        let made = (count as f64 * strength) as usize;
        Ok(Self::new(count).starting_at(count - made.min(count)))
    }

    /// How many of the first steps are left out.
    pub(crate) fn skipped(self) -> usize {
        self.start.unwrap_or(0)
    }

    /// The first step; an error if none is left of those that were asked for.
    fn checked_start(self, total: usize) -> Result<usize, Error> {
        let start = self.skipped();
        if start >= total || (start > 0 && start >= self.count) {
            return Err(Error::StartStep { found: start, steps: self.count });
        }
        Ok(start)
    }
}

/// What a step made, for the callback of [`sample`].
#[derive(Debug)]
pub struct StepInfo<'a, B: Backend> {
    /// Index of the step, counted from 0 over all steps, those left out included.
    pub index: usize,
    /// The number of steps.
    pub total: usize,
    /// The timestep at which the denoiser was called.
    pub timestep: f64,
    /// Latents `[n, c, h, w]` after the step, scaled, with the noise that the sampler keeps in them.
    pub latents: &'a Tensor<B, 4>,
    /// The clean latents as this step predicted them: a preview.
    pub predicted_original: &'a Tensor<B, 4>,
}

/// What [`sample`] returns.
#[derive(Debug, Clone)]
pub struct Sampled<B: Backend> {
    /// Latents `[n, c, h, w]`, scaled.
    pub latents: Tensor<B, 4>,
    /// False if the callback stopped it before the last step.
    pub finished: bool,
}

/// From noisy latents to clean ones.
///
/// - `latents`: `[n, c, h, w]`: standard normal noise, or, for [`Steps::starting_at`], what
///   [`Sampler::add_noise`] made.
/// - `denoiser`: the UNet's output for latents at a timestep, in the meaning that the schedule's prediction type
///   says; guidance goes in here. What it gets has been scaled as the UNet was trained.
/// - `noise`: standard normal numbers of a shape for a step; asked for by DDIM with `eta > 0`, by Euler ancestral,
///   and by LCM in all steps but the last.
/// - `on_step`: called after every call of the denoiser; `Break` ends the loop there.
///
/// Factors are taken in f64, the tensors keep their dtype.
///
/// # Errors
/// [`Error::Steps`] if there are no steps, more than training timesteps, or fewer than the sampler takes;
/// [`Error::StartStep`] if the start is past the last.
pub fn sample<B: Backend>(
    sampler: &Sampler,
    schedule: &NoiseSchedule,
    steps: Steps,
    latents: Tensor<B, 4>,
    mut denoiser: impl FnMut(Tensor<B, 4>, f64) -> Tensor<B, 4>,
    mut noise: impl FnMut(usize, [usize; 4]) -> Tensor<B, 4>,
    mut on_step: impl FnMut(StepInfo<'_, B>) -> ControlFlow<()>,
) -> Result<Sampled<B>, Error> {
    let plan = sampler.plan(schedule, steps.count)?;
    let timesteps = plan.timesteps();
    let position = steps.checked_start(timesteps.len())?;
    let latents = match &plan {
        Plan::Levels(levels) if *sampler != Sampler::DpmPp2m && steps.start.is_none() => {
            latents * euler::initial_scale(schedule, levels)
        }
        _ => latents,
    };
    let mut run = Run {
        schedule,
        count: steps.count,
        timesteps,
        position,
        stopped: false,
        denoiser: &mut denoiser,
        noise: &mut noise,
        on_step: &mut on_step,
    };
    let latents = match (sampler, &plan) {
        (Sampler::Ddim { eta }, _) => ddim::sample(&mut run, latents, *eta),
        (Sampler::Lcm, _) => lcm::sample(&mut run, latents),
        (Sampler::DpmPp2m, Plan::Levels(levels)) => dpmpp_2m::sample(&mut run, latents, levels),
        (_, Plan::Levels(levels)) => {
            euler::sample(&mut run, latents, levels, *sampler == Sampler::EulerAncestral)
        }
        (_, Plan::Timesteps { warm_up, .. }) => pndm::sample(&mut run, latents, warm_up),
    };
    Ok(Sampled { latents, finished: !run.stopped })
}

/// One step of a [`Run`].
struct Step {
    index: usize,
    timestep: f64,
}

/// What every sampler's loop needs.
struct Run<'a, B: Backend> {
    schedule: &'a NoiseSchedule,
    /// The number of steps asked for; there can be more `timesteps`.
    count: usize,
    timesteps: Vec<f64>,
    position: usize,
    stopped: bool,
    denoiser: &'a mut dyn FnMut(Tensor<B, 4>, f64) -> Tensor<B, 4>,
    noise: &'a mut dyn FnMut(usize, [usize; 4]) -> Tensor<B, 4>,
    on_step: &'a mut dyn FnMut(StepInfo<'_, B>) -> ControlFlow<()>,
}

impl<B: Backend> Run<'_, B> {
    /// The next step, until there is none.
    fn next(&mut self) -> Option<Step> {
        let index = self.position;
        self.position += 1;
        self.timesteps.get(index).map(|&timestep| Step { index, timestep })
    }

    fn denoise(&mut self, latents: Tensor<B, 4>, timestep: f64) -> Tensor<B, 4> {
        (self.denoiser)(latents, timestep)
    }

    fn noise(&mut self, index: usize, shape: [usize; 4]) -> Tensor<B, 4> {
        (self.noise)(index, shape)
    }

    fn report(
        &mut self,
        index: usize,
        timestep: f64,
        latents: &Tensor<B, 4>,
        predicted_original: &Tensor<B, 4>,
    ) -> ControlFlow<()> {
        let total = self.timesteps.len();
        let flow = (self.on_step)(StepInfo { index, total, timestep, latents, predicted_original });
        // after the last step there is nothing left to stop
        self.stopped = flow.is_break() && index + 1 < total;
        flow
    }
}
