//! Matrix products and convolutions, each by a kernel that is chosen without timing, into memory without gaps: our own where
//! the device and the sizes are made for it, otherwise one of burn's.
//!
//! burn pads the rows of what its own products make to powers of two on CUDA: every reshape behind one is a copy then.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::ops::{permute_nchw_to_nhwc, permute_nhwc_to_nchw};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubek::convolution::{self, AcceleratedTileKind, ConvAlgorithm, ConvolutionArgs, ConvolutionInputs};
use cubek::matmul::components::tile::TileMatmulKind;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::matmul::routines::BlueprintStrategy;
use cubek::matmul::routines::simple::SimpleArgs;
use cubek::std::InputBinding;

use super::conv::{transposed, turned};
use super::elementwise::add_row;
use super::gemm::{self, Steps};
use super::layout::{Image, empty, empty_of, pixels, reshaped};

/// `lhs @ rhs` over the last two dimensions, in `dtype`; the others are equal.
pub(super) fn product<R: CubeRuntime>(
    lhs: CubeTensor<R>,
    rhs: CubeTensor<R>,
    dtype: DType,
) -> Option<CubeTensor<R>> {
    let mut shape = lhs.shape();
    let last = shape.num_dims() - 1;
    shape[last] = rhs.shape()[last];
    let y = empty_of(&lhs, shape, dtype);
    let mut types = elements(&lhs, &rhs, dtype);
    // The double-buffered ones of this version are wrong for some sizes (docs/burn.md).
    let simple = SimpleArgs { multi_rows: true, tile_matmul: TileMatmulKind::Cmma };
    let strategies = [
        Strategy::SimpleCyclicCmma(BlueprintStrategy::Inferred(simple)),
        Strategy::SimpleUnit(Default::default()),
    ];
    strategies.into_iter().find_map(|strategy| {
        let (lhs, rhs) = (input(lhs.clone()), input(rhs.clone()));
        launch_ref(&strategy, &y.client, lhs, rhs, y.clone().binding(), &mut types).ok().map(|()| y.clone())
    })
}

/// `x` `[rows, in]` by `weight` `[out, in]`, and `bias` `[out]`.
pub(super) fn linear<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: Option<CubeTensor<R>>,
) -> Option<CubeTensor<R>> {
    let ([rows, width], [out, _]) = (x.shape().dims(), weight.shape().dims());
    if gemm::takes(&x, rows, width, out) {
        return Some(gemm::linear(x, weight, bias));
    }
    let dtype = x.dtype;
    let y = product(x, exchanged(weight), dtype)?;
    if let Some(bias) = bias {
        add_row(&y, bias);
    }
    Some(y)
}

/// The gradient of [`linear`] by `x`, from `grad` `[rows, out]`.
pub(super) fn linear_x_backward<R: CubeRuntime>(
    weight: CubeTensor<R>,
    grad: CubeTensor<R>,
) -> Option<CubeTensor<R>> {
    let ([rows, out], [_, width]) = (grad.shape().dims(), weight.shape().dims());
    if gemm::takes(&grad, rows, out, width)
        && let Some(weight) = transposed(weight.clone())
    {
        return Some(gemm::linear(grad, weight, None));
    }
    let dtype = grad.dtype;
    product(grad, weight, dtype)
}

/// The gradient of [`linear`] by its weight.
pub(super) fn linear_weight_backward<R: CubeRuntime>(
    x: CubeTensor<R>,
    grad: CubeTensor<R>,
) -> Option<CubeTensor<R>> {
    let ([rows, width], [_, out]) = (x.shape().dims(), grad.shape().dims());
    if gemm::takes(&grad, out, rows, width)
        && let (Some(x), Some(grad)) = (transposed(x.clone()), transposed(grad.clone()))
    {
        return Some(gemm::linear(grad, x, None));
    }
    let dtype = grad.dtype;
    product(exchanged(grad), x, dtype)
}

