use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::model::UNet2dCondition;
use crate::Error;
use crate::config::{ConfigFile, to_json, wrong};

const FILE: &str = "unet/config.json";

/// A level on the way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DownBlockType {
    /// Residual blocks, each followed by a transformer.
    CrossAttnDownBlock2D,
    /// Residual blocks.
    DownBlock2D,
}

/// A level on the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UpBlockType {
    /// Residual blocks, each followed by a transformer.
    CrossAttnUpBlock2D,
    /// Residual blocks.
    UpBlock2D,
}

/// Heads of attention.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Heads {
    /// The same on every level.
    Same(usize),
    /// For every level, from the finest.
    Each(Vec<usize>),
}

impl Heads {
    /// Heads on a level.
    pub fn on(&self, level: usize) -> usize {
        match self {
            Self::Same(heads) => *heads,
            Self::Each(heads) => heads[level],
        }
    }
}

/// Sizes of a [`UNet2dCondition`], as `unet/config.json` has them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UNetConfig {
    /// Side of the latents that the model was made for; other sizes work.
    pub sample_size: usize,
    /// Channels of latents that go in.
    pub in_channels: usize,
    /// Channels of what is predicted.
    pub out_channels: usize,
    /// Channels of a level, from the finest; every level but the last halves the size.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of a level on the way down; on the way up there is one more.
    pub layers_per_block: usize,
    /// The levels on the way down, from the finest.
    pub down_block_types: Vec<DownBlockType>,
    /// The levels on the way up, from the coarsest.
    pub up_block_types: Vec<UpBlockType>,
    /// Width of the context.
    pub cross_attention_dim: usize,
    /// The number of heads of every attention, whatever the name says: diffusers kept it for the files' sake.
    pub attention_head_dim: Heads,
    /// Groups in every GroupNorm.
    pub norm_num_groups: usize,
    /// Added to the variance in residual blocks and the last norm; the transformers' norms have 1e-6.
    pub norm_eps: f64,
    /// Whether the time embedding has cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the time embedding.
    pub freq_shift: f64,
}

impl UNetConfig {
    /// As Stable Diffusion 1.5 publishes it: 859,520,964 parameters.
    pub fn sd15() -> Self {
        use {DownBlockType::*, UpBlockType::*};
        Self {
            sample_size: 64,
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: 2,
            down_block_types: vec![
                CrossAttnDownBlock2D,
                CrossAttnDownBlock2D,
                CrossAttnDownBlock2D,
                DownBlock2D,
            ],
            up_block_types: vec![UpBlock2D, CrossAttnUpBlock2D, CrossAttnUpBlock2D, CrossAttnUpBlock2D],
            cross_attention_dim: 768,
            attention_head_dim: Heads::Same(8),
            norm_num_groups: 32,
            norm_eps: 1e-5,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
        }
    }

    /// As Stable Diffusion 1.4 publishes it: the same.
    pub fn sd14() -> Self {
        Self::sd15()
    }

    /// Small enough for tests: two levels, the first with attention.
    pub fn tiny() -> Self {
        use {DownBlockType::*, UpBlockType::*};
        Self {
            sample_size: 8,
            block_out_channels: vec![32, 64],
            layers_per_block: 1,
            down_block_types: vec![CrossAttnDownBlock2D, DownBlock2D],
            up_block_types: vec![UpBlock2D, CrossAttnUpBlock2D],
            cross_attention_dim: 32,
            attention_head_dim: Heads::Same(4),
            norm_num_groups: 8,
            ..Self::sd15()
        }
    }

