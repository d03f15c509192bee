use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::constant_parameter;
use crate::{DiffusionBackend, ops};

/// Sizes of a [`GroupNorm`].
#[derive(Debug, Clone, Copy)]
pub struct GroupNormConfig {
    groups: usize,
    channels: usize,
    eps: f64,
}

impl GroupNormConfig {
    /// `channels` in `groups` groups; epsilon 1e-5.
    pub fn new(groups: usize, channels: usize) -> Self {
        Self { groups, channels, eps: 1e-5 }
    }

    /// What is added to the variance.
    pub fn with_eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// The layer: weight one, bias zero.
    pub fn init<B: Backend>(&self, device: &B::Device) -> GroupNorm<B> {
        GroupNorm {
            weight: constant_parameter([self.channels], 1.0, device),
            bias: constant_parameter([self.channels], 0.0, device),
            groups: self.groups,
            eps: self.eps,
        }
    }
}

/// Group normalization (Wu and He, 2018), alone or followed by SiLU.
#[derive(Module, Debug)]
pub struct GroupNorm<B: Backend> {
    /// `[channels]`.
    pub weight: Param<Tensor<B, 1>>,
    /// `[channels]`.
    pub bias: Param<Tensor<B, 1>>,
    groups: usize,
    eps: f64,
}

impl<B: DiffusionBackend> GroupNorm<B> {
    /// `[n, channels, h, w]` to the same shape.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::group_norm(x, self.weight.val(), self.bias.val(), self.groups, self.eps)
    }

    /// [`forward`](Self::forward), then SiLU, in one pass where the backend can.
    pub fn forward_silu(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        ops::group_norm_silu(x, self.weight.val(), self.bias.val(), self.groups, self.eps)
    }
}

/// Sizes of a [`LayerNorm`].
#[derive(Debug, Clone, Copy)]
pub struct LayerNormConfig {
    width: usize,
    eps: f64,
}

impl LayerNormConfig {
    /// Over a last dimension of `width`; epsilon 1e-5.
    pub fn new(width: usize) -> Self {
        Self { width, eps: 1e-5 }
    }

    /// What is added to the variance.
    pub fn with_eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// The layer: weight one, bias zero.
    pub fn init<B: Backend>(&self, device: &B::Device) -> LayerNorm<B> {
        LayerNorm {
            weight: constant_parameter([self.width], 1.0, device),
            bias: constant_parameter([self.width], 0.0, device),
            eps: self.eps,
        }
    }
}

/// Layer normalization over the last dimension (Ba et al., 2016).
#[derive(Module, Debug)]
pub struct LayerNorm<B: Backend> {
    /// `[width]`.
    pub weight: Param<Tensor<B, 1>>,
    /// `[width]`.
    pub bias: Param<Tensor<B, 1>>,
    eps: f64,
}

impl<B: DiffusionBackend> LayerNorm<B> {
    /// `[.., width]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        ops::layer_norm(x, self.weight.val(), self.bias.val(), self.eps)
    }
}
