//! The trait of the hot operations, with plain default bodies.

use burn::tensor::ops::{ConvOptions, FloatTensor};
use burn::tensor::{
    DType, FloatDType, Shape, Slice, TensorMetadata,
    backend::{AutodiffBackend, Backend},
};

use crate::WeightCache;

/// Queries handled at once by the default [`attention`](DiffusionBackend::kernel_attention): the scores of one
/// chunk are `[b, heads, 256, keys]`, 4 MiB per head at the 4096 keys of a 512-pixel picture, where the whole
/// matrix would be 64 MiB per head.
const QUERY_CHUNK: usize = 256;

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
        Self::float_mul(x.clone(), Self::sigmoid(x))
    }

    /// Gradient of [`kernel_silu`](Self::kernel_silu): `grad * s * (1 + x * (1 - s))`, `s = sigmoid(x)`.
    fn kernel_silu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let s = Self::sigmoid(x.clone());
        let one_minus = Self::float_add_scalar(Self::float_neg(s.clone()), 1.0.into());
        let inner = Self::float_add_scalar(Self::float_mul(x, one_minus), 1.0.into());
        Self::float_mul(grad, Self::float_mul(s, inner))
    }

    /// Exact (erf) GELU, `x * Phi(x)`, any shape.
    fn kernel_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let cdf = normal_cdf::<Self>(x.clone());
        Self::float_mul(x, cdf)
    }

    /// Gradient of [`kernel_gelu`](Self::kernel_gelu): `grad * (Phi(x) + x * phi(x))`.
    ///
    /// Written out because burn's own is the tanh approximation on some backends.
    fn kernel_gelu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let square = Self::float_mul(x.clone(), x.clone());
        let density = Self::float_exp(Self::float_mul_scalar(square, (-0.5).into()));
        let density = Self::float_mul_scalar(density, (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2).into());
        let slope = Self::float_add(normal_cdf::<Self>(x.clone()), Self::float_mul(x, density));
        Self::float_mul(grad, slope)
    }

    /// GEGLU on the last dimension: `[.., 2h] -> [.., h]`, `hidden * gelu(gate)`, the hidden half first.
    fn kernel_geglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let (hidden, gate) = halves::<Self>(x);
        Self::float_mul(hidden, Self::kernel_gelu(gate))
    }

    /// Gradient of [`kernel_geglu`](Self::kernel_geglu) with respect to its `[.., 2h]` input.
    fn kernel_geglu_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let last = x.shape().num_dims() - 1;
        let (hidden, gate) = halves::<Self>(x);
        let to_hidden = Self::float_mul(grad.clone(), Self::kernel_gelu(gate.clone()));
        let to_gate = Self::kernel_gelu_backward(gate, Self::float_mul(grad, hidden));
        Self::float_cat(vec![to_hidden, to_gate], last)
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
        let dtype = x.dtype();
        let shape = x.shape();
        let normal = normalize_groups::<Self>(to_f32::<Self>(x), groups, eps).0;
        let y = Self::float_reshape(normal, flat_channels(&shape));
        let y = Self::float_add(
            Self::float_mul(y, per_channel::<Self>(to_f32::<Self>(gamma))),
            per_channel::<Self>(to_f32::<Self>(beta)),
        );
        let y = if silu { Self::kernel_silu(y) } else { y };
        Self::float_reshape(from_f32::<Self>(y, dtype), shape)
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
        let dtype = x.dtype();
        let shape = x.shape();
        let flat = flat_channels(&shape);
        let [n, channels, inner] = [flat[0], flat[1], flat[2]];
        let (normal, inverse) = normalize_groups::<Self>(to_f32::<Self>(x), groups, eps);
        let normal = Self::float_reshape(normal, flat.clone());
        let gamma3 = per_channel::<Self>(to_f32::<Self>(gamma));
        let mut grad = Self::float_reshape(to_f32::<Self>(grad), flat);
        if silu {
            let y = Self::float_add(
                Self::float_mul(normal.clone(), gamma3.clone()),
                per_channel::<Self>(to_f32::<Self>(beta)),
            );
            grad = Self::kernel_silu_backward(y, grad);
        }
        let over_batch = |t: FloatTensor<Self>| {
            let t = Self::float_sum_dim(Self::float_sum_dim(t, 2), 0);
            from_f32::<Self>(Self::float_reshape(t, Shape::new([channels])), dtype)
        };
        let to_gamma = over_batch(Self::float_mul(grad.clone(), normal.clone()));
        let to_beta = over_batch(grad.clone());
        let grouped = Shape::new([n, groups, channels / groups * inner]);
        let to_normal = Self::float_reshape(Self::float_mul(grad, gamma3), grouped.clone());
        let normal = Self::float_reshape(normal, grouped);
        let to_x = normalize_backward::<Self>(normal, inverse, to_normal, 2);
        [Self::float_reshape(from_f32::<Self>(to_x, dtype), shape), to_gamma, to_beta]
    }

    /// LayerNorm over the last dimension, biased variance, then `gamma`, `beta` `[d]`; statistics in f32.
    fn kernel_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let dtype = x.dtype();
        let shape = x.shape();
        let (normal, _) = normalize::<Self>(rows::<Self>(to_f32::<Self>(x)), 1, eps);
        let y = Self::float_mul(normal, as_row::<Self>(to_f32::<Self>(gamma)));
        let y = Self::float_add(y, as_row::<Self>(to_f32::<Self>(beta)));
        Self::float_reshape(from_f32::<Self>(y, dtype), shape)
    }

    /// Gradients of [`kernel_layer_norm`](Self::kernel_layer_norm) with respect to `x`, `gamma`, `beta`.
    fn kernel_layer_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> [FloatTensor<Self>; 3] {
        let dtype = x.dtype();
        let shape = x.shape();
        let width = gamma.shape().clone();
        let (normal, inverse) = normalize::<Self>(rows::<Self>(to_f32::<Self>(x)), 1, eps);
        let grad = rows::<Self>(to_f32::<Self>(grad));
        let over_rows = |t: FloatTensor<Self>| {
            from_f32::<Self>(Self::float_reshape(Self::float_sum_dim(t, 0), width.clone()), dtype)
        };
        let to_gamma = over_rows(Self::float_mul(grad.clone(), normal.clone()));
        let to_beta = over_rows(grad.clone());
        let to_normal = Self::float_mul(grad, as_row::<Self>(to_f32::<Self>(gamma)));
        let to_x = normalize_backward::<Self>(normal, inverse, to_normal, 1);
        [Self::float_reshape(from_f32::<Self>(to_x, dtype), shape), to_gamma, to_beta]
    }

    /// `x @ weight^T + bias` for `x` `[rows, in]`, `weight` `[out, in]` (PyTorch's layout), `bias` `[out]`.
    fn kernel_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let y = Self::float_matmul(x, Self::float_swap_dims(weight, 0, 1));
        match bias {
            Some(bias) => Self::float_add(y, as_row::<Self>(bias)),
            None => y,
        }
    }

    /// Gradient of [`kernel_linear`](Self::kernel_linear) with respect to `x`.
    fn kernel_linear_x_backward(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _cache: &WeightCache,
    ) -> FloatTensor<Self> {
        Self::float_matmul(grad, weight)
    }

    /// Gradient of [`kernel_linear`](Self::kernel_linear) with respect to `weight`, `[out, in]`.
    fn kernel_linear_weight_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(Self::float_swap_dims(grad, 0, 1), x)
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
        Self::conv2d(x, weight, bias, conv_options(stride, padding))
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
        // burn takes the whole input and reads its shape only; zeros of that shape cost next to nothing beside
        // the product, and let the graph forget the input when the weight is frozen.
        let x = Self::float_zeros(x_shape, &Self::float_device(&grad), float_dtype(grad.dtype()));
        Self::conv2d_x_backward(x, weight, grad, conv_options(stride, padding))
    }

    /// Gradient of [`kernel_conv2d`](Self::kernel_conv2d) with respect to `weight`.
    fn kernel_conv2d_weight_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        stride: usize,
        padding: usize,
    ) -> FloatTensor<Self> {
        Self::conv2d_weight_backward(x, weight, grad, conv_options(stride, padding))
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
        let chunks = query_chunks(q.shape()[2])
            .map(|(start, end)| {
                let weights = chunk_weights::<Self>(queries::<Self>(&q, start, end), k.clone(), causal, start);
                Self::float_matmul(from_f32::<Self>(weights, v.dtype()), v.clone())
            })
            .collect();
        cat_queries::<Self>(chunks)
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
        let dtype = q.dtype();
        let scale = (q.shape()[3] as f64).powf(-0.5);
        let (q, k, v, grad) =
            (to_f32::<Self>(q), to_f32::<Self>(k), to_f32::<Self>(v), to_f32::<Self>(grad));
        let mut to_q = Vec::new();
        let mut to_kv: Option<(FloatTensor<Self>, FloatTensor<Self>)> = None;
        for (start, end) in query_chunks(q.shape()[2]) {
            let q = queries::<Self>(&q, start, end);
            let grad = queries::<Self>(&grad, start, end);
            let weights = chunk_weights::<Self>(q.clone(), k.clone(), causal, start);
            let chunk_v = Self::float_matmul(Self::float_swap_dims(weights.clone(), 2, 3), grad.clone());
            let to_weights = Self::float_matmul(grad, Self::float_swap_dims(v.clone(), 2, 3));
            let row = Self::float_sum_dim(Self::float_mul(to_weights.clone(), weights.clone()), 3);
            let to_scores = Self::float_mul(weights, Self::float_sub(to_weights, row));
            let to_scores = Self::float_mul_scalar(to_scores, scale.into());
            to_q.push(Self::float_matmul(to_scores.clone(), k.clone()));
            let chunk_k = Self::float_matmul(Self::float_swap_dims(to_scores, 2, 3), q);
            to_kv = Some(match to_kv {
                None => (chunk_k, chunk_v),
                Some((k, v)) => (Self::float_add(k, chunk_k), Self::float_add(v, chunk_v)),
            });
        }
        let (to_k, to_v) = to_kv.expect("ops::attention asserts that there is at least one query");
        [cat_queries::<Self>(to_q), to_k, to_v].map(|t| from_f32::<Self>(t, dtype))
    }

    /// `[n, c, h, w] -> [n, h * w, c]`, contiguous.
    fn kernel_image_to_tokens(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let [n, c, h, w] = x.shape().dims();
        Self::float_swap_dims(Self::float_reshape(x, Shape::new([n, c, h * w])), 1, 2)
    }

    /// `[n, h * w, c] -> [n, c, h, w]`, contiguous.
    fn kernel_tokens_to_image(x: FloatTensor<Self>, height: usize, width: usize) -> FloatTensor<Self> {
        let [n, _, c] = x.shape().dims();
        Self::float_reshape(Self::float_swap_dims(x, 1, 2), Shape::new([n, c, height, width]))
    }
}

