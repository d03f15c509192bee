//! How the numbers of a tensor lie in memory.
//!
//! A convolution on the matrix units leaves the channels of `[n, c, h, w]` last in memory. Everything between two of them
//! reads and writes what it finds, so that no image is ever brought from one order into the other and back.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::cubecl::{CubeCount, CubeDim};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::ops::{permute_nchw_to_nhwc, permute_nhwc_to_nchw};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};

/// Units of a cube, in every kernel here.
pub(super) const UNITS: u32 = 256;

/// `[n, c, h, w]` without gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) n: usize,
    pub(super) c: usize,
    pub(super) h: usize,
    pub(super) w: usize,
    /// Whether the channels of a pixel lie beside each other; otherwise the pixels of a channel do.
    pub(super) channels_last: bool,
}

impl Image {
    /// The tensor and how it lies; brought into order if it has gaps.
    pub(super) fn of<R: CubeRuntime>(x: CubeTensor<R>) -> (CubeTensor<R>, Self) {
        let [n, c, h, w] = x.shape().dims();
        let lies = |expected: [usize; 4]| {
            (0..4).all(|dim| x.meta.shape()[dim] == 1 || x.meta.strides()[dim] == expected[dim])
        };
        let channels_last = lies([h * w * c, 1, w * c, c]);
        let x = if channels_last || lies([c * h * w, h * w, w, 1]) { x } else { into_contiguous(x) };
        (x, Self { n, c, h, w, channels_last })
    }

    /// The tensor in this order.
    pub(super) fn order<R: CubeRuntime>(self, x: CubeTensor<R>) -> CubeTensor<R> {
        let (x, found) = Self::of(x);
        if found.channels_last == self.channels_last || found.c == 1 || found.h * found.w == 1 {
            return x;
        }
        if self.channels_last { channels_last(x) } else { into_contiguous(x) }
    }

    pub(super) fn pixels(self) -> usize {
        self.h * self.w
    }

    pub(super) fn len(self) -> usize {
        self.n * self.c * self.pixels()
    }

    /// A tensor that lies so, with no numbers in it yet.
    pub(super) fn empty<R: CubeRuntime>(self, like: &CubeTensor<R>) -> CubeTensor<R> {
        let Self { n, c, h, w, channels_last } = self;
        match channels_last {
            true => permute_nhwc_to_nchw(empty(like, Shape::new([n, h, w, c]))),
            false => empty(like, Shape::new([n, c, h, w])),
        }
    }
}

/// `[n, c, h, w]` with the channels last in memory.
pub(super) fn channels_last<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    permute_nhwc_to_nchw(pixels(x))
}

/// `[n, c, h, w]` as `[n, h, w, c]`, without gaps: nothing is moved where the channels are last.
pub(super) fn pixels<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let (x, image) = Image::of(x);
    match image {
        // strides of a single pixel say nothing
        Image { n, c, h, w, channels_last: true } => reshaped(x, Shape::new([n, h, w, c])),
        _ => into_contiguous(permute_nchw_to_nhwc(x)),
    }
}

/// `[n, c, h, w]` as `[n, h * w, c]`, without gaps: nothing is moved where the channels are last.
pub(super) fn tokens<R: CubeRuntime>(x: CubeTensor<R>) -> CubeTensor<R> {
    let [n, c, h, w] = x.shape().dims();
    reshaped(pixels(x), Shape::new([n, h * w, c]))
}

/// `[n, h * w, c]` as `[n, c, h, w]`, the channels last in memory.
pub(super) fn image<R: CubeRuntime>(x: CubeTensor<R>, h: usize, w: usize) -> CubeTensor<R> {
    let [n, _, c] = x.shape().dims();
    permute_nhwc_to_nchw(reshaped(into_contiguous(x), Shape::new([n, h, w, c])))
}

/// `[rows, width]` and the numbers from one row to the next: burn pads rows of what it makes or loads. Without gaps if they
/// cannot be read in vectors.
pub(super) fn in_rows<R: CubeRuntime>(x: CubeTensor<R>) -> (CubeTensor<R>, usize) {
    let ([_, width], [row, number]) = (x.shape().dims(), [x.meta.strides()[0], x.meta.strides()[1]]);
    if number == 1 && row >= width && row.is_multiple_of(16 / x.dtype.size()) {
        return (x, row);
    }
    (into_contiguous(x), width)
}

/// A tensor of the device and dtype of `like`, without gaps, with no numbers in it yet.
pub(super) fn empty<R: CubeRuntime>(like: &CubeTensor<R>, shape: Shape) -> CubeTensor<R> {
    empty_of(like, shape, like.dtype)
}

/// The same numbers, which lie without gaps, as another shape.
pub(super) fn reshaped<R: CubeRuntime>(x: CubeTensor<R>, shape: Shape) -> CubeTensor<R> {
    CubeTensor::new_contiguous(x.client, x.device, shape, x.handle, x.dtype)
}

/// [`empty`] in a dtype of one's own.
pub(super) fn empty_of<R: CubeRuntime>(like: &CubeTensor<R>, shape: Shape, dtype: DType) -> CubeTensor<R> {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape, dtype)
}

/// The most numbers that are read at once, 16 bytes at most, of which `length` is a multiple.
pub(super) fn vector<R: CubeRuntime>(x: &CubeTensor<R>, length: usize) -> usize {
    let most = 16 / x.dtype.size();
    [8, 4, 2].into_iter().find(|size| *size <= most && length.is_multiple_of(*size)).unwrap_or(1)
}

/// So many cubes, or some more; in two dimensions, since one holds no more than 65,535 of them.
pub(super) fn cubes(count: usize) -> CubeCount {
    const ACROSS: usize = 32_768;
    let across = count.clamp(1, ACROSS);
    CubeCount::Static(across as u32, count.div_ceil(across) as u32, 1)
}

/// Cubes enough for one unit each of `count` numbers.
pub(super) fn units(count: usize) -> (CubeCount, CubeDim) {
    (cubes(count.div_ceil(UNITS as usize)), CubeDim::new_1d(UNITS))
}
