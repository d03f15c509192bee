//! `lora_unet_M.lora_down.weight` with underscores for dots, and alpha as a tensor; also with the block names of
//! the original latent diffusion code.

use std::path::Path;

use super::{Factor, Format, Parsed, save, tensors};
use crate::weights::{Adapter, ModuleKey, ModuleName, TEXT_ENCODER, UNET, flatten};
use crate::{LoraError, Result};

const PREFIXES: [(&str, &str); 2] = [("lora_unet_", UNET), ("lora_te_", TEXT_ENCODER)];

pub(super) fn parse(key: &str) -> Option<Parsed> {
    // A flattened name has no dot, so the first one ends it.
    let (stem, suffix) = key.split_once('.')?;
    let factor = match suffix {
        "lora_down.weight" => Factor::A,
        "lora_up.weight" => Factor::B,
        "alpha" => Factor::Alpha,
        _ => return None,
    };
    let (component, name) =
        PREFIXES.iter().find_map(|(prefix, component)| Some((*component, stem.strip_prefix(prefix)?)))?;
    let (format, name) = match from_ldm(name) {
        Some(name) => (Format::KohyaLdm, name),
        None => (Format::Kohya, name.to_owned()),
    };
    let module = ModuleKey { component: component.to_owned(), name: ModuleName::Flattened(name) };
    Some(Parsed { format, module, factor })
}

/// diffusers' flattened name for an attention block named as in the original code.
///
/// `input_blocks.N` counts the convolution at the entry as 0 and, in each of four stages, two blocks and a
/// downsampler; `output_blocks.N` three blocks per stage. The attention of a block is its part 1.
fn from_ldm(name: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix("middle_block_1_") {
        return Some(format!("mid_block_attentions_0_{rest}"));
    }
    let numbered = |prefix: &str| {
        let (number, rest) = name.strip_prefix(prefix)?.split_once('_')?;
        Some((number.parse::<usize>().ok()?, rest.strip_prefix("1_")?))
    };
    if let Some((number, rest)) = numbered("input_blocks_") {
        let (stage, block) = (number.checked_sub(1)? / 3, (number - 1) % 3);
        return (block < 2).then(|| format!("down_blocks_{stage}_attentions_{block}_{rest}"));
    }
    let (number, rest) = numbered("output_blocks_")?;
    Some(format!("up_blocks_{}_attentions_{}_{rest}", number / 3, number % 3))
}

pub(super) fn write(path: &Path, adapter: &Adapter) -> Result<()> {
    let (tensors, header) = tensors(adapter, Format::Kohya, true, |module, factor| {
        let prefix = PREFIXES.iter().find(|(_, component)| *component == module.component);
        let (prefix, _) = prefix.ok_or_else(|| LoraError::CannotWrite {
            module: module.to_string(),
            format: Format::Kohya,
            reason: "the format has prefixes for `unet` and `text_encoder` only",
        })?;
        let suffix = match factor {
            Factor::A => "lora_down.weight",
            Factor::B => "lora_up.weight",
            Factor::Alpha => "alpha",
        };
        Ok(format!("{prefix}{}.{suffix}", flatten(module.name.as_str())))
    })?;
    save(path, &tensors, &header)
}
