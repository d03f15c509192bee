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
    let name = ModuleName::Flattened(name).published(component);
    let module = ModuleKey { component: component.to_owned(), name };
    Some(Parsed { format, module, factor })
}

/// diffusers' flattened name for a layer named as in the original code.
///
/// `input_blocks.N` counts the convolution at the entry as 0 and, in each of four stages, two blocks and a
/// downsampler; `output_blocks.N` three blocks per stage. Part 0 of a block is its residual block, part 1 its
/// attention; an upsampler comes after what is there.
fn from_ldm(name: &str) -> Option<String> {
    let plain = match name {
        "time_embed_0" => Some("time_embedding_linear_1"),
        "time_embed_2" => Some("time_embedding_linear_2"),
        "input_blocks_0_0" => Some("conv_in"),
        "out_2" => Some("conv_out"),
        _ => None,
    };
    if let Some(name) = plain {
        return Some(name.to_owned());
    }
    if let Some(rest) = name.strip_prefix("middle_block_") {
        return Some(match rest.split_once('_')? {
            ("0", rest) => format!("mid_block_resnets_0_{}", of_resnet(rest)?),
            ("1", rest) => format!("mid_block_attentions_0_{rest}"),
            ("2", rest) => format!("mid_block_resnets_1_{}", of_resnet(rest)?),
            _ => return None,
        });
    }
    let numbered = |prefix: &str| {
        let (number, rest) = name.strip_prefix(prefix)?.split_once('_')?;
        let (part, rest) = rest.split_once('_')?;
        Some((number.parse::<usize>().ok()?, part, rest))
    };
    if let Some((number, part, rest)) = numbered("input_blocks_") {
        let (stage, block) = (number.checked_sub(1)? / 3, (number - 1) % 3);
        let in_stage = match (block, part, rest) {
            (2, "0", "op") => "downsamplers_0_conv".to_owned(),
            (0 | 1, "0", _) => format!("resnets_{block}_{}", of_resnet(rest)?),
            (0 | 1, "1", _) => format!("attentions_{block}_{rest}"),
            _ => return None,
        };
        return Some(format!("down_blocks_{stage}_{in_stage}"));
    }
    let (number, part, rest) = numbered("output_blocks_")?;
    let (stage, block) = (number / 3, number % 3);
    let in_stage = match (part, rest) {
        ("1" | "2", "conv") => "upsamplers_0_conv".to_owned(),
        ("0", _) => format!("resnets_{block}_{}", of_resnet(rest)?),
        ("1", _) => format!("attentions_{block}_{rest}"),
        _ => return None,
    };
    Some(format!("up_blocks_{stage}_{in_stage}"))
}

/// diffusers' name for a layer of a residual block.
fn of_resnet(name: &str) -> Option<&'static str> {
    Some(match name {
        "in_layers_2" => "conv1",
        "emb_layers_1" => "time_emb_proj",
        "out_layers_3" => "conv2",
        "skip_connection" => "conv_shortcut",
        _ => return None,
    })
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
