//! The same numbers as PEFT's.

use std::collections::BTreeMap;

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module};
use burn::optim::{AdamWConfig, GradientsParams, Optimizer};
use burn::tensor::backend::Backend;
use cxr_kernels::nn::parameters;
use cxr_kernels::{DiffusionBackend, Flex};
use cxr_lora::{Adapter, DEFAULT_NAME};

use super::{Fixture, gradients, path};
use crate::toy::Toy;
use crate::{assert_close, relative, values};

/// One operation's rounding is 6e-8; the model has some twenty of them in a row.
const BAR: f64 = 1e-5;

/// AdamW's first steps are the signs of gradients, and where one is next to zero its rounding shows.
const CHANGE_BAR: f64 = 1e-4;

/// The fixture's adapter has alpha / rank = 2 on 15 layers and 1 / 2 on one.
fn adapter() -> Adapter {
    cxr_lora::read(path("adapter")).unwrap().0
}

fn adapted<B: Backend>(fixture: &Fixture) -> Toy<B> {
    let mut model = Toy::new(fixture);
    assert_eq!(cxr_lora::load_adapter(&mut model, &adapter(), 1.0).unwrap(), 16);
    model
}

fn check_forward<B: DiffusionBackend>() {
    let fixture = Fixture::open();
    let expected = fixture.values("output.adapted");
    let base = values(Toy::<B>::new(&fixture).output(&fixture));
    assert_close("base", &base, &fixture.values("output.base"), BAR);
    let mut model = adapted::<B>(&fixture);
    assert_close("adapted", &values(model.output(&fixture)), &expected, BAR);

    // What the bar has to tell apart: no adapter, half the scale, the same scale on all layers.
    assert!(relative(&base, &expected) > 100.0 * BAR);
    cxr_lora::set_weight(&mut model, DEFAULT_NAME, 0.5).unwrap();
    assert!(relative(&values(model.output(&fixture)), &expected) > 100.0 * BAR);
    let mut uniform = adapter();
    uniform.modules.values_mut().for_each(|weights| weights.alpha = 2.0 * weights.rank as f64);
    let mut model = Toy::<B>::new(&fixture);
    cxr_lora::load_adapter(&mut model, &uniform, 1.0).unwrap();
    assert!(relative(&values(model.output(&fixture)), &expected) > 100.0 * BAR);
}

#[test]
fn forward() {
    check_forward::<Flex>();
    check_forward::<Autodiff<Flex>>();
}

#[test]
fn gradients_of_both_factors_and_of_nothing_else() {
    type B = Autodiff<Flex>;
    let fixture = Fixture::open();
    let mut model = adapted::<B>(&fixture);
    assert_eq!(cxr_lora::train_only(&mut model, DEFAULT_NAME).unwrap(), 16);
    let loss = (model.output(&fixture) * fixture.tensor("projection")).sum();
    let found = gradients(&model, &loss.backward());
    let expected = fixture.factors("gradient.");
    assert_eq!(expected.len(), 32);
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    let mut worst = 0.0_f64;
    for (name, expected) in &expected {
        let error = relative(&found[name], expected);
        assert!(error <= BAR, "gradient of {name}: relative error {error:e}");
        worst = worst.max(error);
    }
    println!("worst of {} gradients: relative error {worst:.1e}", expected.len());
}

#[test]
fn ten_steps_of_adamw() {
    type B = Autodiff<Flex>;
    let fixture = Fixture::open();
    let mut model = adapted::<B>(&fixture);
    cxr_lora::train_only(&mut model, DEFAULT_NAME).unwrap();
    let frozen = |model: &Toy<B>| {
        let mut frozen = Vec::new();
        parameters::read::<B, _>(model, |name, data| {
            if !name.contains(".adapters.") {
                frozen.push((name.to_owned(), data));
            }
        });
        frozen
    };
    let before = frozen(&model);
    // PyTorch's epsilon and the generator's weight decay.
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(1e-2).init();
    for _ in 0..10 {
        let loss = (model.output(&fixture) - fixture.tensor("projection")).powi_scalar(2).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }
    let (before_training, after) = (factors(&adapted::<Flex>(&fixture)), factors(&model.valid()));
    compare_changes(&before_training, &after, &fixture.factors("trained."));
    assert_eq!(frozen(&model), before, "the base moved");
}

/// What training changed, after minus before, of A and B apart: an error in it is many times larger, relatively, than
/// in the factors themselves.
pub(crate) fn compare_changes(
    before: &BTreeMap<String, Vec<f32>>,
    after: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) {
    assert!(after.keys().eq(expected.keys()));
    let change = |after: &[f32], before: &[f32]| -> Vec<f32> {
        after.iter().zip(before).map(|(after, before)| after - before).collect()
    };
    for factor in [".lora_a", ".lora_b"] {
        let mut worst = 0.0_f64;
        for (name, after) in after.iter().filter(|(name, _)| name.ends_with(factor)) {
            let (before, expected) = (&before[name], &expected[name]);
            let error = relative(&change(after, before), &change(expected, before));
            worst = worst.max(error);
            assert!(error <= CHANGE_BAR, "change of {name}: relative error {error:e}");
            assert!(relative(before, expected) > 1e-2, "{name} has hardly moved");
        }
        println!("worst change of {factor}: relative error {worst:.1e}");
    }
}

pub(crate) fn factors<M: Module<Flex>>(model: &M) -> BTreeMap<String, Vec<f32>> {
    let mut found = BTreeMap::new();
    parameters::read::<Flex, _>(model, |name, data| {
        if name.contains(".adapters.") {
            found.insert(name.to_owned(), data.to_vec().unwrap());
        }
    });
    found
}
