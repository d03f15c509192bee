//! The denoiser: diffusers' `UNet2DConditionModel`.

mod attention;
mod block;
mod config;
mod context;
mod model;
mod time;
mod transformer;

pub use config::{DownBlockType, Heads, UNetConfig, UpBlockType};
pub use context::Context;
pub use model::{Flow, UNet2dCondition};
