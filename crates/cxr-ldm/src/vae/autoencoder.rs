use burn::module::Module;
use burn::tensor::{DType, Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::{Conv2d, Conv2dConfig};

use super::AutoencoderKlConfig;
use super::decoder::Decoder;
use super::encoder::Encoder;
use crate::layers::{part, widens};

/// A variational autoencoder (Kingma and Welling 2014; Rombach et al. 2022): diffusers' `AutoencoderKL`.
///
/// With weights in bf16 it computes in f32, part by part: bf16 has too few digits for a picture.
///
/// Made by [`AutoencoderKlConfig::init`]. The path of a parameter is its key in the published file.
#[derive(Module, Debug)]
pub struct AutoencoderKl<B: Backend> {
    encoder: Encoder<B>,
    decoder: Decoder<B>,
    quant_conv: Conv2d<B>,
    post_quant_conv: Conv2d<B>,
}

/// The normal distribution of the latents of some pictures, unscaled.
#[derive(Debug, Clone)]
pub struct Moments<B: Backend> {
    /// Mean, `[n, latent_channels, h / factor, w / factor]`.
    pub mean: Tensor<B, 4>,
    /// Logarithm of the variance, in [-30, 20], same shape.
    pub logvar: Tensor<B, 4>,
}

impl<B: Backend> AutoencoderKl<B> {
    pub(crate) fn new(config: &AutoencoderKlConfig, device: &B::Device) -> Self {
        let latents = config.latent_channels;
        Self {
            encoder: Encoder::new(config, device),
            decoder: Decoder::new(config, device),
            quant_conv: Conv2dConfig::new(2 * latents, 2 * latents, 1).init(device),
            post_quant_conv: Conv2dConfig::new(latents, latents, 1).init(device),
        }
    }
}

impl<B: DiffusionBackend> AutoencoderKl<B> {
    /// The latents of `pixels` `[n, in_channels, h, w]` in [-1, 1]; `h` and `w` are multiples of the factor.
    ///
    /// The UNet wants latents times `scaling_factor`; these are not.
    ///
    /// # Panics
    /// If the dtype is not that of the weights, or the channels are others.
    pub fn encode(&self, pixels: Tensor<B, 4>) -> Moments<B> {
        Moments::of(self.moments(pixels))
    }

    /// Mean and logarithm of the variance, not yet clamped, one after the other along the channels.
    pub(super) fn moments(&self, pixels: Tensor<B, 4>) -> Tensor<B, 4> {
        let dtype = pixels.dtype();
        let wide = widens(dtype);
        let hidden = self.encoder.forward(if wide { pixels.cast(DType::F32) } else { pixels });
        part(&self.quant_conv, wide, |conv| conv.forward(hidden)).cast(dtype)
    }

    /// Pixels `[n, out_channels, h * factor, w * factor]`, in [-1, 1] but for overshoot, of `latents`
    /// `[n, latent_channels, h, w]`, which have been divided by `scaling_factor`.
    ///
    /// # Panics
    /// If the dtype is not that of the weights, or the channels are others.
    pub fn decode(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        let dtype = latents.dtype();
        let wide = widens(dtype);
        let latents = if wide { latents.cast(DType::F32) } else { latents };
        let latents = part(&self.post_quant_conv, wide, |conv| conv.forward(latents));
        self.decoder.forward(latents).cast(dtype)
    }
}

impl<B: Backend> Moments<B> {
    /// The two halves of the channels that the encoder gives.
    pub(super) fn of(moments: Tensor<B, 4>) -> Self {
        let mut halves = moments.chunk(2, 1).into_iter();
        let (Some(mean), Some(logvar)) = (halves.next(), halves.next()) else {
            unreachable!("quant_conv has an even number of output channels")
        };
        Self { mean, logvar: logvar.clamp(-30.0, 20.0) }
    }

    /// Standard deviation.
    pub fn std(&self) -> Tensor<B, 4> {
        self.logvar.clone().mul_scalar(0.5).exp()
    }

    /// Latents drawn with standard normal `noise` of the same shape.
    pub fn sample(&self, noise: Tensor<B, 4>) -> Tensor<B, 4> {
        self.mean.clone() + self.std() * noise
    }
}
