//! The operations on burn tensors: shapes and dtypes are checked here, then the backend's kernel runs.
//!
//! burn mixes no dtypes, and on some backends reads wrong bytes without a word when asked to; so every function
//! here panics when its operands' dtypes differ, naming both.
//!
//! All functions are differentiable on [`Autodiff`](burn::backend::Autodiff) backends, in every tensor argument.

use burn::tensor::{DType, FloatDType, Tensor, TensorPrimitive};

use crate::{DiffusionBackend, WeightCache};

/// SiLU, `x * sigmoid(x)`, any shape.
pub fn silu<B: DiffusionBackend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    wrap(B::kernel_silu(unwrap(x)))
}

/// CLIP's quick GELU, `x * sigmoid(1.702 x)`, any shape.
pub fn quick_gelu<B: DiffusionBackend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    // silu(a x) / a: one kernel serves both.
    silu(x.mul_scalar(1.702)).div_scalar(1.702)
}

/// Exact (erf) GELU, any shape.
pub fn gelu<B: DiffusionBackend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    wrap(B::kernel_gelu(unwrap(x)))
}

/// GEGLU on the last dimension: `[.., 2h] -> [.., h]`, `hidden * gelu(gate)`, the hidden half first.
///
/// # Panics
/// If the last dimension is odd.
pub fn geglu<B: DiffusionBackend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let width = x.dims()[D - 1];
    assert!(width.is_multiple_of(2), "geglu wants an even last dimension, got {width}");
    wrap(B::kernel_geglu(unwrap(x)))
}

/// GroupNorm over `x` `[n, c, h, w]` with `gamma`, `beta` `[c]`; biased variance, statistics in f32.
///
/// # Panics
/// If `groups` does not divide the channels, or shapes or dtypes do not fit.
pub fn group_norm<B: DiffusionBackend>(
    x: Tensor<B, 4>,
    gamma: Tensor<B, 1>,
    beta: Tensor<B, 1>,
    groups: usize,
    eps: f64,
) -> Tensor<B, 4> {
    check_group_norm(&x, &gamma, &beta, groups);
    wrap(B::kernel_group_norm(unwrap(x), unwrap(gamma), unwrap(beta), groups, eps, false))
}

/// [`group_norm`] followed by [`silu`], in one pass where the backend can.
///
/// # Panics
/// As [`group_norm`].
pub fn group_norm_silu<B: DiffusionBackend>(
    x: Tensor<B, 4>,
    gamma: Tensor<B, 1>,
    beta: Tensor<B, 1>,
    groups: usize,
    eps: f64,
) -> Tensor<B, 4> {
    check_group_norm(&x, &gamma, &beta, groups);
    wrap(B::kernel_group_norm(unwrap(x), unwrap(gamma), unwrap(beta), groups, eps, true))
}

/// LayerNorm over the last dimension of `x` `[.., d]` with `gamma`, `beta` `[d]`; statistics in f32.
///
/// # Panics
/// If shapes or dtypes do not fit.
pub fn layer_norm<B: DiffusionBackend, const D: usize>(
    x: Tensor<B, D>,
    gamma: Tensor<B, 1>,
    beta: Tensor<B, 1>,
    eps: f64,
) -> Tensor<B, D> {
    let width = x.dims()[D - 1];
    same_dtype("layer_norm", x.dtype(), &[gamma.dtype(), beta.dtype()]);
    assert_eq!([width; 2], [gamma.dims()[0], beta.dims()[0]], "layer_norm: width of x, gamma, beta");
    wrap(B::kernel_layer_norm(unwrap(x), unwrap(gamma), unwrap(beta), eps))
}

/// `x @ weight^T + bias`: `x` `[.., in]`, `weight` `[out, in]` (PyTorch's layout), `bias` `[out]`; `[.., out]`.
///
/// # Panics
/// If shapes or dtypes do not fit.
pub fn linear<B: DiffusionBackend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    cache: &WeightCache,
) -> Tensor<B, D> {
    let mut dims = x.dims();
    let [out, width] = weight.dims();
    assert_eq!(dims[D - 1], width, "linear: last dimension of x {dims:?} against weight [{out}, {width}]");
    same_dtype("linear", x.dtype(), &[weight.dtype()]);
    if let Some(bias) = &bias {
        same_dtype("linear", x.dtype(), &[bias.dtype()]);
        assert_eq!(bias.dims()[0], out, "linear: bias against weight [{out}, {width}]");
    }
    // Two dimensions, so that a weight gradient is one product and not one per batch element.
    let rows = dims[..D - 1].iter().product::<usize>();
    let y = B::kernel_linear(unwrap(x.reshape([rows, width])), unwrap(weight), bias.map(unwrap), cache);
    dims[D - 1] = out;
    wrap::<B, 2>(y).reshape(dims)
}

