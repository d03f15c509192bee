//! The Cube backends (CUDA, wgpu) and burn's fusion layer: the default bodies, but for convolution, whose kernel is chosen
//! without timing.

mod cache;
mod conv;
mod registered;

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

impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> DiffusionBackend
    for CubeBackend<R, F, I, T>
{
    fn kernel_conv2d(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        if adds_up_in_half::<Self>(&x) {
            let dtype = x.dtype();
            let (x, weight, bias) = (to_f32::<Self>(x), to_f32::<Self>(weight), bias.map(to_f32::<Self>));
            return from_f32::<Self>(Self::kernel_conv2d(x, weight, bias, stride, padding, cache), dtype);
        }
        conv::forward(&x, &weight, bias.as_ref(), stride, padding)
            .unwrap_or_else(|| plain::conv2d::<Self>(x, weight, bias, stride, padding))
    }

    fn kernel_conv2d_x_backward(
        x_shape: Shape,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        if adds_up_in_half::<Self>(&grad) {
            let dtype = grad.dtype();
            let (weight, grad) = (to_f32::<Self>(weight), to_f32::<Self>(grad));
            let to_x = Self::kernel_conv2d_x_backward(x_shape, weight, grad, stride, padding, cache);
            return from_f32::<Self>(to_x, dtype);
        }
        if stride == 1
            && let Some((turned, padding)) =
                conv::turned::<Self>(weight.clone(), &x_shape, &grad.shape(), padding)
        {
            return Self::kernel_conv2d(grad, turned, None, 1, padding, cache);
        }
        plain::conv2d_x_backward::<Self>(x_shape, weight, grad, stride, padding)
    }

    fn kernel_conv2d_weight_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
    ) -> FloatTensor<Self> {
        if adds_up_in_half::<Self>(&x) {
            let dtype = x.dtype();
            let [x, weight, grad] = [x, weight, grad].map(to_f32::<Self>);
            return from_f32::<Self>(
                plain::conv2d_weight_backward::<Self>(x, weight, grad, stride, padding),
                dtype,
            );
        }
        plain::conv2d_weight_backward::<Self>(x, weight, grad, stride, padding)
    }
}

impl<B: FusionBackend + DiffusionBackend> DiffusionBackend for Fusion<B> {
    fn kernel_conv2d(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let [n, _, height, width] = x.shape().dims();
        let [out, _, kh, kw] = weight.shape().dims();
        let side = |length: usize, kernel: usize| (length + 2 * padding - kernel) / stride + 1;
        let shape = Shape::new([n, out, side(height, kh), side(width, kw)]);
        let (dtype, cache) = (x.dtype(), cache.clone());
        let inputs = [x, weight].into_iter().chain(bias).collect();
        let name = format!("convolution, stride {stride}, padding {padding}");
        registered::register::<B>(name, inputs, shape, dtype, move |inputs| {
            let mut inputs = inputs.into_iter();
            let mut next = || inputs.next().expect("two inputs, and maybe a bias");
            let (x, weight) = (next(), next());
            B::kernel_conv2d(x, weight, inputs.next(), stride, padding, &cache)
        })
    }

    fn kernel_conv2d_x_backward(
        x_shape: Shape,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let (dtype, cache, shape) = (grad.dtype(), cache.clone(), x_shape.clone());
        let name = format!("gradient of convolution, stride {stride}, padding {padding}");
        registered::register::<B>(name, vec![weight, grad], shape, dtype, move |inputs| {
            let [weight, grad] = inputs.try_into().expect("two inputs");
            B::kernel_conv2d_x_backward(x_shape.clone(), weight, grad, stride, padding, &cache)
        })
    }

    fn kernel_conv2d_weight_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
    ) -> FloatTensor<Self> {
        let (dtype, shape) = (weight.dtype(), weight.shape());
        let name = format!("weight gradient of convolution, stride {stride}, padding {padding}");
        registered::register::<B>(name, vec![x, weight, grad], shape, dtype, move |inputs| {
            let [x, weight, grad] = inputs.try_into().expect("three inputs");
            B::kernel_conv2d_weight_backward(x, weight, grad, stride, padding)
        })
    }
}
