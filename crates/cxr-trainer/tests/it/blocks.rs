//! Going backward one block at a time.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{DType, Tensor};
use cxr_kernels::nn::parameters;
use cxr_ldm::unet::{UNet2dCondition, UNetConfig};
use cxr_lora::{LoraConfig, TargetSet};
use cxr_trainer::{Diffusion, Objective, Sample, initialize, peak_memory};

use crate::common::{B, adapted_unet, diffusion, diffusion_of, relative};

type Inner = <B as AutodiffBackend>::InnerBackend;

/// All gradients by path.
fn by_path<M: Module<B>>(model: &M, gradients: &GradientsParams) -> BTreeMap<String, Vec<f64>> {
    struct Visit<'a> {
        path: Vec<String>,
        gradients: &'a GradientsParams,
        found: BTreeMap<String, Vec<f64>>,
    }
    impl ModuleVisitor<B> for Visit<'_> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = self.gradients.get::<Inner, D>(param.id) {
                self.found.insert(self.path.join("."), gradient.into_data().iter::<f64>().collect());
            }
        }
    }
    let mut visit = Visit { path: Vec::new(), gradients, found: BTreeMap::new() };
    model.visit(&mut visit);
    visit.found
}

/// That both ways give the same loss and the same gradients; returns how many gradients there are.
fn same_both_ways(mut model: UNet2dCondition<B>, what: &str) -> usize {
    let samples: Vec<Sample> = (0..3).map(|i| Sample { index: i, position: 7 + i as u64 }).collect();
    let gradients = |model: &mut UNet2dCondition<B>, by_block: bool| {
        let objective = Diffusion { by_block, ..diffusion(4) };
        objective.prepare(model, 7, 2);
        let (loss, gradients) = objective.gradients(model, &samples, 2);
        (loss, by_path(model, &gradients))
    };
    let (loss, whole) = gradients(&mut model, false);
    let (loss_by_block, by_block) = gradients(&mut model, true);
    assert!((loss / loss_by_block - 1.0).abs() < 1e-6, "{what}: {loss} {loss_by_block}");
    assert_eq!(whole.keys().collect::<Vec<_>>(), by_block.keys().collect::<Vec<_>>(), "{what}");
    let all =
        |gradients: &BTreeMap<String, Vec<f64>>| gradients.values().flatten().copied().collect::<Vec<_>>();
    let error = relative(&all(&by_block), &all(&whole));
    assert!(error < 1e-6, "{what}: {error}");
    for (path, expected) in whole.iter().filter(|(_, values)| values.iter().any(|v| *v != 0.0)) {
        let error = relative(&by_block[path], expected);
        assert!(error < 2e-5, "{what}, {path}: {error}");
    }
    whole.len()
}

/// An adapter whose second factors are not zero, so that every gradient is something.
fn adapter(config: &LoraConfig) -> UNet2dCondition<B> {
    adapter_of(initialize(UNetConfig::tiny().init::<B>(&Default::default()), 5), config)
}

/// The same on a given base.
fn adapter_of(mut model: UNet2dCondition<B>, config: &LoraConfig) -> UNet2dCondition<B> {
    cxr_lora::attach(&mut model, config, 6).unwrap();
    let flags: BTreeMap<String, bool> =
        parameters::list(&model).into_iter().map(|info| (info.path, info.trainable)).collect();
    let model = parameters::map_data(model, |path, shape| {
        let numbers = shape.iter().product();
        let normals = || cxr_core::random::Stream::new(9, path, 0).normals(numbers);
        let data = path.ends_with("lora_b").then(|| {
            let values: Vec<f32> = normals().iter().map(|value| 0.1 * value).collect();
            burn::tensor::TensorData::new(values, shape.to_vec())
        });
        Ok::<_, ()>(data)
    })
    .unwrap();
    parameters::set_trainable(model, |path| flags[path])
}

