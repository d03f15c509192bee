//! Keys, one by one; whole files are in `tests/it`.

use super::*;
use crate::weights::{TEXT_ENCODER, UNET, flatten};

const DOWN: &str = "down_blocks.0.attentions.0.transformer_blocks.0";
const TEXT: &str = "text_model.encoder.layers.3";

/// The module that a key is of, as `Display` shows it, with its format and factor.
fn parsed(key: &str) -> (Format, String, Factor) {
    let parsed = parse(key).unwrap_or_else(|| panic!("`{key}` is not understood"));
    (parsed.format, parsed.module.to_string(), parsed.factor)
}

#[test]
fn every_scheme_is_told_from_the_others() {
    use Factor::{A, Alpha, B};
    use Format::{AttnProcessor, Diffusers, DiffusersLora, Kohya, KohyaLdm, Peft};
    let to_q = format!("{UNET}.{DOWN}.attn1.to_q");
    let to_out = format!("{UNET}.{DOWN}.attn1.to_out.0");
    let q_proj = format!("{TEXT_ENCODER}.{TEXT}.self_attn.q_proj");
    let out_proj = format!("{TEXT_ENCODER}.{TEXT}.self_attn.out_proj");
    let flat = |stem: &str| {
        let (component, path) = stem.split_once('.').unwrap();
        format!("{component}.{}", flatten(path))
    };
    let cases = [
        (format!("unet.{DOWN}.attn1.to_q.lora_A.weight"), Diffusers, to_q.clone(), A),
        (format!("{DOWN}.attn1.to_q.lora_B.weight"), Diffusers, to_q.clone(), B),
        (format!("text_encoder.{TEXT}.self_attn.q_proj.lora_A.weight"), Diffusers, q_proj.clone(), A),
        // transformers 5 dropped the first part of the path
        (
            "text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight".to_owned(),
            Diffusers,
            q_proj.clone(),
            A,
        ),
        ("lora_te_encoder_layers_3_self_attn_q_proj.lora_up.weight".to_owned(), Kohya, flat(&q_proj), B),
        (format!("unet.{DOWN}.attn1.to_out.0.lora.down.weight"), DiffusersLora, to_out.clone(), A),
        (format!("unet.{DOWN}.attn1.to_q.lora.up.weight"), DiffusersLora, to_q.clone(), B),
        (
            format!("text_encoder.{TEXT}.self_attn.q_proj.lora_linear_layer.up.weight"),
            DiffusersLora,
            q_proj.clone(),
            B,
        ),
        (format!("{DOWN}.attn1.processor.to_q_lora.down.weight"), AttnProcessor, to_q.clone(), A),
        (format!("unet.{DOWN}.attn1.processor.to_out_lora.up.weight"), AttnProcessor, to_out.clone(), B),
        (format!("text_encoder.{TEXT}.self_attn.to_q_lora.down.weight"), AttnProcessor, q_proj.clone(), A),
        (format!("text_encoder.{TEXT}.self_attn.to_out_lora.up.weight"), AttnProcessor, out_proj, B),
        (format!("base_model.model.{DOWN}.attn1.to_q.lora_A.weight"), Peft, to_q.clone(), A),
        (format!("base_model.model.unet.{DOWN}.attn1.to_q.lora_B.weight"), Peft, to_q.clone(), B),
        (format!("lora_unet_{}_attn1_to_out_0.lora_down.weight", flatten(DOWN)), Kohya, flat(&to_out), A),
        (format!("lora_unet_{}_attn1_to_q.alpha", flatten(DOWN)), Kohya, flat(&to_q), Alpha),
        (format!("lora_te_{}_self_attn_q_proj.lora_up.weight", flatten(TEXT)), Kohya, flat(&q_proj), B),
        (
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight".to_owned(),
            KohyaLdm,
            flat(&to_q),
            B,
        ),
    ];
    for (key, format, module, factor) in cases {
        assert_eq!(parsed(&key), (format, module, factor), "{key}");
    }
}

