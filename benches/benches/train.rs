//! A training step of Stable Diffusion 1.x as the paper's: 128 px, a batch of four, an adapter of rank 8 on every
//! attention projection of the UNet, AdamW. Latents and text embeddings are there, as in a run.

use std::convert::Infallible;
use std::sync::Arc;

use burn::optim::adaptor::OptimizerAdaptor;
use burn::optim::{AdamW, AdamWConfig, Optimizer};
use burn::tensor::{Tensor, TensorData};
use criterion::{Criterion, criterion_group, criterion_main};
use cxr::core::random::Stream;
use cxr::device::Program;
use cxr::kernels::nn::parameters;
use cxr::kernels::{DiffusionAutodiff, graph_guard};
use cxr::ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig};
use cxr::ldm::unet::{UNet2dCondition, UNetConfig};
use cxr::lora::{self, LoraConfig, TargetSet};
use cxr::trainer::{Diffusion, LatentSample, Objective, Sample};
use cxr_benches::{Cost, fill, on_device, unit};

/// The paper's.
const BATCH: usize = 4;
const RANK: usize = 8;
const RATE: f64 = 5e-5;
/// Latents of 128 px, and a text.
const LATENTS: [usize; 3] = [4, 16, 16];
const TEXT: [usize; 2] = [77, 768];

struct Step<'a>(&'a mut Criterion);

impl Program for Step<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        let id = ["train", "step/128px/batch-4/rank-8"];
        unit::<B::InnerBackend, _, 1>(self.0, &device, id, Cost::Long, || {
            let objective = objective::<B>(&device);
            let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(1e-2).init();
            let mut model = Some(with_adapter::<B>(&device));
            let mut position = 0;
            move || {
                position += BATCH as u64;
                step(&objective, &mut model, &mut optimizer, position)
            }
        });
    }
}

/// Four pictures with a text each, all normal numbers.
fn objective<B: DiffusionAutodiff>(device: &B::Device) -> Diffusion<B, UNet2dCondition<B>> {
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).expect("the published schedule");
    let normals = |purpose: &str, i: usize, shape: &[usize]| {
        Stream::new(0, purpose, i as u64).normals(shape.iter().product())
    };
    let text = |i: usize| (Arc::new(normals("bench text", i, &TEXT)), TEXT);
    let sample = |i: usize| LatentSample {
        mean: normals("bench latents", i, &LATENTS),
        std: Vec::new(),
        condition: text(i),
    };
    let samples = (0..BATCH).map(sample).collect();
    Diffusion::new(&schedule, samples, LATENTS, text(BATCH), String::new(), device)
}

/// A frozen UNet with an adapter that learns, of which no factor is zero.
fn with_adapter<B: DiffusionAutodiff>(device: &B::Device) -> UNet2dCondition<B> {
    let mut model = fill(UNetConfig::sd15().init::<B>(device));
    let config = LoraConfig::new(RANK).with_targets(TargetSet::AllAttention);
    lora::attach(&mut model, &config, 0).expect("the layers are there");
    // factors are in f32, whatever the base is in
    let filled = parameters::map_data(model, |path, shape| -> Result<_, Infallible> {
        let factor = path.contains("lora_").then(|| {
            let deviation = (shape[1] as f32).powf(-0.5);
            let normals = Stream::new(0, path, 0).normals(shape.iter().product());
            TensorData::new(normals.into_iter().map(|x| deviation * x).collect::<Vec<f32>>(), shape.to_vec())
        });
        Ok(factor)
    });
    let Ok(mut model) = filled;
    lora::train_only(&mut model, lora::DEFAULT_NAME).expect("the adapter is there");
    model
}

/// One optimizer step; the loss before it.
fn step<B: DiffusionAutodiff>(
    objective: &Diffusion<B, UNet2dCondition<B>>,
    model: &mut Option<UNet2dCondition<B>>,
    optimizer: &mut OptimizerAdaptor<AdamW, UNet2dCondition<B>, B>,
    position: u64,
) -> Tensor<B::InnerBackend, 1> {
    let old = model.take().expect("it is put back below");
    let samples =
        std::array::from_fn::<_, BATCH, _>(|index| Sample { index, position: position + index as u64 });
    let alone = graph_guard();
    let (loss, gradients) = objective.gradients(&old, &samples, 0);
    drop(alone);
    *model = Some(optimizer.step(RATE, old, gradients));
    Tensor::from_floats([loss], &objective.device)
}

fn train(criterion: &mut Criterion) {
    on_device(Step(criterion));
}

criterion_group!(benches, train);
criterion_main!(benches);
