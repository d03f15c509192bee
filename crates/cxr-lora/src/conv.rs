//! The convolution that an adapter can be attached to.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor, backend::Backend};
use cxr_kernels::{DiffusionBackend, WeightCache, nn::constant_parameter, ops};

use crate::branch::Branch;

/// Configuration of a [`LoraConv2d`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraConv2dConfig {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// The step between output pixels, in input pixels. Default: 1.
    pub stride: usize,
    /// Zeros added on each side, in pixels. Default: 0.
    pub padding: usize,
    /// Whether a bias is added. Default: true.
    pub bias: bool,
}

impl LoraConv2dConfig {
    /// A square kernel from `in_channels` to `out_channels`; stride 1, no padding, with a bias.
    pub fn new(in_channels: usize, out_channels: usize, kernel: usize) -> Self {
        Self { in_channels, out_channels, kernel, stride: 1, padding: 0, bias: true }
    }

    /// Sets the step between output pixels.
    pub fn with_stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// Sets the zeros added on each side.
    pub fn with_padding(self, padding: usize) -> Self {
        Self { padding, ..self }
    }

    /// Sets whether a bias is added.
    pub fn with_bias(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// A layer of zeros without adapters, its parameters made when they are first used.
    pub fn init<B: Backend>(&self, device: &B::Device) -> LoraConv2d<B> {
        let shape = [self.out_channels, self.in_channels, self.kernel, self.kernel];
        LoraConv2d {
            weight: constant_parameter(shape, 0.0, device),
            bias: self.bias.then(|| constant_parameter([self.out_channels], 0.0, device)),
            adapters: Vec::new(),
            merged: false,
            stride: self.stride,
            padding: self.padding,
            cache: WeightCache::new(),
        }
    }
}

/// A 2D convolution with any number of low-rank adapters: as [`LoraLinear`](crate::LoraLinear), with `A` a
/// convolution from `in` to `rank` channels of the layer's own kernel, stride and padding, and `B` one of a single
/// pixel from `rank` to `out` channels. That is what PEFT does and what kohya's scripts call LoCon; with a kernel of
/// one pixel both are products.
///
/// `A` is kept as `[rank, in * kh * kw]`, in the order of the weight `[rank, in, kh, kw]`.
#[derive(Module, Debug)]
pub struct LoraConv2d<B: Backend> {
    /// The base's weight `[out, in, k, k]`.
    pub weight: Param<Tensor<B, 4>>,
    /// The base's bias `[out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    pub(crate) adapters: Vec<Branch<B>>,
    pub(crate) merged: bool,
    stride: usize,
    padding: usize,
    cache: WeightCache,
}

impl<B: Backend> LoraConv2d<B> {
    /// Channels of the input.
    pub fn in_channels(&self) -> usize {
        self.weight.lazy_shape()[1]
    }

    /// Channels of the output.
    pub fn out_channels(&self) -> usize {
        self.weight.lazy_shape()[0]
    }

    /// Height and width of the kernel.
    pub fn kernel(&self) -> usize {
        self.weight.lazy_shape()[2]
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

impl<B: DiffusionBackend> LoraConv2d<B> {
    /// `x` `[n, in, h, w]` to `[n, out, h', w']`, in the dtype of `x`.
    ///
    /// # Panics
    /// If the channels of `x` are not `in`, its dtype is not the weight's, or the padded picture is smaller than the
    /// kernel.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let bias = self.bias.as_ref().map(Param::val);
        let (kernel, stride, padding) = (self.kernel(), self.stride, self.padding);
        let base = ops::conv2d(x.clone(), self.weight.val(), bias, stride, padding, &self.cache);
        let mut active = self.adapters.iter().filter(|branch| !self.merged && branch.is_active()).peekable();
        if active.peek().is_none() {
            return base;
        }
        let dtype = base.dtype().into();
        let [x, base] = [x, base].map(|x| ops::cast(x, FloatDType::F32));
        let add = |sum, branch: &Branch<B>| {
            ops::add(sum, branch.forward_conv2d(x.clone(), kernel, stride, padding))
        };
        ops::cast(active.fold(base, add), dtype)
    }
}
