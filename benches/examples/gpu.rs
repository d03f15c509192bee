//! Units of work on a GPU at the published sizes of Stable Diffusion 1.x, one a call, so that each has a peak of memory
//! of its own: `gpu.py` runs them in turns with PyTorch's and prints the tables.
//!
//! ```sh
//! cargo run --release -p cxr-benches --features cuda --example gpu -- cuda:0 step bf16 1
//! ```
//!
//! The last line is the result: what is measured in its unit, from how many runs, seconds until the first was done.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::time::Instant;

use burn::tensor::{DType, FloatDType, Tensor, backend::Backend};
use cxr::core::progress::Progress;
use cxr::device::{Program, dispatch};
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::pipeline::{ModelConfig, ModelParts, Request, StableDiffusion};
use cxr::ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, Sampler};
use cxr::ldm::text::ClipTextConfig;
use cxr::ldm::unet::{UNet2dCondition, UNetConfig};
use cxr::ldm::vae::AutoencoderKlConfig;
use cxr::lora;
use cxr::tokenizer::ClipTokenizer;
use cxr::trainer::{Diffusion, FinetuneConfig, LatentSample, train};
use cxr_benches::{fill_as, normal};

/// Denoising steps of a whole picture.
const STEPS: usize = 20;

struct Unit {
    what: String,
    dtype: FloatDType,
    batch: usize,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [device, what, dtype, batch] = args.as_slice() else {
        panic!("usage: gpu DEVICE step|pictures|train-paper_128|train-clinical_512 f32|f16|bf16 BATCH");
    };
    let dtype = match dtype.as_str() {
        "f32" => FloatDType::F32,
        "f16" => FloatDType::F16,
        "bf16" => FloatDType::BF16,
        other => panic!("dtype {other}: expected f32, f16 or bf16"),
    };
    let batch = batch.parse().unwrap_or_else(|_| panic!("batch {batch}: expected a number"));
    let device = device.parse().unwrap_or_else(|error| panic!("{error}"));
    dispatch(device, Unit { what: what.clone(), dtype, batch }).unwrap_or_else(|error| panic!("{error}"));
}

impl Program for Unit {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        match self.what.strip_prefix("train-") {
            Some(preset) => training::<B>(preset, &device),
            None if self.what == "step" => step::<B::InnerBackend>(&self, &device),
            None if self.what == "pictures" => pictures::<B::InnerBackend>(&self, &device),
            None => panic!("unit {}: expected step, pictures or train-PRESET", self.what),
        }
    }
}

/// Prints the median of `runs` runs after one that warms up and tunes.
fn report<B: Backend>(
    device: &B::Device,
    unit: &str,
    runs: usize,
    mut work: impl FnMut(),
    value: impl Fn(f64) -> f64,
) {
    let mut timed = || {
        let start = Instant::now();
        work();
        assert!(B::sync(device).is_ok(), "the device failed");
        start.elapsed().as_secs_f64()
    };
    let first = timed();
    // The first runs of a shape still tune and fuse.
    (0..2).for_each(|_| {
        timed();
    });
    let mut seconds: Vec<f64> = (0..runs).map(|_| timed()).collect();
    seconds.sort_by(f64::total_cmp);
    println!("{:.4}\t{unit}\t{runs}\t{first:.2}", value(seconds[runs / 2]));
}

/// One guided call of the UNet at 512 pixels, keys and values of the text prepared.
fn step<B: DiffusionBackend>(unit: &Unit, device: &B::Device) {
    let dtype: DType = unit.dtype.into();
    let unet: UNet2dCondition<B> = fill_as(UNetConfig::sd15().init(device), dtype);
    let rows = 2 * unit.batch;
    let context = unet.prepare(normal::<B, 3>([rows, 77, 768], device).cast(dtype));
    let latents = normal::<B, 4>([rows, 4, 64, 64], device).cast(dtype);
    let timesteps = Tensor::<B, 1>::from_floats(vec![981.0_f32; rows].as_slice(), device);
    let finite = |t: Tensor<B, 4>| assert!(t.into_data().iter::<f32>().all(f32::is_finite), "not finite");
    finite(unet.forward(latents.clone(), timesteps.clone(), &context));
    let work = || {
        unet.forward(latents.clone(), timesteps.clone(), &context);
    };
    report::<B>(device, "ms", 20, work, |seconds| 1e3 * seconds);
}

