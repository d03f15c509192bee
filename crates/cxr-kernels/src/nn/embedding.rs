use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, backend::Backend};

use super::constant_parameter;

/// Sizes of an [`Embedding`].
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingConfig {
    count: usize,
    width: usize,
}

impl EmbeddingConfig {
    /// A table of `count` rows of `width`.
    pub fn new(count: usize, width: usize) -> Self {
        Self { count, width }
    }

    /// The table, all zeros.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Embedding<B> {
        Embedding { weight: constant_parameter([self.count, self.width], 0.0, device) }
    }
}

/// A table of vectors, looked up by index.
#[derive(Module, Debug)]
pub struct Embedding<B: Backend> {
    /// `[count, width]`.
    pub weight: Param<Tensor<B, 2>>,
}

impl<B: Backend> Embedding<B> {
    /// `[n, length]` indices below `count` to `[n, length, width]`.
    pub fn forward(&self, indices: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let [n, length] = indices.dims();
        let weight = self.weight.val();
        let width = weight.dims()[1];
        weight.select(0, indices.reshape([n * length])).reshape([n, length, width])
    }
}
