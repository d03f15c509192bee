//! LoRA for any burn model: the layer, its targets, adapter files.

mod linear;
mod target;
mod weights;

pub use linear::{Branch, LoraLinear, LoraLinearConfig};
pub use target::{Adaptable, LayerMut, LayerRef};
pub use weights::LoraWeights;