/// Rows and columns exchanged, where they lie.
fn exchanged<R: CubeRuntime>(mut x: CubeTensor<R>) -> CubeTensor<R> {
    x.meta.swap(0, 1);
    x
}

/// The convolution of `[n, c, h, w]`, whose result has its channels last in memory; `None` without matrix units.
pub(super) fn conv2d<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: Option<CubeTensor<R>>,
    stride: usize,
    padding: usize,
) -> Option<CubeTensor<R>> {
    let ([n, c, h, w], [out, _, kh, kw]) = (x.shape().dims(), weight.shape().dims());
    let side = |length: usize, kernel: usize| (length + 2 * padding - kernel) / stride + 1;
    let (height, width) = (side(h, kh), side(w, kw));
    if kh == kw && gemm::takes(&x, n * height * width, c, out) {
        let steps = Steps { side: kh, stride, spread: 1, padding };
        return Some(gemm::convolution(x, weight, bias, steps, [height, width]));
    }
    let y = if [kh, kw, stride, padding] == [1, 1, 1, 0] {
        let rows = reshaped(pixels(x), Shape::new([n * h * w, c]));
        // either order of memory is this matrix
        let turned = exchanged(reshaped(Image::of(weight).0, Shape::new([out, c])));
        let dtype = rows.dtype;
        reshaped(product(rows, turned, dtype)?, Shape::new([n, height, width, out]))
    } else {
        let y = empty(&x, Shape::new([n, height, width, out]));
        let types = elements(&x, &weight, x.dtype);
        let (x, weight) = (permute_nchw_to_nhwc(x), permute_nchw_to_nhwc(weight));
        // The other kernels of this version read what is not there (seen on an H200: results of 1e34), and that of `mma` takes
        // the bias wrongly.
        let tiles = [AcceleratedTileKind::Mma, AcceleratedTileKind::Cmma];
        tiles.into_iter().find_map(|tile_kind| {
            let algorithm = ConvAlgorithm::SimpleSyncCyclic;
            let strategy = convolution::Strategy::Inferred { algorithm, tile_kind };
            let inputs = ConvolutionInputs::Forward {
                input: input(x.clone()),
                weight: input(weight.clone()),
                bias: None,
                out: y.clone().binding(),
            };
            let args = ConvolutionArgs::<2> { stride: [stride; 2], padding: [padding; 2], dilation: [1; 2] };
            convolution::launch_ref(&strategy, &y.client, inputs, args, types.clone()).ok()
        })?;
        y
    };
    if let Some(bias) = bias {
        add_row(&y, bias);
    }
    Some(permute_nhwc_to_nchw(y))
}

/// The gradient of [`conv2d`] by `x` as a convolution; `None` where it takes another kernel than ours.
pub(super) fn conv2d_x_backward<R: CubeRuntime>(
    x_shape: &Shape,
    weight: &CubeTensor<R>,
    grad: &CubeTensor<R>,
    stride: usize,
    padding: usize,
) -> Option<CubeTensor<R>> {
    let ([n, c, h, w], [out, _, kh, kw]) = (x_shape.dims(), weight.shape().dims());
    if kh != kw || kh <= padding || !gemm::takes(grad, n * h * w, out, c) {
        return None;
    }
    let steps = Steps { side: kh, stride: 1, spread: stride, padding: kh - 1 - padding };
    Some(gemm::convolution(grad.clone(), turned(weight.clone()), None, steps, [h, w]))
}

fn input<R: CubeRuntime>(x: CubeTensor<R>) -> InputBinding<R> {
    let dtype = x.dtype;
    InputBinding::new(x.binding(), dtype.into())
}

fn elements<R: CubeRuntime>(lhs: &CubeTensor<R>, rhs: &CubeTensor<R>, out: DType) -> MatmulElems {
    MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: lhs.dtype.into(),
        rhs: rhs.dtype.into(),
        out: out.into(),
    })
}