/// A backend with gradients whose inner backend runs the same operations: what training code asks for.
pub trait DiffusionAutodiff:
    DiffusionBackend + AutodiffBackend<InnerBackend: DiffusionBackend>
{
}

impl<B> DiffusionAutodiff for B where B: DiffusionBackend + AutodiffBackend<InnerBackend: DiffusionBackend> {}

/// burn's options for a convolution without dilation and groups.
pub(crate) fn conv_options(stride: usize, padding: usize) -> ConvOptions<2> {
    ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1)
}

fn float_dtype(dtype: DType) -> FloatDType {
    dtype.into()
}

fn to_f32<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    if x.dtype() == DType::F32 { x } else { B::float_cast(x, FloatDType::F32) }
}

fn from_f32<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if x.dtype() == dtype { x } else { B::float_cast(x, float_dtype(dtype)) }
}

/// The distribution function of the standard normal.
fn normal_cdf<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let erf = B::float_erf(B::float_mul_scalar(x, std::f64::consts::FRAC_1_SQRT_2.into()));
    B::float_mul_scalar(B::float_add_scalar(erf, 1.0.into()), 0.5.into())
}

/// The two halves of the last dimension.
fn halves<B: Backend>(x: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let shape = x.shape();
    let last = shape.num_dims() - 1;
    let half = shape[last] / 2;
    let part = |start: usize, end: usize| {
        let mut slices = vec![Slice::full(); last];
        slices.push(Slice::from(start..end));
        B::float_slice(x.clone(), &slices)
    };
    (part(0, half), part(half, 2 * half))
}

