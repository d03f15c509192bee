//! Group and layer normalization: sums in f32 around one of the numbers, so that a mean far from zero costs no digits.

use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::layout::{Image, UNITS, cubes, empty, empty_of};

/// Numbers of a group that one cube sums, at least: few groups of many pixels are spread over the device.
const PART: usize = 4096;

/// Parts of a group, at most: a cube that normalizes adds up those of its group, one unit each.
const MAX_PARTS: usize = UNITS as usize;

/// Adds up two columns over the units of a cube, whose sums every unit may read then.
#[cube]
fn sum_units(first: &mut SharedMemory<f32>, second: &mut SharedMemory<f32>, #[comptime] units: usize) {
    sync_cube();
    let unit = UNIT_POS as usize;
    let mut half = units.runtime() / 2;
    while half > 0 {
        if unit < half {
            first[unit] = first[unit] + first[unit + half];
            second[unit] = second[unit] + second[unit + half];
        }
        half /= 2;
        sync_cube();
    }
}

/// What the parts of a group were summed up to, `[n, groups, parts, 2]`: the two sums of the group that this cube has a part of.
#[cube]
fn sums_of_group(sums: &Tensor<f32>, #[comptime] units: usize) -> (f32, f32) {
    let mut first = SharedMemory::<f32>::new(units);
    let mut second = SharedMemory::<f32>::new(units);
    let unit = UNIT_POS as usize;
    let parts = CUBE_COUNT_X as usize;
    let mut one = 0.0f32;
    let mut other = 0.0f32;
    if unit < parts {
        let group = CUBE_POS_Z as usize * CUBE_COUNT_Y as usize + CUBE_POS_Y as usize;
        let at = 2 * (group * parts + unit);
        one = sums[at];
        other = sums[at + 1];
    }
    first[unit] = one;
    second[unit] = other;
    sum_units(&mut first, &mut second, units);
    (first[0], second[0])
}

/// The mean, around the group's first number, and the inverse deviation that the two sums of [`group_sums`] say.
#[cube]
fn moments(sum: f32, squares: f32, count: usize, eps: f32) -> (f32, f32) {
    let count = f32::cast_from(count);
    let mean = sum / count;
    let variance = max(squares / count - mean * mean, 0.0f32);
    (mean, 1.0f32 / (variance + eps).sqrt())
}

/// The gradient of SiLU's input `z`.
#[cube]
fn silu_gradient(z: f32, grad: f32) -> f32 {
    let s = 1.0f32 / (1.0f32 + (-z).exp());
    grad * s * (1.0f32 + z * (1.0f32 - s))
}

/// Where number `i` of a part lies, counted from the group's first number in its image, and its channel in the group.
///
/// Neighbours in `i` are neighbours in memory, as far as the order of the image lets them.
#[cube]
fn place(
    i: usize,
    first_pixel: usize,
    span: usize,
    group: usize,
    channels: usize,
    pixels: usize,
    #[comptime] channels_last: bool,
) -> (usize, usize) {
    if channels_last {
        let channel = i % group;
        ((first_pixel + i / group) * channels + channel, channel)
    } else {
        let channel = i / span;
        (channel * pixels + first_pixel + i % span, channel)
    }
}

/// The first number of a group.
#[cube]
fn origin(
    image: usize,
    index: usize,
    group: usize,
    channels: usize,
    pixels: usize,
    #[comptime] channels_last: bool,
) -> usize {
    if channels_last {
        image * channels * pixels + index * group
    } else {
        (image * channels + index * group) * pixels
    }
}

