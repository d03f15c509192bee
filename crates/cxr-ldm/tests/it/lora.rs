//! A LoRA training step against PEFT.

use burn::backend::Autodiff;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::nn::parameters;
use cxr_kernels::{DiffusionBackend, Flex};
use cxr_ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig};
use cxr_ldm::unet::{Context, UNet2dCondition};
use cxr_lora::{LoraConfig, TargetSet, UNET};

use crate::fixture::{Reference, assert_meets, assert_misses, path, relative, unet, values};

fn adapted<B: Backend>(weight: f64) -> UNet2dCondition<B> {
    let mut model = unet::<B>();
    let (adapter, _) = cxr_lora::read(path("adapter.safetensors")).unwrap();
    let layers = cxr_lora::load_adapter(&mut model, &adapter, weight).unwrap();
    assert_eq!(layers, 4 * 8, "transformers, projections of two attentions");
    model
}

fn predict<B: DiffusionBackend>(model: &UNet2dCondition<B>, reference: &Reference) -> Tensor<B, 4> {
    let hidden = reference.float::<B, 3>("text.hidden").slice(1..3);
    model.forward(
        reference.float("unet.latents"),
        reference.timesteps("unet.timesteps"),
        &Context::new(hidden),
    )
}

#[test]
fn an_adapted_prediction() {
    let reference = Reference::open();
    let expected = reference.values("lora.eps");
    assert_meets("UNet with adapter", &values(predict(&adapted::<Flex>(1.0), &reference)), &expected);
    assert_misses("UNet without adapter", &values(predict(&unet::<Flex>(), &reference)), &expected);
    // alpha is not the rank
    assert_misses("UNet, adapter unscaled", &values(predict(&adapted::<Flex>(0.5), &reference)), &expected);
}

/// On every layer there is, so that a wrong branch anywhere shows.
#[test]
fn attached_everywhere_the_prediction_is_the_bases_to_the_bit_and_merged_it_is_the_adapted_one() {
    let reference = Reference::open();
    let bits = |model: &UNet2dCondition<Flex>| {
        values(predict(model, &reference)).into_iter().map(f32::to_bits).collect::<Vec<u32>>()
    };
    let base = unet::<Flex>();
    let mut model = base.clone();
    let everywhere = LoraConfig::new(2).with_targets(TargetSet::Patterns(vec!["*".to_owned()]));
    let layers = cxr_lora::attach(&mut model, &everywhere, 3).unwrap();
    assert_eq!(layers, cxr_lora::layers(&model).unwrap().len());
    assert_eq!(bits(&model), bits(&base));

    let mut adapter = cxr_lora::export(&model, cxr_lora::DEFAULT_NAME, UNET).unwrap();
    for (index, weights) in adapter.modules.values_mut().enumerate() {
        let mut stream = cxr_core::random::Stream::new(4, "test", index as u64);
        weights.b.iter_mut().for_each(|value| *value = 0.1 * stream.normal());
    }
    let mut model = base.clone();
    assert_eq!(cxr_lora::load_adapter(&mut model, &adapter, 1.0).unwrap(), layers);
    let adapted = values(predict(&model, &reference));
    assert_misses("UNet without adapter", &values(predict(&base, &reference)), &adapted);
    assert_eq!(cxr_lora::merge_and_detach(&mut model).unwrap(), layers);
    assert_meets("UNet with its adapter merged", &values(predict(&model, &reference)), &adapted);
}

#[test]
fn a_training_step() {
    type B = Autodiff<Flex>;
    let reference = Reference::open();
    let mut model = adapted::<B>(1.0);
    cxr_lora::train_only(&mut model, cxr_lora::DEFAULT_NAME).unwrap();
    let trainable = parameters::list::<B, _>(&model).iter().filter(|p| p.trainable).count();

    let gradients = step(&model, &reference);
    let expected = reference.names("lora.grad.");
    assert_eq!((gradients.len(), trainable), (expected.len(), expected.len()), "the adapter's and no other");
    let mut worst = 0.0_f64;
    for name in &expected {
        let ours = name
            .replace(".lora_A.weight", ".adapters.0.lora_a")
            .replace(".lora_B.weight", ".adapters.0.lora_b");
        let error = relative(&gradients[&ours], &reference.values(&format!("lora.grad.{name}")));
        worst = worst.max(error);
        assert!(error <= crate::fixture::BAR, "gradient of {name}: relative error {error:e}");
    }
    println!("worst of {} gradients: relative error {worst:.1e}", expected.len());
}

/// The gradients of the loss, which is checked as well.
fn step<B: AutodiffBackend + DiffusionBackend>(
    model: &UNet2dCondition<B>,
    reference: &Reference,
) -> std::collections::BTreeMap<String, Vec<f32>> {
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    let (latents, noise) = (reference.float::<B, 4>("lora.latents"), reference.float::<B, 4>("lora.noise"));
    let timesteps = reference.data("lora.timesteps").to_vec::<i64>().unwrap();
    let noised = timesteps.iter().enumerate().map(|(i, &t)| {
        let alpha_bar = schedule.alpha_bar(t);
        let row = |x: &Tensor<B, 4>| x.clone().slice(i..i + 1);
        row(&latents) * alpha_bar.sqrt() + row(&noise) * (1.0 - alpha_bar).sqrt()
    });
    let noised = Tensor::cat(noised.collect(), 0);
    let context = Context::new(reference.float::<B, 3>("text.hidden").slice(1..3));
    let loss = |model: &UNet2dCondition<B>| {
        let predicted = model.forward(noised.clone(), reference.timesteps("lora.timesteps"), &context);
        (predicted - noise.clone()).powi_scalar(2).mean()
    };
    let found = loss(model);
    let expected = reference.values("lora.loss");
    assert_meets("loss", &values(found.clone()), &expected);
    assert_misses("loss without adapter", &values(loss(&unet())), &expected);
    crate::gradients::by_path(model, &found.backward())
}
