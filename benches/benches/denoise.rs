//! The denoising loop's parts at the embedded model's sizes (64 pixels, 16 x 16 latents).
//!
//! Ids are the unit of work, so that runs on several backends have the same ones.

use burn::tensor::{Int, Tensor, backend::Backend};
use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::{DeviceSpec, Program, dispatch};
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::pipeline::{LoadOptions, ModelFolder};
use cxr_benches::normal;

struct Denoise<'a>(&'a mut Criterion);

impl Program for Denoise<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        parts::<B::InnerBackend>(self.0, &device);
    }
}

/// The embedded model: small enough that every part repeats often in a few seconds.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/model/cxr-demo-64");

fn parts<B: DiffusionBackend>(criterion: &mut Criterion, device: &B::Device) {
    let folder = ModelFolder::open(MODEL).expect("the embedded model is there");
    let model = folder.load::<B>(&LoadOptions::default(), device).expect("the embedded model loads");
    let config = &model.config;
    // Two rows: what one picture with guidance takes.
    let width = config.unet.cross_attention_dim;
    let context = model.unet.prepare(normal::<B, 3>([2, 77, width], device));
    let (channels, side) = (config.unet.in_channels, config.unet.sample_size);
    let latents = normal::<B, 4>([2, channels, side, side], device);
    let timesteps = Tensor::<B, 1, Int>::from_ints([981, 981], device);
    criterion.bench_function("unet/guided-step/64px", |bencher| {
        bencher.iter(|| sync::<B>(device, model.unet.forward(latents.clone(), timesteps.clone(), &context)));
    });

    let latents = normal::<B, 4>([1, channels, side, side], device);
    criterion.bench_function("vae/decode/64px", |bencher| {
        bencher.iter(|| sync::<B>(device, model.vae.decode(latents.clone())));
    });
    let pixels = normal::<B, 4>([1, 3, 64, 64], device);
    criterion.bench_function("vae/encode/64px", |bencher| {
        bencher.iter(|| sync::<B>(device, model.vae.encode(pixels.clone()).mean));
    });
}

/// Waits until the device has done its work, and makes sure that it was the work.
fn sync<B: Backend>(device: &B::Device, result: Tensor<B, 4>) {
    assert!(B::sync(device).is_ok(), "the device failed");
    std::hint::black_box(result);
}

fn denoise(criterion: &mut Criterion) {
    dispatch(DeviceSpec::Auto, Denoise(criterion)).expect("auto is always there");
}

criterion_group!(benches, denoise);
criterion_main!(benches);
