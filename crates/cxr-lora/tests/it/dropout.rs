//! Dropout, and finite differences of the layers with and without it.

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module};
use burn::tensor::{Distribution, Tensor, TensorData, backend::Backend};
use cxr_kernels::nn::parameters;
use cxr_kernels::{DiffusionBackend, Flex};
use cxr_lora::{
    Adaptable, DEFAULT_NAME, DropoutStep, LayerMut, LayerRef, LoraConfig, LoraConv2d, LoraConv2dConfig,
    LoraLinear, LoraLinearConfig, TargetSet, UNET,
};

use crate::peft::gradients;
use crate::{assert_close, bits, values};

/// One layer of each kind.
#[derive(Module, Debug)]
struct Layers<B: Backend> {
    linear: LoraLinear<B>,
    conv: LoraConv2d<B>,
}

impl<B: Backend> Layers<B> {
    /// With an adapter of which no factor is zero.
    fn new(dropout: f64) -> Self {
        let device = Default::default();
        let mut model = Self {
            linear: LoraLinearConfig::new(5, 4).init(&device),
            conv: LoraConv2dConfig::new(4, 3, 3).with_stride(2).with_padding(1).init(&device),
        };
        let config = LoraConfig::new(2)
            .with_alpha(3.0)
            .with_dropout(dropout)
            .with_targets(TargetSet::Patterns(vec!["*".to_owned()]));
        cxr_lora::attach(&mut model, &config, 1).unwrap();
        let mut stream = cxr_core::random::Stream::new(2, "test", 0);
        let fill = |_: &str, shape: &[usize]| -> Result<Option<TensorData>, std::convert::Infallible> {
            Ok(Some(TensorData::new(stream.normals(shape.iter().product()), shape.to_vec())))
        };
        let Ok(mut model) = parameters::map_data(model, fill);
        cxr_lora::train_only(&mut model, DEFAULT_NAME).unwrap();
        model
    }
}

impl<B: DiffusionBackend> Layers<B> {
    /// `x` `[2, 20, 5]`.
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let y = self.linear.forward(x);
        self.conv.forward(y.swap_dims(1, 2).reshape([2, 4, 5, 4]))
    }
}

impl<B: Backend> Adaptable<B> for Layers<B> {
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        visit("linear", LayerRef::Linear(&self.linear));
        visit("conv", LayerRef::Conv2d(&self.conv));
    }

    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        visit("linear", LayerMut::Linear(&mut self.linear));
        visit("conv", LayerMut::Conv2d(&mut self.conv));
    }
}

type B = Autodiff<Flex>;

const STEP: DropoutStep = DropoutStep { seed: 7, step: 3 };

fn input() -> Tensor<B, 3> {
    let values = cxr_core::random::Stream::new(3, "test", 0).normals(200);
    Tensor::from_data(TensorData::new(values, [2, 20, 5]), &Default::default())
}

/// The loss is linear in each factor, so that central differences are exact up to rounding.
#[test]
fn gradients_against_finite_differences() {
    for dropout in [0.0, 0.4] {
        let mut model = Layers::<B>::new(dropout);
        cxr_lora::set_dropout_step(&mut model, DEFAULT_NAME, Some(STEP)).unwrap();
        let projection =
            Tensor::<B, 4>::random([2, 3, 3, 2], Distribution::Normal(0.0, 1.0), &Default::default());
        let loss = |model: &Layers<B>| (model.forward(input()) * projection.clone()).sum();
        let found = gradients(&model, &loss(&model).backward());
        assert_eq!(found.len(), 4);
        for (name, found) in found {
            let shifted = |index: usize, by: f32| {
                let change = |path: &str, shape: &[usize]| -> Result<_, std::convert::Infallible> {
                    let mut values = None;
                    parameters::read::<B, _>(&model, |other, data| {
                        if other == path {
                            values = Some(data.to_vec::<f32>().unwrap());
                        }
                    });
                    let mut values = values.unwrap();
                    if path == name {
                        values[index] += by;
                    }
                    Ok(Some(TensorData::new(values, shape.to_vec())))
                };
                let Ok(mut model) = parameters::map_data(model.clone(), change);
                // Dropout is for factors that are tracked.
                cxr_lora::train_only(&mut model, DEFAULT_NAME).unwrap();
                f64::from(values(loss(&model))[0])
            };
            let expected: Vec<f32> =
                (0..found.len()).map(|index| (shifted(index, 0.5) - shifted(index, -0.5)) as f32).collect();
            assert_close(&format!("gradient of {name}, dropout {dropout}"), &found, &expected, 1e-5);
        }
    }
}