/// Whole pictures of 512 pixels: text encoder, 20 guided steps, autoencoder, bytes on the host.
fn pictures<B: DiffusionBackend>(unit: &Unit, device: &B::Device) {
    let config = ModelConfig {
        text: ClipTextConfig::sd15(),
        unet: UNetConfig::sd15(),
        vae: AutoencoderKlConfig::sd15(),
        schedule: NoiseScheduleConfig::sd15(),
    };
    let dtype: DType = unit.dtype.into();
    let parts = ModelParts {
        text: fill_as(config.text.init::<B>(device), dtype),
        unet: fill_as(config.unet.init::<B>(device), dtype),
        vae: fill_as(config.vae.init::<B>(device), dtype),
        tokenizer: ClipTokenizer::embedded(),
        schedule: NoiseSchedule::new(config.schedule.clone()).expect("published settings"),
        config,
        dtype: unit.dtype,
        hash: String::new(),
    };
    let pipeline = StableDiffusion::new(parts, device).expect("the parts fit");
    let request = Request::new("Cardiomegaly.")
        .steps(STEPS)
        .sampler(Sampler::DpmPp2m)
        .images_per_prompt(unit.batch)
        .batch(unit.batch);
    let work = || {
        pipeline.generate(&request).expect("a picture");
    };
    report::<B>(device, "images/min", 3, work, |seconds| 60.0 * unit.batch as f64 / seconds);
}

/// Optimizer steps of fine-tuning by a preset, in its own loop, on random latents.
fn training<B: DiffusionAutodiff>(preset: &str, device: &B::Device) {
    const WARM_UP: u64 = 4;
    const MEASURED: u64 = 7;
    let preset = FinetuneConfig::preset(preset).expect("a preset");
    let dtype: DType = match preset.base_dtype {
        cxr::trainer::BaseDtype::F32 => DType::F32,
        cxr::trainer::BaseDtype::F16 => DType::F16,
        cxr::trainer::BaseDtype::Bf16 => DType::BF16,
    };
    let mut unet: UNet2dCondition<B> = fill_as(UNetConfig::sd15().init(device), dtype);
    lora::attach(&mut unet, &preset.lora, 0).expect("attention projections");
    lora::train_only(&mut unet, lora::DEFAULT_NAME).expect("the adapter is there");
    let side = preset.image_size as usize / 8;
    let count = 4 * side * side;
    let latents = cxr::core::random::Stream::new(0, "latents", 0).normals(count);
    let condition = || (std::sync::Arc::new(vec![0.1_f32; 77 * 768]), [77, 768]);
    let samples: Vec<_> = (0..64)
        .map(|_| LatentSample { mean: latents.clone(), std: vec![0.1; count], condition: condition() })
        .collect();
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).expect("published settings");
    let objective = Diffusion::<B, UNet2dCondition<B>>::new(
        &schedule,
        samples,
        [4, side, side],
        condition(),
        "bench".to_owned(),
        device,
    );
    let objective = Diffusion { weight: preset.weight, by_block: preset.block_checkpointing, ..objective };
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = preset.train_config(64, 1);
    config.steps = WARM_UP + MEASURED;
    let clock = Clock(Mutex::new(vec![Instant::now()]));
    train(unet, &objective, &config, folder.path(), &clock).expect("some steps");
    let times = clock.0.into_inner().expect("no step panicked");
    let mut seconds: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    let first = seconds[0];
    seconds.drain(..WARM_UP as usize);
    seconds.sort_by(f64::total_cmp);
    println!("{:.4}\tms/step\t{MEASURED}\t{first:.2}", 1e3 * seconds[seconds.len() / 2]);
}

/// When each step was done: a step ends with its loss on the host.
struct Clock(Mutex<Vec<Instant>>);

impl Progress for Clock {
    fn advance(&self, _: u64, _: &str) -> ControlFlow<()> {
        self.0.lock().expect("no step panicked").push(Instant::now());
        ControlFlow::Continue(())
    }
}
