//! The names in single-file checkpoints, as CompVis' latent diffusion writes them, and diffusers' names of the same
//! tensors.

use cxr_core::tensor_file::TensorFile;

use super::names::{Component, canonical};
use super::parts::ModelConfig;
use crate::Error;
use crate::unet::UpBlockType;

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const TEXT: &str = "cond_stage_model.transformer.";

/// What is beside the networks: averaged copies of weights, losses, the filter of pictures.
const IGNORED_PREFIXES: [&str; 4] =
    ["model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "safety_checker."];

/// Tables of the noise schedule, which follow from its configuration.
const IGNORED: [&str; 15] = [
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
];

/// What a key of a single-file checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    /// A tensor of a network, by its [`canonical`] name.
    Tensor(Component, String),
    /// No weights of a network that is used.
    Ignored,
    /// Nothing that is known.
    Unknown,
}

/// Reads a key of a checkpoint of `config`, on which the places of blocks depend.
pub(super) fn read_key(config: &ModelConfig, key: &str) -> Key {
    if IGNORED.contains(&key) || IGNORED_PREFIXES.iter().any(|prefix| key.starts_with(prefix)) {
        return Key::Ignored;
    }
    if let Some(name) = key.strip_prefix(TEXT) {
        return canonical(Component::TextEncoder, name)
            .map_or(Key::Ignored, |name| Key::Tensor(Component::TextEncoder, name));
    }
    let (component, name) = if let Some(name) = key.strip_prefix(UNET) {
        (Component::Unet, unet(config, name))
    } else if let Some(name) = key.strip_prefix(VAE) {
        (Component::Vae, vae(config, name))
    } else {
        return Key::Unknown;
    };
    name.map_or(Key::Unknown, |name| Key::Tensor(component, name))
}

/// `openaimodel.UNetModel`: blocks are counted through all levels, samplers among them.
fn unet(config: &ModelConfig, name: &str) -> Option<String> {
    let layers = config.unet.layers_per_block;
    let block = |number: &str| {
        let number: usize = number.parse().ok()?;
        Some((number / (layers + 1), number % (layers + 1)))
    };
    let parts: Vec<&str> = name.split('.').collect();
    Some(match parts[..] {
        ["time_embed", "0", tensor] => format!("time_embedding.linear_1.{tensor}"),
        ["time_embed", "2", tensor] => format!("time_embedding.linear_2.{tensor}"),
        ["out", "0", tensor] => format!("conv_norm_out.{tensor}"),
        ["out", "2", tensor] => format!("conv_out.{tensor}"),
        ["input_blocks", "0", "0", tensor] => format!("conv_in.{tensor}"),
        ["input_blocks", number, part, ref rest @ ..] => {
            let number = number.parse::<usize>().ok()?.checked_sub(1)?;
            let (level, layer) = block(&number.to_string())?;
            match (part, rest) {
                ("0", ["op", tensor]) if layer == layers => {
                    format!("down_blocks.{level}.downsamplers.0.conv.{tensor}")
                }
                _ if layer == layers => return None,
                ("0", rest) => format!("down_blocks.{level}.resnets.{layer}.{}", unet_resnet(rest)?),
                ("1", rest) => format!("down_blocks.{level}.attentions.{layer}.{}", rest.join(".")),
                _ => return None,
            }
        }
        ["middle_block", "0", ref rest @ ..] => format!("mid_block.resnets.0.{}", unet_resnet(rest)?),
        ["middle_block", "1", ref rest @ ..] => format!("mid_block.attentions.0.{}", rest.join(".")),
        ["middle_block", "2", ref rest @ ..] => format!("mid_block.resnets.1.{}", unet_resnet(rest)?),
        ["output_blocks", number, part, ref rest @ ..] => {
            let (level, layer) = block(number)?;
            // the sampler comes after the transformer, where there is one
            let attention = *config.unet.up_block_types.get(level)? == UpBlockType::CrossAttnUpBlock2D;
            let sampler = if attention { "2" } else { "1" };
            match (part, rest) {
                (part, ["conv", tensor]) if layer == layers && part == sampler => {
                    format!("up_blocks.{level}.upsamplers.0.conv.{tensor}")
                }
                ("0", rest) => format!("up_blocks.{level}.resnets.{layer}.{}", unet_resnet(rest)?),
                ("1", rest) if attention => {
                    format!("up_blocks.{level}.attentions.{layer}.{}", rest.join("."))
                }
                _ => return None,
            }
        }
        _ => return None,
    })
}