/// Sums of a part of a group and of its squares, around the group's first number: `[n, groups, parts, 2]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn group_sums<F: Float>(
    x: &Tensor<F>,
    sums: &mut Tensor<f32>,
    channels: usize,
    group: usize,
    pixels: usize,
    part: usize,
    #[comptime] channels_last: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (index, image) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let first_pixel = CUBE_POS_X as usize * part;
    let span = min(part, pixels - first_pixel);
    let origin = origin(image, index, group, channels, pixels, channels_last);
    let around = f32::cast_from(x[origin]);
    let mut sum = 0.0f32;
    let mut squares = 0.0f32;
    for i in range_stepped(UNIT_POS as usize, span * group, units) {
        let (offset, _) = place(i, first_pixel, span, group, channels, pixels, channels_last);
        let value = f32::cast_from(x[origin + offset]) - around;
        sum += value;
        squares += value * value;
    }
    let mut first = SharedMemory::<f32>::new(units);
    let mut second = SharedMemory::<f32>::new(units);
    first[UNIT_POS as usize] = sum;
    second[UNIT_POS as usize] = squares;
    sum_units(&mut first, &mut second, units);
    if UNIT_POS == 0 {
        let at = 2 * CUBE_POS;
        sums[at] = first[0];
        sums[at + 1] = second[0];
    }
}

/// A part of a group, normalized; cubes as those of [`group_sums`].
#[cube(launch_unchecked, address_type = "dynamic")]
fn group_normalize<F: Float>(
    x: &Tensor<F>,
    gamma: &Tensor<F>,
    beta: &Tensor<F>,
    sums: &Tensor<f32>,
    y: &mut Tensor<F>,
    channels: usize,
    group: usize,
    pixels: usize,
    part: usize,
    eps: f32,
    #[comptime] channels_last: bool,
    #[comptime] silu: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (index, image) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let unit = UNIT_POS as usize;
    let (sum, squares) = sums_of_group(sums, units);
    let (mean, inverse) = moments(sum, squares, group * pixels, eps);
    let first_pixel = CUBE_POS_X as usize * part;
    let span = min(part, pixels - first_pixel);
    let origin = origin(image, index, group, channels, pixels, channels_last);
    let mean = mean + f32::cast_from(x[origin]);
    for i in range_stepped(unit, span * group, units) {
        let (offset, channel) = place(i, first_pixel, span, group, channels, pixels, channels_last);
        let channel = index * group + channel;
        let normal = (f32::cast_from(x[origin + offset]) - mean) * inverse;
        let value = normal * f32::cast_from(gamma[channel]) + f32::cast_from(beta[channel]);
        if silu {
            y[origin + offset] = F::cast_from(value / (1.0f32 + (-value).exp()));
        } else {
            y[origin + offset] = F::cast_from(value);
        }
    }
}

/// What two gradients are sums of, over a part of a group: the gradient of the normalized numbers, and its product with them.
#[cube(launch_unchecked, address_type = "dynamic")]
fn group_gradient_sums<F: Float>(
    x: &Tensor<F>,
    gamma: &Tensor<F>,
    beta: &Tensor<F>,
    grad: &Tensor<F>,
    sums: &Tensor<f32>,
    gradient_sums: &mut Tensor<f32>,
    channels: usize,
    group: usize,
    pixels: usize,
    part: usize,
    eps: f32,
    #[comptime] channels_last: bool,
    #[comptime] silu: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (index, image) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (sum, squares) = sums_of_group(sums, units);
    let (mean, inverse) = moments(sum, squares, group * pixels, eps);
    let first_pixel = CUBE_POS_X as usize * part;
    let span = min(part, pixels - first_pixel);
    let origin = origin(image, index, group, channels, pixels, channels_last);
    let mean = mean + f32::cast_from(x[origin]);
    let mut one = 0.0f32;
    let mut along = 0.0f32;
    for i in range_stepped(UNIT_POS as usize, span * group, units) {
        let (offset, channel) = place(i, first_pixel, span, group, channels, pixels, channels_last);
        let channel = index * group + channel;
        let normal = (f32::cast_from(x[origin + offset]) - mean) * inverse;
        let scale = f32::cast_from(gamma[channel]);
        let mut to_normal = f32::cast_from(grad[origin + offset]);
        if silu {
            to_normal = silu_gradient(normal * scale + f32::cast_from(beta[channel]), to_normal);
        }
        to_normal *= scale;
        one += to_normal;
        along += to_normal * normal;
    }
    let mut first = SharedMemory::<f32>::new(units);
    let mut second = SharedMemory::<f32>::new(units);
    first[UNIT_POS as usize] = one;
    second[UNIT_POS as usize] = along;
    sum_units(&mut first, &mut second, units);
    if UNIT_POS == 0 {
        let at = 2 * CUBE_POS;
        gradient_sums[at] = first[0];
        gradient_sums[at + 1] = second[0];
    }
}

