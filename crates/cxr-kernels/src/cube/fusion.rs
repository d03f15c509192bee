//! Each operation as one of burn's fusion layer, which sees its name and the shapes of its results.

use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, TensorMetadata};
use burn_fusion::{Fusion, FusionBackend};

use super::registered;
use crate::{DiffusionBackend, WeightCache};

impl<B: FusionBackend + DiffusionBackend> DiffusionBackend for Fusion<B> {
    fn kernel_silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = x.shape();
        registered::one::<B>("silu".to_owned(), x, shape, B::kernel_silu)
    }

    fn kernel_geglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let mut shape = x.shape();
        let last = shape.num_dims() - 1;
        shape[last] /= 2;
        registered::one::<B>("geglu".to_owned(), x, shape, B::kernel_geglu)
    }

    fn kernel_geglu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = x.shape();
        registered::two::<B>("gradient of geglu".to_owned(), [x, grad], shape, B::kernel_geglu_backward)
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
        let shape = x.shape();
        let name = format!("gradient of group norm, {groups} groups, epsilon {eps:e}, SiLU {silu}");
        registered::register::<B>(name, vec![x, gamma, beta, grad], shape, move |inputs| {
            let [x, gamma, beta, grad] = inputs.try_into().expect("four inputs");
            B::kernel_group_norm_x_backward(x, gamma, beta, grad, groups, eps, silu)
        })
    }

    fn kernel_layer_norm_x_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let shape = x.shape();
        let name = format!("gradient of layer norm, epsilon {eps:e}");
        registered::register::<B>(name, vec![x, gamma, grad], shape, move |inputs| {
            let [x, gamma, grad] = inputs.try_into().expect("three inputs");
            B::kernel_layer_norm_x_backward(x, gamma, grad, eps)
        })
    }

    fn kernel_group_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        let shape = x.shape();
        let name = format!("group norm, {groups} groups, epsilon {eps:e}, SiLU {silu}");
        registered::register::<B>(name, vec![x, gamma, beta], shape, move |inputs| {
            let [x, gamma, beta] = inputs.try_into().expect("three inputs");
            B::kernel_group_norm(x, gamma, beta, groups, eps, silu)
        })
    }

    fn kernel_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let shape = x.shape();
        let name = format!("layer norm, epsilon {eps:e}");
        registered::register::<B>(name, vec![x, gamma, beta], shape, move |inputs| {
            let [x, gamma, beta] = inputs.try_into().expect("three inputs");
            B::kernel_layer_norm(x, gamma, beta, eps)
        })
    }

    fn kernel_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let shape = Shape::new([x.shape()[0], weight.shape()[0]]);
        let cache = cache.clone();
        let inputs = [x, weight].into_iter().chain(bias).collect();
        registered::register::<B>("linear".to_owned(), inputs, shape, move |inputs| {
            let mut inputs = inputs.into_iter();
            let mut next = || inputs.next().expect("two inputs, and maybe a bias");
            let (x, weight) = (next(), next());
            B::kernel_linear(x, weight, inputs.next(), &cache)
        })
    }

    fn kernel_linear_x_backward(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let shape = Shape::new([grad.shape()[0], weight.shape()[1]]);
        let cache = cache.clone();
        let name = "gradient of linear".to_owned();
        registered::two::<B>(name, [weight, grad], shape, move |weight, grad| {
            B::kernel_linear_x_backward(weight, grad, &cache)
        })
    }

    fn kernel_linear_weight_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = Shape::new([grad.shape()[1], x.shape()[1]]);
        let name = "weight gradient of linear".to_owned();
        registered::two::<B>(name, [x, grad], shape, B::kernel_linear_weight_backward)
    }

    fn kernel_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = x.shape();
        registered::two::<B>("sum".to_owned(), [x, y], shape, B::kernel_add)
    }

    fn kernel_shift(x: FloatTensor<Self>, shift: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = x.shape();
        registered::two::<B>("shift of channels".to_owned(), [x, shift], shape, B::kernel_shift)
    }

    fn kernel_conv2d_weight(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = weight.shape();
        registered::one::<B>("order of a kernel".to_owned(), weight, shape, B::kernel_conv2d_weight)
    }

    fn kernel_image_to_tokens(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let [n, c, h, w] = x.shape().dims();
        let shape = Shape::new([n, h * w, c]);
        registered::one::<B>("tokens".to_owned(), x, shape, B::kernel_image_to_tokens)
    }

    fn kernel_tokens_to_image(x: FloatTensor<Self>, height: usize, width: usize) -> FloatTensor<Self> {
        let [n, _, c] = x.shape().dims();
        let shape = Shape::new([n, c, height, width]);
        let name = format!("image of {height} by {width}");
        registered::one::<B>(name, x, shape, move |x| B::kernel_tokens_to_image(x, height, width))
    }

    fn kernel_join(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let mut shape = x.shape();
        shape[1] += y.shape()[1];
        registered::two::<B>("channels joined".to_owned(), [x, y], shape, B::kernel_join)
    }

    fn kernel_upsample(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let [n, c, h, w] = x.shape().dims();
        let shape = Shape::new([n, c, 2 * h, 2 * w]);
        registered::one::<B>("upsampling".to_owned(), x, shape, B::kernel_upsample)
    }

    fn kernel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        let shape = q.shape();
        let name = format!("attention, causal {causal}");
        registered::register::<B>(name, vec![q, k, v], shape, move |inputs| {
            let [q, k, v] = inputs.try_into().expect("three inputs");
            B::kernel_attention(q, k, v, causal)
        })
    }

    fn kernel_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        causal: bool,
    ) -> [FloatTensor<Self>; 3] {
        let shapes = [q.shape(), k.shape(), v.shape()];
        let name = format!("gradients of attention, causal {causal}");
        registered::register_all::<B, 3>(name, vec![q, k, v, grad], shapes, move |inputs| {
            let [q, k, v, grad] = inputs.try_into().expect("four inputs");
            B::kernel_attention_backward(q, k, v, grad, causal)
        })
    }

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
        let cache = cache.clone();
        let inputs = [x, weight].into_iter().chain(bias).collect();
        let name = format!("convolution, stride {stride}, padding {padding}");
        registered::register::<B>(name, inputs, shape, move |inputs| {
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
        let (cache, shape) = (cache.clone(), x_shape.clone());
        let name = format!("gradient of convolution, stride {stride}, padding {padding}");
        registered::register::<B>(name, vec![weight, grad], shape, move |inputs| {
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
        let shape = weight.shape();
        let name = format!("weight gradient of convolution, stride {stride}, padding {padding}");
        registered::register::<B>(name, vec![x, weight, grad], shape, move |inputs| {
            let [x, weight, grad] = inputs.try_into().expect("three inputs");
            B::kernel_conv2d_weight_backward(x, weight, grad, stride, padding)
        })
    }
}
