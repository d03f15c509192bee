//! `unet.M.lora_A.weight`, as diffusers writes with PEFT: rank and alpha stand in the header, as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cxr_core::tensor_file::TensorFile;
use serde_json::{Map, Value};

use super::peft_config::PeftConfig;
use super::{Factor, Format, Parsed, path_of, save, tensors};
use crate::weights::{Adapter, TEXT_ENCODER, UNET};
use crate::{LoraError, Result};

/// diffusers' name for the header entry.
const SETTINGS_KEY: &str = "lora_adapter_metadata";

pub(super) fn parse(key: &str) -> Option<Parsed> {
    let (stem, factor) = strip_factor(key)?;
    let (component, path) = split_component(stem);
    Some(Parsed::path(Format::Diffusers, component, path, factor))
}

/// The key without the factor's name at its end, in PEFT's spelling.
pub(super) fn strip_factor(key: &str) -> Option<(&str, Factor)> {
    let a = key.strip_suffix(".lora_A.weight").map(|stem| (stem, Factor::A));
    a.or_else(|| key.strip_suffix(".lora_B.weight").map(|stem| (stem, Factor::B)))
}

/// The component that a key's prefix names, and the rest; without a prefix, the UNet.
pub(super) fn split_component(stem: &str) -> (&str, &str) {
    for component in [UNET, TEXT_ENCODER] {
        if let Some(path) = stem.strip_prefix(component).and_then(|rest| rest.strip_prefix('.')) {
            return (component, path);
        }
    }
    (UNET, stem)
}

/// The settings of each component, if the header has them.
pub(super) fn settings(
    file: &TensorFile,
    parsed: &[(String, Parsed)],
) -> Result<BTreeMap<String, PeftConfig>> {
    let Some(json) = file.metadata().get(SETTINGS_KEY) else { return Ok(BTreeMap::new()) };
    let what = || format!("header entry `{SETTINGS_KEY}`");
    let map: Map<String, Value> =
        serde_json::from_str(json).map_err(|source| LoraError::Json { what: what(), source })?;
    let components: BTreeSet<&str> = parsed.iter().map(|(_, p)| p.module.component.as_str()).collect();
    let mut settings = BTreeMap::new();
    for component in components {
        let prefix = format!("{component}.");
        let mut of_component: Map<String, Value> = map
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_owned(), value.clone())))
            .collect();
        // A model saved on its own, not as part of a pipeline, has no prefixes.
        if of_component.is_empty() && map.contains_key("r") {
            of_component = map.clone();
        }
        if !of_component.is_empty() {
            let name = format!("{} for `{component}`", what());
            settings.insert(component.to_owned(), PeftConfig::from_json(of_component.into(), &name)?);
        }
    }
    Ok(settings)
}

pub(super) fn write(path: &Path, adapter: &Adapter) -> Result<()> {
    let (tensors, mut header) = tensors(adapter, Format::Diffusers, false, |module, factor| {
        let name = path_of(module, Format::Diffusers)?;
        let factor = if factor == Factor::A { "lora_A" } else { "lora_B" };
        Ok(format!("{}.{name}.{factor}.weight", module.component))
    })?;
    let mut settings = Map::new();
    for component in adapter.components() {
        if component != UNET && component != TEXT_ENCODER {
            return Err(LoraError::CannotWrite {
                module: component.to_owned(),
                format: Format::Diffusers,
                reason: "the file could not be told from one for the unet; use `unet` or `text_encoder`",
            });
        }
        for (key, value) in PeftConfig::describe(adapter, component).to_json()? {
            settings.insert(format!("{component}.{key}"), value);
        }
    }
    header.insert(SETTINGS_KEY.to_owned(), Value::from(settings).to_string());
    save(path, &tensors, &header)
}