fn unet_resnet(parts: &[&str]) -> Option<String> {
    let (layer, tensor) = match *parts {
        ["in_layers", "0", tensor] => ("norm1", tensor),
        ["in_layers", "2", tensor] => ("conv1", tensor),
        ["emb_layers", "1", tensor] => ("time_emb_proj", tensor),
        ["out_layers", "0", tensor] => ("norm2", tensor),
        ["out_layers", "3", tensor] => ("conv2", tensor),
        ["skip_connection", tensor] => ("conv_shortcut", tensor),
        _ => return None,
    };
    Some(format!("{layer}.{tensor}"))
}

/// `model.Encoder` and `model.Decoder`: the decoder counts its levels from the finest, though it ends there.
fn vae(config: &ModelConfig, name: &str) -> Option<String> {
    let levels = config.vae.block_out_channels.len();
    let parts: Vec<&str> = name.split('.').collect();
    Some(match parts[..] {
        ["quant_conv" | "post_quant_conv", _] => name.to_string(),
        [side @ ("encoder" | "decoder"), ref rest @ ..] => {
            let rest = match *rest {
                ["conv_in" | "conv_out", _] => rest.join("."),
                ["norm_out", tensor] => format!("conv_norm_out.{tensor}"),
                ["mid", "block_1", ref rest @ ..] => format!("mid_block.resnets.0.{}", vae_resnet(rest)?),
                ["mid", "block_2", ref rest @ ..] => format!("mid_block.resnets.1.{}", vae_resnet(rest)?),
                ["mid", "attn_1", layer, tensor] => {
                    let layer = match layer {
                        "norm" => "group_norm",
                        "q" => "to_q",
                        "k" => "to_k",
                        "v" => "to_v",
                        "proj_out" => "to_out.0",
                        _ => return None,
                    };
                    format!("mid_block.attentions.0.{layer}.{tensor}")
                }
                ["down", level, "block", layer, ref rest @ ..] if side == "encoder" => {
                    format!("down_blocks.{level}.resnets.{layer}.{}", vae_resnet(rest)?)
                }
                ["down", level, "downsample", "conv", tensor] if side == "encoder" => {
                    format!("down_blocks.{level}.downsamplers.0.conv.{tensor}")
                }
                ["up", level, ref rest @ ..] if side == "decoder" => {
                    let level = levels.checked_sub(level.parse::<usize>().ok()?.checked_add(1)?)?;
                    match *rest {
                        ["block", layer, ref rest @ ..] => {
                            format!("up_blocks.{level}.resnets.{layer}.{}", vae_resnet(rest)?)
                        }
                        ["upsample", "conv", tensor] => {
                            format!("up_blocks.{level}.upsamplers.0.conv.{tensor}")
                        }
                        _ => return None,
                    }
                }
                _ => return None,
            };
            format!("{side}.{rest}")
        }
        _ => return None,
    })
}

fn vae_resnet(parts: &[&str]) -> Option<String> {
    match *parts {
        [layer @ ("norm1" | "conv1" | "norm2" | "conv2"), tensor] => Some(format!("{layer}.{tensor}")),
        ["nin_shortcut", tensor] => Some(format!("conv_shortcut.{tensor}")),
        _ => None,
    }
}

