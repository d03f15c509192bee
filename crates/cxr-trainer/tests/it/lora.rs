//! Fine-tuning an adapter: what changes, and what does not.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;
use cxr_core::hash::stable_hash;
use cxr_core::progress::Silent;
use cxr_kernels::nn::parameters;
use cxr_trainer::{LearningRate, Objective, Sample, TrainConfig, train};

use crate::common::{B, adapted_unet, bits, diffusion};

/// Norms of the gradients by path.
fn gradient_norms<M: Module<B>>(
    model: &M,
    gradients: &<B as AutodiffBackend>::Gradients,
) -> Vec<(String, f64)> {
    struct Norms<'a> {
        path: Vec<String>,
        gradients: &'a <B as AutodiffBackend>::Gradients,
        found: Vec<(String, f64)>,
    }
    impl ModuleVisitor<B> for Norms<'_> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = param.val().grad(self.gradients) {
                let squares = gradient.into_data().iter::<f64>().map(|g| g * g).sum::<f64>();
                self.found.push((self.path.join("."), squares.sqrt()));
            }
        }
    }
    let mut norms = Norms { path: Vec::new(), gradients, found: Vec::new() };
    model.visit(&mut norms);
    norms.found
}

#[test]
fn the_first_gradient_is_zero_for_a_and_not_for_b() {
    let model = adapted_unet();
    let samples: Vec<Sample> = (0..4).map(|i| Sample { index: i, position: i as u64 }).collect();
    let loss = diffusion(4).loss(&model, &samples, 0);
    let norms = gradient_norms(&model, &loss.backward());
    assert_eq!(
        norms.len(),
        2 * 4 * 8,
        "both factors of 8 projections in 4 transformers, and no other parameter"
    );
    for (path, norm) in norms {
        match path.ends_with("lora_a") {
            true => assert_eq!(norm, 0.0, "{path}"),
            false => assert!(path.ends_with("lora_b") && norm > 0.0, "{path}: {norm}"),
        }
    }
}

#[test]
fn the_adapter_alone_changes() {
    let (model, objective) = (adapted_unet(), diffusion(5));
    let config = TrainConfig {
        steps: 3,
        learning_rate: LearningRate::constant(1e-2),
        ema: Some(0.9),
        ..TrainConfig::default()
    };
    let (base, adapter) = (bits::<B, _>(&model, Some(false)), bits::<B, _>(&model, Some(true)));
    let folder = tempfile::tempdir().unwrap();
    let trained = train(model, &objective, &config, folder.path(), &Silent).unwrap();
    let averaged = trained.averaged.expect("the configuration asks for it");
    for model in [&trained.model, &averaged] {
        assert_eq!(bits::<B, _>(model, Some(false)), base);
        let after = bits::<B, _>(model, Some(true));
        assert_eq!(after.len(), adapter.len());
        for (path, before) in &adapter {
            assert_ne!(&after[path], before, "{path}");
        }
    }
    assert_ne!(bits::<B, _>(&averaged, Some(true)), bits::<B, _>(&trained.model, Some(true)));
    // an optimizer keeps its state under the ids, which have to be those of the next process
    for info in parameters::list::<B, _>(&trained.model) {
        assert_eq!(info.id, stable_hash(info.path.as_bytes()), "{}", info.path);
    }
}

/// Masks are a function of seed and position: two runs agree, and one with dropout is another than one without.
#[test]
fn dropout_takes_part_and_repeats() {
    let trained = |dropout: f64| {
        let mut model = adapted_unet();
        cxr_lora::detach(&mut model, cxr_lora::DEFAULT_NAME).unwrap();
        cxr_lora::attach(&mut model, &cxr_lora::LoraConfig::new(2).with_dropout(dropout), 3).unwrap();
        let config = TrainConfig {
            steps: 3,
            batch_size: 2,
            learning_rate: LearningRate::constant(1e-2),
            ..TrainConfig::default()
        };
        let folder = tempfile::tempdir().unwrap();
        bits::<B, _>(&train(model, &diffusion(5), &config, folder.path(), &Silent).unwrap().model, Some(true))
    };
    let dropped = trained(0.5);
    assert_eq!(dropped, trained(0.5));
    assert_ne!(dropped, trained(0.0));
}
