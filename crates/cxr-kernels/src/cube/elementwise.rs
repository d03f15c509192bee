//! Operations that take numbers one by one, in the order in which they lie.

use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::layout::{Image, empty, units, vector};

#[cube(launch_unchecked, address_type = "dynamic")]
fn silu_units<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    y: &mut Tensor<Vector<F, N>>,
    count: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let value = Vector::<f32, N>::cast_from(x[ABSOLUTE_POS]);
    // CUDA's compiler is given no negation of vectors
    let power = (Vector::new(0.0f32) - value).exp();
    y[ABSOLUTE_POS] = Vector::cast_from(value / (Vector::new(1.0f32) + power));
}

/// `x * sigmoid(x)`.
pub(super) fn silu<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let x = into_contiguous(x);
    let y = empty(&x, x.meta.shape().clone());
    let width = vector(&x, x.meta.num_elements());
    let count = x.meta.num_elements() / width;
    if count > 0 {
        let (cubes, dim) = units(count);
        // SAFETY: units beyond the last number end at once
        unsafe {
            silu_units::launch_unchecked::<R>(
                &x.client,
                cubes,
                dim,
                x.required_address_type(),
                width,
                x.clone().into_tensor_arg(),
                y.clone().into_tensor_arg(),
                count,
                x.dtype.into(),
            );
        }
    }
    y
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn geglu_units<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    y: &mut Tensor<Vector<F, N>>,
    count: usize,
    half: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let at = ABSOLUTE_POS / half * 2 * half + ABSOLUTE_POS % half;
    let hidden = Vector::<f32, N>::cast_from(x[at]);
    let gate = Vector::<f32, N>::cast_from(x[at + half]);
    #[allow(unstable_name_collisions)]
    let erf = (gate * Vector::new(0.707_106_77f32)).erf();
    let below = Vector::new(0.5f32) * (Vector::new(1.0f32) + erf);
    y[ABSOLUTE_POS] = Vector::cast_from(hidden * gate * below);
}

/// GEGLU on the last dimension.
pub(super) fn geglu<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let x = into_contiguous(x);
    let mut shape = x.meta.shape().clone();
    let last = shape.num_dims() - 1;
    let half = shape[last] / 2;
    shape[last] = half;
    let y = empty(&x, shape);
    let width = vector(&x, half);
    let count = y.meta.num_elements() / width;
    if count > 0 {
        let (cubes, dim) = units(count);
        // SAFETY: units beyond the last number end at once; a row of `x` is two halves
        unsafe {
            geglu_units::launch_unchecked::<R>(
                &x.client,
                cubes,
                dim,
                x.required_address_type(),
                width,
                x.clone().into_tensor_arg(),
                y.clone().into_tensor_arg(),
                count,
                half / width,
                x.dtype.into(),
            );
        }
    }
    y
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn geglu_gradient<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    grad: &Tensor<Vector<F, N>>,
    to_x: &mut Tensor<Vector<F, N>>,
    count: usize,
    half: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let at = ABSOLUTE_POS / half * 2 * half + ABSOLUTE_POS % half;
    let hidden = Vector::<f32, N>::cast_from(x[at]);
    let gate = Vector::<f32, N>::cast_from(x[at + half]);
    let grad = Vector::<f32, N>::cast_from(grad[ABSOLUTE_POS]);
    #[allow(unstable_name_collisions)]
    let erf = (gate * Vector::new(0.707_106_77f32)).erf();
    let below = Vector::new(0.5f32) * (Vector::new(1.0f32) + erf);
    let density = Vector::new(0.398_942_3f32) * (gate * gate * Vector::new(-0.5f32)).exp();
    to_x[at] = Vector::cast_from(grad * gate * below);
    to_x[at + half] = Vector::cast_from(grad * hidden * (below + gate * density));
}

/// The gradient of [`geglu`].
pub(super) fn geglu_backward<R: CubeRuntime>(x: CubeTensor<R>, grad: CubeTensor<R>) -> CubeTensor<R> {
    let [x, grad] = [x, grad].map(into_contiguous);
    let to_x = empty(&x, x.meta.shape().clone());
    let half = x.meta.shape()[x.meta.num_dims() - 1] / 2;
    let width = vector(&x, half);
    let count = grad.meta.num_elements() / width;
    if count > 0 {
        let (cubes, dim) = units(count);
        // SAFETY: units beyond the last number end at once; a row of `x` is two halves
        unsafe {
            geglu_gradient::launch_unchecked::<R>(
                &x.client,
                cubes,
                dim,
                x.required_address_type(),
                width,
                x.clone().into_tensor_arg(),
                grad.into_tensor_arg(),
                to_x.clone().into_tensor_arg(),
                count,
                half / width,
                x.dtype.into(),
            );
        }
    }
    to_x
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn add_units<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    y: &Tensor<Vector<F, N>>,
    sum: &mut Tensor<Vector<F, N>>,
    count: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    sum[ABSOLUTE_POS] = x[ABSOLUTE_POS] + y[ABSOLUTE_POS];
}

