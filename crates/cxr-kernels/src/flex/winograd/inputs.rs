//! The input's tiles, transformed, as the product reads them.

use std::ops::Range;

use rayon::prelude::*;

use super::super::fast_math::{Kernel, Vectors};
use super::super::gemm::Shared;
use super::Plan;
use super::product::PANEL;
use super::transform::{Across, Down, OUTPUTS, POSITIONS, SIDE};

/// Channels of one task: neighbours share cache lines of the result.
const CHANNELS: usize = 4;
/// Tiles that are transformed at a time, more or less: 30 KiB before and after, for the first-level cache.
const LANES_AT_ONCE: usize = 96;

/// Transformed tiles of some strips: `[panels][POSITIONS][channels, PANEL]`, positions `step` apart.
pub(super) struct Tiles {
    data: Shared,
    step: usize,
    channels: usize,
    panels: usize,
    /// The first tile, counted through all images.
    pub(super) first: usize,
    /// The number of tiles.
    pub(super) count: usize,
}

impl Tiles {
    /// Of `strips` of `x` `[n, c, h, w]`, in `memory`, which must outlive the result.
    pub(super) fn new(
        plan: &Plan,
        vectors: Vectors,
        x: &[f32],
        strips: Range<usize>,
        memory: &mut Vec<f32>,
    ) -> Self {
        let channels = plan.input[0];
        let count = strips.len() * plan.tiles[1];
        let panels = count.div_ceil(PANEL);
        // the odd cache line keeps positions apart in the cache
        let step = channels * PANEL + 2 * PANEL;
        memory.clear();
        memory.reserve(panels * POSITIONS * step);
        let data = Shared::spare(memory);
        let tiles = Self { data, step, channels, panels, first: strips.start * plan.tiles[1], count };
        let tasks = (0..channels).into_par_iter().step_by(CHANNELS);
        tasks.for_each_init(Scratch::default, |scratch, channel| {
            for channel in channel..(channel + CHANNELS).min(channels) {
                // SAFETY: this task alone writes this channel, whose tiles lie in the memory reserved.
                unsafe { scratch.channel(plan, vectors, x, channel, strips.clone(), &tiles) };
            }
        });
        tiles
    }

    /// `depth` channels from `channel` on, of one position of a panel: `[depth, PANEL]`.
    pub(super) fn at(&self, panel: usize, position: usize, channel: usize, depth: usize) -> *const f32 {
        assert!(panel < self.panels && position < POSITIONS && channel + depth <= self.channels);
        // SAFETY: it lies in the memory reserved, as was just checked.
        unsafe { self.data.at((panel * POSITIONS + position) * self.step + channel * PANEL) }
    }
}

/// What a task transforms in.
#[derive(Default)]
struct Scratch {
    /// `[SIDE][strips, OUTPUTS * (tiles across + 1)]`.
    down: Vec<f32>,
    /// `[SIDE][SIDE][lanes]`.
    across: Vec<f32>,
    /// A row above or below the image.
    zeros: Vec<f32>,
}

impl Scratch {
    /// # Safety
    /// `vectors` must be of this processor, and this channel of `to` the caller's to write.
    unsafe fn channel(
        &mut self,
        plan: &Plan,
        vectors: Vectors,
        x: &[f32],
        channel: usize,
        strips: Range<usize>,
        to: &Tiles,
    ) {
        let ([channels, height, width], [down, across]) = (plan.input, plan.tiles);
        let row = OUTPUTS * (across + 1);
        let group = (LANES_AT_ONCE / (across + 1)).clamp(1, strips.len().max(1));
        self.zeros.resize(width, 0.0);
        // what lies beside the image is zero, and stays it: only the image's columns are written below
        self.down.clear();
        self.down.resize(SIDE * group * row, 0.0);
        self.across.resize(POSITIONS * group * (across + 1), 0.0);
        for first in strips.clone().step_by(group) {
            let count = group.min(strips.end - first);
            for i in 0..count {
                let (image, top) = ((first + i) / down, (first + i) % down * OUTPUTS);
                let plane = &x[(image * channels + channel) * height * width..][..height * width];
                let from = std::array::from_fn(|y| match (top + y).checked_sub(plan.padding) {
                    Some(y) if y < height => &plane[y * width..][..width],
                    _ => &self.zeros[..],
                });
                let mut rows = self.down.chunks_exact_mut(count * row);
                let to = std::array::from_fn(|_| {
                    let all = rows.next().expect("as many rows as a tile");
                    &mut all[i * row + plan.padding..][..width]
                });
                // SAFETY: the caller's.
                unsafe { vectors.run(Down { from, to }) };
            }
            let lanes = count * (across + 1) - 1;
            let rows = &self.down[..SIDE * count * row];
            // SAFETY: the caller's.
            unsafe {
                Across { from: rows, lanes, to: &mut self.across[..POSITIONS * lanes] }.run_by(vectors)
            };
            for i in 0..count {
                let lane = i * (across + 1);
                let tile = (first + i - strips.start) * across;
                // SAFETY: the caller's.
                unsafe {
                    vectors.run(Distribute {
                        from: &self.across,
                        lanes,
                        lane,
                        tile,
                        count: across,
                        channel,
                        to,
                    })
                };
            }
        }
        self.fill_last_panel(channel, to);
    }

    /// Zeros where the last panel has no tiles.
    fn fill_last_panel(&self, channel: usize, to: &Tiles) {
        let used = to.count % PANEL;
        if used == 0 {
            return;
        }
        for position in 0..POSITIONS {
            let last = to.at(to.panels - 1, position, channel, 1).cast_mut();
            // SAFETY: the rest of the panel's row.
            unsafe { std::slice::from_raw_parts_mut(last.add(used), PANEL - used).fill(0.0) };
        }
    }
}

/// `count` lanes of one channel, from `lane` on, to as many tiles from `tile` on.
struct Distribute<'a> {
    /// `[POSITIONS][lanes]`.
    from: &'a [f32],
    lanes: usize,
    lane: usize,
    tile: usize,
    count: usize,
    channel: usize,
    /// This channel of which must be the caller's to write.
    to: &'a Tiles,
}

impl Kernel for Distribute<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, lanes, lane, tile, count, channel, to } = self;
        let mut done = 0;
        while done < count {
            let (panel, place) = ((tile + done) / PANEL, (tile + done) % PANEL);
            let run = (PANEL - place).min(count - done);
            for (position, from) in from.chunks_exact(lanes).take(POSITIONS).enumerate() {
                let from = &from[lane + done..][..run];
                let to = to.at(panel, position, channel, 1).cast_mut();
                // SAFETY: the panel has room for `run` tiles from `place` on.
                unsafe { copy(from, to.add(place)) };
            }
            done += run;
        }
    }
}

/// A copy that is a move of one register where the length is a usual one.
///
/// # Safety
/// `to` must be valid for writes of as many elements.
#[inline(always)]
unsafe fn copy(from: &[f32], to: *mut f32) {
    // SAFETY: the lengths are the same.
    unsafe {
        match from.len() {
            PANEL => to.cast::<[f32; PANEL]>().write(from.try_into().expect("a panel")),
            4 => to.cast::<[f32; 4]>().write(from.try_into().expect("four")),
            length => std::ptr::copy_nonoverlapping(from.as_ptr(), to, length),
        }
    }
}
