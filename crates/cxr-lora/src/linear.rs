//! The linear layer that an adapter can be attached to.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, FloatDType, Tensor, TensorData, backend::Backend};
use cxr_core::hash::stable_hash;
use cxr_kernels::{DiffusionBackend, WeightCache, nn::constant_parameter, ops};

use crate::weights::LoraWeights;

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

/// One adapter's two factors in one layer.
#[derive(Module, Debug)]
pub struct Branch<B: Backend> {
    /// `A`, `[rank, in]`, f32.
    pub lora_a: Param<Tensor<B, 2>>,
    /// `B`, `[out, rank]`, f32.
    pub lora_b: Param<Tensor<B, 2>>,
    pub(crate) name: String,
    pub(crate) alpha: f64,
    pub(crate) weight: f64,
    pub(crate) enabled: bool,
    cache_a: WeightCache,
    cache_b: WeightCache,
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

    /// The adapters that change the output now.
    pub(crate) fn active(&self) -> impl Iterator<Item = &Branch<B>> {
        self.adapters.iter().filter(|branch| !self.merged && branch.is_active())
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
        let mut active = self.active().peekable();
        if active.peek().is_none() {
            return base;
        }
        let dtype = base.dtype();
        let x = to_f32(x);
        active.fold(to_f32(base), |sum, branch| sum + branch.forward(x.clone())).cast(dtype)
    }
}

impl<B: Backend> Branch<B> {
    /// Puts `weights` on `device`, untracked, under ids that depend on the path of the layer and on `name` alone.
    pub(crate) fn new(name: &str, path: &str, weights: &LoraWeights, device: &B::Device) -> Self {
        let param = |factor: &str, shape: [usize; 2], values: &[f32]| {
            let data = TensorData::new(values.to_vec(), shape);
            let tensor = Tensor::from_data(data, (device, DType::F32)).set_require_grad(false);
            Param::initialized(param_id(path, factor, name), tensor)
        };
        let rank = weights.rank;
        Self {
            lora_a: param("lora_A", [rank, weights.in_features], &weights.a),
            lora_b: param("lora_B", [weights.out_features, rank], &weights.b),
            name: name.to_owned(),
            alpha: weights.alpha,
            weight: 1.0,
            enabled: true,
            cache_a: WeightCache::new(),
            cache_b: WeightCache::new(),
        }
    }

    /// The adapter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rows of `A`.
    pub fn rank(&self) -> usize {
        self.lora_a.lazy_shape()[0]
    }

    /// Alpha: the product `B A` is scaled by `alpha / rank`.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// How much of the adapter is added, on top of `alpha / rank`; 1 unless set.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Whether the adapter takes part.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// What the product `B A` is multiplied by: `weight * alpha / rank`.
    pub fn scale(&self) -> f64 {
        self.weight * self.alpha / self.rank() as f64
    }

    fn is_active(&self) -> bool {
        self.enabled && self.weight != 0.0
    }

    /// Makes both factors trainable, or neither.
    pub(crate) fn set_trainable(&mut self, trainable: bool) {
        for factor in [&mut self.lora_a, &mut self.lora_b] {
            let id = factor.id;
            *factor = Param::initialized(id, factor.val().detach().set_require_grad(trainable));
        }
    }
}

impl<B: DiffusionBackend> Branch<B> {
    /// `scale * B (A x)`, `x` `[.., in]` in f32.
    fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let inner = ops::linear(x, self.lora_a.val(), None, &self.cache_a);
        // Scaled here, where the last dimension is the rank, which is where it costs least.
        ops::linear(inner.mul_scalar(self.scale()), self.lora_b.val(), None, &self.cache_b)
    }
}

/// The id of a factor: the stable hash of the name that PEFT gives the parameter.
///
/// The adapter's name stands in it instead of its position, so that detaching one adapter cannot hand another's
/// optimizer state to the wrong factor.
fn param_id(path: &str, factor: &str, adapter: &str) -> ParamId {
    ParamId::from(stable_hash(format!("{path}.{factor}.{adapter}.weight").as_bytes()))
}

pub(crate) fn to_f32<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    if x.dtype() == DType::F32 { x } else { x.cast(FloatDType::F32) }
}
