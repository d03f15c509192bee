//! The estimate of memory beside what was measured.

use burn::tensor::FloatDType;
use cxr::ldm::scheduler::NoiseScheduleConfig;
use cxr::ldm::text::ClipTextConfig;
use cxr::ldm::unet::UNetConfig;
use cxr::ldm::vae::AutoencoderKlConfig;
use cxr::ldm::weights::ModelConfig;
use cxr_examples::memory::{PictureBatch, Sizes, TrainingBatch};

/// The small model that was measured.
const UNET: &str = r#"{
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
const VAE: &str = r#"{
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
const TEXT: &str = r#"{
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

fn small() -> ModelConfig {
    ModelConfig {
        text: ClipTextConfig::from_json(TEXT).unwrap(),
        unet: UNetConfig::from_json(UNET).unwrap(),
        vae: AutoencoderKlConfig::from_json(VAE).unwrap(),
        schedule: NoiseScheduleConfig::sd15(),
    }
}

fn picture(side: usize) -> PictureBatch {
    let (batch, dtype) = (1, FloatDType::F32);
    PictureBatch { width: side, height: side, batch, decoded: batch, tiled: false, guided: true, dtype }
}

/// Peaks of `/usr/bin/time -v` in bytes, of `synthesize` and `finetune` on `flex` with two cores,
/// `MIMALLOC_PURGE_DELAY=-1` and `MIMALLOC_ALLOW_THP=0`.
#[test]
fn the_estimate_is_near_what_was_measured() {
    let near = |estimate: u64, peak: f64| {
        let ratio = estimate as f64 / peak;
        assert!((0.75..1.5).contains(&ratio), "{estimate} for {peak}: {ratio}");
    };
    let many = |side, batch, guided| PictureBatch { batch, decoded: batch, guided, ..picture(side) };
    let step = |side, batch, by_block| {
        let dtype = FloatDType::F32;
        TrainingBatch { side, batch, by_block, samples: 0, dtype }
    };
    let sd = Sizes::of(&ModelConfig::sd15()).unwrap();
    for (side, peak) in [(128, 4.608e9), (256, 4.790e9)] {
        near(sd.pictures(&picture(side)), peak);
    }
    near(sd.pictures(&PictureBatch { dtype: FloatDType::BF16, ..picture(128) }), 2.52e9);
    let training =
        [(128, 4, false, 4.07e9), (512, 1, false, 5.21e9), (128, 4, true, 3.89e9), (512, 1, true, 4.39e9)];
    for (side, batch, by_block, peak) in training {
        // From a warm cache: nothing goes through the encoder.
        near(sd.training(&step(side, batch, by_block), 0), peak);
    }
    let small = Sizes::of(&small()).unwrap();
    near(small.pictures(&many(64, 1, true)), 0.095e9);
    near(small.pictures(&many(256, 1, true)), 0.159e9);
    near(small.pictures(&many(512, 1, true)), 0.316e9);
    near(small.pictures(&many(64, 25, true)), 0.232e9);
    near(small.pictures(&many(64, 100, true)), 0.610e9);
    near(small.pictures(&many(64, 100, false)), 0.337e9);
    for (batch, peak) in [(4, 0.188e9), (32, 0.464e9), (128, 1.674e9)] {
        near(small.training(&step(64, batch, false), 4), peak);
    }
}