/// 2D convolution: `x` `[n, c, h, w]`, `weight` `[out, c, kh, kw]`, `bias` `[out]`, zero `padding` on all sides.
///
/// # Panics
/// If shapes or dtypes do not fit, or the stride is zero.
pub fn conv2d<B: DiffusionBackend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    stride: usize,
    padding: usize,
    cache: &WeightCache,
) -> Tensor<B, 4> {
    let ([_, c, h, w], [out, weight_c, kh, kw]) = (x.dims(), weight.dims());
    assert_eq!(c, weight_c, "conv2d: channels of x against weight [{out}, {weight_c}, {kh}, {kw}]");
    assert!(stride > 0, "conv2d: a stride of zero");
    assert!(
        h + 2 * padding >= kh && w + 2 * padding >= kw,
        "conv2d: a {h} x {w} image, padded by {padding}, is smaller than the {kh} x {kw} kernel"
    );
    same_dtype("conv2d", x.dtype(), &[weight.dtype()]);
    if let Some(bias) = &bias {
        same_dtype("conv2d", x.dtype(), &[bias.dtype()]);
        assert_eq!(bias.dims()[0], out, "conv2d: bias against {out} output channels");
    }
    wrap(B::kernel_conv2d(unwrap(x), unwrap(weight), bias.map(unwrap), stride, padding, cache))
}

/// Pools of 3x3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    /// Largest value, stride 2, without padding.
    MaxHalving,
    /// Largest value, stride 1, padding of one pixel that never counts.
    Max,
    /// Mean, stride 1, padding of one pixel that never counts (TensorFlow's; PyTorch's `count_include_pad=False`).
    Mean,
}

impl Pool {
    /// Height and width of the result.
    pub fn output(self, [h, w]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::MaxHalving => [(h - 3) / 2 + 1, (w - 3) / 2 + 1],
            Self::Max | Self::Mean => [h, w],
        }
    }
}

/// A 3x3 pool of `x` `[n, c, h, w]`.
///
/// # Panics
/// If `x` has no pixels, or fewer than 3x3 for [`Pool::MaxHalving`].
pub fn pool<B: DiffusionBackend>(x: Tensor<B, 4>, pool: Pool) -> Tensor<B, 4> {
    let [_, _, h, w] = x.dims();
    let least = if pool == Pool::MaxHalving { 3 } else { 1 };
    assert!(h >= least && w >= least, "pool: a {h} x {w} image is smaller than {least} x {least}");
    wrap(B::kernel_pool(unwrap(x), pool))
}

/// `x` in another dtype, each number rounded to the nearest; its gradient goes back in the dtype of `x`.
pub fn cast<B: DiffusionBackend, const D: usize>(x: Tensor<B, D>, dtype: FloatDType) -> Tensor<B, D> {
    if x.dtype() == dtype.into() { x } else { wrap(B::kernel_cast(unwrap(x), dtype)) }
}

/// `x + y` of one shape: a shortcut and what goes past it.
///
/// # Panics
/// If shapes or dtypes differ.
pub fn add<B: DiffusionBackend, const D: usize>(x: Tensor<B, D>, y: Tensor<B, D>) -> Tensor<B, D> {
    same_dtype("add", x.dtype(), &[y.dtype()]);
    assert_eq!(x.dims(), y.dims(), "add: shapes");
    wrap(B::kernel_add(unwrap(x), unwrap(y)))
}

/// `x + shift`, `[n, c, h, w]` and `[n, c]`: a number of its own for every channel of an image.
///
/// # Panics
/// If shapes or dtypes do not fit.
pub fn shift<B: DiffusionBackend>(x: Tensor<B, 4>, shift: Tensor<B, 2>) -> Tensor<B, 4> {
    same_dtype("shift", x.dtype(), &[shift.dtype()]);
    let [n, c, _, _] = x.dims();
    assert_eq!([n, c], shift.dims(), "shift: images and channels");
    wrap(B::kernel_shift(unwrap(x), unwrap(shift)))
}

/// A convolution's weight `[out, c, kh, kw]`, the same numbers, in the order of memory that [`conv2d`] reads on this
/// backend. No result depends on it: where it is left out, each call brings the weight into order.
pub fn conv2d_weight<B: DiffusionBackend>(weight: Tensor<B, 4>) -> Tensor<B, 4> {
    wrap(B::kernel_conv2d_weight(unwrap(weight)))
}

