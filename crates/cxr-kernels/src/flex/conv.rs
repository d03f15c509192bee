//! Gradients of a convolution by tiles: a few rows of the image at a time are unfolded into a matrix that stays in the cache
//! (im2col), and multiplied there.
//!
//! For layers whose weights stay in the cache too. Above [`WEIGHT_LIMIT`] every tile would read all the weights
//! from memory again, and [`conv_large`](super::conv_large) takes larger tiles; for the gradient of the weights burn's own
//! convolution is the better one. The choice looks at the layer alone. [`products`](super::products) has the forward pass, and
//! the gradient of the input for strides of one.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{contiguous, slice, tensor};
use super::gemm::{Matrix, product};

/// Largest number of weights that this kernel takes on: 2 MiB, the second-level cache of current cores.
const WEIGHT_LIMIT: usize = 512 * 1024;
/// Elements of an unfolded tile: 512 KiB, to stay in the second-level cache beside the weights.
const TILE_ELEMENTS: usize = 128 * 1024;
/// Partial sums of a weight gradient. Fixed, so that the result does not depend on the number of threads.
const PARTIAL_SUMS: usize = 8;

/// Whether this kernel should run for weights of this shape and dtype.
pub(super) fn applies(weight: &FlexTensor, x_dtype: DType) -> bool {
    let f32s = x_dtype == DType::F32 && weight.dtype() == DType::F32;
    f32s && weight.shape().num_elements() <= WEIGHT_LIMIT
}

/// The sizes of one convolution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) batch: usize,
    pub(super) input: [usize; 3],
    pub(super) output: [usize; 3],
    pub(super) kernel: [usize; 2],
    pub(super) stride: usize,
    pub(super) padding: usize,
}

impl Geometry {
    pub(super) fn new(x: &Shape, weight: &Shape, stride: usize, padding: usize) -> Self {
        let [batch, c, h, w] = x.dims();
        let [out, _, kh, kw] = weight.dims();
        let extent = |size: usize, kernel: usize| (size + 2 * padding - kernel) / stride + 1;
        Self {
            batch,
            input: [c, h, w],
            output: [out, extent(h, kh), extent(w, kw)],
            kernel: [kh, kw],
            stride,
            padding,
        }
    }

    /// Rows of the unfolded matrix.
    pub(super) fn depth(&self) -> usize {
        self.input[0] * self.kernel[0] * self.kernel[1]
    }

    pub(super) fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    pub(super) fn output_len(&self) -> usize {
        self.output.iter().product()
    }

    /// A 1x1 convolution reads the image as it lies.
    fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.padding == 0
    }

    /// The tiles of one image: first output row, and number of rows.
    fn tiles(&self) -> Vec<(usize, usize)> {
        let [_, height, width] = self.output;
        let rows = (TILE_ELEMENTS / (self.depth() * width).max(1)).clamp(1, height.max(1));
        (0..height).step_by(rows).map(|start| (start, rows.min(height - start))).collect()
    }

    /// Every tile of every image, in order.
    fn tasks(&self) -> Vec<(usize, usize, usize)> {
        let tiles = self.tiles();
        (0..self.batch).flat_map(|n| tiles.iter().map(move |&(row, rows)| (n, row, rows))).collect()
    }

    /// Unfolds output rows `row..row + rows` of one image into `column` `[depth, rows * width]`.
    fn unfold(&self, image: &[f32], row: usize, rows: usize, column: &mut Vec<f32>) {
        let ([c, h, w], [_, _, out_w], [kh, kw]) = (self.input, self.output, self.kernel);
        column.resize(self.depth() * rows * out_w, 0.0);
        let mut lines = column.chunks_exact_mut(out_w);
        for channel in 0..c {
            let plane = &image[channel * h * w..(channel + 1) * h * w];
            for ky in 0..kh {
                for kx in 0..kw {
                    for y in row..row + rows {
                        let line = lines.next().expect("as many lines as the column has");
                        match (y * self.stride + ky).checked_sub(self.padding) {
                            Some(source) if source < h => {
                                self.unfold_line(&plane[source * w..(source + 1) * w], kx, line)
                            }
                            _ => line.fill(0.0),
                        }
                    }
                }
            }
        }
    }

    /// The output columns whose input column lies in the image, for kernel column `kx`.
    pub(super) fn inside(&self, kx: usize) -> std::ops::Range<usize> {
        let (w, out_w) = (self.input[2], self.output[2]);
        let start = self.padding.saturating_sub(kx).div_ceil(self.stride).min(out_w);
        let end = (w + self.padding).saturating_sub(kx).div_ceil(self.stride).clamp(start, out_w);
        start..end
    }

    pub(super) fn unfold_line(&self, source: &[f32], kx: usize, line: &mut [f32]) {
        let inside = self.inside(kx);
        line[..inside.start].fill(0.0);
        line[inside.end..].fill(0.0);
        if inside.is_empty() {
            return;
        }
        let first = inside.start * self.stride + kx - self.padding;
        let length = inside.len();
        if self.stride == 1 {
            line[inside].copy_from_slice(&source[first..first + length]);
        } else {
            for (to, from) in line[inside].iter_mut().zip(source[first..].iter().step_by(self.stride)) {
                *to = *from;
            }
        }
    }

    /// Adds an unfolded tile back onto its image: the transpose of [`unfold`](Self::unfold).
    fn fold(&self, column: &[f32], row: usize, rows: usize, image: &mut [f32]) {
        let ([c, h, w], [_, _, out_w], [kh, kw]) = (self.input, self.output, self.kernel);
        let mut lines = column.chunks_exact(out_w);
        for channel in 0..c {
            let plane = &mut image[channel * h * w..(channel + 1) * h * w];
            for ky in 0..kh {
                for kx in 0..kw {
                    let inside = self.inside(kx);
                    for y in row..row + rows {
                        let line = lines.next().expect("as many lines as the column has");
                        let source = (y * self.stride + ky).checked_sub(self.padding).filter(|s| *s < h);
                        let Some(source) = source.filter(|_| !inside.is_empty()) else { continue };
                        let first = inside.start * self.stride + kx - self.padding;
                        let target = plane[source * w + first..(source + 1) * w].iter_mut();
                        for (to, from) in target.step_by(self.stride).zip(&line[inside.clone()]) {
                            *to += *from;
                        }
                    }
                }
            }
        }
    }
}

