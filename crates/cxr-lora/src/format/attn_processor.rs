//! `attn1.processor.to_q_lora.down.weight`: the factors belong to the attention, not to its projections, and the
//! output projection is `to_out`. The text encoder has `self_attn.to_q_lora`. Alpha is the rank.

use super::diffusers::split_component;
use super::diffusers_lora::strip_factor;
use super::{Factor, Format, Parsed};
use crate::weights::TEXT_ENCODER;

pub(super) fn parse(key: &str) -> Option<Parsed> {
    let (stem, factor) = strip_factor(key)?;
    let (attention, projection) = stem.strip_suffix("_lora")?.rsplit_once('.')?;
    let (component, attention) = split_component(attention);
    if component == TEXT_ENCODER {
        let projection = match projection {
            "to_q" => "q_proj",
            "to_k" => "k_proj",
            "to_v" => "v_proj",
            "to_out" => "out_proj",
            _ => return None,
        };
        return Some(parsed(component, attention, projection, factor));
    }
    let attention = attention.strip_suffix(".processor")?;
    let projection = match projection {
        "to_q" | "to_k" | "to_v" => projection,
        "to_out" => "to_out.0",
        _ => return None,
    };
    Some(parsed(component, attention, projection, factor))
}

fn parsed(component: &str, attention: &str, projection: &str, factor: Factor) -> Parsed {
    Parsed::path(Format::AttnProcessor, component, &format!("{attention}.{projection}"), factor)
}
