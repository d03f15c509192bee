//! The samplers alone: 20 steps over the latents of a 512-pixel picture, with a denoiser that does nothing.
//!
//! What is left is a sampler's own arithmetic, which should be next to nothing beside a UNet's step.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::DiffusionAutodiff;
use cxr::ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, Sampler, Steps, sample};
use cxr_benches::{Cost, normal, on_device, unit};

const STEPS: usize = 20;

struct Schedulers<'a>(&'a mut Criterion);

impl Program for Schedulers<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).expect("published settings");
        for name in ["pndm", "ddim", "euler", "euler-a", "dpmpp-2m", "lcm"] {
            let sampler: Sampler = name.parse().expect("a sampler's name");
            let id = ["scheduler", &format!("{name}/{STEPS}-steps/64x64")];
            let (schedule, device) = (&schedule, &device);
            unit::<B::InnerBackend, _, 4>(self.0, device, id, Cost::Short, || {
                let start: Tensor<B::InnerBackend, 4> = normal([1, 4, 64, 64], device);
                // drawn before: random numbers are not the sampler's work
                let noise = start.clone();
                move || {
                    let latents = start.clone();
                    let denoiser = |latents, _| latents;
                    let noise = |_, _| noise.clone();
                    let steps = Steps::new(STEPS);
                    sample(&sampler, schedule, steps, latents, denoiser, noise, |_| ControlFlow::Continue(()))
                        .expect("20 steps")
                        .latents
                }
            });
        }
    }
}

fn schedulers(criterion: &mut Criterion) {
    on_device(Schedulers(criterion));
}

criterion_group!(benches, schedulers);
criterion_main!(benches);