#[test]
fn other_keys_are_not_understood() {
    for key in [
        "",
        "weight",
        "unet.to_q.weight",
        "unet.to_q.lora_A.bias",
        "base_model.model.head.weight",
        "lora_unet_to_q.lora_mid.weight",
        "lora_te2_to_q.lora_up.weight",
        "attn1.to_q_lora.down.weight",
        "attn1.processor.to_x_lora.down.weight",
        "text_encoder.self_attn.to_x_lora.down.weight",
    ] {
        assert_eq!(parse(key), None, "{key}");
    }
}

/// The blocks of Stable Diffusion 1.x that hold attentions, in the order of the network.
#[test]
fn block_names_of_the_original_code() {
    let names = [
        ("input_blocks_1_1", "down_blocks_0_attentions_0"),
        ("input_blocks_2_1", "down_blocks_0_attentions_1"),
        ("input_blocks_4_1", "down_blocks_1_attentions_0"),
        ("input_blocks_5_1", "down_blocks_1_attentions_1"),
        ("input_blocks_7_1", "down_blocks_2_attentions_0"),
        ("input_blocks_8_1", "down_blocks_2_attentions_1"),
        ("middle_block_1", "mid_block_attentions_0"),
        ("output_blocks_3_1", "up_blocks_1_attentions_0"),
        ("output_blocks_4_1", "up_blocks_1_attentions_1"),
        ("output_blocks_5_1", "up_blocks_1_attentions_2"),
        ("output_blocks_6_1", "up_blocks_2_attentions_0"),
        ("output_blocks_7_1", "up_blocks_2_attentions_1"),
        ("output_blocks_8_1", "up_blocks_2_attentions_2"),
        ("output_blocks_9_1", "up_blocks_3_attentions_0"),
        ("output_blocks_10_1", "up_blocks_3_attentions_1"),
        ("output_blocks_11_1", "up_blocks_3_attentions_2"),
    ];
    for (ldm, diffusers) in names {
        for tail in ["proj_in", "transformer_blocks_0_attn2_to_out_0", "transformer_blocks_0_ff_net_2"] {
            let (format, module, _) = parsed(&format!("lora_unet_{ldm}_{tail}.lora_down.weight"));
            assert_eq!((format, module), (Format::KohyaLdm, format!("unet.{diffusers}_{tail}")));
        }
    }
    // Residual blocks, what changes the size, and what stands around the blocks.
    let names = [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks_0_resnets_0_conv1"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_4_0_skip_connection", "down_blocks_1_resnets_0_conv_shortcut"),
        ("input_blocks_11_0_out_layers_3", "down_blocks_3_resnets_1_conv2"),
        ("middle_block_0_emb_layers_1", "mid_block_resnets_0_time_emb_proj"),
        ("middle_block_2_in_layers_2", "mid_block_resnets_1_conv1"),
        ("output_blocks_2_1_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_2_conv", "up_blocks_1_upsamplers_0_conv"),
        ("output_blocks_11_0_skip_connection", "up_blocks_3_resnets_2_conv_shortcut"),
        ("time_embed_0", "time_embedding_linear_1"),
        ("time_embed_2", "time_embedding_linear_2"),
        ("out_2", "conv_out"),
    ];
    for (ldm, diffusers) in names {
        let (format, module, _) = parsed(&format!("lora_unet_{ldm}.lora_down.weight"));
        assert_eq!((format, module), (Format::KohyaLdm, format!("unet.{diffusers}")));
    }
    // Nothing of that network.
    for other in [
        "input_blocks_0_1_x",
        "input_blocks_3_1_x",
        "input_blocks_1_0_norm",
        "input_blocks_x_1_y",
        "middle_block_3_x",
    ] {
        let (format, module, _) = parsed(&format!("lora_unet_{other}.alpha"));
        assert_eq!((format, module), (Format::Kohya, format!("unet.{other}")));
    }
}
