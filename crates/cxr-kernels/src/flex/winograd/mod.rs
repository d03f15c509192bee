//! Convolution of 3x3 with stride 1 by Winograd's F(4x4, 3x3): tiles of 4x4 outputs with 36 products for each pair of
//! channels, where the definition has 144.
//!
//! Tiles of the input are transformed for all channels; for a block of output channels at a time, the weights are
//! transformed, multiplied position by position ([`product`]), and the sums transformed back. A transformed copy is four
//! times the weights: what the cache beside a weight has no room for is transformed anew in every call, a block at a time.
//!
//! The norm of the error is below 4e-6 of the result's, at any number of channels: the transforms take differences of
//! numbers that they have multiplied, and lose two or three bits. Sums over many channels would add to that, so they are
//! taken by blocks of [`DEPTH`], each from zero. Their order depends on the layer alone.

mod inputs;
mod product;
#[cfg(test)]
mod tests;
mod transform;
mod weights;

use std::sync::Arc;

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use self::inputs::Tiles;
use self::product::{LANES, PANEL};
use self::transform::{Lanes, OUTPUTS, Outputs, POSITIONS};
use self::weights::{BLOCK, DEPTH, Gathered, Kernels, STEP, Transformed, Weight};
use super::elementwise::{contiguous, slice, tensor};
use super::fast_math::{Kernel, Vectors};
use super::gemm::Shared;
use super::half::elements;
use super::kept::kept;
use super::layout::{TILE, transpose_tile};
use crate::WeightCache;

/// Tiles that one task multiplies: the weights' transform is used for all of them.
const TASK_TILES: usize = 64;
/// Elements of the transformed input at most: 24 MiB, for the last-level cache. One strip of tiles is always taken.
const INPUT_ELEMENTS: usize = 6 * 1024 * 1024;
/// Transformed weights that are worth keeping for all tiles of one call.
const KEPT_BYTES: usize = 16 << 20;
/// Fewest channels on each side, and pixels along each side of the output: below, tiles are too few or too empty.
const FEWEST_CHANNELS: usize = 32;
const FEWEST_PIXELS: usize = 8;

/// The sizes of one convolution.
#[derive(Clone, Copy, Debug)]
struct Plan {
    batch: usize,
    input: [usize; 3],
    output: [usize; 3],
    padding: usize,
    /// Tiles down and across one image.
    tiles: [usize; 2],
}

impl Plan {
    fn new(batch: usize, input: [usize; 3], output: [usize; 3], padding: usize) -> Self {
        let tiles = [output[1], output[2]].map(|size| size.div_ceil(OUTPUTS));
        Self { batch, input, output, padding, tiles }
    }

    /// Whether transformed weights are kept until the end of a call.
    fn keeps_transformed(&self, kernels: &Kernels<'_, impl Weight>) -> bool {
        self.strips() * self.tiles[1] > TASK_TILES && Transformed::bytes(kernels) <= KEPT_BYTES
    }

    /// How often a call transforms each weight that it does not find transformed.
    fn transforms(&self, kernels: &Kernels<'_, impl Weight>) -> usize {
        if self.keeps_transformed(kernels) { 1 } else { (self.strips() * self.tiles[1]).div_ceil(TASK_TILES) }
    }

    /// Rows of tiles in all images.
    fn strips(&self) -> usize {
        self.batch * self.tiles[0]
    }
}

/// Whether this kernel should run for images `x` `[n, c, h, w]` and weights of this shape, whatever `n`.
pub(super) fn applies(x: &Shape, weight: &Shape, stride: usize, padding: usize) -> bool {
    let ([_, _, h, w], [out, c, kh, kw]) = (x.dims(), weight.dims());
    let fits = [kh, kw, stride] == [3, 3, 1] && padding <= 2;
    let pixels = (h.min(w) + 2 * padding).saturating_sub(2);
    fits && c.min(out) >= FEWEST_CHANNELS && pixels >= FEWEST_PIXELS
}

/// `x` `[n, c, h, w]` and `bias` `[out]` in f32, `weight` `[out, c, 3, 3]` in any dtype but f64: `[n, out, h', w']`.
pub(super) fn forward(
    x: FlexTensor,
    weight: FlexTensor,
    bias: Option<FlexTensor>,
    padding: usize,
    cache: &WeightCache,
) -> FlexTensor {
    let by = match weight.dtype() {
        DType::BF16 => forward_by::<bf16>,
        DType::F16 => forward_by::<f16>,
        _ => forward_by::<f32>,
    };
    by(x, weight, bias, padding, cache)
}