    /// Reads `unet/config.json`; a key that is absent has diffusers' default.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key that is wrong, or whose value is not implemented.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut file = ConfigFile::parse(FILE, text)?;
        let default = Self::sd15();
        let config = Self {
            sample_size: file.take("sample_size", default.sample_size)?,
            in_channels: file.take("in_channels", default.in_channels)?,
            out_channels: file.take("out_channels", default.out_channels)?,
            block_out_channels: file.take("block_out_channels", default.block_out_channels)?,
            layers_per_block: file.take("layers_per_block", default.layers_per_block)?,
            down_block_types: file.take("down_block_types", default.down_block_types)?,
            up_block_types: file.take("up_block_types", default.up_block_types)?,
            cross_attention_dim: file.take("cross_attention_dim", 1280)?,
            attention_head_dim: file.take("attention_head_dim", default.attention_head_dim)?,
            norm_num_groups: file.take("norm_num_groups", default.norm_num_groups)?,
            norm_eps: file.take("norm_eps", default.norm_eps)?,
            flip_sin_to_cos: file.take("flip_sin_to_cos", default.flip_sin_to_cos)?,
            freq_shift: file.take("freq_shift", default.freq_shift)?,
        };
        refuse_unsupported(&mut file)?;
        file.finish()?;
        config.validate()?;
        Ok(config)
    }

    /// The file that [`from_json`](Self::from_json) and diffusers read.
    pub fn to_json(&self) -> String {
        to_json(self, &[("_class_name", "UNet2DConditionModel".into()), ("act_fn", "silu".into())])
    }

    /// Checks that a network can be made of it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn validate(&self) -> Result<(), Error> {
        let sizes = [
            ("sample_size", self.sample_size),
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("layers_per_block", self.layers_per_block),
            ("cross_attention_dim", self.cross_attention_dim),
            ("norm_num_groups", self.norm_num_groups),
        ];
        for (key, size) in sizes {
            if size == 0 {
                return wrong(FILE, key, size, "at least 1");
            }
        }
        let (channels, groups) = (&self.block_out_channels, self.norm_num_groups);
        let levels = channels.len();
        if levels == 0 || channels.iter().any(|&c| c == 0 || !c.is_multiple_of(groups)) {
            let expected = format!("one or more multiples of norm_num_groups, {groups}");
            return wrong(FILE, "block_out_channels", format!("{channels:?}"), expected);
        }
        if !channels[0].is_multiple_of(2) || channels[0] < 4 {
            return wrong(FILE, "block_out_channels", channels[0], "an even first one, at least 4");
        }
        for (key, found) in
            [("down_block_types", self.down_block_types.len()), ("up_block_types", self.up_block_types.len())]
        {
            if found != levels {
                return wrong(
                    FILE,
                    key,
                    format!("{found} blocks"),
                    format!("{levels}, as block_out_channels"),
                );
            }
        }
        let fits = match &self.attention_head_dim {
            Heads::Each(heads) if heads.len() != levels => false,
            heads => (0..levels).all(|i| heads.on(i) > 0 && channels[i].is_multiple_of(heads.on(i))),
        };
        if !fits {
            let expected = format!("a divisor of block_out_channels {channels:?}, or one for each");
            return wrong(FILE, "attention_head_dim", format!("{:?}", self.attention_head_dim), expected);
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return wrong(FILE, "norm_eps", self.norm_eps, "above 0");
        }
        if !(self.freq_shift >= 0.0 && self.freq_shift < (channels[0] / 2) as f64) {
            return wrong(FILE, "freq_shift", self.freq_shift, "0 to below half of the first channels");
        }
        Ok(())
    }

    /// The network: zeros (norm weights: ones), made when first used.
    ///
    /// # Panics
    /// If the configuration is not [valid](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> UNet2dCondition<B> {
        if let Err(error) = self.validate() {
            panic!("{error}");
        }
        UNet2dCondition::new(self, device)
    }

    /// Width of the time embedding after its two layers.
    pub(crate) fn time_width(&self) -> usize {
        4 * self.block_out_channels[0]
    }
}

/// Keys of diffusers' class that change the result and have one implemented value each.
fn refuse_unsupported(file: &mut ConfigFile) -> Result<(), Error> {
    for (key, only) in [
        ("act_fn", "silu"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("resnet_time_scale_shift", "default"),
        ("time_embedding_type", "positional"),
        ("attention_type", "default"),
    ] {
        file.fixed(key, only)?;
    }
    for (key, only) in [
        ("downsample_padding", 1),
        ("mid_block_scale_factor", 1),
        ("transformer_layers_per_block", 1),
        ("resnet_out_scale_factor", 1),
        ("conv_in_kernel", 3),
        ("conv_out_kernel", 3),
        ("dropout", 0),
    ] {
        file.fixed(key, only)?;
    }
    // the rest is off by default, which `finish` asks of every key; this one counts only where another is on
    file.ignore(&["addition_embed_type_num_heads"]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: &str = r#"{
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"] }"#;

    #[test]
    fn the_published_file_is_the_preset() {
        assert_eq!(UNetConfig::from_json(PUBLISHED).unwrap(), UNetConfig::sd15());
    }

    #[test]
    fn what_is_written_is_read() {
        let heads = Heads::Each(vec![2, 8]);
        let config = UNetConfig { attention_head_dim: heads, flip_sin_to_cos: false, ..UNetConfig::tiny() };
        assert_eq!(UNetConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (json, key) in [
            (r#"{"act_fn": "gelu"}"#, "act_fn"),
            (r#"{"use_linear_projection": true}"#, "use_linear_projection"),
            (r#"{"class_embed_type": "timestep"}"#, "class_embed_type"),
            (r#"{"num_class_embeds": 3}"#, "num_class_embeds"),
            (r#"{"addition_embed_type": "text_time"}"#, "addition_embed_type"),
            (r#"{"only_cross_attention": true}"#, "only_cross_attention"),
            (r#"{"upcast_attention": true}"#, "upcast_attention"),
            (r#"{"center_input_sample": true}"#, "center_input_sample"),
            (r#"{"downsample_padding": 0}"#, "downsample_padding"),
            (r#"{"transformer_layers_per_block": [1, 2, 10]}"#, "transformer_layers_per_block"),
            (r#"{"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}"#, "mid_block_type"),
            (r#"{"down_block_types": ["AttnDownBlock2D"]}"#, "down_block_types"),
            (r#"{"down_block_types": ["DownBlock2D"]}"#, "down_block_types"),
            (r#"{"attention_head_dim": 7}"#, "attention_head_dim"),
            (r#"{"attention_head_dim": [8, 8]}"#, "attention_head_dim"),
            (r#"{"block_out_channels": [320, 640, 1280, 1281]}"#, "block_out_channels"),
            (r#"{"freq_shift": 160}"#, "freq_shift"),
        ] {
            let error = UNetConfig::from_json(json).unwrap_err().to_string();
            assert!(error.contains(&format!("{FILE}: {key}")), "{json}: {error}");
        }
    }
}