/// The gradient of a part of a group: `inverse * (g - mean(g) - normal * mean(g * normal))`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn group_gradient<F: Float>(
    x: &Tensor<F>,
    gamma: &Tensor<F>,
    beta: &Tensor<F>,
    grad: &Tensor<F>,
    sums: &Tensor<f32>,
    gradient_sums: &Tensor<f32>,
    to_x: &mut Tensor<F>,
    channels: usize,
    group: usize,
    pixels: usize,
    part: usize,
    eps: f32,
    #[comptime] channels_last: bool,
    #[comptime] silu: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let (index, image) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let (sum, squares) = sums_of_group(sums, units);
    let (mean, inverse) = moments(sum, squares, group * pixels, eps);
    let (one, along) = sums_of_group(gradient_sums, units);
    let count = f32::cast_from(group * pixels);
    let (one, along) = (one / count, along / count);
    let first_pixel = CUBE_POS_X as usize * part;
    let span = min(part, pixels - first_pixel);
    let origin = origin(image, index, group, channels, pixels, channels_last);
    let mean = mean + f32::cast_from(x[origin]);
    for i in range_stepped(UNIT_POS as usize, span * group, units) {
        let (offset, channel) = place(i, first_pixel, span, group, channels, pixels, channels_last);
        let channel = index * group + channel;
        let normal = (f32::cast_from(x[origin + offset]) - mean) * inverse;
        let scale = f32::cast_from(gamma[channel]);
        let mut to_normal = f32::cast_from(grad[origin + offset]);
        if silu {
            to_normal = silu_gradient(normal * scale + f32::cast_from(beta[channel]), to_normal);
        }
        to_x[origin + offset] = F::cast_from(inverse * (to_normal * scale - one - normal * along));
    }
}

/// How the groups of an image are spread over the device.
struct Spread {
    image: Image,
    groups: usize,
    /// Pixels of a part.
    part: usize,
    parts: usize,
}

impl Spread {
    fn new(image: Image, groups: usize) -> Self {
        let (pixels, group) = (image.pixels(), image.c / groups);
        let parts = (pixels * group).div_ceil(PART).min(MAX_PARTS).min(pixels);
        let part = pixels.div_ceil(parts);
        Self { image, groups, part, parts: pixels.div_ceil(part) }
    }

    fn cubes(&self) -> CubeCount {
        CubeCount::Static(self.parts as u32, self.groups as u32, self.image.n as u32)
    }

    fn group(&self) -> usize {
        self.image.c / self.groups
    }

    /// A place for two sums of each part.
    fn empty_sums<R: CubeRuntime>(&self, like: &CubeTensor<R>) -> CubeTensor<R> {
        empty_of(like, Shape::new([self.image.n, self.groups, self.parts, 2]), DType::F32)
    }

    /// The sums of [`group_sums`].
    fn sums<R: CubeRuntime>(&self, x: &CubeTensor<R>) -> CubeTensor<R> {
        let sums = self.empty_sums(x);
        // SAFETY: cubes cover the groups of all images, units the parts of each
        unsafe {
            group_sums::launch_unchecked::<R>(
                &x.client,
                self.cubes(),
                CubeDim::new_1d(UNITS),
                x.required_address_type(),
                x.clone().into_tensor_arg(),
                sums.clone().into_tensor_arg(),
                self.image.c,
                self.group(),
                self.image.pixels(),
                self.part,
                self.image.channels_last,
                UNITS as usize,
                x.dtype.into(),
            );
        }
        sums
    }
}

/// GroupNorm, followed by SiLU if `silu`; the result lies as the image does.
pub(super) fn group_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    gamma: CubeTensor<R>,
    beta: CubeTensor<R>,
    groups: usize,
    eps: f64,
    silu: bool,
) -> CubeTensor<R> {
    let (x, image) = Image::of(x);
    let y = image.empty(&x);
    if image.len() == 0 {
        return y;
    }
    let spread = Spread::new(image, groups);
    let sums = spread.sums(&x);
    // SAFETY: as for the sums
    unsafe {
        group_normalize::launch_unchecked::<R>(
            &x.client,
            spread.cubes(),
            CubeDim::new_1d(UNITS),
            x.required_address_type(),
            x.clone().into_tensor_arg(),
            into_contiguous(gamma).into_tensor_arg(),
            into_contiguous(beta).into_tensor_arg(),
            sums.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            image.c,
            spread.group(),
            image.pixels(),
            spread.part,
            eps as f32,
            image.channels_last,
            silu,
            UNITS as usize,
            x.dtype.into(),
        );
    }
    y
}