fn forward_by<T: Weight>(
    x: FlexTensor,
    weight: FlexTensor,
    bias: Option<FlexTensor>,
    padding: usize,
    cache: &WeightCache,
) -> FlexTensor {
    let as_stored = weight.clone();
    let (x, weight, bias) = (contiguous(x), contiguous(weight), bias.map(contiguous));
    let [batch, c, h, w] = x.shape().dims();
    let out = weight.shape()[0];
    let output = [out, h + 2 * padding - 2, w + 2 * padding - 2];
    let kernels = Kernels { data: elements::<T>(&weight), outputs: out, inputs: c, rotated: false };
    let plan = Plan::new(batch, [c, h, w], output, padding);
    let vectors = Vectors::widest();
    let (bytes, uses) = (Transformed::bytes(&kernels), plan.transforms(&kernels));
    let transformed = kept(cache, &as_stored, bytes, uses, || Transformed::new(vectors, kernels));
    let y = convolve(plan, vectors, slice(&x), kernels, bias.as_ref().map(slice), transformed);
    tensor(y, Shape::new([batch, output[0], output[1], output[2]]))
}

/// Gradient with respect to the input, whose shape is `x_shape`: the gradient, in f32, convolved with the rotated weights.
pub(super) fn x_backward(
    x_shape: &Shape,
    weight: FlexTensor,
    grad: FlexTensor,
    padding: usize,
) -> FlexTensor {
    let by = match weight.dtype() {
        DType::BF16 => x_backward_by::<bf16>,
        DType::F16 => x_backward_by::<f16>,
        _ => x_backward_by::<f32>,
    };
    by(x_shape, weight, grad, padding)
}

fn x_backward_by<T: Weight>(
    x_shape: &Shape,
    weight: FlexTensor,
    grad: FlexTensor,
    padding: usize,
) -> FlexTensor {
    let (weight, grad) = (contiguous(weight), contiguous(grad));
    let [batch, c, h, w] = x_shape.dims();
    let [_, out, grad_h, grad_w] = grad.shape().dims();
    let kernels = Kernels { data: elements::<T>(&weight), outputs: c, inputs: out, rotated: true };
    let plan = Plan::new(batch, [out, grad_h, grad_w], [c, h, w], 2 - padding);
    tensor(convolve(plan, Vectors::widest(), slice(&grad), kernels, None, None), x_shape.clone())
}

fn convolve<T: Weight>(
    plan: Plan,
    vectors: Vectors,
    x: &[f32],
    kernels: Kernels<'_, T>,
    bias: Option<&[f32]>,
    transformed: Option<Arc<Transformed>>,
) -> Vec<f32> {
    assert!(vectors.are_here(), "{vectors:?} on a processor without them");
    let length = plan.batch * plan.output.iter().product::<usize>();
    let mut out = Vec::with_capacity(length);
    let target = Shared::spare(&mut out);
    let per_strip = plan.tiles[1].next_multiple_of(PANEL) * POSITIONS * plan.input[0];
    let strips = (INPUT_ELEMENTS / per_strip.max(1)).clamp(1, plan.strips().max(1));
    let for_this_call =
        || plan.keeps_transformed(&kernels).then(|| Transformed::new(vectors, kernels).into());
    let transformed = transformed.or_else(for_this_call);
    let mut memory = Vec::new();
    for first in (0..plan.strips()).step_by(strips) {
        let tiles = Tiles::new(&plan, vectors, x, first..(first + strips).min(plan.strips()), &mut memory);
        let tasks: Vec<_> = (0..tiles.count)
            .step_by(TASK_TILES)
            .flat_map(|tile| (0..kernels.lane_blocks()).map(move |block| (tile, block)))
            .collect();
        tasks.into_par_iter().for_each_init(Scratch::<T>::default, |scratch, (tile, lane_block)| {
            let count = TASK_TILES.min(tiles.count - tile);
            // SAFETY: the vectors are here, and these tiles of these channels of `out` are this task's.
            unsafe {
                scratch.multiply(
                    vectors,
                    &tiles,
                    tile / PANEL,
                    count,
                    kernels,
                    lane_block,
                    transformed.as_deref(),
                );
                scratch.finish(&plan, vectors, tiles.first + tile, count, lane_block, bias, target);
            }
        });
    }
    // SAFETY: the tiles cover every pixel of every channel, and each task has written its own.
    unsafe { out.set_len(length) };
    out
}

/// What a task computes in.
struct Scratch<T> {
    gathered: Gathered<T>,
    weights: Vec<f32>,
    /// `[POSITIONS][TASK_TILES, LANES]`, positions [`SUMS`] apart.
    sums: Vec<f32>,
    /// `[OUTPUTS][tiles * OUTPUTS]`.
    pixels: Vec<Lanes>,
}

/// From one position of the sums to the next.
const SUMS: usize = TASK_TILES * LANES + TILE;

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { gathered: Gathered::default(), weights: Vec::new(), sums: Vec::new(), pixels: Vec::new() }
    }
}

