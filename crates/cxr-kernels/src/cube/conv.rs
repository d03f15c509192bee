//! Convolution as a matrix product on the matrix units, whose operand is gathered as it is read (an implicit GEMM).
//!
//! burn would compile and time eight kernels for every shape, the direct convolution among them, which uses no matrix
//! units: on a GPU that is a good part of the minutes before the first picture.

use burn::tensor::Shape;
use burn::tensor::ops::{ConvOptions, FloatTensor};
use burn::tensor::{TensorMetadata, backend::Backend};
use burn_cubecl::kernel::conv::{ConvStrategy, conv_forward};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};

fn options(stride: usize, padding: usize) -> ConvOptions<2> {
    ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1)
}

/// The convolution; `None` where no strategy takes it.
pub(super) fn forward<R: CubeRuntime>(
    x: &CubeTensor<R>,
    weight: &CubeTensor<R>,
    bias: Option<&CubeTensor<R>>,
    stride: usize,
    padding: usize,
) -> Option<CubeTensor<R>> {
    let strategies = [ConvStrategy::ImplicitGemm, ConvStrategy::Direct];
    let run =
        |strategy| conv_forward(x.clone(), weight.clone(), bias.cloned(), options(stride, padding), strategy);
    strategies.into_iter().find_map(|strategy| run(strategy).ok())
}

/// The gradient of a convolution with stride one is a convolution of the gradient: this is its weight, in and out swapped
/// and turned by half, and its padding; `None` for other strides.
///
/// The kernel of the forward direction serves both, then, which every test of a picture has tried.
pub(super) fn turned<B: Backend>(
    weight: FloatTensor<B>,
    x_shape: &Shape,
    grad_shape: &Shape,
    padding: usize,
) -> Option<(FloatTensor<B>, usize)> {
    let [_, _, kh, kw] = weight.shape().dims();
    let same = kh == kw && kh > padding;
    let stride_one = x_shape[2] + 2 * padding + 1 == grad_shape[2] + kh
        && x_shape[3] + 2 * padding + 1 == grad_shape[3] + kw;
    (same && stride_one).then(|| (B::float_flip(B::float_swap_dims(weight, 0, 1), &[2, 3]), kh - 1 - padding))
}
