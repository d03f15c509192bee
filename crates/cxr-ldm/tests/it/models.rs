//! What holds for all networks.

use burn::backend::Autodiff;
use burn::module::Module;
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::text::{ClipTextConfig, ClipTextModel};
use cxr_ldm::unet::{Context, UNet2dCondition, UNetConfig};
use cxr_ldm::vae::{AutoencoderKl, AutoencoderKlConfig, Moments};
use cxr_lora::{LoraConfig, TargetSet};

fn count<M: Module<Flex>>(model: &M) -> usize {
    parameters::list::<Flex, M>(model).iter().map(parameters::ParameterInfo::elements).sum()
}

#[test]
fn the_published_parameter_counts() {
    let device = Default::default();
    assert_eq!(count(&UNetConfig::sd15().init::<Flex>(&device)), 859_520_964);
    assert_eq!(count(&AutoencoderKlConfig::sd15().init::<Flex>(&device)), 83_653_863);
    assert_eq!(count(&ClipTextConfig::sd15().init::<Flex>(&device)), 123_060_480);
}

#[test]
fn models_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<UNet2dCondition<Flex>>();
    shared::<AutoencoderKl<Flex>>();
    shared::<ClipTextModel<Flex>>();
    shared::<Context<Flex>>();
    shared::<Moments<Flex>>();
    shared::<UNet2dCondition<Autodiff<Flex>>>();
    shared::<AutoencoderKl<Autodiff<Flex>>>();
}

#[test]
fn the_layers_for_adapters_are_parameters_of_the_same_path() {
    let device = Default::default();
    let unet = UNetConfig::tiny().init::<Flex>(&device);
    let text = ClipTextConfig::tiny().init::<Flex>(&device);
    let of_unet = parameters::list::<Flex, _>(&unet);
    // Whatever is a matrix or a kernel.
    let kernels = of_unet.iter().filter(|parameter| parameter.shape.len() > 1).count();
    for (layers, parameters, expected) in [
        (cxr_lora::layers(&unet).unwrap(), of_unet, kernels),
        (cxr_lora::layers(&text).unwrap(), parameters::list::<Flex, _>(&text), 2 * 6),
    ] {
        assert_eq!(layers.len(), expected);
        for layer in layers {
            let weight = format!("{}.weight", layer.path);
            let found = parameters.iter().find(|p| p.path == weight).unwrap_or_else(|| panic!("no {weight}"));
            assert_eq!(found.shape, [layer.shape.to_vec(), layer.kernel.map_or(vec![], Vec::from)].concat());
        }
    }
}

/// Of Stable Diffusion 1.5's UNet. The first two pairs of numbers are published facts of LoRA on it; the third is what
/// kohya's scripts adapt, counted in PEFT.
#[test]
fn modules_and_parameters_of_the_target_sets() {
    let unet = UNetConfig::sd15().init::<Flex>(&Default::default());
    let layers = cxr_lora::layers(&unet).unwrap();
    let paths: Vec<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
    for (targets, modules, parameters) in [
        (TargetSet::AllAttention, 128, 1_594_368),
        (TargetSet::CrossAttention, 64, 795_648),
        (TargetSet::Transformer, 192, 3_391_488),
    ] {
        let selected = targets.select(&paths).unwrap();
        assert_eq!(selected.len(), modules, "{targets}");
        let chosen = layers.iter().filter(|layer| selected.contains(&layer.path.as_str()));
        assert_eq!(
            chosen.map(|layer| 8 * (layer.shape[0] + layer.shape[1])).sum::<usize>(),
            parameters,
            "{targets}"
        );
    }
    // And as they are attached, on a small one.
    let mut unet = UNetConfig::tiny().init::<Flex>(&Default::default());
    let all = LoraConfig::new(2).with_targets(TargetSet::Transformer);
    assert_eq!(cxr_lora::attach(&mut unet, &all, 1).unwrap(), 4 * 12);
}
