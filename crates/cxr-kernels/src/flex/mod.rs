//! Hand-written kernels for `Flex`, one file each.

mod attention;
mod conv;
mod gemm;

use burn::tensor::Shape;
use burn::tensor::TensorMetadata;
use burn_flex::{Flex, FlexTensor};

use crate::{DiffusionBackend, WeightCache, plain};

impl DiffusionBackend for Flex {
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
        if attention::applies([&q, &k, &v]) {
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
        if attention::applies([&q, &k, &v]) {
            return attention::backward(q, k, v, grad, causal);
        }
        plain::attention_backward::<Flex>(q, k, v, grad, causal)
    }
}
