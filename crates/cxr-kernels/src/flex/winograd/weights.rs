//! The weights of a convolution, gathered by output channel and transformed, a block at a time.

use rayon::prelude::*;

use super::super::fast_math::{Kernel, Vectors};
use super::super::half::{Half, Stored};
use super::super::layout::{TILE, transpose_tile};
use super::product::LANES;
use super::transform::{POSITIONS, TAPS, Weights};

/// Input channels of a block: with 32 output channels 0.6 MiB, for the second-level cache.
pub(super) const DEPTH: usize = 128;
/// From one position of a block to the next; the odd cache line keeps positions apart in the cache.
pub(super) const STEP: usize = DEPTH * LANES + TILE;
/// Elements of a block.
pub(super) const BLOCK: usize = POSITIONS * STEP;
/// Input channels that are gathered at a time, for the first-level cache.
const GROUP: usize = 16;

/// A number that kernels are stored as.
pub(super) trait Weight: Stored {
    /// Kernels in f32, in `wide` unless they are that.
    fn widened<'a>(gathered: &'a [Taps<Self>], wide: &'a mut Vec<Taps<f32>>) -> &'a [Taps<f32>];
}

impl Weight for f32 {
    fn widened<'a>(gathered: &'a [Taps<f32>], _: &'a mut Vec<Taps<f32>>) -> &'a [Taps<f32>] {
        gathered
    }
}

impl<H: Half> Weight for H {
    fn widened<'a>(gathered: &'a [Taps<H>], wide: &'a mut Vec<Taps<f32>>) -> &'a [Taps<f32>] {
        wide.resize(gathered.len(), [[0.0; LANES]; TAPS]);
        H::widen(gathered.as_flattened().as_flattened(), wide.as_flattened_mut().as_flattened_mut());
        wide
    }
}

/// The weights of one input channel's kernels for [`LANES`] output channels.
pub(super) type Taps<T> = [[T; LANES]; TAPS];

/// Some kernels as they are stored, and in f32.
pub(super) struct Gathered<T> {
    as_stored: Vec<Taps<T>>,
    wide: Vec<Taps<f32>>,
}

impl<T> Default for Gathered<T> {
    fn default() -> Self {
        Self { as_stored: Vec::new(), wide: Vec::new() }
    }
}

/// The 3x3 kernels of a convolution.
#[derive(Clone, Copy)]
pub(super) struct Kernels<'a, T> {
    /// `[outputs, inputs, 3, 3]`; `[inputs, outputs, 3, 3]` if `rotated`.
    pub(super) data: &'a [T],
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Of the convolution's gradient: channels exchanged, and each kernel turned by half a circle.
    pub(super) rotated: bool,
}

impl<T: Weight> Kernels<'_, T> {
    /// Blocks along the input channels.
    pub(super) fn depth_blocks(&self) -> usize {
        self.inputs.div_ceil(DEPTH)
    }

    /// Blocks along the output channels.
    pub(super) fn lane_blocks(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Blocks in all.
    fn blocks(&self) -> usize {
        self.lane_blocks() * self.depth_blocks()
    }

    /// Input channels of block `depth_block`.
    pub(super) fn depth(&self, depth_block: usize) -> usize {
        DEPTH.min(self.inputs - depth_block * DEPTH)
    }

    /// Block `[POSITIONS][depth, LANES]`, positions [`STEP`] apart; lanes beyond the last output channel are zero.
    ///
    /// # Safety
    /// `vectors` must be of this processor.
    pub(super) unsafe fn block(
        &self,
        vectors: Vectors,
        [lane_block, depth_block]: [usize; 2],
        Gathered { as_stored, wide }: &mut Gathered<T>,
        to: &mut [f32],
    ) {
        as_stored.resize(GROUP, [[T::default(); LANES]; TAPS]);
        let (first_lane, first) = (lane_block * LANES, depth_block * DEPTH);
        let depth = self.depth(depth_block);
        for start in (0..depth).step_by(GROUP) {
            let count = GROUP.min(depth - start);
            let group = &mut as_stored[..count];
            let to = &mut to[start * LANES..];
            // SAFETY: the caller's.
            unsafe {
                vectors.run(Gather { kernels: *self, first_lane, first: first + start, to: group });
                vectors.run(Weights { from: T::widened(group, wide), to, step: STEP });
            }
        }
    }
}

/// All blocks of a layer's transformed weights.
pub(super) struct Transformed(Vec<f32>);

