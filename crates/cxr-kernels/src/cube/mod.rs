//! The Cube backends (CUDA, wgpu) and burn's fusion layer.
//!
//! Kernels of our own take the operations between two matrix products in one pass each, in the order in which a
//! convolution leaves an image; so do convolutions and linear layers where there are NVIDIA's matrix units. Other products
//! are burn's, chosen without timing. What is not here has its default body.

mod attention;
mod cache;
mod conv;
mod elementwise;
mod flash;
mod fusion;
mod gemm;
mod layout;
mod mma;
mod norm;
mod product;
mod registered;

pub use cache::keep_tuning;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, TensorMetadata, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};

use crate::plain::{from_f32, to_f32};
use crate::{DiffusionBackend, WeightCache, plain};

/// Whether a convolution of `x` would be added up in half precision.
///
/// Without the matrix cores that burn uses on CUDA, its convolution adds up in the dtype of the input. The widest layer
/// of Stable Diffusion adds 23,040 products: f16 would lose one or two of its three digits.
fn adds_up_in_half<B: Backend>(x: &FloatTensor<B>) -> bool {
    x.dtype() != DType::F32 && B::name(&B::float_device(x)).contains("wgpu")
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> DiffusionBackend
    for CubeBackend<R, F, I, T>
{
    fn kernel_silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::silu(x)
    }

    fn kernel_geglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::geglu(x)
    }

    fn kernel_geglu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::geglu_backward(x, grad)
    }

    fn kernel_group_norm_x_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        norm::group_norm_x_backward(x, gamma, beta, grad, groups, eps, silu)
    }

    fn kernel_layer_norm_x_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        norm::layer_norm_x_backward(x, gamma, grad, eps)
    }

    fn kernel_group_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        norm::group_norm(x, gamma, beta, groups, eps, silu)
    }

    fn kernel_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        norm::layer_norm(x, gamma, beta, eps)
    }

    fn kernel_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        product::linear(x.clone(), weight.clone(), bias.clone())
            .unwrap_or_else(|| plain::linear::<Self>(x, weight, bias))
    }

    fn kernel_linear_x_backward(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        product::linear_x_backward(weight.clone(), grad.clone())
            .unwrap_or_else(|| plain::linear_x_backward::<Self>(weight, grad))
    }

    fn kernel_linear_weight_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        product::linear_weight_backward(x.clone(), grad.clone())
            .unwrap_or_else(|| plain::linear_weight_backward::<Self>(x, grad))
    }

    fn kernel_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::add(x, y)
    }

    fn kernel_shift(x: FloatTensor<Self>, shift: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::shift(x, shift)
    }

    fn kernel_join(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::join(x, y)
    }

    fn kernel_conv2d_weight(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        layout::channels_last(weight)
    }

    fn kernel_image_to_tokens(x: FloatTensor<Self>) -> FloatTensor<Self> {
        layout::tokens(x)
    }

    fn kernel_tokens_to_image(x: FloatTensor<Self>, height: usize, width: usize) -> FloatTensor<Self> {
        layout::image(x, height, width)
    }

    fn kernel_upsample(x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::upsample(x)
    }

    fn kernel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        attention::attention::<Self, R>(q, k, v, causal)
    }

    fn kernel_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        causal: bool,
    ) -> [FloatTensor<Self>; 3] {
        attention::attention_backward::<Self, R>(q, k, v, grad, causal)
    }

    fn kernel_conv2d(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        stride: usize,
        padding: usize,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let dtype = x.dtype();
        let (x, weight, bias) = match adds_up_in_half::<Self>(&x) {
            true => (to_f32::<Self>(x), to_f32::<Self>(weight), bias.map(to_f32::<Self>)),
            false => (x, weight, bias),
        };
        let y = product::conv2d(x.clone(), weight.clone(), bias.clone(), stride, padding)
            .unwrap_or_else(|| plain::conv2d::<Self>(x, weight, bias, stride, padding));
        from_f32::<Self>(y, dtype)
    }

    fn kernel_conv2d_x_backward(
        x_shape: Shape,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        if let Some(to_x) = product::conv2d_x_backward(&x_shape, &weight, &grad, stride, padding) {
            return to_x;
        }
        let [_, _, height, width] = weight.shape().dims();
        if stride == 1 && height == width && height > padding {
            return Self::kernel_conv2d(grad, conv::turned(weight), None, 1, height - 1 - padding, cache);
        }
        // burn's own adds up in the dtype of the gradient
        let dtype = grad.dtype();
        let [weight, grad] = [weight, grad].map(to_f32::<Self>);
        from_f32::<Self>(plain::conv2d_x_backward::<Self>(x_shape, weight, grad, stride, padding), dtype)
    }

    fn kernel_conv2d_weight_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
    ) -> FloatTensor<Self> {
        // and so does this
        let dtype = x.dtype();
        let [x, weight, grad] = [x, weight, grad].map(to_f32::<Self>);
        from_f32::<Self>(plain::conv2d_weight_backward::<Self>(x, weight, grad, stride, padding), dtype)
    }
}
