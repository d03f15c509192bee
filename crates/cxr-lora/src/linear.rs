//! The linear layer that an adapter can be attached to.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor, backend::Backend};
use cxr_kernels::{DiffusionBackend, WeightCache, nn::constant_parameter, ops};

use crate::branch::Branch;

/// Configuration of a [`LoraLinear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraLinearConfig {
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// Whether a bias is added. Default: true.
    pub bias: bool,
}

impl LoraLinearConfig {
    /// A layer from `in_features` to `out_features`, with a bias.
    pub fn new(in_features: usize, out_features: usize) -> Self {
        Self { in_features, out_features, bias: true }
    }

    /// Sets whether a bias is added.
    pub fn with_bias(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// A layer of zeros without adapters, its parameters made when they are first used.
    pub fn init<B: Backend>(&self, device: &B::Device) -> LoraLinear<B> {
        LoraLinear {
            weight: constant_parameter([self.out_features, self.in_features], 0.0, device),
            bias: self.bias.then(|| constant_parameter([self.out_features], 0.0, device)),
            adapters: Vec::new(),
            merged: false,
            cache: WeightCache::new(),
        }
    }
}

/// A linear layer with any number of low-rank adapters: `y = W x + b + sum_i weight_i * scale_i * B_i (A_i x)`.
///
/// `W` is `[out, in]` and the parameters are called `weight` and `bias`, so a layer's paths are those of a plain
/// linear layer in PyTorch. Each adapter is two thin products; no `[out, in]` delta is ever made, forward or
/// backward, and no gradient of a frozen `W`. Without an active adapter, `forward` is the plain linear layer.
///
/// `A` and `B` are f32 whatever the dtype of `W`: `x` is cast to f32 for them, the sum is taken in f32 and cast back.
#[derive(Module, Debug)]
pub struct LoraLinear<B: Backend> {
    /// The base's weight `[out, in]`.
    pub weight: Param<Tensor<B, 2>>,
    /// The base's bias `[out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    pub(crate) adapters: Vec<Branch<B>>,
    pub(crate) merged: bool,
    cache: WeightCache,
}

impl<B: Backend> LoraLinear<B> {
    /// Width of the input.
    pub fn in_features(&self) -> usize {
        self.weight.lazy_shape()[1]
    }

    /// Width of the output.
    pub fn out_features(&self) -> usize {
        self.weight.lazy_shape()[0]
    }

    /// The adapters, in the order in which they were attached.
    pub fn adapters(&self) -> &[Branch<B>] {
        &self.adapters
    }

    /// Whether adapters are merged into the weight, so that [`forward`](Self::forward) leaves them out.
    pub fn is_merged(&self) -> bool {
        self.merged
    }
}

impl<B: DiffusionBackend> LoraLinear<B> {
    /// `x` `[.., in]` to `[.., out]`, in the dtype of `x`.
    ///
    /// # Panics
    /// If the last dimension of `x` is not `in`, or its dtype is not the weight's.
    pub fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let bias = self.bias.as_ref().map(Param::val);
        let base = ops::linear(x.clone(), self.weight.val(), bias, &self.cache);
        let mut active = self.adapters.iter().filter(|branch| !self.merged && branch.is_active()).peekable();
        if active.peek().is_none() {
            return base;
        }
        let dtype = base.dtype().into();
        let [x, base] = [x, base].map(|x| ops::cast(x, FloatDType::F32));
        ops::cast(active.fold(base, |sum, branch| ops::add(sum, branch.forward(x.clone()))), dtype)
    }
}