/// Refuses by name what is no checkpoint of Stable Diffusion 1.x.
///
/// # Errors
/// [`Error::Checkpoint`] saying what it is instead.
pub(super) fn refuse_others(file: &TensorFile, config: &ModelConfig) -> Result<(), Error> {
    let refuse = |problem: String| Err(Error::Checkpoint { path: file.path().to_path_buf(), problem });
    let has = |prefix: &str| file.names().any(|name| name.starts_with(prefix));
    let other = |kind: &str| {
        refuse(format!(
            "a checkpoint of {kind}; expected Stable Diffusion 1.x, the only one that is implemented"
        ))
    };
    let dimension = |key: &str| file.info(key).and_then(|info| info.shape.get(1).copied());
    let context = dimension("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight");
    if has("conditioner.") || has("model.diffusion_model.label_emb.") {
        return other("Stable Diffusion XL");
    }
    if has("model.diffusion_model.joint_blocks.") {
        return other("Stable Diffusion 3");
    }
    if has("model.diffusion_model.double_blocks.") || has("double_blocks.") {
        return other("FLUX");
    }
    if has("cond_stage_model.model.") || context == Some(1024) && config.unet.cross_attention_dim != 1024 {
        return other("Stable Diffusion 2.x");
    }
    if dimension("model.diffusion_model.input_blocks.0.0.weight") == Some(9) && config.unet.in_channels != 9 {
        return other("Stable Diffusion for inpainting");
    }
    if has("control_model.") {
        return other("a ControlNet");
    }
    let missing: Vec<String> = [UNET, VAE, TEXT]
        .into_iter()
        .filter(|prefix| !has(prefix))
        .map(|prefix| format!("{prefix}*"))
        .collect();
    match missing.len() {
        0 => Ok(()),
        3 if has("lora_")
            || file.names().any(|name| name.contains("lora_A.") || name.contains("lora.down")) =>
        {
            refuse("a LoRA adapter, not a model; load a model and add it to that".into())
        }
        3 => {
            let first = file.names().next().unwrap_or("nothing");
            refuse(format!(
                "no single-file checkpoint: expected keys {}, found {first} first of {}; one network of a diffusers \
                 folder is loaded with its folder",
                missing.join(", "),
                file.names().len()
            ))
        }
        _ => refuse(format!("not a whole model: no keys {}", missing.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_only_look_alike_are_unknown() {
        let config = ModelConfig::sd15();
        for key in [
            "model.diffusion_model.input_blocks.0.1.weight",
            "model.diffusion_model.input_blocks.3.0.in_layers.0.weight",
            "model.diffusion_model.input_blocks.1.0.op.weight",
            "model.diffusion_model.input_blocks.x.0.op.weight",
            "model.diffusion_model.output_blocks.2.2.conv.weight",
            "model.diffusion_model.output_blocks.0.1.norm.weight",
            "model.diffusion_model.output_blocks.99.0.in_layers.0.weight",
            "model.diffusion_model.output_blocks.18446744073709551615.0.in_layers.0.weight",
            "model.diffusion_model.middle_block.3.in_layers.0.weight",
            "model.diffusion_model.conv_in.weight",
            "first_stage_model.encoder.up.0.block.0.norm1.weight",
            "first_stage_model.decoder.down.0.block.0.norm1.weight",
            "first_stage_model.decoder.up.4.block.0.norm1.weight",
            "first_stage_model.decoder.up.18446744073709551615.block.0.norm1.weight",
            "first_stage_model.encoder.mid.attn_1.qkv.weight",
            "first_stage_model.encoder.conv_in",
            "loss.weight",
            "",
        ] {
            assert_eq!(read_key(&config, key), Key::Unknown, "{key}");
        }
        for key in
            ["betas", "model_ema.decay", "first_stage_model.loss.logvar", "safety_checker.concept_embeds"]
        {
            assert_eq!(read_key(&config, key), Key::Ignored, "{key}");
        }
        let ids = "cond_stage_model.transformer.text_model.embeddings.position_ids";
        assert_eq!(read_key(&config, ids), Key::Ignored);
    }
}