impl Transformed {
    /// # Panics
    /// If the processor has no such vectors.
    pub(super) fn new<T: Weight>(vectors: Vectors, kernels: Kernels<'_, T>) -> Self {
        assert!(vectors.are_here(), "{vectors:?} on a processor without them");
        let mut blocks = vec![0.0_f32; kernels.blocks() * BLOCK];
        blocks.par_chunks_mut(BLOCK).enumerate().for_each_init(Gathered::default, |gathered, (i, to)| {
            let place = [i / kernels.depth_blocks(), i % kernels.depth_blocks()];
            // SAFETY: the vectors are here.
            unsafe { kernels.block(vectors, place, gathered, to) };
        });
        Self(blocks)
    }

    /// What they take.
    pub(super) fn bytes<T: Weight>(kernels: &Kernels<'_, T>) -> usize {
        kernels.blocks() * BLOCK * size_of::<f32>()
    }

    pub(super) fn block<T: Weight>(
        &self,
        kernels: &Kernels<'_, T>,
        [lane_block, depth_block]: [usize; 2],
    ) -> &[f32] {
        &self.0[(lane_block * kernels.depth_blocks() + depth_block) * BLOCK..][..BLOCK]
    }
}

/// Kernels of [`LANES`] output and some input channels, channel by channel and tap by tap.
struct Gather<'a, T> {
    kernels: Kernels<'a, T>,
    first_lane: usize,
    first: usize,
    to: &'a mut [Taps<T>],
}

impl<T: Weight> Kernel for Gather<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { kernels, first_lane, first, to } = self;
        let lanes = LANES.min(kernels.outputs - first_lane);
        for half in (0..LANES).step_by(TILE) {
            let there = lanes.saturating_sub(half);
            match kernels.rotated {
                false => kernels.gather(first_lane + half, first, half, there, to.as_flattened_mut()),
                true => kernels.gather_rotated(first_lane + half, first, half, there, to.as_flattened_mut()),
            }
        }
    }
}

impl<T: Weight> Kernels<'_, T> {
    /// [`TILE`] lanes from `lane` on, of which `lanes` are there, into lanes `half..` of `to`.
    #[inline(always)]
    fn gather(&self, lane: usize, first: usize, half: usize, lanes: usize, to: &mut [[T; LANES]]) {
        let row = self.inputs * TAPS;
        let from = lane * row + first * TAPS;
        for column in (0..to.len()).step_by(TILE) {
            if lanes >= TILE && column + TILE <= to.len() {
                let last = from + (TILE - 1) * row + column + TILE;
                assert!(last <= self.data.len(), "kernels of {TILE} output channels");
                let to = &mut to[column..column + TILE];
                // SAFETY: the rows end in the kernels, as was just checked, and `to` has as many lines.
                unsafe {
                    let from = self.data.as_ptr().add(from + column);
                    transpose_tile(from, row, to.as_mut_ptr().cast::<T>().add(half), LANES);
                }
                continue;
            }
            for (i, line) in to.iter_mut().enumerate().skip(column).take(TILE) {
                for l in 0..TILE {
                    line[half + l] = if l < lanes { self.data[from + l * row + i] } else { T::default() };
                }
            }
        }
    }

    /// The same for rotated kernels.
    #[inline(always)]
    fn gather_rotated(&self, lane: usize, first: usize, half: usize, lanes: usize, to: &mut [[T; LANES]]) {
        let mut tile = [[T::default(); TILE]; TILE];
        for (i, lines) in to.chunks_exact_mut(TAPS).enumerate() {
            let from = ((first + i) * self.outputs + lane) * TAPS;
            // a row is read beyond its kernel, so not at the very end
            if lanes >= TILE && from + (TILE - 1) * TAPS + TILE <= self.data.len() {
                // SAFETY: the rows end in the kernels, and `tile` has room for the transposed ones.
                unsafe { transpose_tile(self.data.as_ptr().add(from), TAPS, tile.as_mut_ptr().cast(), TILE) };
            } else {
                for (tap, line) in tile[..TAPS].iter_mut().enumerate() {
                    for (l, value) in line.iter_mut().enumerate() {
                        *value = if l < lanes { self.data[from + l * TAPS + tap] } else { T::default() };
                    }
                }
            }
            for (line, values) in lines.iter_mut().zip(tile[..TAPS].iter().rev()) {
                line[half..half + TILE].copy_from_slice(values);
            }
        }
    }
}
