//! The autoencoder between pixels and latents: diffusers' `AutoencoderKL`.

mod attention;
mod autoencoder;
mod config;
mod decoder;
mod encoder;
mod mid;
mod tiling;

pub use autoencoder::{AutoencoderKl, Moments};
pub use config::AutoencoderKlConfig;
pub use tiling::Tiling;

/// Added to the variance in every norm of the autoencoder; no configuration has it.
const NORM_EPS: f64 = 1e-6;
