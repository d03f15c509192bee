//! The embedded demonstration: its data, its model, and how the model was made.

pub mod autoencoder;
pub mod extractor;
pub mod joint;
pub mod latents;
pub mod pictures;
pub mod sharpen;
pub mod thumbnails;

use std::path::PathBuf;

/// The folder of the 1,000 NIH thumbnails.
pub fn data_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/nih-chest-64")
}

/// The folder of the embedded base model, in the diffusers layout.
pub fn model_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("model/cxr-demo-64")
}

/// The folder of the embedded small feature extractor.
pub fn extractor_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("model/cxr-small-extractor")
}

/// Sizes of the embedded autoencoder: `vae/config.json`.
pub const VAE_CONFIG: &str = r#"{
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "block_out_channels": [16, 32, 64],
  "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "out_channels": 3,
  "sample_size": 64,
  "scaling_factor": 1.0,
  "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
}
"#;

/// Sizes of the embedded UNet: `unet/config.json`.
pub const UNET_CONFIG: &str = r#"{
  "_class_name": "UNet2DConditionModel",
  "act_fn": "silu",
  "attention_head_dim": 4,
  "block_out_channels": [64, 128, 128],
  "center_input_sample": false,
  "cross_attention_dim": 64,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "downsample_padding": 1,
  "flip_sin_to_cos": true,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 1,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 16,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
}
"#;

/// Sizes of the embedded text encoder: `text_encoder/config.json`.
pub const TEXT_CONFIG: &str = r#"{
  "architectures": ["CLIPTextModel"],
  "bos_token_id": 49406,
  "eos_token_id": 49407,
  "hidden_act": "quick_gelu",
  "hidden_size": 64,
  "intermediate_size": 256,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 77,
  "model_type": "clip_text_model",
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "projection_dim": 64,
  "vocab_size": 49408
}
"#;

/// The noise schedule: `scheduler/scheduler_config.json`, Stable Diffusion's own.
pub const SCHEDULER_CONFIG: &str = r#"{
  "_class_name": "DPMSolverMultistepScheduler",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": false,
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "set_alpha_to_one": false,
  "skip_prk_steps": true,
  "steps_offset": 1
}
"#;