impl<T: Weight> Scratch<T> {
    /// The products of `count` tiles from panel `panel` on with a block of output channels.
    ///
    /// # Safety
    /// `vectors` must be of this processor.
    unsafe fn multiply(
        &mut self,
        vectors: Vectors,
        tiles: &Tiles,
        panel: usize,
        count: usize,
        kernels: Kernels<'_, T>,
        lane_block: usize,
        transformed: Option<&Transformed>,
    ) {
        self.sums.resize(POSITIONS * SUMS, 0.0);
        let depth_blocks = kernels.depth_blocks();
        for depth_block in 0..depth_blocks {
            let place = [lane_block, depth_block];
            let weights = match transformed {
                Some(transformed) => transformed.block(&kernels, place),
                None => {
                    self.weights.resize(BLOCK, 0.0);
                    // SAFETY: the caller's.
                    unsafe { kernels.block(vectors, place, &mut self.gathered, &mut self.weights) };
                    &self.weights
                }
            };
            let (depth, panels) = (kernels.depth(depth_block), count.div_ceil(PANEL));
            for (position, weights) in weights.chunks_exact(STEP).enumerate() {
                for i in 0..panels {
                    let sums = &mut self.sums[position * SUMS + i * PANEL * LANES..][..PANEL * LANES];
                    let from = tiles.at(panel + i, position, depth_block * DEPTH, depth);
                    let next = match (i + 1 < panels, position + 1 < POSITIONS) {
                        (true, _) => tiles.at(panel + i + 1, position, depth_block * DEPTH, depth),
                        (false, true) => tiles.at(panel, position + 1, depth_block * DEPTH, depth),
                        (false, false) => from,
                    };
                    let fresh = depth_block == 0;
                    // SAFETY: the three slices have the sizes of the product's operands.
                    unsafe {
                        product::product(
                            vectors,
                            weights.as_ptr(),
                            from,
                            next,
                            sums.as_mut_ptr(),
                            depth,
                            fresh,
                        )
                    };
                }
            }
        }
    }

    /// The sums of `count` tiles from `first` on as pixels of a block of output channels.
    ///
    /// # Safety
    /// `vectors` must be of this processor, and these pixels of `out` the caller's to write.
    unsafe fn finish(
        &mut self,
        plan: &Plan,
        vectors: Vectors,
        first: usize,
        count: usize,
        lane_block: usize,
        bias: Option<&[f32]>,
        out: Shared,
    ) {
        let [channels, height, width] = plan.output;
        let first_channel = lane_block * LANES;
        let lanes = LANES.min(channels - first_channel);
        let mut lane_bias = [0.0; LANES];
        if let Some(bias) = bias {
            lane_bias[..lanes].copy_from_slice(&bias[first_channel..first_channel + lanes]);
        }
        self.pixels.resize(OUTPUTS * TASK_TILES * OUTPUTS, [0.0; LANES]);
        // SAFETY: the vectors are here.
        unsafe {
            vectors.run(Outputs {
                from: &self.sums,
                step: SUMS,
                bias: &lane_bias,
                tiles: count,
                to: &mut self.pixels,
            });
        }
        let mut tile = 0;
        while tile < count {
            let (strip, column) = ((first + tile) / plan.tiles[1], (first + tile) % plan.tiles[1]);
            let run = (plan.tiles[1] - column).min(count - tile);
            let (image, top) = (strip / plan.tiles[0], strip % plan.tiles[0] * OUTPUTS);
            for row in top..(top + OUTPUTS).min(height) {
                let from = &self.pixels[((row - top) * count + tile) * OUTPUTS..][..run * OUTPUTS];
                let from = &from[..from.len().min(width - column * OUTPUTS)];
                let place = ((image * channels + first_channel) * height + row) * width + column * OUTPUTS;
                // SAFETY: this part of this row lies in `out` for each of the channels.
                unsafe { vectors.run(Row { from, lanes, out: out.at(place), plane: height * width }) };
            }
            tile += run;
        }
    }
}

/// Pixels of a row, lane by lane, to the planes of their channels.
struct Row<'a> {
    from: &'a [Lanes],
    lanes: usize,
    /// Valid for writes of `from.len()` elements in each of `lanes` planes.
    out: *mut f32,
    plane: usize,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, lanes, out, plane } = self;
        for lane in (0..lanes).step_by(TILE) {
            for pixel in (0..from.len()).step_by(TILE) {
                // SAFETY: what is written is within `from.len()` and `lanes`.
                unsafe {
                    let to = out.add(lane * plane + pixel);
                    if lane + TILE <= lanes && pixel + TILE <= from.len() {
                        transpose_tile(from[pixel..].as_ptr().cast::<f32>().add(lane), LANES, to, plane);
                        continue;
                    }
                    for l in 0..TILE.min(lanes - lane) {
                        for (i, from) in from[pixel..].iter().take(TILE).enumerate() {
                            to.add(l * plane + i).write(from[lane + l]);
                        }
                    }
                }
            }
        }
    }
}
