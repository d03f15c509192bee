//! An adapter with the shape of LCM-LoRA, on every layer that it has in Stable Diffusion 1.5, and what it draws in four
//! steps: `fixtures/lcm_generate.py`.

use std::convert::Infallible;
use std::ops::ControlFlow;

use burn::tensor::{Tensor, TensorData};
use cxr_core::random::TorchGenerator;
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, Sampler, Steps, sample};
use cxr_ldm::unet::{Context, UNet2dCondition, UNetConfig};

use crate::fixture::{Reference, assert_meets, assert_misses, path, values};

/// What the published adapter has: `train_lcm_distill_lora_sd_wds.py` of diffusers.
const MODULES: usize = 278;

/// The UNet with the weights of the generator: one draw for all parameters, in the order of their names.
fn unet() -> UNet2dCondition<Flex> {
    let config = std::fs::read_to_string(path("lcm_unet.json")).unwrap();
    let model = UNetConfig::from_json(&config).unwrap().init(&Default::default());
    let mut all: Vec<(String, usize)> = parameters::list::<Flex, _>(&model)
        .into_iter()
        .map(|parameter| (parameter.path, parameter.shape.iter().product()))
        .collect();
    all.sort();
    let numbers = TorchGenerator::new(15).randn(all.iter().map(|(_, count)| count).sum());
    let mut start = 0;
    let mut places = std::collections::BTreeMap::new();
    for (name, count) in all {
        places.insert(name, start);
        start += count;
    }
    let Ok(model) = parameters::map_data(model, |path, shape| -> Result<_, Infallible> {
        let start = places[path];
        let mut values = numbers[start..start + shape.iter().product::<usize>()].to_vec();
        let is_norm = path.contains("norm") && path.ends_with("weight");
        let fan_in = shape[1..].iter().product::<usize>() as f32;
        for value in &mut values {
            *value = match shape.len() {
                1 => 0.2 * *value + if is_norm { 1.0 } else { 0.0 },
                _ => *value / fan_in.sqrt(),
            };
        }
        Ok(Some(TensorData::new(values, shape.to_vec())))
    });
    model
}

fn adapted(weight: f64) -> UNet2dCondition<Flex> {
    let mut model = unet();
    let (adapter, origin) = cxr_lora::read(path("lcm_lora.safetensors")).unwrap();
    assert_eq!(adapter.modules.len(), MODULES, "{origin:?}");
    assert_eq!(cxr_lora::load_adapter(&mut model, &adapter, weight).unwrap(), MODULES);
    model
}

fn predict(model: &UNet2dCondition<Flex>, reference: &Reference) -> Vec<f32> {
    let context = Context::new(reference.float("context"));
    values(model.forward(reference.float("latents"), reference.timesteps("timesteps"), &context))
}

#[test]
fn an_adapter_on_every_kind_of_layer() {
    let reference = Reference::of("lcm.safetensors");
    let expected = reference.values("adapted");
    assert_meets("UNet", &predict(&unet(), &reference), &reference.values("base"));
    assert_meets("UNet with LCM-LoRA", &predict(&adapted(1.0), &reference), &expected);
    assert_meets("at half the weight", &predict(&adapted(0.5), &reference), &reference.values("half"));
    assert_misses("UNet without", &predict(&unet(), &reference), &expected);
    let mut model = adapted(1.0);
    assert_eq!(cxr_lora::merge_and_detach(&mut model).unwrap(), MODULES);
    assert_meets("merged", &predict(&model, &reference), &expected);
}

/// The names of the file are those of Stable Diffusion 1.5 itself.
#[test]
fn its_modules_are_those_of_stable_diffusion() {
    let (adapter, _) = cxr_lora::read(path("lcm_lora.safetensors")).unwrap();
    // kohya's names have underscores for dots
    let names: Vec<&str> = adapter.modules.keys().map(|module| module.name.as_str()).collect();
    let of = |end: &str| {
        let end = end.replace('.', "_");
        names.iter().filter(|name| name.ends_with(&end)).count()
    };
    let kinds =
        [".to_q", ".to_out.0", ".ff.net.0.proj", ".proj_in", ".conv1", ".conv_shortcut", ".time_emb_proj"];
    assert_eq!(kinds.map(of), [32, 32, 16, 16, 22, 14, 22]);
    assert_eq!([".downsamplers.0.conv", ".upsamplers.0.conv"].map(of), [3, 3]);
}

#[test]
fn four_steps() {
    let reference = Reference::of("lcm.safetensors");
    let context = Context::new(reference.float("context"));
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    let draw = |model: &UNet2dCondition<Flex>, sampler: Sampler| {
        let mut generator = TorchGenerator::new(3);
        let sampled = sample(
            &sampler,
            &schedule,
            Steps::new(4),
            reference.float("latents"),
            |x, t| model.forward(x, Tensor::from_floats([t as f32; 2], &Default::default()), &context),
            |_, shape| {
                let numbers = generator.randn(shape.iter().product());
                Tensor::from_data(TensorData::new(numbers, shape), &Default::default())
            },
            |_| ControlFlow::Continue(()),
        );
        values(sampled.unwrap().latents)
    };
    let expected = reference.values("four_steps");
    assert_meets("four steps of LCM", &draw(&adapted(1.0), Sampler::Lcm), &expected);
    assert_misses("without the adapter", &draw(&unet(), Sampler::Lcm), &expected);
    assert_misses("four steps of Euler ancestral", &draw(&adapted(1.0), Sampler::EulerAncestral), &expected);
}
