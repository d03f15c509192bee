//! What holds for all networks.

use burn::backend::Autodiff;
use burn::module::Module;
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::text::{ClipTextConfig, ClipTextModel};
use cxr_ldm::unet::{Context, UNet2dCondition, UNetConfig};
use cxr_ldm::vae::{AutoencoderKl, AutoencoderKlConfig, Moments};

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
    for (layers, parameters, expected) in [
        // 4 transformers with 8 projections and 2 layers of feed-forward
        (cxr_lora::layers(&unet).unwrap(), parameters::list::<Flex, _>(&unet), 4 * 10),
        (cxr_lora::layers(&text).unwrap(), parameters::list::<Flex, _>(&text), 2 * 6),
    ] {
        assert_eq!(layers.len(), expected);
        for layer in layers {
            let weight = format!("{}.weight", layer.path);
            let found = parameters.iter().find(|p| p.path == weight).unwrap_or_else(|| panic!("no {weight}"));
            assert_eq!(found.shape, layer.shape);
        }
    }
}
