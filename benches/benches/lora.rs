//! A LoRA step of one attention projection of Stable Diffusion 1.x, forward and backward: as two thin products, and as
//! the dense composition `W + scale * B A`, which makes a matrix and a gradient of the size of the weight.
//!
//! Rows are those of a batch of four at 128 pixels, the paper's, on each level, and of one picture at 512.

use burn::tensor::Tensor;
use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::{DiffusionAutodiff, WeightCache, ops};
use cxr::lora::{self, Adaptable, LayerMut, LayerRef, LoraConfig, LoraLinear, LoraLinearConfig, TargetSet};
use cxr_benches::{Cost, fill, normal, on_device, unit};

const SIZES: [(&str, [usize; 3]); 5] = [
    ("128px/4x256x320", [4, 256, 320]),
    ("128px/4x64x640", [4, 64, 640]),
    ("128px/4x16x1280", [4, 16, 1280]),
    ("512px/1x4096x320", [1, 4096, 320]),
    ("512px/1x1024x640", [1, 1024, 640]),
];

/// The paper's rank.
const RANK: usize = 8;

#[derive(burn::module::Module, Debug)]
struct Projection<B: burn::tensor::backend::Backend> {
    layer: LoraLinear<B>,
}

impl<B: burn::tensor::backend::Backend> Adaptable<B> for Projection<B> {
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        visit("to_q", LayerRef::Linear(&self.layer));
    }

    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        visit("to_q", LayerMut::Linear(&mut self.layer));
    }
}

/// A frozen projection with an adapter that learns, of which no factor is zero.
fn projection<B: DiffusionAutodiff>(width: usize, device: &B::Device) -> LoraLinear<B> {
    let mut model =
        Projection { layer: LoraLinearConfig::new(width, width).with_bias(false).init::<B>(device) };
    let targets = TargetSet::Patterns(vec!["to_q".to_owned()]);
    lora::attach(&mut model, &LoraConfig::new(RANK).with_targets(targets), 0).expect("the layer is there");
    let mut model = fill(model);
    lora::train_only(&mut model, lora::DEFAULT_NAME).expect("the adapter is there");
    model.layer
}

struct Step<'a>(&'a mut Criterion);

impl Program for Step<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        for (id, shape) in SIZES {
            for (group, thin) in [("lora-thin", true), ("lora-dense", false)] {
                unit::<B::InnerBackend, _, 3>(self.0, &device, [group, id], Cost::Short, || {
                    let layer = projection::<B>(shape[2], &device);
                    let (x, projected) = (normal::<B, 3>(shape, &device), normal::<B, 3>(shape, &device));
                    move || step(&layer, x.clone(), projected.clone(), thin)
                });
            }
        }
    }
}

/// The gradient of the input, with those of A and B on the way: the projection is in the middle of a network.
fn step<B: DiffusionAutodiff>(
    layer: &LoraLinear<B>,
    x: Tensor<B, 3>,
    projected: Tensor<B, 3>,
    thin: bool,
) -> Tensor<B::InnerBackend, 3> {
    let x = x.require_grad();
    let branch = &layer.adapters()[0];
    let (a, b) = (branch.lora_a.val(), branch.lora_b.val());
    let y = match thin {
        true => layer.forward(x.clone()),
        false => {
            let weight = layer.weight.val() + b.clone().matmul(a.clone()).mul_scalar(branch.scale());
            ops::linear(x.clone(), weight, None, &WeightCache::new())
        }
    };
    let gradients = (y * projected).sum().backward();
    assert!(a.grad(&gradients).is_some() && b.grad(&gradients).is_some(), "the factors learn");
    assert!(layer.weight.val().grad(&gradients).is_none(), "the base is frozen");
    x.grad(&gradients).expect("it is tracked")
}

fn lora_step(criterion: &mut Criterion) {
    on_device(Step(criterion));
}

criterion_group!(benches, lora_step);
criterion_main!(benches);
