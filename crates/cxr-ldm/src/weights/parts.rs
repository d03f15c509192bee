//! What a pipeline is made of.

use burn::tensor::{FloatDType, backend::Backend};
use cxr_tokenizer::ClipTokenizer;

use crate::Error;
use crate::scheduler::{NoiseSchedule, NoiseScheduleConfig};
use crate::text::{ClipTextConfig, ClipTextModel};
use crate::unet::{UNet2dCondition, UNetConfig};
use crate::vae::{AutoencoderKl, AutoencoderKlConfig};

/// The configurations of a model's parts.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `text_encoder/config.json`.
    pub text: ClipTextConfig,
    /// `unet/config.json`.
    pub unet: UNetConfig,
    /// `vae/config.json`.
    pub vae: AutoencoderKlConfig,
    /// `scheduler/scheduler_config.json`.
    pub schedule: NoiseScheduleConfig,
}

impl ModelConfig {
    /// As Stable Diffusion 1.5 publishes them.
    pub fn sd15() -> Self {
        Self {
            text: ClipTextConfig::sd15(),
            unet: UNetConfig::sd15(),
            vae: AutoencoderKlConfig::sd15(),
            schedule: NoiseScheduleConfig::sd15(),
        }
    }

    /// The parts as they are before any weights: zeros, made when first used.
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and [`Error::SchedulerConfig`] if the schedule is out of range.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<ModelParts<B>, Error> {
        self.validate()?;
        Ok(ModelParts {
            text: self.text.init(device),
            unet: self.unet.init(device),
            vae: self.vae.init(device),
            tokenizer: ClipTokenizer::embedded(),
            schedule: NoiseSchedule::new(self.schedule.clone())?,
            config: self.clone(),
            dtype: FloatDType::F32,
            hash: String::new(),
        })
    }

    /// Checks each part, and that they fit together.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key; [`Error::Mismatch`], naming both.
    pub fn validate(&self) -> Result<(), Error> {
        self.text.validate()?;
        self.unet.validate()?;
        self.vae.validate()?;
        let same = |left: &str, a: usize, right: &str, b: usize| match a == b {
            true => Ok(()),
            false => {
                Err(Error::Mismatch { left: left.into(), left_value: a, right: right.into(), right_value: b })
            }
        };
        let latents = self.vae.latent_channels;
        same("unet in_channels", self.unet.in_channels, "vae latent_channels", latents)?;
        same("unet out_channels", self.unet.out_channels, "vae latent_channels", latents)?;
        let width = self.text.hidden_size;
        same("unet cross_attention_dim", self.unet.cross_attention_dim, "text_encoder hidden_size", width)
    }
}

/// Everything that a pipeline is made of.
#[derive(Debug)]
pub struct ModelParts<B: Backend> {
    /// The text encoder.
    pub text: ClipTextModel<B>,
    /// The denoiser.
    pub unet: UNet2dCondition<B>,
    /// The autoencoder.
    pub vae: AutoencoderKl<B>,
    /// The tokenizer.
    pub tokenizer: ClipTokenizer,
    /// The noise schedule.
    pub schedule: NoiseSchedule,
    /// What they were made from.
    pub config: ModelConfig,
    /// The dtype of the weights of all three networks.
    pub dtype: FloatDType,
    /// SHA-256 over all weights in hex; empty for a model that was not loaded. It is the same for a folder and a
    /// single file with the same weights.
    pub hash: String,
}