/// `[n, c, ...] -> [n, c, rest]`.
fn flat_channels(shape: &Shape) -> Shape {
    let (n, c) = (shape[0], shape[1]);
    Shape::new([n, c, shape.num_elements() / (n * c).max(1)])
}

/// `[c] -> [1, c, 1]`.
fn per_channel<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let c = x.shape()[0];
    B::float_reshape(x, Shape::new([1, c, 1]))
}

/// `[d] -> [1, d]`.
fn as_row<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let d = x.shape()[0];
    B::float_reshape(x, Shape::new([1, d]))
}

/// `[.., d] -> [rows, d]`.
fn rows<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape();
    let d = shape[shape.num_dims() - 1];
    B::float_reshape(x, Shape::new([shape.num_elements() / d.max(1), d]))
}

/// Zero mean and unit (biased) variance along `dim`; also the inverse deviation, with `dim` of size one.
fn normalize<B: Backend>(x: FloatTensor<B>, dim: usize, eps: f64) -> (FloatTensor<B>, FloatTensor<B>) {
    let mean = B::float_mean_dim(x.clone(), dim);
    let centred = B::float_sub(x, mean);
    let variance = B::float_mean_dim(B::float_mul(centred.clone(), centred.clone()), dim);
    let inverse = B::float_recip(B::float_sqrt(B::float_add_scalar(variance, eps.into())));
    (B::float_mul(centred, inverse.clone()), inverse)
}

