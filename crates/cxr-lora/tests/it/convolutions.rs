//! Adapters on convolutions: against PEFT, and through files.

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module};
use burn::optim::{AdamWConfig, GradientsParams, Optimizer};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use cxr_kernels::nn::parameters;
use cxr_kernels::{DiffusionBackend, Flex, ops};
use cxr_lora::{
    Adaptable, Adapter, DEFAULT_NAME, Format, LayerMut, LayerRef, LoraConfig, LoraConv2d, LoraConv2dConfig,
    LoraError, TargetSet, UNET,
};

use crate::peft::{Fixture, gradients, parity, path};
use crate::{assert_close, bits, relative, values};

const BAR: f64 = 1e-5;

/// The model of `peft/generate.py`.
#[derive(Module, Debug)]
struct Convolutions<B: Backend> {
    proj_in: LoraConv2d<B>,
    conv1: LoraConv2d<B>,
    proj_out: LoraConv2d<B>,
}

impl<B: Backend> Convolutions<B> {
    fn new(fixture: &Fixture, dtype: DType) -> Self {
        let device = Default::default();
        let model = Self {
            proj_in: LoraConv2dConfig::new(3, 4, 1).init(&device),
            conv1: LoraConv2dConfig::new(4, 5, 3).with_stride(2).with_padding(1).init(&device),
            proj_out: LoraConv2dConfig::new(5, 4, 1).with_bias(false).init(&device),
        };
        let fill = |path: &str, _: &[usize]| -> Result<Option<TensorData>, std::convert::Infallible> {
            Ok(Some(fixture.data(&format!("base.{path}")).convert_dtype(dtype)))
        };
        let Ok(model) = parameters::map_data(model, fill);
        model
    }

    fn adapted(fixture: &Fixture, weight: f64) -> Self {
        let mut model = Self::new(fixture, DType::F32);
        assert_eq!(cxr_lora::load_adapter(&mut model, &adapter(), weight).unwrap(), 3);
        model
    }
}

impl<B: DiffusionBackend> Convolutions<B> {
    fn output(&self, fixture: &Fixture) -> Tensor<B, 4> {
        let dtype = self.proj_in.weight.val().dtype();
        let data = fixture.data("x").convert_dtype(dtype);
        let x = Tensor::from_data(data, (&Default::default(), dtype));
        let x = self.conv1.forward(ops::silu(self.proj_in.forward(x)));
        self.proj_out.forward(ops::silu(x))
    }
}

impl<B: Backend> Adaptable<B> for Convolutions<B> {
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        for (name, layer) in
            [("proj_in", &self.proj_in), ("conv1", &self.conv1), ("proj_out", &self.proj_out)]
        {
            visit(name, LayerRef::Conv2d(layer));
        }
    }

    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        visit("proj_in", LayerMut::Conv2d(&mut self.proj_in));
        visit("conv1", LayerMut::Conv2d(&mut self.conv1));
        visit("proj_out", LayerMut::Conv2d(&mut self.proj_out));
    }
}

/// Alpha / rank is 3 / 2.
fn adapter() -> Adapter {
    let (adapter, format) = cxr_lora::read(path("convolutions.safetensors")).unwrap();
    assert_eq!(format, Format::Diffusers);
    adapter
}

fn everywhere() -> LoraConfig {
    LoraConfig::new(2).with_targets(TargetSet::Patterns(vec!["*".to_owned()]))
}

#[test]
fn forward_and_merged() {
    let fixture = Fixture::convolutions();
    let base = Convolutions::<Flex>::new(&fixture, DType::F32);
    assert_close("base", &values(base.output(&fixture)), &fixture.values("output.base"), BAR);
    let expected = fixture.values("output.adapted");
    let mut model = Convolutions::<Flex>::adapted(&fixture, 1.0);
    assert_close("adapted", &values(model.output(&fixture)), &expected, BAR);
    let unscaled = Convolutions::<Flex>::adapted(&fixture, 2.0 / 3.0);
    assert!(relative(&values(unscaled.output(&fixture)), &expected) > 100.0 * BAR);

    let (before, base) = (bits(model.output(&fixture)), model.clone());
    let merged = cxr_lora::merge(&mut model).unwrap();
    assert_eq!(merged.layers(), 3);
    assert!(model.conv1.is_merged());
    assert_close("merged", &values(model.output(&fixture)), &expected, BAR);
    cxr_lora::unmerge(&mut model, merged).unwrap();
    assert_eq!(bits(model.output(&fixture)), before);
    assert_eq!(bits(model.conv1.weight.val()), bits(base.conv1.weight.val()));
}

