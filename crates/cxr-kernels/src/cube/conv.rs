//! The gradient of a convolution as one more convolution.

use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::layout::{Image, units};

#[cube(launch_unchecked, address_type = "dynamic")]
fn turn_units<F: Float>(
    weight: &Tensor<F>,
    turned: &mut Tensor<F>,
    count: usize,
    outputs: usize,
    inputs: usize,
    height: usize,
    width: usize,
    #[comptime] channels_last: bool,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    // written in the order of `[inputs, height, width, outputs]`
    let (rest, output) = (ABSOLUTE_POS / outputs, ABSOLUTE_POS % outputs);
    let (rest, column) = (rest / width, width - 1 - rest % width);
    let (input, row) = (rest / height, height - 1 - rest % height);
    let mut at = ((output * inputs + input) * height + row) * width + column;
    if channels_last {
        at = ((output * height + row) * width + column) * inputs + input;
    }
    turned[ABSOLUTE_POS] = weight[at];
}

/// The gradient of a convolution with stride one is a convolution of the gradient: this is its weight, in and out swapped
/// and turned by half, in the order in which it is read, and its padding; `None` for other strides.
///
/// The kernel of the forward direction serves both, then, which every test of a picture has tried.
pub(super) fn turned<R: CubeRuntime>(
    weight: CubeTensor<R>,
    x_shape: &Shape,
    grad_shape: &Shape,
    padding: usize,
) -> Option<(CubeTensor<R>, usize)> {
    let [outputs, inputs, kh, kw] = weight.shape().dims();
    let same = kh == kw && kh > padding;
    let stride_one = x_shape[2] + 2 * padding + 1 == grad_shape[2] + kh
        && x_shape[3] + 2 * padding + 1 == grad_shape[3] + kw;
    if !same || !stride_one {
        return None;
    }
    let (weight, image) = Image::of(weight);
    let turned = Image { n: inputs, c: outputs, channels_last: true, ..image }.empty(&weight);
    let count = image.len();
    if count > 0 {
        let (cubes, dim) = units(count);
        // SAFETY: units beyond the last number end at once
        unsafe {
            turn_units::launch_unchecked::<R>(
                &weight.client,
                cubes,
                dim,
                weight.required_address_type(),
                weight.clone().into_tensor_arg(),
                turned.clone().into_tensor_arg(),
                count,
                outputs,
                inputs,
                kh,
                kw,
                image.channels_last,
                weight.dtype.into(),
            );
        }
    }
    Some((turned, kh - 1 - padding))
}
