use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::constant_parameter;
use crate::{DiffusionBackend, WeightCache, ops};

/// Sizes of a [`Linear`].
#[derive(Debug, Clone, Copy)]
pub struct LinearConfig {
    input: usize,
    output: usize,
    bias: bool,
}

impl LinearConfig {
    /// From `input` to `output` features, with a bias.
    pub fn new(input: usize, output: usize) -> Self {
        Self { input, output, bias: true }
    }

    /// Whether there is a bias.
    pub fn with_bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// The layer, all zeros.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Linear<B> {
        Linear {
            weight: constant_parameter([self.output, self.input], 0.0, device),
            bias: self.bias.then(|| constant_parameter([self.output], 0.0, device)),
            cache: WeightCache::new(),
        }
    }
}

/// `y = x W^T + b`.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`, PyTorch's layout.
    pub weight: Param<Tensor<B, 2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    #[module(skip)]
    cache: WeightCache,
}

impl<B: DiffusionBackend> Linear<B> {
    /// `[.., in] -> [.., out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        ops::linear(x, self.weight.val(), self.bias.as_ref().map(|bias| bias.val()), &self.cache)
    }
}
