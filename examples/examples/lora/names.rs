//! The names of a model's layers, which kohya's files write with underscores for dots.

use anyhow::{Context, Result};
use cxr::device::{DeviceSpec, Program, built, dispatch};
use cxr::kernels::DiffusionAutodiff;
use cxr::ldm::pipeline::{LoadOptions, ModelSource};
use cxr::ldm::text::ClipTextConfig;
use cxr::ldm::unet::UNetConfig;
use cxr::ldm::weights::ModelFiles;
use cxr::lora::{self, Adapter, ModuleName, TEXT_ENCODER, UNET};

/// The layers of the two components that adapters are made for.
pub(crate) struct Names {
    unet: Vec<String>,
    text_encoder: Vec<String>,
}

impl Names {
    /// Of a model; of Stable Diffusion 1.x without one.
    pub(crate) fn of(model: Option<&str>) -> Result<Self> {
        let (unet, text) = match model {
            None => (UNetConfig::sd15(), ClipTextConfig::sd15()),
            Some(model) => {
                let source = ModelSource::from(model.to_owned());
                let files = ModelFiles::locate(&source, &LoadOptions::default()).context("--model")?;
                let config = files.config().context("--model")?;
                (config.unet, config.text)
            }
        };
        // No weight is made for this, so the device does not matter.
        let device = if built().contains(&"flex") { "flex" } else { "auto" };
        dispatch(device.parse::<DeviceSpec>()?, List { unet, text })?
    }

    /// The adapter with its modules named by path.
    pub(crate) fn resolve(&self, adapter: &Adapter) -> Result<Adapter, lora::LoraError> {
        let of = |adapter: &Adapter, component, paths: &[String]| {
            adapter.resolve(component, &paths.iter().map(String::as_str).collect::<Vec<_>>())
        };
        of(&of(adapter, UNET, &self.unet)?, TEXT_ENCODER, &self.text_encoder)
    }
}

struct List {
    unet: UNetConfig,
    text: ClipTextConfig,
}

impl Program for List {
    type Output = Result<Names>;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _name: &str) -> Self::Output {
        let paths = |layers: Vec<lora::LayerInfo>| layers.into_iter().map(|layer| layer.path).collect();
        Ok(Names {
            unet: paths(lora::layers(&self.unet.init::<B>(&device))?),
            text_encoder: paths(lora::layers(&self.text.init::<B>(&device))?),
        })
    }
}

/// Whether a module of the adapter stands under a name with underscores for dots.
pub(crate) fn is_flattened(adapter: &Adapter) -> bool {
    adapter.modules.keys().any(|key| matches!(key.name, ModuleName::Flattened(_)))
}