/// As PEFT: what goes into A is dropped, the base's input is not.
#[test]
fn the_adapters_input_is_dropped() {
    let device = Default::default();
    let mut model = Layers::<B>::new(0.4);
    let x = input();
    let without = values(model.linear.forward(x.clone()));
    assert_eq!(cxr_lora::set_dropout_step(&mut model, DEFAULT_NAME, Some(STEP)).unwrap(), 2);
    let branch = &model.linear.adapters()[0];
    let mask = branch.dropout_mask([2, 20, 5], &device).unwrap();
    let kept = values(mask.clone());
    assert!(kept.iter().all(|value| *value == 0.0 || *value == 1.0 / 0.6) && kept.contains(&0.0));

    let layer = &model.linear;
    let base = x.clone().matmul(layer.weight.val().transpose().unsqueeze())
        + layer.bias.as_ref().unwrap().val().unsqueeze();
    let inner = (x.clone() * mask).matmul(branch.lora_a.val().transpose().unsqueeze());
    let expected = base + inner.matmul(branch.lora_b.val().transpose().unsqueeze()).mul_scalar(1.5);
    let found = values(layer.forward(x.clone()));
    assert_close("dropped", &found, &values(expected), 1e-6);
    assert!(crate::relative(&found, &without) > 1e-2);

    // Both layers, each with a mask of its own.
    let of_conv = model.conv.adapters()[0].dropout_mask([2, 20, 5], &device).unwrap();
    assert_ne!(values(of_conv), kept);
    // Another step, other masks; the same step, the same.
    let again = values(model.forward(x.clone()));
    cxr_lora::set_dropout_step(&mut model, DEFAULT_NAME, Some(DropoutStep { step: 4, ..STEP })).unwrap();
    assert_ne!(values(model.forward(x.clone())), again);
    cxr_lora::set_dropout_step(&mut model, DEFAULT_NAME, Some(STEP)).unwrap();
    assert_eq!(values(model.forward(x)), again);
}

#[test]
fn nothing_is_dropped_outside_training() {
    let mut model = Layers::<B>::new(0.4);
    let plain = bits(Layers::<Flex>::new(0.0).forward(input().inner()));
    // Before a step is set, and after it is taken back.
    assert_eq!(bits(model.forward(input())), plain);
    cxr_lora::set_dropout_step(&mut model, DEFAULT_NAME, Some(STEP)).unwrap();
    assert_ne!(bits(model.forward(input())), plain);
    assert_eq!(bits(model.valid().forward(input().inner())), plain);
    let adapter = cxr_lora::export(&model, DEFAULT_NAME, UNET).unwrap();
    assert_eq!(adapter.modules.len(), 2);
    cxr_lora::set_dropout_step(&mut model, DEFAULT_NAME, None).unwrap();
    assert_eq!(bits(model.forward(input())), plain);
    let error = cxr_lora::set_dropout_step(&mut model, "other", None).unwrap_err();
    assert!(error.to_string().contains("`other`"), "{error}");
}

#[test]
fn a_probability_is_checked() {
    for dropout in [-0.1, 1.0, f64::NAN] {
        let mut model = Layers::<Flex>::new(0.0);
        let config = LoraConfig::new(2).with_name("second").with_dropout(dropout);
        let error = cxr_lora::attach(&mut model, &config, 1).unwrap_err().to_string();
        assert!(error.contains("dropout"), "{error}");
    }
}
