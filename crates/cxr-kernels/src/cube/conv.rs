//! Weights turned round, for gradients that are one more product or convolution.

use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::ops::permute_nhwc_to_nchw;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::layout::{empty, in_rows, pixels, reshaped};

/// Rows and columns that a cube brings through its memory at once.
const TILE: usize = 32;

/// Rows of a tile that its units take at a time.
const AT_ONCE: usize = 8;

/// `x` `[outputs, taps, inputs]`, the inputs of a tap `x_row` numbers behind those of the one before, as `[inputs, taps,
/// outputs]`, the taps from the last to the first.
///
/// By way of shared memory, so that what units beside each other read and write lies beside each other.
#[cube(launch_unchecked, address_type = "dynamic")]
fn turn_tiles<F: Float>(
    x: &Tensor<F>,
    turned: &mut Tensor<F>,
    outputs: usize,
    taps: usize,
    inputs: usize,
    x_row: usize,
    #[define(F)] _dtype: StorageType,
) {
    // a column more than there are: those of one column lie in banks of their own
    let mut tile = SharedMemory::<F>::new(comptime!(TILE * (TILE + 1)));
    let (column, row) = (UNIT_POS_X as usize, UNIT_POS_Y as usize);
    let (first_input, first_output) = (CUBE_POS_X as usize * TILE, CUBE_POS_Y as usize * TILE);
    let tap = CUBE_POS_Z as usize;
    #[unroll]
    for i in 0..comptime!(TILE / AT_ONCE) {
        let (output, input) = (first_output + row + i * AT_ONCE, first_input + column);
        if output < outputs && input < inputs {
            tile[(row + i * AT_ONCE) * comptime!(TILE + 1) + column] =
                x[(output * taps + tap) * x_row + input];
        }
    }
    sync_cube();
    #[unroll]
    for i in 0..comptime!(TILE / AT_ONCE) {
        let (output, input) = (first_output + column, first_input + row + i * AT_ONCE);
        if output < outputs && input < inputs {
            turned[(input * taps + taps - 1 - tap) * outputs + output] =
                tile[column * comptime!(TILE + 1) + row + i * AT_ONCE];
        }
    }
}

/// `[outputs, taps, inputs]`, with `x_row` numbers from tap to tap, as `[inputs, taps, outputs]`, turned by half.
fn turn<R: CubeRuntime>(x: CubeTensor<R>, x_row: usize) -> CubeTensor<R> {
    let [outputs, taps, inputs] = x.shape().dims();
    let turned = empty(&x, Shape::new([inputs, taps, outputs]));
    if inputs * taps * outputs > 0 {
        let cubes = |length: usize| length.div_ceil(TILE) as u32;
        // SAFETY: what lies beyond the last row or column is neither read nor written
        unsafe {
            turn_tiles::launch_unchecked::<R>(
                &x.client,
                CubeCount::Static(cubes(inputs), cubes(outputs), taps as u32),
                CubeDim::new_2d(TILE as u32, AT_ONCE as u32),
                x.required_address_type(),
                x.clone().into_tensor_arg(),
                turned.clone().into_tensor_arg(),
                outputs,
                taps,
                inputs,
                x_row,
                x.dtype.into(),
            );
        }
    }
    turned
}

/// `[rows, columns]` with rows and columns exchanged, in memory too; `None` for more rows than there are cubes.
pub(super) fn transposed<R: CubeRuntime>(x: CubeTensor<R>) -> Option<CubeTensor<R>> {
    let [rows, columns] = x.shape().dims();
    if rows.div_ceil(TILE) > 65_535 {
        return None;
    }
    let (x, row) = in_rows(x);
    let turned = turn(reshaped(x, Shape::new([rows, 1, columns])), row);
    Some(reshaped(turned, Shape::new([columns, rows])))
}

/// The gradient of a convolution is a convolution of the gradient: this is its weight, of `[outputs, inputs, side, side]`, in
/// and out exchanged and turned by half, in the order in which it is read.
///
/// The kernel of the forward direction serves both, then, which every test of a picture has tried.
pub(super) fn turned<R: CubeRuntime>(weight: CubeTensor<R>) -> CubeTensor<R> {
    let [outputs, inputs, height, width] = weight.shape().dims();
    let weight = reshaped(pixels(weight), Shape::new([outputs, height * width, inputs]));
    let turned = turn(weight, inputs);
    permute_nhwc_to_nchw(reshaped(turned, Shape::new([inputs, height, width, outputs])))
}