/// `x + y`, images in the order of `x`.
pub(super) fn add<R: CubeRuntime>(x: CubeTensor<R>, y: CubeTensor<R>) -> CubeTensor<R> {
    let (x, y, sum) = if x.meta.num_dims() == 4 {
        let (x, image) = Image::of(x);
        let sum = image.empty(&x);
        (x, image.order(y), sum)
    } else {
        let (x, y) = (into_contiguous(x), into_contiguous(y));
        let sum = empty(&x, x.meta.shape().clone());
        (x, y, sum)
    };
    let width = vector(&x, x.meta.num_elements());
    let count = x.meta.num_elements() / width;
    if count > 0 {
        let (cubes, dim) = units(count);
        // SAFETY: units beyond the last number end at once, and all three lie without gaps in one order
        unsafe {
            add_units::launch_unchecked::<R>(
                &x.client,
                cubes,
                dim,
                x.required_address_type(),
                width,
                x.clone().into_tensor_arg(),
                y.into_tensor_arg(),
                sum.clone().into_tensor_arg(),
                count,
                x.dtype.into(),
            );
        }
    }
    sum
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn add_row_units<F: Float, N: Size>(
    x: &mut Tensor<Vector<F, N>>,
    row: &Tensor<Vector<F, N>>,
    count: usize,
    width: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    x[ABSOLUTE_POS] = x[ABSOLUTE_POS] + row[ABSOLUTE_POS % width];
}

/// Adds `row` `[width]` to every row of `x`, in place: nobody else may hold it.
pub(super) fn add_row<R: CubeRuntime>(x: &CubeTensor<R>, row: CubeTensor<R>) {
    let length = row.meta.num_elements();
    let width = vector(x, length);
    let count = x.meta.num_elements() / width;
    if count == 0 {
        return;
    }
    let (cubes, dim) = units(count);
    // SAFETY: units beyond the last number end at once; `x` is rows of `width` without gaps
    unsafe {
        add_row_units::launch_unchecked::<R>(
            &x.client,
            cubes,
            dim,
            x.required_address_type(),
            width,
            x.clone().into_tensor_arg(),
            into_contiguous(row).into_tensor_arg(),
            count,
            length / width,
            x.dtype.into(),
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn shift_units<F: Float>(
    x: &Tensor<F>,
    shift: &Tensor<F>,
    y: &mut Tensor<F>,
    count: usize,
    channels: usize,
    pixels: usize,
    #[comptime] channels_last: bool,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let mut of = ABSOLUTE_POS / pixels;
    if channels_last {
        of = ABSOLUTE_POS / (pixels * channels) * channels + ABSOLUTE_POS % channels;
    }
    y[ABSOLUTE_POS] = x[ABSOLUTE_POS] + shift[of];
}

/// `x` with a number of its own added to every channel of an image; the result lies as the image does.
pub(super) fn shift<R: CubeRuntime>(x: CubeTensor<R>, shift: CubeTensor<R>) -> CubeTensor<R> {
    let (x, image) = Image::of(x);
    let y = image.empty(&x);
    if image.len() > 0 {
        let (cubes, dim) = units(image.len());
        // SAFETY: units beyond the last number end at once; there is a number for each channel of each image
        unsafe {
            shift_units::launch_unchecked::<R>(
                &x.client,
                cubes,
                dim,
                x.required_address_type(),
                x.clone().into_tensor_arg(),
                into_contiguous(shift).into_tensor_arg(),
                y.clone().into_tensor_arg(),
                image.len(),
                image.c,
                image.pixels(),
                image.channels_last,
                x.dtype.into(),
            );
        }
    }
    y
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn join_units<F: Float>(
    x: &Tensor<F>,
    y: &Tensor<F>,
    joined: &mut Tensor<F>,
    count: usize,
    first: usize,
    second: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let width = first + second;
    let (row, column) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    if column < first {
        joined[ABSOLUTE_POS] = x[row * first + column];
    } else {
        joined[ABSOLUTE_POS] = y[row * second + column - first];
    }
}

/// Channels behind one another, in the order of `x`.
pub(super) fn join<R: CubeRuntime>(x: CubeTensor<R>, y: CubeTensor<R>) -> CubeTensor<R> {
    let (x, image) = Image::of(x);
    let (y, other) = Image::of(image.order(y));
    let both = Image { c: image.c + other.c, ..image };
    let joined = both.empty(&x);
    if both.len() > 0 {
        let row = if image.channels_last { 1 } else { image.pixels() };
        let (cubes, dim) = units(both.len());
        // SAFETY: units beyond the last number end at once; rows are pixels, or images, of both in one order
        unsafe {
            join_units::launch_unchecked::<R>(
                &joined.client,
                cubes,
                dim,
                joined.required_address_type(),
                x.into_tensor_arg(),
                y.into_tensor_arg(),
                joined.clone().into_tensor_arg(),
                both.len(),
                image.c * row,
                other.c * row,
                joined.dtype.into(),
            );
        }
    }
    joined
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn upsample_units<F: Float>(
    x: &Tensor<F>,
    y: &mut Tensor<F>,
    count: usize,
    height: usize,
    width: usize,
    inner: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let (rest, channel) = (ABSOLUTE_POS / inner, ABSOLUTE_POS % inner);
    let (rest, column) = (rest / width, rest % width);
    let (outer, row) = (rest / height, rest % height);
    let from = (outer * (height / 2) + row / 2) * (width / 2) + column / 2;
    y[ABSOLUTE_POS] = x[from * inner + channel];
}

/// Every pixel twice across and twice down.
pub(super) fn upsample<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let (x, image) = Image::of(x);
    let twice = Image { h: 2 * image.h, w: 2 * image.w, ..image };
    let y = twice.empty(&x);
    if twice.len() > 0 {
        let (cubes, dim) = units(twice.len());
        // SAFETY: units beyond the last number end at once
        unsafe {
            upsample_units::launch_unchecked::<R>(
                &y.client,
                cubes,
                dim,
                y.required_address_type(),
                x.into_tensor_arg(),
                y.clone().into_tensor_arg(),
                twice.len(),
                twice.h,
                twice.w,
                if image.channels_last { image.c } else { 1 },
                y.dtype.into(),
            );
        }
    }
    y
}
