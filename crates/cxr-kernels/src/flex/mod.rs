//! Hand-written kernels for `Flex`, one file each.

mod attention;
mod conv;
mod elementwise;
mod fast_math;
mod gelu;
mod gemm;
mod group_norm;
mod layer_norm;
mod layout;
mod moments;
mod silu;

use burn::tensor::Shape;
use burn::tensor::TensorMetadata;
use burn_flex::{Flex, FlexTensor};

use self::elementwise::all_f32;
use crate::{DiffusionBackend, WeightCache, plain};

impl DiffusionBackend for Flex {
    fn kernel_silu(x: FlexTensor) -> FlexTensor {
        if all_f32([&x]) { silu::forward(x) } else { plain::silu::<Flex>(x) }
    }

    fn kernel_silu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        if all_f32([&x, &grad]) { silu::backward(x, grad) } else { plain::silu_backward::<Flex>(x, grad) }
    }

    fn kernel_gelu(x: FlexTensor) -> FlexTensor {
        if all_f32([&x]) { gelu::forward(x) } else { plain::gelu::<Flex>(x) }
    }

    fn kernel_gelu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        if all_f32([&x, &grad]) { gelu::backward(x, grad) } else { plain::gelu_backward::<Flex>(x, grad) }
    }

    fn kernel_geglu(x: FlexTensor) -> FlexTensor {
        if all_f32([&x]) { gelu::geglu(x) } else { plain::geglu::<Flex>(x) }
    }

    fn kernel_geglu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        if all_f32([&x, &grad]) {
            gelu::geglu_backward(x, grad)
        } else {
            plain::geglu_backward::<Flex>(x, grad)
        }
    }

    fn kernel_group_norm(
        x: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FlexTensor {
        if all_f32([&x, &gamma, &beta]) {
            return group_norm::forward(x, gamma, beta, groups, eps, silu);
        }
        plain::group_norm::<Flex>(x, gamma, beta, groups, eps, silu)
    }

    fn kernel_group_norm_backward(
        x: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        grad: FlexTensor,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> [FlexTensor; 3] {
        if all_f32([&x, &gamma, &beta, &grad]) {
            return group_norm::backward(x, gamma, beta, grad, groups, eps, silu);
        }
        plain::group_norm_backward::<Flex>(x, gamma, beta, grad, groups, eps, silu)
    }

    fn kernel_layer_norm(x: FlexTensor, gamma: FlexTensor, beta: FlexTensor, eps: f64) -> FlexTensor {
        if all_f32([&x, &gamma, &beta]) {
            return layer_norm::forward(x, gamma, beta, eps);
        }
        plain::layer_norm::<Flex>(x, gamma, beta, eps)
    }

    fn kernel_layer_norm_backward(
        x: FlexTensor,
        gamma: FlexTensor,
        grad: FlexTensor,
        eps: f64,
    ) -> [FlexTensor; 3] {
        if all_f32([&x, &gamma, &grad]) {
            return layer_norm::backward(x, gamma, grad, eps);
        }
        plain::layer_norm_backward::<Flex>(x, gamma, grad, eps)
    }

    fn kernel_image_to_tokens(x: FlexTensor) -> FlexTensor {
        if all_f32([&x]) { layout::image_to_tokens(x) } else { plain::image_to_tokens::<Flex>(x) }
    }

    fn kernel_tokens_to_image(x: FlexTensor, height: usize, width: usize) -> FlexTensor {
        if all_f32([&x]) {
            return layout::tokens_to_image(x, height, width);
        }
        plain::tokens_to_image::<Flex>(x, height, width)
    }

    fn kernel_conv2d(
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<FlexTensor>,
        stride: usize,
        padding: usize,
        _cache: &WeightCache,
    ) -> FlexTensor {
        if conv::applies(&weight, x.dtype()) {
            return conv::forward(x, weight, bias, stride, padding);
        }
        plain::conv2d::<Flex>(x, weight, bias, stride, padding)
    }

    fn kernel_conv2d_x_backward(
        x_shape: Shape,
        weight: FlexTensor,
        grad: FlexTensor,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FlexTensor {
        if conv::applies(&weight, grad.dtype()) {
            return conv::x_backward(&x_shape, weight, grad, stride, padding, cache);
        }
        plain::conv2d_x_backward::<Flex>(x_shape, weight, grad, stride, padding)
    }

    fn kernel_conv2d_weight_backward(
        x: FlexTensor,
        weight: FlexTensor,
        grad: FlexTensor,
        stride: usize,
        padding: usize,
    ) -> FlexTensor {
        if conv::applies(&weight, grad.dtype()) {
            return conv::weight_backward(x, weight.shape(), grad, stride, padding);
        }
        plain::conv2d_weight_backward::<Flex>(x, weight, grad, stride, padding)
    }

    fn kernel_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, causal: bool) -> FlexTensor {
        if all_f32([&q, &k, &v]) {
            return attention::forward(q, k, v, causal);
        }
        plain::attention::<Flex>(q, k, v, causal)
    }

    fn kernel_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        grad: FlexTensor,
        causal: bool,
    ) -> [FlexTensor; 3] {
        if all_f32([&q, &k, &v, &grad]) {
            return attention::backward(q, k, v, grad, causal);
        }
        plain::attention_backward::<Flex>(q, k, v, grad, causal)
    }
}
