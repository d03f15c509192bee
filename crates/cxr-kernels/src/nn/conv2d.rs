use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};

use super::constant_parameter;
use crate::{DiffusionBackend, WeightCache, ops};

/// Sizes of a [`Conv2d`].
#[derive(Debug, Clone, Copy)]
pub struct Conv2dConfig {
    input: usize,
    output: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    bias: bool,
}

impl Conv2dConfig {
    /// A square kernel from `input` to `output` channels; stride 1, no padding, with a bias.
    pub fn new(input: usize, output: usize, kernel: usize) -> Self {
        Self { input, output, kernel, stride: 1, padding: 0, bias: true }
    }

    /// The step between output pixels, in input pixels.
    pub fn with_stride(mut self, stride: usize) -> Self {
        self.stride = stride;
        self
    }

    /// Zeros added on each side, in pixels.
    pub fn with_padding(mut self, padding: usize) -> Self {
        self.padding = padding;
        self
    }

    /// Whether there is a bias.
    pub fn with_bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// The layer, all zeros.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Conv2d<B> {
        Conv2d {
            weight: constant_parameter([self.output, self.input, self.kernel, self.kernel], 0.0, device),
            bias: self.bias.then(|| constant_parameter([self.output], 0.0, device)),
            stride: self.stride,
            padding: self.padding,
            cache: WeightCache::new(),
        }
    }
}

/// 2D convolution without dilation or groups.
#[derive(Module, Debug)]
pub struct Conv2d<B: Backend> {
    /// `[out, in, k, k]`.
    pub weight: Param<Tensor<B, 4>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    stride: usize,
    padding: usize,
    #[module(skip)]
    cache: WeightCache,
}

impl<B: DiffusionBackend> Conv2d<B> {
    /// `[n, in, h, w] -> [n, out, h', w']`.
    pub fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        ops::conv2d(x, self.weight.val(), bias, self.stride, self.padding, &self.cache)
    }
}
