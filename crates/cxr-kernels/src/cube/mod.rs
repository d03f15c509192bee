//! The Cube backends (CUDA, wgpu) and burn's fusion layer: the default bodies, but for convolution in half precision
//! through WebGPU.

mod cache;

pub use cache::keep_tuning;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, TensorMetadata, backend::Backend};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::{Fusion, FusionBackend};

use crate::plain::{from_f32, to_f32};
use crate::{DiffusionBackend, WeightCache, plain};

/// Whether a convolution of `x` would be added up in half precision.
///
/// Without the matrix cores that burn uses on CUDA, its convolution adds up in the dtype of the input. The widest layer
/// of Stable Diffusion adds 23,040 products: f16 would lose one or two of its three digits.
fn adds_up_in_half<B: Backend>(x: &FloatTensor<B>) -> bool {
    x.dtype() != DType::F32 && B::name(&B::float_device(x)).contains("wgpu")
}

macro_rules! convolution_in_f32 {
    () => {
        fn kernel_conv2d(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            bias: Option<FloatTensor<Self>>,
            stride: usize,
            padding: usize,
            _cache: &WeightCache,
        ) -> FloatTensor<Self> {
            if !adds_up_in_half::<Self>(&x) {
                return plain::conv2d::<Self>(x, weight, bias, stride, padding);
            }
            let dtype = x.dtype();
            let (x, weight, bias) = (to_f32::<Self>(x), to_f32::<Self>(weight), bias.map(to_f32::<Self>));
            from_f32::<Self>(plain::conv2d::<Self>(x, weight, bias, stride, padding), dtype)
        }

        fn kernel_conv2d_x_backward(
            x_shape: Shape,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            stride: usize,
            padding: usize,
            _cache: &WeightCache,
        ) -> FloatTensor<Self> {
            if !adds_up_in_half::<Self>(&grad) {
                return plain::conv2d_x_backward::<Self>(x_shape, weight, grad, stride, padding);
            }
            let dtype = grad.dtype();
            let (weight, grad) = (to_f32::<Self>(weight), to_f32::<Self>(grad));
            from_f32::<Self>(plain::conv2d_x_backward::<Self>(x_shape, weight, grad, stride, padding), dtype)
        }

        fn kernel_conv2d_weight_backward(
            x: FloatTensor<Self>,
            weight: FloatTensor<Self>,
            grad: FloatTensor<Self>,
            stride: usize,
            padding: usize,
        ) -> FloatTensor<Self> {
            if !adds_up_in_half::<Self>(&x) {
                return plain::conv2d_weight_backward::<Self>(x, weight, grad, stride, padding);
            }
            let dtype = x.dtype();
            let [x, weight, grad] = [x, weight, grad].map(to_f32::<Self>);
            from_f32::<Self>(plain::conv2d_weight_backward::<Self>(x, weight, grad, stride, padding), dtype)
        }
    };
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> DiffusionBackend
    for CubeBackend<R, F, I, T>
{
    convolution_in_f32!();
}

impl<B: FusionBackend> DiffusionBackend for Fusion<B> {
    convolution_in_f32!();
}