#[test]
fn gradients_by_block_are_those_of_the_whole() {
    assert_eq!(same_both_ways(adapter(&LoraConfig::new(3)), "attention"), 64);
    let dropout = LoraConfig::new(3).with_dropout(0.4);
    assert_eq!(same_both_ways(adapter(&dropout), "dropout"), 64);
    // all layers: those before the first block and after the last, and the time embedding, which every block reads
    let everywhere = LoraConfig::new(2).with_targets(TargetSet::Patterns(vec!["*".to_owned()]));
    assert!(same_both_ways(adapter(&everywhere), "every layer") > 150);
    let model = initialize(UNetConfig::tiny().init::<B>(&Default::default()), 5);
    let all = parameters::list(&model).len();
    assert_eq!(same_both_ways(parameters::set_trainable(model, |_| true), "every parameter"), all);
    // masks are drawn without a graph as with one: with others the gradients would be far off
    let with = |by_block: bool, dropout: f64| {
        let mut model = adapter(&LoraConfig::new(3).with_dropout(dropout));
        let objective = Diffusion { by_block, ..diffusion(4) };
        objective.prepare(&mut model, 0, 2);
        objective.gradients(&model, &[Sample { index: 0, position: 0 }], 2).0
    };
    assert_ne!(with(true, 0.4), with(true, 0.0));
    assert!((with(true, 0.4) / with(false, 0.4) - 1.0).abs() < 1e-6);
}

/// All parameters in another dtype.
struct Cast(DType);

impl ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

#[test]
fn gradients_of_an_adapter_keep_their_digits_on_a_base_in_half_precision() {
    // so many elements that a gradient by one of them, 2e-5, has few digits in f16
    let samples: Vec<Sample> = (0..3).map(|i| Sample { index: i, position: 7 + i as u64 }).collect();
    let base = initialize(UNetConfig::tiny().init::<B>(&Default::default()), 5);
    let gradients = |dtype: DType, by_block: bool| {
        let rounded = base.clone().map(&mut Cast(DType::F16)).map(&mut Cast(dtype));
        let mut model = adapter_of(rounded, &LoraConfig::new(3));
        let objective = Diffusion { by_block, ..diffusion_of(4, [4, 32, 32]) };
        objective.prepare(&mut model, 7, 2);
        let (loss, gradients) = objective.gradients(&model, &samples, 2);
        (loss, by_path(&model, &gradients))
    };
    let (loss, expected) = gradients(DType::F32, false);
    for by_block in [false, true] {
        let (found_loss, found) = gradients(DType::F16, by_block);
        assert!((found_loss / loss - 1.0).abs() < 1e-3, "{found_loss}, in f32 {loss}");
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (path, expected) in &expected {
            let error = relative(&found[path], expected);
            assert!(error < 1e-2, "by block {by_block}, {path}: {error}");
        }
    }
}

const BY_BLOCK: &str = "CXR_TRAINER_TEST_BY_BLOCK";

/// Prints how much memory a pass has taken at its peak.
#[test]
#[ignore = "a_pass_by_block_takes_less_memory starts it in a process of its own"]
fn a_pass_of_which_the_memory_is_measured() {
    let Some(by_block) = std::env::var_os(BY_BLOCK) else { return };
    let model = adapted_unet();
    let objective = Diffusion { by_block: by_block == "true", ..diffusion_of(4, [4, 64, 64]) };
    let samples: Vec<Sample> = (0..4).map(|i| Sample { index: i, position: i as u64 }).collect();
    objective.gradients(&model, &samples, 0);
    println!("peak {}", peak_memory().unwrap_or(0));
}

#[test]
fn a_pass_by_block_takes_less_memory() {
    if peak_memory().is_none() {
        println!("skipped: this system does not say how much memory a process takes");
        return;
    }
    let peak = |by_block: &str| -> u64 {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "blocks::a_pass_of_which_the_memory_is_measured"])
            .env(BY_BLOCK, by_block)
            .stderr(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.split("peak ").nth(1)).expect("a line with the peak");
        line.trim().parse().unwrap()
    };
    let (whole, by_block) = (peak("false"), peak("true"));
    println!("peak of a pass: {} MiB whole, {} MiB by block", whole >> 20, by_block >> 20);
    assert!((by_block as f64) < 0.9 * whole as f64, "{by_block} of {whole} bytes");
}
