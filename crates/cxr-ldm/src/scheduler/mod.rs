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
//! assert_eq!(Sampler::ddim().timesteps(&schedule, 50)?[..3], [981, 961, 941]);
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
mod schedule;

use std::ops::ControlFlow;
use std::str::FromStr;

use burn::tensor::{Tensor, backend::Backend};

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
    /// DPM-Solver++ 2M (Lu et al. 2022): better than DDIM below some 30 steps.
    DpmPp2m,
}

impl Sampler {
    /// Deterministic DDIM.
    pub fn ddim() -> Self {
        Self::Ddim { eta: 0.0 }
    }

    /// The name in flags and metadata, which [`FromStr`] reads: `ddim`, `dpmpp-2m`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ddim { .. } => "ddim",
            Self::DpmPp2m => "dpmpp-2m",
        }
    }

    /// The timesteps at which the denoiser is called, falling.
    ///
    /// As diffusers has them, quirks included; `trailing` spacing can give one more than `steps`.
    ///
    /// # Errors
    /// [`Error::Steps`] if there are none or more than training timesteps.
    pub fn timesteps(&self, schedule: &NoiseSchedule, steps: usize) -> Result<Vec<i64>, Error> {
        schedule.check_steps(steps)?;
        let timesteps = match self {
            Self::Ddim { .. } => ddim::timesteps(schedule, steps),
            Self::DpmPp2m => dpmpp_2m::timesteps(schedule, steps),
        };
        // a large offset or very many steps can leave the trained range, where diffusers would fail too
        let n = schedule.train_timesteps();
        match timesteps.iter().all(|&t| t >= 0 && (t as usize) < n) {
            true => Ok(timesteps),
            false => Err(Error::Steps { found: steps, limit: n }),
        }
    }
}

impl FromStr for Sampler {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "ddim" => Ok(Self::ddim()),
            "dpmpp-2m" => Ok(Self::DpmPp2m),
            _ => Err(Error::Sampler { found: name.into() }),
        }
    }
}

/// How many steps, and from which on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    count: usize,
    start: usize,
}

impl Steps {
    /// All of `count` steps.
    pub fn new(count: usize) -> Self {
        Self { count, start: 0 }
    }

    /// Leaves out the first `start` of them: for latents that carry only part of the noise (image to image).
    pub fn starting_at(self, start: usize) -> Self {
        Self { start, ..self }
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
    pub timestep: i64,
    /// Latents `[n, c, h, w]` after the step, scaled.
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
/// - `latents`: `[n, c, h, w]`, at the noise level of the first timestep that is visited: standard normal when it
///   is the first of all, else [`NoiseSchedule::add_noise`] of an image's latents at that timestep.
/// - `denoiser`: the UNet's output for latents at a timestep, in the meaning that the schedule's prediction type
///   says; guidance goes in here.
/// - `noise`: standard normal numbers of a shape for a step; asked for by DDIM with `eta > 0` alone.
/// - `on_step`: called after every step; `Break` ends the loop there.
///
/// Factors are taken in f64, the tensors keep their dtype.
///
/// # Errors
/// [`Error::Steps`] if there are no steps, more than training timesteps, or the start is past the last.
pub fn sample<B: Backend>(
    sampler: &Sampler,
    schedule: &NoiseSchedule,
    steps: Steps,
    latents: Tensor<B, 4>,
    mut denoiser: impl FnMut(Tensor<B, 4>, i64) -> Tensor<B, 4>,
    mut noise: impl FnMut(usize, [usize; 4]) -> Tensor<B, 4>,
    mut on_step: impl FnMut(StepInfo<'_, B>) -> ControlFlow<()>,
) -> Result<Sampled<B>, Error> {
    let timesteps = sampler.timesteps(schedule, steps.count)?;
    if steps.start >= timesteps.len() {
        return Err(Error::StartStep { found: steps.start, steps: timesteps.len() });
    }
    let mut run = Run {
        schedule,
        count: steps.count,
        timesteps,
        position: steps.start,
        stopped: false,
        denoiser: &mut denoiser,
        noise: &mut noise,
        on_step: &mut on_step,
    };
    let latents = match *sampler {
        Sampler::Ddim { eta } => ddim::sample(&mut run, latents, eta),
        Sampler::DpmPp2m => dpmpp_2m::sample(&mut run, latents),
    };
    Ok(Sampled { latents, finished: !run.stopped })
}

/// One step of a [`Run`].
struct Step {
    index: usize,
    timestep: i64,
}

/// What every sampler's loop needs.
struct Run<'a, B: Backend> {
    schedule: &'a NoiseSchedule,
    /// The number of steps asked for; `timesteps` can have one more.
    count: usize,
    timesteps: Vec<i64>,
    position: usize,
    stopped: bool,
    denoiser: &'a mut dyn FnMut(Tensor<B, 4>, i64) -> Tensor<B, 4>,
    noise: &'a mut dyn FnMut(usize, [usize; 4]) -> Tensor<B, 4>,
    on_step: &'a mut dyn FnMut(StepInfo<'_, B>) -> ControlFlow<()>,
}

impl<B: Backend> Run<'_, B> {
    /// The next step, until there is none.
    fn next(&mut self) -> Option<Step> {
        let index = self.position;
        self.position += 1;
        self.timestep(index).map(|timestep| Step { index, timestep })
    }

    fn timestep(&self, index: usize) -> Option<i64> {
        self.timesteps.get(index).copied()
    }

    fn denoise(&mut self, latents: Tensor<B, 4>, timestep: i64) -> Tensor<B, 4> {
        (self.denoiser)(latents, timestep)
    }

    fn noise(&mut self, index: usize, shape: [usize; 4]) -> Tensor<B, 4> {
        (self.noise)(index, shape)
    }

    fn report(
        &mut self,
        index: usize,
        timestep: i64,
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
