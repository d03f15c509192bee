//! Matrix products and convolutions, each by a kernel that is chosen without timing, into memory without gaps.
//!
//! burn pads the rows of what its own products make to powers of two on CUDA: every reshape behind one is a copy then.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::{permute_nchw_to_nhwc, permute_nhwc_to_nchw};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubek::convolution::{self, AcceleratedTileKind, ConvAlgorithm, ConvolutionArgs, ConvolutionInputs};
use cubek::matmul::components::tile::TileMatmulKind;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::matmul::routines::BlueprintStrategy;
use cubek::matmul::routines::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::routines::simple::SimpleArgs;
use cubek::std::InputBinding;

use super::elementwise::add_row;
use super::layout::{Image, empty, empty_of, reshaped};

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
    strategies(&lhs, &rhs, dtype).into_iter().find_map(|strategy| {
        let (lhs, rhs) = (input(lhs.clone()), input(rhs.clone()));
        launch_ref(&strategy, &y.client, lhs, rhs, y.clone().binding(), &mut types).ok().map(|()| y.clone())
    })
}

/// The kernels to try, the best first. Seen on an H200: with tiles that units hold in registers and two stages of memory, what
/// few rows or columns leave of the device is used better than by wide tiles; f32, which is taken in TF32, is an exception.
fn strategies<R: CubeRuntime>(lhs: &CubeTensor<R>, rhs: &CubeTensor<R>, dtype: DType) -> Vec<Strategy> {
    /// Results of a product that fills the device with wide tiles.
    const WIDE: usize = 1 << 22;
    /// Terms of both stages together: with an odd number of stages the kernel is wrong (`cubek` 0.2).
    const STAGES: usize = 64;
    let [m, k] = lhs.meta.shape()[lhs.meta.num_dims() - 2..] else { return Vec::new() };
    let n = rhs.meta.shape()[rhs.meta.num_dims() - 1];
    let mut found = Vec::new();
    // of many matrices, or from half precision into f32, it is wrong too
    let plain = lhs.meta.num_dims() == 2 && dtype == lhs.dtype && dtype != DType::F32;
    if plain && k.is_multiple_of(STAGES) && m.min(n) >= 64 {
        found.push(Strategy::OrderedDoubleMma(BlueprintStrategy::Inferred(OrderedSelectionArgs {
            partition_k: Some(2),
            row_count: Some(if m * n >= WIDE { 8 } else { 4 }),
            rows_per_plane: Some(2),
            tile_matmul: TileMatmulKind::Mma,
        })));
    }
    let simple = SimpleArgs { multi_rows: true, tile_matmul: TileMatmulKind::Cmma };
    found.push(Strategy::SimpleCyclicCmma(BlueprintStrategy::Inferred(simple)));
    found.push(Strategy::SimpleUnit(Default::default()));
    found
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
    let y = if [kh, kw, stride, padding] == [1, 1, 1, 0] {
        let rows = reshaped(into_contiguous(permute_nchw_to_nhwc(x)), Shape::new([n * h * w, c]));
        // either order of memory is this matrix
        let mut turned = reshaped(Image::of(weight).0, Shape::new([out, c]));
        turned.meta.swap(0, 1);
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
