//! The two factors that an adapter adds to one layer.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, FloatDType, Tensor, TensorData, backend::Backend};
use cxr_core::hash::stable_hash;
use cxr_kernels::{DiffusionBackend, WeightCache, ops};

use crate::dropout::DropoutStep;
use crate::weights::LoraWeights;

/// One adapter's two factors in one layer.
#[derive(Module, Debug)]
pub struct Branch<B: Backend> {
    /// `A`, `[rank, in]`, f32; of a convolution `[rank, in * kh * kw]`.
    pub lora_a: Param<Tensor<B, 2>>,
    /// `B`, `[out, rank]`, f32.
    pub lora_b: Param<Tensor<B, 2>>,
    pub(crate) name: String,
    pub(crate) alpha: f64,
    pub(crate) weight: f64,
    pub(crate) enabled: bool,
    pub(crate) dropout: f64,
    #[module(skip)]
    pub(crate) dropout_step: Option<DropoutStep>,
    /// Whether untracked factors drop as well.
    pub(crate) dropout_untracked: bool,
    cache_a: WeightCache,
    cache_b: WeightCache,
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
            lora_a: param("lora_A", [rank, weights.columns()], &weights.a),
            lora_b: param("lora_B", [weights.out_features, rank], &weights.b),
            name: name.to_owned(),
            alpha: weights.alpha,
            weight: 1.0,
            enabled: true,
            dropout: 0.0,
            dropout_step: None,
            dropout_untracked: false,
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

    /// The probability with which a value of the adapter's input is dropped in training.
    pub fn dropout(&self) -> f64 {
        self.dropout
    }

    /// The mask that the next forward pass multiplies an input of `shape` with: 0 with the probability
    /// [`dropout`](Self::dropout), `1 / (1 - dropout)` otherwise, f32. `None` without dropout: outside training,
    /// and until [`set_dropout_step`](crate::set_dropout_step) says where the masks come from.
    pub fn dropout_mask<const D: usize>(
        &self,
        shape: [usize; D],
        device: &B::Device,
    ) -> Option<Tensor<B, D>> {
        let drops = self.dropout > 0.0 && (self.dropout_untracked || self.lora_a.val().is_require_grad());
        let step = self.dropout_step.filter(|_| drops)?;
        let values = step.mask(self.lora_a.id.val(), self.dropout, shape.iter().product());
        Some(Tensor::from_data(TensorData::new(values, shape), (device, DType::F32)))
    }

    pub(crate) fn is_active(&self) -> bool {
        self.enabled && self.weight != 0.0
    }

    /// Makes both factors trainable, or neither.
    pub(crate) fn set_trainable(&mut self, trainable: bool) {
        for factor in [&mut self.lora_a, &mut self.lora_b] {
            let id = factor.id;
            *factor = Param::initialized(id, factor.val().detach().set_require_grad(trainable));
        }
    }

    /// The factors as numbers; `kernel` is that of the layer.
    pub(crate) fn to_weights(&self, kernel: Option<[usize; 2]>) -> LoraWeights {
        let values = |factor: &Param<Tensor<B, 2>>| {
            factor.val().into_data().convert_dtype(DType::F32).iter::<f32>().collect::<Vec<f32>>()
        };
        LoraWeights {
            rank: self.rank(),
            in_features: self.lora_a.lazy_shape()[1] / kernel.map_or(1, |[h, w]| h * w),
            out_features: self.lora_b.lazy_shape()[0],
            kernel,
            alpha: self.alpha,
            a: values(&self.lora_a),
            b: values(&self.lora_b),
        }
    }

    /// `scale * B A`, `[out, in * kh * kw]`, f32, outside the graph.
    pub(crate) fn delta(&self) -> Tensor<B, 2> {
        let (a, b) = (self.lora_a.val().detach(), self.lora_b.val().detach());
        b.matmul(a).mul_scalar(self.scale())
    }
}

impl<B: DiffusionBackend> Branch<B> {
    /// `scale * B (A x)`, `x` `[.., in]` in f32.
    pub(crate) fn forward<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        let inner = ops::linear(self.drop(x), self.lora_a.val(), None, &self.cache_a);
        // Scaled here, where the last dimension is the rank, which is where it costs least.
        ops::linear(inner.mul_scalar(self.scale()), self.lora_b.val(), None, &self.cache_b)
    }

    /// The same for a convolution: `A` has the layer's square kernel, `B` one of one pixel. `x` `[n, in, h, w]`.
    pub(crate) fn forward_conv2d(
        &self,
        x: Tensor<B, 4>,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Tensor<B, 4> {
        let (channels, rank, out) = (x.dims()[1], self.rank(), self.lora_b.lazy_shape()[0]);
        let a = self.lora_a.val().reshape([rank, channels, kernel, kernel]);
        let b = self.lora_b.val().reshape([out, rank, 1, 1]);
        let inner = ops::conv2d(self.drop(x), a, None, stride, padding, &self.cache_a);
        ops::conv2d(inner.mul_scalar(self.scale()), b, None, 1, 0, &self.cache_b)
    }

    fn drop<const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self.dropout_mask(x.dims(), &x.device()) {
            Some(mask) => x * mask,
            None => x,
        }
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
