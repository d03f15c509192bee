//! The text encoder: transformers' `CLIPTextModel`.

mod config;
mod layer;
mod model;

pub use config::{Activation, ClipTextConfig};
pub use model::ClipTextModel;