/// Channels behind one another: `[n, a, h, w]` and `[n, b, h, w]` to `[n, a + b, h, w]`.
///
/// # Panics
/// If the other dimensions or dtypes differ.
pub fn join<B: DiffusionBackend>(x: Tensor<B, 4>, y: Tensor<B, 4>) -> Tensor<B, 4> {
    same_dtype("join", x.dtype(), &[y.dtype()]);
    let ([n, _, h, w], [m, _, height, width]) = (x.dims(), y.dims());
    assert_eq!([n, h, w], [m, height, width], "join: batch, height, width");
    wrap(B::kernel_join(unwrap(x), unwrap(y)))
}

/// Nearest-neighbour upsampling of `x` `[n, c, h, w]` to `size` `[height, width]`, each side twice as long, or one less.
///
/// # Panics
/// If `size` is another.
pub fn upsample<B: DiffusionBackend>(x: Tensor<B, 4>, size: [usize; 2]) -> Tensor<B, 4> {
    let [n, c, h, w] = x.dims();
    let [height, width] = size;
    let fits = |from: usize, to: usize| to > 0 && to.div_ceil(2) == from;
    assert!(
        fits(h, height) && fits(w, width),
        "upsample: {h} x {w} to {height} x {width}, which is not twice as large"
    );
    let twice = wrap::<B, 4>(B::kernel_upsample(unwrap(x)));
    // PyTorch takes pixel `floor(i * h / height)`, which is `i / 2` for `2h` and for `2h - 1` alike
    if size == [2 * h, 2 * w] { twice } else { twice.slice([0..n, 0..c, 0..height, 0..width]) }
}

/// What [`attention`] leaves open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttentionOptions {
    /// Query `i` sees keys `0..=i` only.
    pub causal: bool,
}

/// `softmax(q k^T / sqrt(d)) v`: `q` `[b, heads, n, d]`, `k` and `v` `[b, heads, m, d]`; `[b, heads, n, d]`.
///
/// No `n x m` matrix is made, in this direction or in the other; softmax is taken in f32.
///
/// # Panics
/// If shapes or dtypes do not fit, or there are no queries or keys.
pub fn attention<B: DiffusionBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    options: AttentionOptions,
) -> Tensor<B, 4> {
    let ([b, heads, n, d], [kb, k_heads, m, kd]) = (q.dims(), k.dims());
    same_dtype("attention", q.dtype(), &[k.dtype(), v.dtype()]);
    assert_eq!([b, heads, d], [kb, k_heads, kd], "attention: batch, heads, head size of q against k");
    assert_eq!(k.dims(), v.dims(), "attention: k against v");
    assert!(n > 0 && m > 0, "attention: {n} queries, {m} keys");
    wrap(B::kernel_attention(unwrap(q), unwrap(k), unwrap(v), options.causal))
}

/// `[n, c, h, w] -> [n, h * w, c]`.
pub fn image_to_tokens<B: DiffusionBackend>(x: Tensor<B, 4>) -> Tensor<B, 3> {
    wrap(B::kernel_image_to_tokens(unwrap(x)))
}

/// `[n, height * width, c] -> [n, c, height, width]`.
///
/// # Panics
/// If the number of tokens is not `height * width`.
pub fn tokens_to_image<B: DiffusionBackend>(x: Tensor<B, 3>, height: usize, width: usize) -> Tensor<B, 4> {
    let tokens = x.dims()[1];
    assert_eq!(tokens, height * width, "tokens_to_image: {tokens} tokens for {height} x {width}");
    wrap(B::kernel_tokens_to_image(unwrap(x), height, width))
}

fn unwrap<B: DiffusionBackend, const D: usize>(x: Tensor<B, D>) -> B::FloatTensorPrimitive {
    x.into_primitive().tensor()
}

fn wrap<B: DiffusionBackend, const D: usize>(x: B::FloatTensorPrimitive) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

fn same_dtype(operation: &str, x: DType, others: &[DType]) {
    for other in others {
        assert_eq!(x, *other, "{operation}: dtypes differ, cast first");
    }
}

fn check_group_norm<B: DiffusionBackend>(
    x: &Tensor<B, 4>,
    gamma: &Tensor<B, 1>,
    beta: &Tensor<B, 1>,
    groups: usize,
) {
    let channels = x.dims()[1];
    same_dtype("group_norm", x.dtype(), &[gamma.dtype(), beta.dtype()]);
    assert_eq!([channels; 2], [gamma.dims()[0], beta.dims()[0]], "group_norm: channels of x, gamma, beta");
    assert!(
        groups > 0 && channels.is_multiple_of(groups),
        "group_norm: {channels} channels do not divide into {groups} groups"
    );
}