/// The gradient of [`group_norm`] with respect to `x`.
pub(super) fn group_norm_x_backward<R: CubeRuntime>(
    x: CubeTensor<R>,
    gamma: CubeTensor<R>,
    beta: CubeTensor<R>,
    grad: CubeTensor<R>,
    groups: usize,
    eps: f64,
    silu: bool,
) -> CubeTensor<R> {
    let (x, image) = Image::of(x);
    let to_x = image.empty(&x);
    if image.len() == 0 {
        return to_x;
    }
    let [gamma, beta] = [gamma, beta].map(into_contiguous);
    let grad = image.order(grad);
    let spread = Spread::new(image, groups);
    let sums = spread.sums(&x);
    let gradient_sums = spread.empty_sums(&x);
    // SAFETY: as for the sums
    unsafe {
        group_gradient_sums::launch_unchecked::<R>(
            &x.client,
            spread.cubes(),
            CubeDim::new_1d(UNITS),
            x.required_address_type(),
            x.clone().into_tensor_arg(),
            gamma.clone().into_tensor_arg(),
            beta.clone().into_tensor_arg(),
            grad.clone().into_tensor_arg(),
            sums.clone().into_tensor_arg(),
            gradient_sums.clone().into_tensor_arg(),
            image.c,
            spread.group(),
            image.pixels(),
            spread.part,
            eps as f32,
            image.channels_last,
            silu,
            UNITS as usize,
            x.dtype.into(),
        );
        group_gradient::launch_unchecked::<R>(
            &x.client,
            spread.cubes(),
            CubeDim::new_1d(UNITS),
            x.required_address_type(),
            x.clone().into_tensor_arg(),
            gamma.into_tensor_arg(),
            beta.into_tensor_arg(),
            grad.into_tensor_arg(),
            sums.into_tensor_arg(),
            gradient_sums.into_tensor_arg(),
            to_x.clone().into_tensor_arg(),
            image.c,
            spread.group(),
            image.pixels(),
            spread.part,
            eps as f32,
            image.channels_last,
            silu,
            UNITS as usize,
            x.dtype.into(),
        );
    }
    to_x
}

/// A row of a cube's own, normalized.
#[cube(launch_unchecked, address_type = "dynamic")]
fn row_normalize<F: Float>(
    x: &Tensor<F>,
    gamma: &Tensor<F>,
    beta: &Tensor<F>,
    y: &mut Tensor<F>,
    rows: usize,
    width: usize,
    eps: f32,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let origin = row * width;
    let unit = UNIT_POS as usize;
    let around = f32::cast_from(x[origin]);
    let mut sum = 0.0f32;
    let mut squares = 0.0f32;
    for i in range_stepped(unit, width, units) {
        let value = f32::cast_from(x[origin + i]) - around;
        sum += value;
        squares += value * value;
    }
    let mut first = SharedMemory::<f32>::new(units);
    let mut second = SharedMemory::<f32>::new(units);
    first[unit] = sum;
    second[unit] = squares;
    sum_units(&mut first, &mut second, units);
    let (mean, inverse) = moments(first[0], second[0], width, eps);
    let mean = mean + around;
    for i in range_stepped(unit, width, units) {
        let normal = (f32::cast_from(x[origin + i]) - mean) * inverse;
        y[origin + i] = F::cast_from(normal * f32::cast_from(gamma[i]) + f32::cast_from(beta[i]));
    }
}

/// Units that share a row.
const ROW_UNITS: u32 = 128;

