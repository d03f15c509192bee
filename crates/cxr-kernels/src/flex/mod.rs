//! Hand-written kernels for `Flex`, one file each.

mod attention;
mod blockwise;
mod conv;
mod conv_large;
mod elementwise;
mod fast_math;
mod gelu;
mod gemm;
mod group_norm;
mod half;
mod join;
mod kept;
mod layer_norm;
mod layout;
mod moments;
mod pool;
mod products;
mod silu;
mod sums;
mod upsample;
mod winograd;

use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{DType, FloatDType, Shape, TensorMetadata};
use burn_flex::{Flex, FlexTensor};

use self::half::{by_dtype, narrow, widen};
use crate::{DiffusionBackend, Pool, WeightCache, plain};

impl DiffusionBackend for Flex {
    fn kernel_silu(x: FlexTensor) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::silu::<Flex>(x),
            _ => silu::forward(x),
        }
    }

    fn kernel_silu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        one(by_dtype(
            [x, grad],
            |[x, grad]| [silu::backward(x, grad)],
            |[x, grad]| [plain::silu_backward::<Flex>(x, grad)],
        ))
    }

    fn kernel_gelu(x: FlexTensor) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::gelu::<Flex>(x),
            _ => gelu::forward(x),
        }
    }

    fn kernel_gelu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        one(by_dtype(
            [x, grad],
            |[x, grad]| [gelu::backward(x, grad)],
            |[x, grad]| [plain::gelu_backward::<Flex>(x, grad)],
        ))
    }

    fn kernel_geglu(x: FlexTensor) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::geglu::<Flex>(x),
            _ => gelu::geglu(x),
        }
    }

    fn kernel_geglu_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        one(by_dtype(
            [x, grad],
            |[x, grad]| [gelu::geglu_backward(x, grad)],
            |[x, grad]| [plain::geglu_backward::<Flex>(x, grad)],
        ))
    }

    fn kernel_group_norm(
        x: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::group_norm::<Flex>(x, gamma, beta, groups, eps, silu),
            _ => group_norm::forward(x, widen(gamma), widen(beta), groups, eps, silu),
        }
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
        by_dtype(
            [x, gamma, beta, grad],
            |[x, gamma, beta, grad]| group_norm::backward(x, gamma, beta, grad, groups, eps, silu),
            |[x, gamma, beta, grad]| {
                plain::group_norm_backward::<Flex>(x, gamma, beta, grad, groups, eps, silu)
            },
        )
    }

    fn kernel_layer_norm(x: FlexTensor, gamma: FlexTensor, beta: FlexTensor, eps: f64) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::layer_norm::<Flex>(x, gamma, beta, eps),
            _ => layer_norm::forward(x, widen(gamma), widen(beta), eps),
        }
    }

    fn kernel_layer_norm_backward(
        x: FlexTensor,
        gamma: FlexTensor,
        grad: FlexTensor,
        eps: f64,
    ) -> [FlexTensor; 3] {
        by_dtype(
            [x, gamma, grad],
            |[x, gamma, grad]| layer_norm::backward(x, gamma, grad, eps),
            |[x, gamma, grad]| plain::layer_norm_backward::<Flex>(x, gamma, grad, eps),
        )
    }

    fn kernel_linear(
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<FlexTensor>,
        cache: &WeightCache,
    ) -> FlexTensor {
        products::linear(x, weight, bias, cache)
    }

    fn kernel_linear_x_backward(weight: FlexTensor, grad: FlexTensor, _cache: &WeightCache) -> FlexTensor {
        products::linear_x_backward(weight, grad)
    }

    fn kernel_linear_weight_backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
        let dtype = grad.dtype();
        narrow(plain::linear_weight_backward::<Flex>(widen(x), widen(grad)), dtype)
    }

    fn kernel_image_to_tokens(x: FlexTensor) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::image_to_tokens::<Flex>(x),
            _ => layout::image_to_tokens(x),
        }
    }

    fn kernel_tokens_to_image(x: FlexTensor, height: usize, width: usize) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::tokens_to_image::<Flex>(x, height, width),
            _ => layout::tokens_to_image(x, height, width),
        }
    }

    fn kernel_conv2d(
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<FlexTensor>,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FlexTensor {
        let dtype = x.dtype();
        if dtype != DType::F64
            && !products::outrun_winograd(dtype)
            && winograd::applies(&x.shape(), &weight.shape(), stride, padding)
        {
            return narrow(winograd::forward(widen(x), weight, bias.map(widen), padding, cache), dtype);
        }
        products::conv2d(&x, &weight, bias.as_ref(), stride, padding)
            .unwrap_or_else(|| plain::conv2d::<Flex>(x, weight, bias, stride, padding))
    }

    fn kernel_conv2d_x_backward(
        x_shape: Shape,
        weight: FlexTensor,
        grad: FlexTensor,
        stride: usize,
        padding: usize,
        _cache: &WeightCache,
    ) -> FlexTensor {
        let dtype = grad.dtype();
        if dtype == DType::F64 {
            return plain::conv2d_x_backward::<Flex>(x_shape, weight, grad, stride, padding);
        }
        if !products::outrun_winograd(dtype) && winograd::applies(&x_shape, &weight.shape(), stride, padding)
        {
            return narrow(winograd::x_backward(&x_shape, weight, widen(grad), padding), dtype);
        }
        if (stride == 1 || products::multiplies_halves(dtype))
            && let Some(y) = products::conv2d_x_backward(&x_shape, &weight, &grad, stride, padding)
        {
            return y;
        }
        let (weight, grad) = (widen(weight), widen(grad));
        let y = if conv::applies(&weight, grad.dtype()) {
            conv::x_backward(&x_shape, weight, grad, stride, padding)
        } else {
            conv_large::x_backward(&x_shape, weight, grad, stride, padding)
        };
        narrow(y, dtype)
    }

    fn kernel_conv2d_weight_backward(
        x: FlexTensor,
        weight: FlexTensor,
        grad: FlexTensor,
        stride: usize,
        padding: usize,
    ) -> FlexTensor {
        let dtype = grad.dtype();
        let (x, weight, grad) = (widen(x), widen(weight), widen(grad));
        let y = if conv::applies(&weight, grad.dtype()) {
            conv::weight_backward(x, weight.shape(), grad, stride, padding)
        } else {
            plain::conv2d_weight_backward::<Flex>(x, weight, grad, stride, padding)
        };
        narrow(y, dtype)
    }

    fn kernel_pool(x: FlexTensor, pool: Pool) -> FlexTensor {
        match x.dtype() {
            DType::F32 => pool::forward(x, pool),
            _ => plain::pool::<Flex>(x, pool),
        }
    }

    fn kernel_cast(x: FlexTensor, dtype: FloatDType) -> FlexTensor {
        match (x.dtype(), dtype) {
            (DType::F16 | DType::BF16, FloatDType::F32) => widen(x),
            (DType::F32, FloatDType::F16 | FloatDType::BF16) => narrow(x, dtype.into()),
            _ => Flex::float_cast(x, dtype),
        }
    }

    fn kernel_add(x: FlexTensor, y: FlexTensor) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::add::<Flex>(x, y),
            _ => sums::add(x, y),
        }
    }

    fn kernel_bias_backward(grad: FlexTensor) -> FlexTensor {
        one(by_dtype(
            [grad],
            |[grad]| [sums::over_all_but_channels(grad)],
            |[grad]| [plain::bias_backward::<Flex>(grad)],
        ))
    }

    fn kernel_join(x: FlexTensor, y: FlexTensor) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::join::<Flex>(x, y),
            _ => join::join(x, y),
        }
    }

    fn kernel_split(x: FlexTensor, first: usize) -> [FlexTensor; 2] {
        match x.dtype() {
            DType::F64 => plain::split::<Flex>(x, first),
            _ => join::split(x, first),
        }
    }

    fn kernel_upsample(x: FlexTensor) -> FlexTensor {
        match x.dtype() {
            DType::F64 => plain::upsample::<Flex>(x),
            _ => upsample::forward(x),
        }
    }

    fn kernel_upsample_backward(grad: FlexTensor) -> FlexTensor {
        one(by_dtype(
            [grad],
            |[grad]| [upsample::backward(grad)],
            |[grad]| [plain::upsample_backward::<Flex>(grad)],
        ))
    }

    fn kernel_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, causal: bool) -> FlexTensor {
        products::attention(&q, &k, &v, causal).unwrap_or_else(|| plain::attention::<Flex>(q, k, v, causal))
    }

    fn kernel_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        grad: FlexTensor,
        causal: bool,
    ) -> [FlexTensor; 3] {
        if let Some(gradients) = products::attention_backward(&q, &k, &v, &grad, causal) {
            return gradients;
        }
        by_dtype(
            [q, k, v, grad],
            |[q, k, v, grad]| attention::backward(q, k, v, grad, causal),
            |[q, k, v, grad]| plain::attention_backward::<Flex>(q, k, v, grad, causal),
        )
    }
}

fn one([result]: [FlexTensor; 1]) -> FlexTensor {
    result
}
