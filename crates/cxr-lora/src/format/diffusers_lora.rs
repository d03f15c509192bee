//! `unet.M.lora.down.weight`, and `text_encoder.M.lora_linear_layer.down.weight` beside it; alpha is the rank.

use super::diffusers::split_component;
use super::{Factor, Format, Parsed};

pub(super) fn parse(key: &str) -> Option<Parsed> {
    let (stem, factor) = strip_factor(key)?;
    let module = stem.strip_suffix(".lora").or_else(|| stem.strip_suffix(".lora_linear_layer"))?;
    let (component, path) = split_component(module);
    Some(Parsed::path(Format::DiffusersLora, component, path, factor))
}

/// The key without `.down.weight` or `.up.weight`.
pub(super) fn strip_factor(key: &str) -> Option<(&str, Factor)> {
    let a = key.strip_suffix(".down.weight").map(|stem| (stem, Factor::A));
    a.or_else(|| key.strip_suffix(".up.weight").map(|stem| (stem, Factor::B)))
}
