//! The layers of latent diffusion models: weights in PyTorch's layout, computed by [`ops`](crate::ops).
//!
//! A layer is made from its config with zeros (norms: ones), lazily: nothing is allocated before the first use,
//! and a model that is loaded from a file never holds both. [`parameters`] fills, reads and marks them by path.

mod conv2d;
mod embedding;
mod linear;
mod norm;
pub mod parameters;

pub use conv2d::{Conv2d, Conv2dConfig};
pub use embedding::{Embedding, EmbeddingConfig};
pub use linear::{Linear, LinearConfig};
pub use norm::{GroupNorm, GroupNormConfig, LayerNorm, LayerNormConfig};

use burn::module::{Param, ParamId};
use burn::tensor::{Shape, Tensor, backend::Backend};

/// A parameter of the given shape, all `value`, made when first used.
pub fn constant_parameter<B: Backend, const D: usize>(
    shape: [usize; D],
    value: f32,
    device: &B::Device,
) -> Param<Tensor<B, D>> {
    Param::uninitialized(
        ParamId::new(),
        move |device: &B::Device, require_grad| {
            // zeros are calloc'ed pages that cost nothing until written
            let tensor =
                if value == 0.0 { Tensor::zeros(shape, device) } else { Tensor::full(shape, value, device) };
            tensor.set_require_grad(require_grad)
        },
        device.clone(),
        true,
        Shape::new(shape),
    )
}
