//! The trait of the hot operations, with plain default bodies.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{FloatDType, Shape};

use crate::{Pool, WeightCache, plain};

/// The operations that a latent diffusion model spends its time in, on backend primitives.
///
/// Every method has a default body in plain burn operations, so that an implementation for a backend can be
/// empty; a backend overrides what it can do better. [`ops`](crate::ops) has the same operations on tensors, with
/// the shapes and dtypes checked: call those. Inside the trait, shapes are taken as given.
///
/// Methods named `*_backward` return the gradients of the operation of that name; the
/// [`Autodiff`](burn::backend::Autodiff) implementation calls them. Which kernel runs depends on configuration,
/// processor features and image shape, never on batch size or free memory, so that results repeat.
pub trait DiffusionBackend: Backend {
    /// `x * sigmoid(x)`, any shape.
    fn kernel_silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::silu::<Self>(x)
    }

    /// Gradient of [`kernel_silu`](Self::kernel_silu): `grad * s * (1 + x * (1 - s))`, `s = sigmoid(x)`.
    fn kernel_silu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::silu_backward::<Self>(x, grad)
    }

    /// Exact (erf) GELU, `x * Phi(x)`, any shape.
    fn kernel_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::gelu::<Self>(x)
    }

    /// Gradient of [`kernel_gelu`](Self::kernel_gelu): `grad * (Phi(x) + x * phi(x))`.
    ///
    /// Written out because burn's own is the tanh approximation on some backends.
    fn kernel_gelu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::gelu_backward::<Self>(x, grad)
    }

    /// GEGLU on the last dimension: `[.., 2h] -> [.., h]`, `hidden * gelu(gate)`, the hidden half first.
    fn kernel_geglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::geglu::<Self>(x)
    }

    /// Gradient of [`kernel_geglu`](Self::kernel_geglu) with respect to its `[.., 2h]` input.
    fn kernel_geglu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::geglu_backward::<Self>(x, grad)
    }

    /// GroupNorm over `[n, c, ...]`, biased variance, then `gamma`, `beta` `[c]`; followed by SiLU if `silu`.
    ///
    /// Statistics are taken in f32 whatever the dtype.
    fn kernel_group_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        plain::group_norm::<Self>(x, gamma, beta, groups, eps, silu)
    }

    /// Gradients of [`kernel_group_norm`](Self::kernel_group_norm) with respect to `x`, `gamma`, `beta`.
    ///
    /// Everything but `x` is computed again from it, so that the graph keeps one tensor.
    fn kernel_group_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> [FloatTensor<Self>; 3] {
        plain::group_norm_backward::<Self>(x, gamma, beta, grad, groups, eps, silu)
    }

    /// Gradient of [`kernel_group_norm`](Self::kernel_group_norm) with respect to `x` alone: what a frozen norm needs.
    fn kernel_group_norm_x_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        let [to_x, _, _] = Self::kernel_group_norm_backward(x, gamma, beta, grad, groups, eps, silu);
        to_x
    }

    /// LayerNorm over the last dimension, biased variance, then `gamma`, `beta` `[d]`; statistics in f32.
    fn kernel_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        plain::layer_norm::<Self>(x, gamma, beta, eps)
    }

    /// Gradients of [`kernel_layer_norm`](Self::kernel_layer_norm) with respect to `x`, `gamma`, `beta`.
    fn kernel_layer_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> [FloatTensor<Self>; 3] {
        plain::layer_norm_backward::<Self>(x, gamma, grad, eps)
    }

    /// Gradient of [`kernel_layer_norm`](Self::kernel_layer_norm) with respect to `x` alone: what a frozen norm needs.
    fn kernel_layer_norm_x_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let [to_x, _, _] = Self::kernel_layer_norm_backward(x, gamma, grad, eps);
        to_x
    }

    /// `x @ weight^T + bias` for `x` `[rows, in]`, `weight` `[out, in]` (PyTorch's layout), `bias` `[out]`.
    fn kernel_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        plain::linear::<Self>(x, weight, bias)
    }

    /// Gradient of [`kernel_linear`](Self::kernel_linear) with respect to `x`.
    fn kernel_linear_x_backward(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        plain::linear_x_backward::<Self>(weight, grad)
    }

    /// Gradient of [`kernel_linear`](Self::kernel_linear) with respect to `weight`, `[out, in]`.
    fn kernel_linear_weight_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::linear_weight_backward::<Self>(x, grad)
    }

    /// 2D convolution: `x` `[n, c, h, w]`, `weight` `[out, c, kh, kw]`, `bias` `[out]`, no dilation, one group.
    fn kernel_conv2d(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        stride: usize,
        padding: usize,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        plain::conv2d::<Self>(x, weight, bias, stride, padding)
    }

    /// The weight of a convolution `[out, c, kh, kw]`, the same numbers, in the order of memory that
    /// [`kernel_conv2d`](Self::kernel_conv2d) reads: what is called once for a weight that stays, so that no call has to
    /// bring it into order.
    fn kernel_conv2d_weight(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        weight
    }

    /// Gradient of [`kernel_conv2d`](Self::kernel_conv2d) with respect to `x`, whose shape is `x_shape`.
    fn kernel_conv2d_x_backward(
        x_shape: Shape,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        plain::conv2d_x_backward::<Self>(x_shape, weight, grad, stride, padding)
    }

    /// Gradient of [`kernel_conv2d`](Self::kernel_conv2d) with respect to `weight`.
    fn kernel_conv2d_weight_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
    ) -> FloatTensor<Self> {
        plain::conv2d_weight_backward::<Self>(x, weight, grad, stride, padding)
    }

    /// A 3x3 pool of `[n, c, h, w]`. The default's gradient is burn's own.
    fn kernel_pool(x: FloatTensor<Self>, pool: Pool) -> FloatTensor<Self> {
        plain::pool::<Self>(x, pool)
    }

    /// `x` in another dtype, each number rounded to the nearest.
    fn kernel_cast(x: FloatTensor<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        Self::float_cast(x, dtype)
    }

    /// `x + y`, of one shape: a shortcut and what goes past it.
    fn kernel_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::add::<Self>(x, y)
    }

    /// `x + shift`: `[n, c, h, w]` and `[n, c]`, a number of its own for every channel of an image.
    fn kernel_shift(x: FloatTensor<Self>, shift: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::shift::<Self>(x, shift)
    }

    /// Gradient of [`kernel_shift`](Self::kernel_shift) with respect to `shift`: the sums over the pixels.
    fn kernel_shift_backward(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::shift_backward::<Self>(grad)
    }

    /// Gradient with respect to the bias of a linear layer or a convolution: `[rows, c]` or `[n, c, h, w]` to `[c]`.
    fn kernel_bias_backward(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::bias_backward::<Self>(grad)
    }

    /// `[n, a, h, w]` and `[n, b, h, w]` to `[n, a + b, h, w]`.
    fn kernel_join(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::join::<Self>(x, y)
    }

    /// The `first` channels of `[n, c, h, w]`, and the others: the gradients of [`kernel_join`](Self::kernel_join).
    fn kernel_split(x: FloatTensor<Self>, first: usize) -> [FloatTensor<Self>; 2] {
        plain::split::<Self>(x, first)
    }

    /// Every pixel of `[n, c, h, w]` twice across and twice down: `[n, c, 2h, 2w]`.
    ///
    /// Not burn's `interpolate`, which is wrong on its Cube backends (docs/burn.md).
    fn kernel_upsample(x: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::upsample::<Self>(x)
    }

    /// Gradient of [`kernel_upsample`](Self::kernel_upsample): the four gradients of each pixel, summed.
    fn kernel_upsample_backward(grad: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::upsample_backward::<Self>(grad)
    }

    /// `softmax(q k^T / sqrt(d)) v` for `q` `[b, heads, n, d]` and `k`, `v` `[b, heads, m, d]`.
    ///
    /// With `causal`, query `i` sees keys `0..=i`. The default goes over chunks of the queries, so that no
    /// `n x m` matrix is ever made; softmax is taken in f32 whatever the dtype.
    fn kernel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        plain::attention::<Self>(q, k, v, causal)
    }

    /// Gradients of [`kernel_attention`](Self::kernel_attention) with respect to `q`, `k`, `v`.
    ///
    /// Each chunk's weights are computed again: nothing of size `n x m` is kept between the passes.
    fn kernel_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        causal: bool,
    ) -> [FloatTensor<Self>; 3] {
        plain::attention_backward::<Self>(q, k, v, grad, causal)
    }

    /// `[n, c, h, w] -> [n, h * w, c]`; the default may be a view.
    fn kernel_image_to_tokens(x: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::image_to_tokens::<Self>(x)
    }

    /// `[n, h * w, c] -> [n, c, h, w]`; the default may be a view.
    fn kernel_tokens_to_image(x: FloatTensor<Self>, height: usize, width: usize) -> FloatTensor<Self> {
        plain::tokens_to_image::<Self>(x, height, width)
    }
}

/// A backend with gradients whose inner backend runs the same operations: what training code asks for.
pub trait DiffusionAutodiff: DiffusionBackend + AutodiffBackend<InnerBackend: DiffusionBackend> {}

impl<B> DiffusionAutodiff for B where B: DiffusionBackend + AutodiffBackend<InnerBackend: DiffusionBackend> {}