/// LayerNorm over the last dimension.
pub(super) fn layer_norm<R: CubeRuntime>(
    x: CubeTensor<R>,
    gamma: CubeTensor<R>,
    beta: CubeTensor<R>,
    eps: f64,
) -> CubeTensor<R> {
    let x = into_contiguous(x);
    let shape = x.meta.shape().clone();
    let y = empty(&x, shape.clone());
    let width = shape[shape.num_dims() - 1];
    let rows = shape.num_elements() / width.max(1);
    if rows == 0 {
        return y;
    }
    // SAFETY: cubes without a row end at once, and units go over a row's width alone
    unsafe {
        row_normalize::launch_unchecked::<R>(
            &x.client,
            cubes(rows),
            CubeDim::new_1d(ROW_UNITS),
            x.required_address_type(),
            x.clone().into_tensor_arg(),
            into_contiguous(gamma).into_tensor_arg(),
            into_contiguous(beta).into_tensor_arg(),
            y.clone().into_tensor_arg(),
            rows,
            width,
            eps as f32,
            ROW_UNITS as usize,
            x.dtype.into(),
        );
    }
    y
}

/// The gradient of a row: as that of a group.
#[cube(launch_unchecked, address_type = "dynamic")]
fn row_gradient<F: Float>(
    x: &Tensor<F>,
    gamma: &Tensor<F>,
    grad: &Tensor<F>,
    to_x: &mut Tensor<F>,
    rows: usize,
    width: usize,
    eps: f32,
    #[comptime] units: usize,
    #[define(F)] _dtype: StorageType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let origin = row * width;
    let unit = UNIT_POS as usize;
    let around = f32::cast_from(x[origin]);
    let mut sum = 0.0f32;
    let mut squares = 0.0f32;
    for i in range_stepped(unit, width, units) {
        let value = f32::cast_from(x[origin + i]) - around;
        sum += value;
        squares += value * value;
    }
    let mut first = SharedMemory::<f32>::new(units);
    let mut second = SharedMemory::<f32>::new(units);
    first[unit] = sum;
    second[unit] = squares;
    sum_units(&mut first, &mut second, units);
    let (mean, inverse) = moments(first[0], second[0], width, eps);
    let mean = mean + around;
    sync_cube();
    let mut one = 0.0f32;
    let mut along = 0.0f32;
    for i in range_stepped(unit, width, units) {
        let normal = (f32::cast_from(x[origin + i]) - mean) * inverse;
        let to_normal = f32::cast_from(grad[origin + i]) * f32::cast_from(gamma[i]);
        one += to_normal;
        along += to_normal * normal;
    }
    first[unit] = one;
    second[unit] = along;
    sum_units(&mut first, &mut second, units);
    let count = f32::cast_from(width);
    let (one, along) = (first[0] / count, second[0] / count);
    for i in range_stepped(unit, width, units) {
        let normal = (f32::cast_from(x[origin + i]) - mean) * inverse;
        let to_normal = f32::cast_from(grad[origin + i]) * f32::cast_from(gamma[i]);
        to_x[origin + i] = F::cast_from(inverse * (to_normal - one - normal * along));
    }
}

/// The gradient of [`layer_norm`] with respect to `x`.
pub(super) fn layer_norm_x_backward<R: CubeRuntime>(
    x: CubeTensor<R>,
    gamma: CubeTensor<R>,
    grad: CubeTensor<R>,
    eps: f64,
) -> CubeTensor<R> {
    let [x, gamma, grad] = [x, gamma, grad].map(into_contiguous);
    let shape = x.meta.shape().clone();
    let to_x = empty(&x, shape.clone());
    let width = shape[shape.num_dims() - 1];
    let rows = shape.num_elements() / width.max(1);
    if rows == 0 {
        return to_x;
    }
    // SAFETY: cubes without a row end at once, and units go over a row's width alone
    unsafe {
        row_gradient::launch_unchecked::<R>(
            &x.client,
            cubes(rows),
            CubeDim::new_1d(ROW_UNITS),
            x.required_address_type(),
            x.clone().into_tensor_arg(),
            gamma.into_tensor_arg(),
            grad.into_tensor_arg(),
            to_x.clone().into_tensor_arg(),
            rows,
            width,
            eps as f32,
            ROW_UNITS as usize,
            x.dtype.into(),
        );
    }
    to_x
}
