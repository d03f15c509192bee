//! Small models and runs that several tests use.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use burn::backend::Autodiff;
use burn::module::Module;
use burn::tensor::backend::Backend;
use cxr_core::progress::Progress;
use cxr_core::random::Stream;
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig};
use cxr_ldm::unet::{UNet2dCondition, UNetConfig};
use cxr_lora::LoraConfig;
use cxr_trainer::{Diffusion, LatentSample, SnrWeight};

/// What everything here trains on.
pub(crate) type B = Autodiff<Flex>;

pub(crate) type Condition = (Arc<Vec<f32>>, [usize; 2]);

/// A UNet as from a file, and an adapter that alone is trainable.
pub(crate) fn adapted_unet() -> UNet2dCondition<B> {
    let mut model = cxr_trainer::initialize(UNetConfig::tiny().init::<B>(&Default::default()), 5);
    cxr_lora::attach(&mut model, &LoraConfig::new(3), 6).unwrap();
    model
}

/// `n` pictures of noise, with captions of noise.
pub(crate) fn diffusion(n: usize) -> Diffusion<B, UNet2dCondition<B>> {
    diffusion_of(n, [4, 8, 8])
}

/// The same with latents of another shape.
pub(crate) fn diffusion_of(n: usize, shape: [usize; 3]) -> Diffusion<B, UNet2dCondition<B>> {
    let condition =
        |index: u64| -> Condition { (Arc::new(Stream::new(1, "condition", index).normals(5 * 32)), [5, 32]) };
    let elements = shape.iter().product();
    let sample = |index: u64| LatentSample {
        mean: Stream::new(1, "mean", index).normals(elements),
        std: (0..elements).map(|i| 0.1 + 0.001 * i as f32).collect(),
        condition: condition(index),
    };
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    let samples = (0..n as u64).map(sample).collect();
    let fingerprint = format!("{n} pictures of noise");
    let unconditional = condition(1000);
    let plain = Diffusion::new(&schedule, samples, shape, unconditional, fingerprint, &Default::default());
    Diffusion { weight: SnrWeight::MinSnr(5.0), dropout: 0.3, ..plain }
}

/// Bits of every parameter by path; all, or those that are trainable.
pub(crate) fn bits<B: Backend, M: Module<B>>(
    model: &M,
    trainable: Option<bool>,
) -> BTreeMap<String, Vec<u32>> {
    let flags: BTreeMap<String, bool> =
        parameters::list(model).into_iter().map(|info| (info.path, info.trainable)).collect();
    let mut found = BTreeMap::new();
    parameters::read(model, |path, data| {
        if trainable.is_none_or(|wanted| flags[path] == wanted) {
            found.insert(path.to_string(), data.iter::<f32>().map(f32::to_bits).collect());
        }
    });
    found
}

/// All values of the parameters that are trainable, one after the other.
pub(crate) fn trainable_values<B: Backend, M: Module<B>>(model: &M) -> Vec<f64> {
    bits(model, Some(true)).into_values().flatten().map(|bits| f64::from(f32::from_bits(bits))).collect()
}

/// The norm of the difference over the norm of the reference.
pub(crate) fn relative(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

/// Keeps the steps it is told of, and does something after one of them.
#[derive(Default)]
pub(crate) struct Steps {
    pub(crate) seen: Mutex<Vec<u64>>,
    pub(crate) stop_after: Option<u64>,
    pub(crate) kill_after: Option<u64>,
}

impl Progress for Steps {
    fn advance(&self, done: u64, _message: &str) -> ControlFlow<()> {
        if self.kill_after == Some(done) {
            // no destructor runs, as if the machine had gone down
            std::process::abort();
        }
        self.seen.lock().unwrap().push(done);
        if self.stop_after == Some(done) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
