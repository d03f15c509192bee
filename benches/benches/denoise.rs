//! The denoising loop: four guided steps of Stable Diffusion 1.x at 128 and 512 px, and the parts of the loop at the embedded
//! model's sizes (64 px, 16 x 16 latents), which are those of `reproduce`.
//!
//! Ids are the unit of work, so that runs on several backends have the same ones.

use std::cell::OnceCell;
use std::ops::ControlFlow;

use burn::tensor::Tensor;
use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::pipeline::{LoadOptions, ModelFolder, ModelParts};
use cxr::ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, Sampler, Steps, sample};
use cxr::ldm::unet::UNetConfig;
use cxr_benches::{Cost, dtype, fill, normal, on_device, timesteps, unit};

struct Denoise<'a>(&'a mut Criterion);

impl Program for Denoise<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        for (unit, side) in [("dpmpp-2m/4-steps/128px", 16), ("dpmpp-2m/4-steps/512px", 64)] {
            whole_loop::<B::InnerBackend>(self.0, &device, unit, side);
        }
        embedded::<B::InnerBackend>(self.0, &device);
    }
}

/// Text embeddings to latents of `side` pixels. Four steps: the loop costs the same in each, and more would only take longer.
fn whole_loop<B: DiffusionBackend>(
    criterion: &mut Criterion,
    device: &B::Device,
    name: &'static str,
    side: usize,
) {
    const GUIDANCE: f64 = 7.5;
    unit::<B, _, 4>(criterion, device, ["loop", name], Cost::Long, || {
        let unet = fill(UNetConfig::sd15().init::<B>(device));
        let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).expect("published settings");
        let hidden = normal::<B, 3>([2, 77, 768], device);
        let start = normal::<B, 4>([1, 4, side, side], device);
        move || {
            let context = unet.prepare(hidden.clone());
            let denoiser = |latents: Tensor<B, 4>, timestep| {
                let both = Tensor::cat(vec![latents.clone(), latents], 0);
                let timesteps = Tensor::<B, 1>::from_floats([timestep as f32; 2], device);
                let eps = unet.forward(both, timesteps, &context);
                let (unconditional, conditional) = (eps.clone().slice(0..1), eps.slice(1..2));
                unconditional.clone() + (conditional - unconditional) * GUIDANCE
            };
            let noise = |_, shape| Tensor::zeros(shape, device);
            let go_on = |_: cxr::ldm::scheduler::StepInfo<'_, B>| ControlFlow::Continue(());
            sample(&Sampler::DpmPp2m, &schedule, Steps::new(4), start.clone(), denoiser, noise, go_on)
                .expect("four steps")
                .latents
        }
    });
}

/// The embedded model: small enough that every part repeats often in a few seconds.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/model/cxr-demo-64");

fn embedded<B: DiffusionBackend>(criterion: &mut Criterion, device: &B::Device) {
    let loaded = OnceCell::<ModelParts<B>>::new();
    let model = || {
        loaded.get_or_init(|| {
            let folder = ModelFolder::open(MODEL).expect("the embedded model is there");
            let mut options = LoadOptions::default();
            options.dtype = dtype().into();
            folder.load::<B>(&options, device).expect("the embedded model loads")
        })
    };
    unit::<B, _, 4>(criterion, device, ["embedded", "unet/guided-step/64px"], Cost::Short, || {
        let (unet, config) = (&model().unet, &model().config.unet);
        // Two rows: what one picture with guidance takes.
        let context = unet.prepare(normal::<B, 3>([2, 77, config.cross_attention_dim], device));
        let latents = normal::<B, 4>([2, config.in_channels, config.sample_size, config.sample_size], device);
        let timesteps = timesteps(device);
        move || unet.forward(latents.clone(), timesteps.clone(), &context)
    });
    unit::<B, _, 4>(criterion, device, ["embedded", "vae/decode/64px"], Cost::Short, || {
        let config = &model().config.unet;
        let latents = normal::<B, 4>([1, config.in_channels, config.sample_size, config.sample_size], device);
        move || model().vae.decode(latents.clone())
    });
    unit::<B, _, 4>(criterion, device, ["embedded", "vae/encode/64px"], Cost::Short, || {
        let pixels = normal::<B, 4>([1, 3, 64, 64], device);
        move || model().vae.encode(pixels.clone()).mean
    });
}

fn denoise(criterion: &mut Criterion) {
    on_device(Denoise(criterion));
}

criterion_group!(benches, denoise);
criterion_main!(benches);
