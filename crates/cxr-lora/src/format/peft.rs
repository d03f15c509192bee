//! A PEFT folder: `adapter_model.safetensors` with `base_model.model.M.lora_A.weight`, and `adapter_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use cxr_core::atomic::AtomicDir;

use super::diffusers::{split_component, strip_factor};
use super::peft_config::PeftConfig;
use super::{Factor, Format, Parsed, path_of, save, tensors};
use crate::weights::{Adapter, UNET};
use crate::{LoraError, Result};

const PREFIX: &str = "base_model.model.";
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

pub(super) fn parse(key: &str) -> Option<Parsed> {
    let (stem, factor) = strip_factor(key.strip_prefix(PREFIX)?)?;
    // PEFT wraps one model and does not say which; a prefix is there only if that model is a whole pipeline.
    let (component, path) = split_component(stem);
    Some(Parsed::path(Format::Peft, component, path, factor))
}

/// The settings in the file beside the weights, for whichever component.
pub(super) fn settings(weights: &Path) -> Result<BTreeMap<String, PeftConfig>> {
    let path = weights.with_file_name(CONFIG);
    let text =
        std::fs::read_to_string(&path).map_err(|source| LoraError::Io { path: path.clone(), source })?;
    let what = path.display().to_string();
    let json =
        serde_json::from_str(&text).map_err(|source| LoraError::Json { what: what.clone(), source })?;
    let config = PeftConfig::from_json(json, &what)?;
    Ok([UNET, crate::TEXT_ENCODER].map(|component| (component.to_owned(), config.clone())).into())
}

pub(super) fn write(path: &Path, adapter: &Adapter) -> Result<()> {
    let refuse =
        |reason| LoraError::CannotWrite { module: path.display().to_string(), format: Format::Peft, reason };
    let [component] = adapter.components()[..] else {
        return Err(refuse("a PEFT folder holds the adapter of one model; split the components"));
    };
    if path.exists() {
        return Err(refuse("the folder exists; remove it or choose another"));
    }
    let (tensors, header) = tensors(adapter, Format::Peft, false, |module, factor| {
        let factor = if factor == Factor::A { "lora_A" } else { "lora_B" };
        Ok(format!("{PREFIX}{}.{factor}.weight", path_of(module, Format::Peft)?))
    })?;
    let mut config = PeftConfig::describe(adapter, component).to_json()?;
    config.insert("peft_type".to_owned(), "LORA".into());
    config.insert("task_type".to_owned(), serde_json::Value::Null);
    config.insert("inference_mode".to_owned(), true.into());
    let json = serde_json::to_vec_pretty(&config)
        .map_err(|source| LoraError::Json { what: CONFIG.to_owned(), source })?;

    let io = |source| LoraError::Io { path: path.to_owned(), source };
    let folder = AtomicDir::new(path).map_err(io)?;
    std::fs::write(folder.path().join(CONFIG), json).map_err(io)?;
    save(&folder.path().join(WEIGHTS), &tensors, &header)?;
    folder.commit().map_err(io)
}