/// [`normalize`] over the groups of `[n, c, ...]`: `[n, groups, rest]` and `[n, groups, 1]`.
fn normalize_groups<B: Backend>(
    x: FloatTensor<B>,
    groups: usize,
    eps: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let shape = x.shape();
    let n = shape[0];
    let rest = shape.num_elements() / (n * groups).max(1);
    normalize::<B>(B::float_reshape(x, Shape::new([n, groups, rest])), 2, eps)
}

/// Gradient through [`normalize`]: `inverse * (g - mean(g) - normal * mean(g * normal))`.
fn normalize_backward<B: Backend>(
    normal: FloatTensor<B>,
    inverse: FloatTensor<B>,
    grad: FloatTensor<B>,
    dim: usize,
) -> FloatTensor<B> {
    let mean = B::float_mean_dim(grad.clone(), dim);
    let along = B::float_mean_dim(B::float_mul(grad.clone(), normal.clone()), dim);
    let centred = B::float_sub(B::float_sub(grad, mean), B::float_mul(normal, along));
    B::float_mul(centred, inverse)
}

fn query_chunks(queries: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..queries).step_by(QUERY_CHUNK).map(move |start| (start, (start + QUERY_CHUNK).min(queries)))
}

/// Queries `start..end` of `[b, heads, n, d]`.
fn queries<B: Backend>(q: &FloatTensor<B>, start: usize, end: usize) -> FloatTensor<B> {
    if start == 0 && end == q.shape()[2] {
        return q.clone();
    }
    B::float_slice(q.clone(), &[Slice::full(), Slice::full(), Slice::from(start..end), Slice::full()])
}

fn cat_queries<B: Backend>(mut chunks: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    if chunks.len() == 1 { chunks.remove(0) } else { B::float_cat(chunks, 2) }
}

/// Attention weights of one chunk of queries, in f32: `[b, heads, chunk, keys]`, rows summing to one.
fn chunk_weights<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    causal: bool,
    first_query: usize,
) -> FloatTensor<B> {
    let scale = (q.shape()[3] as f64).powf(-0.5);
    let scores = B::float_matmul(q, B::float_swap_dims(k, 2, 3));
    let mut scores = B::float_mul_scalar(to_f32::<B>(scores), scale.into());
    if causal {
        let [_, _, n, m] = scores.shape().dims();
        // Additive: -1e30 is far below any score, and stays finite through the subtraction of the maximum.
        let mask: Vec<f32> = (0..n * m)
            .map(|i| if i % m > first_query + i / m { -1e30 } else { 0.0 })
            .collect();
        let data = burn::tensor::TensorData::new(mask, [1, 1, n, m]);
        let mask = B::float_from_data(data, &B::float_device(&scores));
        scores = B::float_add(scores, to_f32::<B>(mask));
    }
    let maximum = B::float_max_dim(scores.clone(), 3);
    let exponentials = B::float_exp(B::float_sub(scores, maximum));
    let sum = B::float_sum_dim(exponentials.clone(), 3);
    B::float_div(exponentials, sum)
}
