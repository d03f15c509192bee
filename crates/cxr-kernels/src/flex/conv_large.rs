//! The gradient by the input of a convolution whose weights do not fit the cache: a product with the weights as they lie,
//! turned, for many pixels at a time, so that weights are read once for all of them, and its columns folded back onto the
//! image.
//!
//! burn's own copies all weights into another order in every call, on one core: 118 MB for Stable Diffusion's largest
//! layer. Here nothing is copied but pixels. [`products`](super::products) has the forward pass, and the gradient for strides
//! of one.

use burn::tensor::Shape;
use burn::tensor::TensorMetadata;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::conv::Geometry;
use super::elementwise::{contiguous, slice, tensor};
use super::gemm::{Matrix, Shared, product};

/// Elements of the unfolded matrix: 24 MiB.
const COLUMN_ELEMENTS: usize = 6 * 1024 * 1024;
/// Columns of it at most: more than enough to hide reading the weights.
const MOST_COLUMNS: usize = 1024;
/// Columns of it at least, or weights would be read too often.
const FEWEST_COLUMNS: usize = 64;
/// Input channels of one task. Fixed, so that the result does not depend on the number of threads.
const CHANNELS: usize = 16;

/// Rows of one image.
#[derive(Clone, Copy, Debug)]
struct Segment {
    image: usize,
    row: usize,
    rows: usize,
    /// Its first column in the unfolded matrix.
    column: usize,
}

/// Gradient with respect to the input, whose shape is `x_shape`.
pub(super) fn x_backward(
    x_shape: &Shape,
    weight: FlexTensor,
    grad: FlexTensor,
    stride: usize,
    padding: usize,
) -> FlexTensor {
    let (weight, grad) = (contiguous(weight), contiguous(grad));
    let geometry = Geometry::new(x_shape, &weight.shape(), stride, padding);
    let (weight, grad) = (slice(&weight), slice(&grad));
    let ([c, h, w], [channels, height, width]) = (geometry.input, geometry.output);
    let (taps, plane) = (geometry.kernel[0] * geometry.kernel[1], height * width);
    let mut out = vec![0.0_f32; geometry.batch * geometry.input_len()];
    let target = Shared::new(&mut out);
    let mut joined = Vec::new();
    for segments in tiles(&geometry) {
        let columns = segments.iter().map(|segment| segment.rows * width).sum::<usize>();
        joined.resize(channels * columns, 0.0);
        joined.par_chunks_mut(columns.max(1)).enumerate().for_each(|(channel, line)| {
            for segment in &segments {
                let first = segment.image * geometry.output_len() + channel * plane + segment.row * width;
                let pixels = segment.rows * width;
                line[segment.column..segment.column + pixels].copy_from_slice(&grad[first..first + pixels]);
            }
        });
        let tasks: Vec<usize> = (0..c).step_by(CHANNELS).collect();
        tasks.into_par_iter().for_each_init(Vec::new, |unfolded, first| {
            let count = CHANNELS.min(c - first);
            let rows = count * taps;
            unfolded.resize(rows * columns, 0.0);
            let lhs = Matrix::rows(&weight[first * taps..], c * taps).transposed();
            // SAFETY: `unfolded` is this task's and holds `[rows, columns]`; the operands have `[rows, channels]` and
            // `[channels, columns]` elements.
            unsafe {
                let sizes = [rows, columns, channels];
                product(sizes, lhs, Matrix::rows(&joined, columns), unfolded.as_mut_ptr(), columns, false);
            }
            for (lines, channel) in unfolded.chunks_exact(taps * columns).zip(first..) {
                for segment in &segments {
                    let place = segment.image * geometry.input_len() + channel * h * w;
                    // SAFETY: this channel of this image lies in `out`, and no other task has it.
                    let place = unsafe { std::slice::from_raw_parts_mut(target.at(place), h * w) };
                    fold(&geometry, lines, columns, segment, place);
                }
            }
        });
    }
    tensor(out, x_shape.clone())
}

/// Adds a segment's columns of one channel, `lines` `[taps, columns]`, onto that channel of its image.
fn fold(geometry: &Geometry, lines: &[f32], columns: usize, segment: &Segment, image: &mut [f32]) {
    let ([_, h, w], [_, _, width]) = (geometry.input, geometry.output);
    for (tap, line) in lines.chunks_exact(columns).enumerate() {
        let (ky, kx) = (tap / geometry.kernel[1], tap % geometry.kernel[1]);
        let inside = geometry.inside(kx);
        if inside.is_empty() {
            continue;
        }
        let first = inside.start * geometry.stride + kx - geometry.padding;
        let places = line[segment.column..].chunks_exact(width);
        for (y, from) in (segment.row..segment.row + segment.rows).zip(places) {
            let row = (y * geometry.stride + ky).checked_sub(geometry.padding).filter(|row| *row < h);
            let Some(row) = row else { continue };
            let to = image[row * w + first..(row + 1) * w].iter_mut().step_by(geometry.stride);
            to.zip(&from[inside.clone()]).for_each(|(to, from)| *to += from);
        }
    }
}

/// What is unfolded at a time: rows of one image, or several small images.
fn tiles(geometry: &Geometry) -> Vec<Vec<Segment>> {
    let [_, height, width] = geometry.output;
    let columns = (COLUMN_ELEMENTS / geometry.depth().max(1)).clamp(FEWEST_COLUMNS, MOST_COLUMNS);
    let rows = (columns / width.max(1)).clamp(1, height.max(1));
    let mut tiles: Vec<Vec<Segment>> = Vec::new();
    let mut filled = columns;
    for image in 0..geometry.batch {
        for row in (0..height).step_by(rows) {
            let rows = rows.min(height - row);
            if filled + rows * width > columns {
                tiles.push(Vec::new());
                filled = 0;
            }
            let segment = Segment { image, row, rows, column: filled };
            filled += rows * width;
            tiles.last_mut().expect("the first segment opens a tile").push(segment);
        }
    }
    tiles
}
