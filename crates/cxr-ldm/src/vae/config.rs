use burn::tensor::backend::Backend;
use serde::Serialize;

use super::autoencoder::AutoencoderKl;
use crate::Error;
use crate::config::{ConfigFile, to_json, wrong};

const FILE: &str = "vae/config.json";
const DOWN: &str = "DownEncoderBlock2D";
const UP: &str = "UpDecoderBlock2D";

/// Sizes of an [`AutoencoderKl`], as `vae/config.json` has them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AutoencoderKlConfig {
    /// Channels of pictures that go in.
    pub in_channels: usize,
    /// Channels of pictures that come out.
    pub out_channels: usize,
    /// Channels of a level, from the finest; every level but the last halves the size.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of a level in the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of latents.
    pub latent_channels: usize,
    /// Groups in every norm.
    pub norm_num_groups: usize,
    /// Side of the pictures that the model was made for, in pixels; nothing here depends on it.
    pub sample_size: usize,
    /// Latents are multiplied by this for the UNet.
    pub scaling_factor: f64,
}

impl AutoencoderKlConfig {
    /// As Stable Diffusion 1.5 publishes it: 83,653,863 parameters.
    pub fn sd15() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 512,
            scaling_factor: 0.18215,
        }
    }

    /// As Stable Diffusion 1.4 publishes it: the same.
    pub fn sd14() -> Self {
        Self::sd15()
    }

    /// Small enough for tests: a factor of 2.
    pub fn tiny() -> Self {
        Self { block_out_channels: vec![32, 64], layers_per_block: 1, sample_size: 32, ..Self::sd15() }
    }

    /// Reads `vae/config.json`; a key that is absent has diffusers' default.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key that is wrong, or whose value is not implemented.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut file = ConfigFile::parse(FILE, text)?;
        let config = Self {
            in_channels: file.take("in_channels", 3)?,
            out_channels: file.take("out_channels", 3)?,
            block_out_channels: file.take("block_out_channels", vec![64])?,
            layers_per_block: file.take("layers_per_block", 1)?,
            latent_channels: file.take("latent_channels", 4)?,
            norm_num_groups: file.take("norm_num_groups", 32)?,
            sample_size: file.take("sample_size", 32)?,
            scaling_factor: file.take("scaling_factor", 0.18215)?,
        };
        let levels = config.block_out_channels.len();
        file.fixed("down_block_types", vec![DOWN; levels])?;
        file.fixed("up_block_types", vec![UP; levels])?;
        file.fixed("act_fn", "silu")?;
        for key in ["use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"] {
            file.fixed(key, true)?;
        }
        // about half precision, where `StableDiffusion::decode` does as much where it is needed
        file.ignore(&["force_upcast"]);
        file.finish()?;
        config.validate()?;
        Ok(config)
    }

    /// The file that [`from_json`](Self::from_json) and diffusers read.
    pub fn to_json(&self) -> String {
        let levels = self.block_out_channels.len();
        to_json(
            self,
            &[
                ("_class_name", "AutoencoderKL".into()),
                ("act_fn", "silu".into()),
                ("down_block_types", vec![DOWN; levels].into()),
                ("up_block_types", vec![UP; levels].into()),
            ],
        )
    }

    /// Checks that a network can be made of it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn validate(&self) -> Result<(), Error> {
        let sizes = [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("layers_per_block", self.layers_per_block),
            ("latent_channels", self.latent_channels),
            ("norm_num_groups", self.norm_num_groups),
            ("sample_size", self.sample_size),
        ];
        for (key, size) in sizes {
            if size == 0 {
                return wrong(FILE, key, size, "at least 1");
            }
        }
        let (channels, groups) = (&self.block_out_channels, self.norm_num_groups);
        if channels.is_empty() || channels.iter().any(|&c| c == 0 || !c.is_multiple_of(groups)) {
            let expected = format!("one or more multiples of norm_num_groups, {groups}");
            return wrong(FILE, "block_out_channels", format!("{channels:?}"), expected);
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return wrong(FILE, "scaling_factor", self.scaling_factor, "above 0");
        }
        Ok(())
    }

    /// Pixels per latent, along each side: 8 for Stable Diffusion.
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// The network: zeros (norm weights: ones), made when first used.
    ///
    /// # Panics
    /// If the configuration is not [valid](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> AutoencoderKl<B> {
        if let Err(error) = self.validate() {
            panic!("{error}");
        }
        AutoencoderKl::new(self, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: &str = r#"{
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"] }"#;

    #[test]
    fn the_published_file_is_the_preset() {
        assert_eq!(AutoencoderKlConfig::from_json(PUBLISHED).unwrap(), AutoencoderKlConfig::sd15());
        assert_eq!(AutoencoderKlConfig::sd15().factor(), 8);
    }

    #[test]
    fn what_is_written_is_read() {
        let config =
            AutoencoderKlConfig { scaling_factor: 1.25, latent_channels: 8, ..AutoencoderKlConfig::tiny() };
        assert_eq!(AutoencoderKlConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (json, key) in [
            (r#"{"act_fn": "relu"}"#, "act_fn"),
            (r#"{"use_quant_conv": false}"#, "use_quant_conv"),
            (r#"{"mid_block_add_attention": false}"#, "mid_block_add_attention"),
            (r#"{"shift_factor": 0.1}"#, "shift_factor"),
            (r#"{"latents_mean": [0.1]}"#, "latents_mean"),
            (r#"{"down_block_types": ["AttnDownEncoderBlock2D"]}"#, "down_block_types"),
            (r#"{"block_out_channels": [32, 40]}"#, "block_out_channels"),
            (r#"{"block_out_channels": []}"#, "block_out_channels"),
            (r#"{"norm_num_groups": 0}"#, "norm_num_groups"),
            (r#"{"scaling_factor": 0}"#, "scaling_factor"),
        ] {
            let error = AutoencoderKlConfig::from_json(json).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(FILE), "{json}: {error}");
        }
    }
}