/// Gradient with respect to the input, whose shape is `x_shape`.
pub(super) fn x_backward(
    x_shape: &Shape,
    weight: FlexTensor,
    grad: FlexTensor,
    stride: usize,
    padding: usize,
) -> FlexTensor {
    let geometry = Geometry::new(x_shape, &weight.shape(), stride, padding);
    let (weight, grad) = (contiguous(weight), contiguous(grad));
    tensor(fold_back(geometry, slice(&weight), slice(&grad)), x_shape.clone())
}

/// The unfolded gradient, added back onto the image.
fn fold_back(geometry: Geometry, weight: &[f32], grad: &[f32]) -> Vec<f32> {
    let [channels, height, width] = geometry.output;
    let (plane, depth) = (height * width, geometry.depth());
    let mut out = vec![0.0_f32; geometry.batch * geometry.input_len()];
    let tiles = geometry.tiles();
    out.par_chunks_mut(geometry.input_len().max(1)).enumerate().for_each_init(
        Vec::new,
        |column, (n, image)| {
            for &(row, rows) in &tiles {
                let pixels = rows * width;
                column.resize(depth * pixels, 0.0);
                let first = n * geometry.output_len() + row * width;
                let lhs = Matrix::rows(weight, depth).transposed();
                let rhs = Matrix::rows(&grad[first..], plane);
                // SAFETY: `column` is this task's and holds `[depth, pixels]`; the operands have `[depth, channels]`
                // and `[channels, pixels]` elements.
                unsafe { product([depth, pixels, channels], lhs, rhs, column.as_mut_ptr(), pixels, false) };
                geometry.fold(column, row, rows, image);
            }
        },
    );
    out
}

/// Gradient with respect to the weights.
pub(super) fn weight_backward(
    x: FlexTensor,
    weight_shape: Shape,
    grad: FlexTensor,
    stride: usize,
    padding: usize,
) -> FlexTensor {
    let (x, grad) = (contiguous(x), contiguous(grad));
    let geometry = Geometry::new(&x.shape(), &weight_shape, stride, padding);
    let (x, grad) = (slice(&x), slice(&grad));
    let [channels, height, width] = geometry.output;
    let (plane, depth) = (height * width, geometry.depth());
    let tasks = geometry.tasks();
    let partials: Vec<Vec<f32>> = tasks
        .par_chunks(tasks.len().div_ceil(PARTIAL_SUMS).max(1))
        .map(|tasks| {
            let mut column = Vec::new();
            let mut sum = vec![0.0_f32; channels * depth];
            for &(n, row, rows) in tasks {
                let image = &x[n * geometry.input_len()..(n + 1) * geometry.input_len()];
                let pixels = rows * width;
                let rhs = if geometry.is_pointwise() {
                    Matrix::rows(&image[row * width..], plane)
                } else {
                    geometry.unfold(image, row, rows, &mut column);
                    Matrix::rows(&column, pixels)
                };
                let lhs = Matrix::rows(&grad[n * geometry.output_len() + row * width..], plane);
                // SAFETY: `sum` is this task's and holds `[channels, depth]`; the operands have
                // `[channels, pixels]` and `[pixels, depth]` elements.
                unsafe {
                    let sizes = [channels, depth, pixels];
                    product(sizes, lhs, rhs.transposed(), sum.as_mut_ptr(), depth, true);
                }
            }
            sum
        })
        .collect();
    let mut partials = partials.into_iter();
    let mut total = partials.next().unwrap_or_else(|| vec![0.0; weight_shape.num_elements()]);
    for partial in partials {
        total.iter_mut().zip(partial).for_each(|(total, partial)| *total += partial);
    }
    tensor(total, weight_shape)
}
