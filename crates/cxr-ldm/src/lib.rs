//! Stable Diffusion 1.x on [burn]: text encoder, autoencoder, UNet, samplers, weights and the pipeline.
//!
//! | Module | Holds |
//! |---|---|
//! | [`text`] | CLIP's text encoder: token ids to context |
//! | [`vae`] | the autoencoder: pixels to latents and back |
//! | [`unet`] | the denoiser: noised latents, timestep and context to noise |
//! | [`scheduler`] | noise schedules and samplers, over any denoiser |
//! | [`weights`] | a model's files: found, read strictly and written whole |
//! | [`pipeline`] | from a prompt to pictures |
//!
//! Networks are generic over the backend. Their configurations read the published `config.json` files, and refuse
//! what is not implemented; the path of a parameter is its key in the published weight files.
//!
//! ```
//! use burn::tensor::{Int, Tensor};
//! use cxr_ldm::{text::ClipTextConfig, unet::{Context, UNetConfig}, vae::AutoencoderKlConfig};
//! # type B = cxr_kernels::Flex;
//!
//! let device = Default::default();
//! let text = ClipTextConfig::tiny().init::<B>(&device); // zeros until weights are loaded
//! let unet = UNetConfig::tiny().init::<B>(&device);
//! let vae = AutoencoderKlConfig::tiny().init::<B>(&device);
//!
//! let hidden = text.forward(Tensor::<B, 2, Int>::zeros([1, 77], &device));
//! let context = unet.prepare(hidden); // keys and values, once for all steps
//! let latents = Tensor::<B, 4>::ones([1, 4, 8, 8], &device);
//! let timesteps = Tensor::<B, 1>::from_floats([981.0], &device);
//! let noise = unet.forward(latents.clone(), timesteps, &context);
//! assert_eq!(noise.dims(), latents.dims());
//! assert_eq!(vae.decode(latents).dims(), [1, 3, 16, 16]);
//! ```

mod config;
mod error;
mod layers;
pub mod pipeline;
pub mod scheduler;
pub mod text;
pub mod unet;
pub mod vae;
pub mod weights;

pub use error::Error;