#[test]
fn gradients_and_ten_steps_of_adamw() {
    type B = Autodiff<Flex>;
    let fixture = Fixture::convolutions();
    let mut model = Convolutions::<B>::adapted(&fixture, 1.0);
    cxr_lora::train_only(&mut model, DEFAULT_NAME).unwrap();
    let loss = (model.output(&fixture) * fixture.tensor("projection")).sum();
    let found = gradients(&model, &loss.backward());
    let expected = fixture.factors("gradient.");
    assert!(expected.len() == 6 && found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (name, expected) in &expected {
        assert_close(&format!("gradient of {name}"), &found[name], expected, BAR);
    }

    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(1e-2).init();
    for _ in 0..10 {
        let loss = (model.output(&fixture) - fixture.tensor("projection")).powi_scalar(2).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }
    let before = parity::factors(&Convolutions::<Flex>::adapted(&fixture, 1.0));
    parity::compare_changes(&before, &parity::factors(&model.valid()), &fixture.factors("trained."));
}

#[test]
fn before_the_first_step() {
    let fixture = Fixture::convolutions();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut model = Convolutions::<Flex>::new(&fixture, dtype);
        let base = bits(model.output(&fixture));
        assert_eq!(cxr_lora::attach(&mut model, &everywhere(), 5).unwrap(), 3);
        assert_eq!(bits(model.output(&fixture)), base, "{dtype:?}");
        assert_eq!(model.conv1.adapters()[0].lora_a.dims(), [2, 4 * 9]);
    }
    type B = Autodiff<Flex>;
    let mut model = Convolutions::<B>::new(&fixture, DType::F32);
    cxr_lora::attach(&mut model, &everywhere(), 5).unwrap();
    let loss = (model.output(&fixture) * fixture.tensor("projection")).sum();
    let found = gradients(&model, &loss.backward());
    assert_eq!(found.len(), 6);
    for (name, gradient) in found {
        assert_eq!(gradient.iter().all(|value| *value == 0.0), name.ends_with(".lora_a"), "{name}");
    }
}

#[test]
fn files_keep_the_kernel() {
    let fixture = Fixture::convolutions();
    let expected = adapter();
    let model = Convolutions::<Flex>::adapted(&fixture, 1.0);
    let exported = cxr_lora::export(&model, DEFAULT_NAME, UNET).unwrap();
    assert_eq!(exported.modules, expected.modules);
    let folder = tempfile::tempdir().unwrap();
    for format in [Format::Diffusers, Format::Peft, Format::Kohya] {
        let at = folder.path().join(format!("{format:?}"));
        cxr_lora::write(&at, &exported, format).unwrap();
        let (read, found) = cxr_lora::read(&at).unwrap();
        assert_eq!(found, format);
        assert_eq!(read.resolve(UNET, &["proj_in", "conv1", "proj_out"]).unwrap(), exported);
    }
    // diffusers' converter writes the rank as alpha.
    let (kohya, _) = cxr_lora::read(path("convolutions_kohya.safetensors")).unwrap();
    let mut kohya = kohya.resolve(UNET, &["proj_in", "conv1", "proj_out"]).unwrap();
    kohya.modules.values_mut().for_each(|weights| weights.alpha = 3.0);
    assert_eq!(kohya.modules, expected.modules);
}

#[test]
fn factors_of_another_kernel_are_refused() {
    let fixture = Fixture::convolutions();
    let mut adapter = adapter();
    let conv1 = adapter.modules.values_mut().next().unwrap();
    assert_eq!(conv1.kernel, Some([3, 3]));
    // 4 channels of 3 x 3 are as many values as 12 of 3 x 1.
    (conv1.in_features, conv1.kernel) = (12, Some([3, 1]));
    let mut model = Convolutions::<Flex>::new(&fixture, DType::F32);
    let error = cxr_lora::load_adapter(&mut model, &adapter, 1.0).unwrap_err();
    let LoraError::LayerShape { expected, found, .. } = &error else { panic!("{error}") };
    assert_eq!((*expected, *found), ([5, 4, 3, 3], [5, 12, 3, 1]));
    assert!(error.to_string().contains("unet.conv1"), "{error}");
    assert!(cxr_lora::attached(&model).is_empty());
}
