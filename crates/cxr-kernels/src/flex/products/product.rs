//! The product of rows as they lie and columns that come in panels.
//!
//! `result[r, c] = sum over d of rows[r, d] * columns[d, c]`. A panel has, for every word of the depth (32 bits: one f32 or a
//! pair of bf16), that word of each of its columns side by side. What multiplies is an [`Engine`]: vectors, or the
//! tiles of AMX.

use std::ops::Range;

use rayon::prelude::*;

use super::ahead::{Source, fetch};
use super::number::{Line, Number};
use super::simd::{LANES, Simd};
use super::{Weights, blocks};

/// Vectors of a panel.
pub(super) const VECTORS: usize = 4;
/// Columns of a panel.
pub(super) const WIDTH: usize = LANES * VECTORS;
/// Words of a panel's depth: 64 KiB with its 64 columns, read again from the second-level cache for every few rows, which
/// is cheaper than putting sums aside more often (half of it was 3 % slower for bf16). Pairs never cross its end.
pub(super) const WORDS: usize = 256;
/// Rows that are copied at once where there is a single panel: 24 KiB.
const FEW: usize = 24;
/// How many rows ahead those that are copied are called for.
const AHEAD: usize = 4;

/// Where vector `v` of a word lies in a panel of so many vectors and words: those that are [multiplied at once](Simd::TILE)
/// are neighbours.
#[inline(always)]
pub(super) fn place<S: Simd>(word: usize, v: usize, vectors: usize, words: usize) -> usize {
    if S::TILE >= VECTORS {
        return word * vectors + v;
    }
    let first = v / S::TILE * S::TILE;
    first * words + word * S::TILE.min(vectors - first) + v - first
}

/// The words that panels of such a depth have, with those of zeros.
pub(super) fn words<E: Engine>(depth: usize) -> usize {
    depth.div_ceil(E::PER_WORD).next_multiple_of(LANES)
}

/// What multiplies some rows by a panel.
pub(super) trait Engine: Sized {
    /// What it multiplies.
    type Number: Number<Self>;
    /// What moves rows, columns and sums.
    type Simd: Simd;
    /// How many numbers a word has, neighbours along the depth.
    const PER_WORD: usize = size_of::<Line>() / LANES / size_of::<Self::Number>();
    /// Rows that it takes at once: blocks are made of so many.
    const ROWS: usize;
    /// Whether it takes rows in whole lines of the cache: rows that do not lie so are copied, with zeros at their end.
    const ROWS_IN_LINES: bool;
    /// Sums of a block: with the operands they stay in the second-level cache.
    const SUMS: usize;
    /// Whether multiplying is so fast that a weight should be brought into panels once for all blocks of rows, even where
    /// nothing keeps them.
    const PACKS_ONCE: bool;

    /// Whether this processor has it.
    fn is_available() -> bool;

    /// Makes this thread ready for it.
    fn begin() -> Self;

    /// Multiplies `rows` rows by `vectors` vectors of a panel.
    ///
    /// # Safety
    /// The processor must have it; `tile.rows` must have so many rows of `tile.depth` elements, `tile.panel` as many
    /// vectors for each of the depth's [`words`], as [`pack_whole`] writes them, and `tile.sums` be valid for reading and
    /// writing as many sums. With [`ROWS_IN_LINES`](Self::ROWS_IN_LINES) rows must lie so, and go on with zeros to the end of
    /// their last line.
    unsafe fn multiply(&mut self, tile: Tile<Self::Number>, rows: usize, vectors: usize);
}

/// Sixteen words of an engine.
pub(super) type Words<E> = <<E as Engine>::Simd as Simd>::Words;

/// The rows of a product.
///
/// # Safety
/// [`part`](Self::part) must return what it says.
pub(super) unsafe trait Operand<E: Engine>: Copy + Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Elements of each.
    fn depth(&self) -> usize;

    /// Whether [`part`](Self::part) copies in any case.
    fn are_copied(&self) -> bool;

    /// What [`part`](Self::part) reads, if it is worth being called for ahead.
    fn source(&self, rows: Range<usize>, depth: Range<usize>) -> Source;

    /// Elements `depth` of some rows as the engine takes them, where they lie or in `copied`.
    ///
    /// # Safety
    /// The processor must have the engine's instructions; the ranges must lie in the operand, the depth be no more than that
    /// of a panel.
    unsafe fn part(&self, rows: Range<usize>, depth: Range<usize>, copied: &mut Vec<Line>)
    -> Part<E::Number>;
}

/// Some elements of some rows.
#[derive(Clone, Copy)]
pub(super) struct Part<T> {
    /// The first element of the first row.
    pub(super) from: *const T,
    /// From one row to the next.
    pub(super) step: usize,
    /// From one element of a row to the next.
    pub(super) way: Way,
    /// From an element to the one at its place in the part of the depth that comes next, or thereabouts: it is called for, and
    /// not read.
    pub(super) onward: usize,
}

/// The way along a row: a run of `first` elements and then runs of `run`, each element `step` behind the one before, and
/// `jump` more from run to run. Engines that take rows in whole lines of the cache take the straight way alone.
#[derive(Clone, Copy)]
pub(super) struct Way {
    pub(super) first: usize,
    pub(super) run: usize,
    pub(super) step: isize,
    pub(super) jump: isize,
}

impl Way {
    /// Side by side; a run is a line of the cache.
    pub(super) const STRAIGHT: Self = Self { first: LANES, run: LANES, step: 1, jump: 0 };
}

/// Rows that lie side by side: `[rows, depth]`, each beginning `step` after the one before.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) count: usize,
    pub(super) depth: usize,
    pub(super) step: usize,
}

/// The columns of a product, which come in panels.
///
/// # Safety
/// `pack` must write all of the panel, and `packed` return one as [`pack_whole`] writes it.
pub(super) unsafe trait Columns<E: Engine>: Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// The panel that [`pack_whole`] would write, if there is one already.
    fn packed(&self, columns: &Range<usize>, depth: &Range<usize>) -> Option<*const Line> {
        let _ = (columns, depth);
        None
    }

    /// What [`pack`](Self::pack) reads, if it is worth being called for ahead.
    fn source(&self, columns: Range<usize>, depth: &Range<usize>) -> Source {
        let _ = (columns, depth);
        Source::NONE
    }

    /// Writes lines `depth` of `columns` into `panel`, each vector in its [`place`]: for each line, or pair of lines, the words of
    /// all columns, which are rounded up to whole vectors. The last of an odd number of lines is paired with zeros. What columns that are
    /// not there get does not matter.
    ///
    /// # Safety
    /// The processor must have the instructions; `depth` must begin with a word, both ranges must lie in the operand
    /// and be no larger than a panel, and `panel` must be valid for writing as much.
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut Line);
}

/// [`Columns::pack`], and zeros up to a multiple of [`LANES`] words.
///
/// # Safety
/// As there; `panel` must be valid for writing these too.
#[inline(always)]
pub(super) unsafe fn pack_whole<E: Engine>(
    matrix: &impl Columns<E>,
    columns: Range<usize>,
    depth: Range<usize>,
    panel: *mut Line,
) {
    let vectors = columns.len().div_ceil(LANES);
    let (from, words) = (depth.len().div_ceil(E::PER_WORD), words::<E>(depth.len()));
    // SAFETY: the caller's word.
    unsafe {
        matrix.pack(columns, depth, panel);
        for word in from..words {
            for v in 0..vectors {
                *panel.add(place::<E::Simd>(word, v, vectors, words)) = Line::ZERO;
            }
        }
    }
}

/// What becomes of the sums.
pub(super) trait Sink<E: Engine>: Sync {
    /// Takes the sums of some columns of some rows; those of a row begin `step` after those of the row before. They are not
    /// needed any more, unless the sink is to leave them where they are.
    ///
    /// # Safety
    /// The processor must have the instructions; rows and columns must be those of the product, and `sums` have them, in whole
    /// vectors.
    unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32], step: usize);
}

/// Leaves the sums where they are.
pub(super) struct Kept;

impl<E: Engine> Sink<E> for Kept {
    #[inline(always)]
    unsafe fn store(&self, _: Range<usize>, _: Range<usize>, _: &mut [f32], _: usize) {}
}

/// Multiplies; needs [`Engine::is_available`].
pub(super) fn multiply<E: Engine>(
    rows: impl Operand<E>,
    columns: &impl Columns<E>,
    sink: &impl Sink<E>,
    weights: Weights,
) {
    assert!(E::is_available(), "a product for instructions that this processor does not have");
    let count = rows.count();
    let [height, width] = blocks([count, columns.count()], E::SUMS, [E::ROWS, WIDTH], weights);
    let starts = |count: usize, size: usize| (0..count).step_by(size).map(move |s| s..(s + size).min(count));
    // blocks of one and the same column after another: they share what they read of it
    let tasks: Vec<_> = starts(columns.count(), width)
        .flat_map(|c| starts(count, height).map(move |r| (r, c.clone())))
        .collect();
    tasks.into_par_iter().for_each_init(Buffers::default, |buffers, (r, c)| {
        // SAFETY: the processor has the features, as asserted; the ranges lie in the product.
        unsafe { block::<E>(rows, columns, sink, r, c, buffers) }
    });
}

/// In how many blocks of rows [`multiply`] goes over the columns.
pub(super) fn row_blocks<E: Engine>(rows: usize, columns: usize) -> usize {
    rows.div_ceil(blocks([rows, columns], E::SUMS, [E::ROWS, WIDTH], Weights::Columns)[0])
}

/// What one thread works in.
#[derive(Default)]
pub(super) struct Buffers {
    /// Of the rows of the last [`block`], each rounded up to whole vectors.
    pub(super) sums: Sums,
    panel: Vec<Line>,
    rows: Vec<Line>,
}

/// Numbers that begin on a line of the cache.
#[derive(Default)]
pub(super) struct Sums(Vec<Line>);

impl Sums {
    /// Makes room for `lines` vectors; what is there stays.
    fn resize(&mut self, lines: usize) {
        self.0.resize(lines, Line::ZERO);
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        Line::numbers_mut(&mut self.0)
    }
}

/// One block of the product, on this thread.
///
/// # Safety
/// The processor must have what numbers and engine take; the ranges must lie in the product.
pub(super) unsafe fn block<E: Engine>(
    rows: impl Operand<E>,
    columns: &impl Columns<E>,
    sink: &impl Sink<E>,
    of_rows: Range<usize>,
    of_columns: Range<usize>,
    buffers: &mut Buffers,
) {
    // SAFETY: the caller's word.
    unsafe {
        E::Simd::run(
            #[inline(always)]
            || sum::<E>(rows, columns, sink, of_rows, of_columns, false, buffers),
        )
    }
}

/// One block of the product, left in the sums of `buffers`, with `onto` added to those of the block before, which must have
/// been of the same size.
///
/// # Safety
/// As [`block`].
pub(super) unsafe fn block_onto<E: Engine>(
    rows: impl Operand<E>,
    columns: &impl Columns<E>,
    of_rows: Range<usize>,
    of_columns: Range<usize>,
    onto: bool,
    buffers: &mut Buffers,
) {
    // SAFETY: the caller's word.
    unsafe {
        E::Simd::run(
            #[inline(always)]
            || sum::<E>(rows, columns, &Kept, of_rows, of_columns, onto, buffers),
        )
    }
}

/// # Safety
/// As [`block`].
#[inline(always)]
unsafe fn sum<E: Engine>(
    rows: impl Operand<E>,
    columns: &impl Columns<E>,
    sink: &impl Sink<E>,
    of_rows: Range<usize>,
    of_columns: Range<usize>,
    onto: bool,
    Buffers { sums, panel, rows: copied }: &mut Buffers,
) {
    let step = of_columns.len().next_multiple_of(LANES);
    sums.resize(of_rows.len() * step / LANES);
    let sums = sums.as_mut_slice();
    if rows.depth() == 0 && !onto {
        sums.fill(0.0);
    }
    panel.resize(WORDS * VECTORS, Line::ZERO);
    let panel = panel.as_mut_ptr();
    let mut engine = E::begin();
    // beside a single panel, which stays where it is, rows that are copied go by way of the first-level cache
    let at_once = if step <= WIDTH && rows.are_copied() { FEW } else { of_rows.len() };
    let rows_from = |first: usize| first..(first + at_once).min(of_rows.end);
    let depth_from = |start: usize| start..(start + WORDS * E::PER_WORD).min(rows.depth());
    let group_from = |first: usize| first..(first + WIDTH).min(of_columns.end);
    for start in (0..rows.depth()).step_by(WORDS * E::PER_WORD) {
        let depth = depth_from(start);
        for some in of_rows.clone().step_by(at_once.max(1)).map(rows_from) {
            // SAFETY: the rows lie in the operand.
            let part = unsafe { rows.part(some.clone(), depth.clone(), copied) };
            for group in of_columns.clone().step_by(WIDTH).map(group_from) {
                let panel = columns.packed(&group, &depth).unwrap_or_else(|| {
                    if some.start == of_rows.start {
                        // SAFETY: the panel's buffer has room for `WORDS` words of `WIDTH` columns.
                        unsafe { pack_whole(columns, group.clone(), depth.clone(), panel) };
                    }
                    panel
                });
                let sums = &mut sums[group.start - of_columns.start..];
                let next = if some.end < of_rows.end {
                    rows.source(rows_from(some.end), depth.clone())
                } else if group.end < of_columns.end {
                    columns.source(group_from(group.end), &depth)
                } else if depth.end < rows.depth() {
                    let depth = depth_from(depth.end);
                    let columns = columns.source(group_from(of_columns.start), &depth);
                    rows.source(rows_from(of_rows.start), depth).or(columns)
                } else {
                    Source::NONE
                };
                let tile = Tile {
                    rows: part,
                    depth: depth.len(),
                    next,
                    panel,
                    sums: sums[(some.start - of_rows.start) * step..].as_mut_ptr(),
                    step,
                    accumulate: onto || start > 0,
                };
                // SAFETY: as many rows and vectors are there, in the operands and in the sums.
                unsafe { engine.multiply(tile, some.len(), group.len().div_ceil(LANES)) };
                if some.end == of_rows.end && depth.end == rows.depth() {
                    // SAFETY: they lie in the product.
                    unsafe { sink.store(of_rows.clone(), group, sums, step) };
                }
            }
        }
    }
    if rows.depth() == 0 {
        // SAFETY: as above.
        unsafe { sink.store(of_rows, of_columns, sums, step) };
    }
}

// SAFETY: where a part is copied, it is to whole lines, with zeros at the end; otherwise it lies as the engine takes it.
unsafe impl<T: Number<E>, E: Engine> Operand<E> for Rows<'_, T> {
    fn count(&self) -> usize {
        self.count
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn are_copied(&self) -> bool {
        !T::AS_STORED
    }

    fn source(&self, rows: Range<usize>, depth: Range<usize>) -> Source {
        if T::AS_STORED {
            return Source::NONE;
        }
        let (from, size) =
            (self.data.as_ptr().wrapping_add(rows.start * self.step + depth.start), size_of::<T>());
        Source { from: from.cast(), step: self.step * size, pieces: rows.len(), bytes: depth.len() * size }
    }

    #[inline(always)]
    unsafe fn part(
        &self,
        rows: Range<usize>,
        depth: Range<usize>,
        copied: &mut Vec<Line>,
    ) -> Part<E::Number> {
        let of_line = LANES * E::PER_WORD;
        // SAFETY: the first of these rows has elements from there on.
        let from = unsafe { self.data.as_ptr().add(rows.start * self.step + depth.start) };
        let in_lines = from.addr().is_multiple_of(size_of::<Line>())
            && self.step.is_multiple_of(of_line)
            && depth.len().is_multiple_of(of_line);
        if T::AS_STORED && (in_lines || !E::ROWS_IN_LINES) {
            return Part { from: from.cast(), step: self.step, way: Way::STRAIGHT, onward: depth.len() };
        }
        let lines = depth.len().div_ceil(of_line);
        let step = copied_step(lines);
        copied.resize(rows.len() * step, Line::ZERO);
        for (row, to) in copied.chunks_exact_mut(step).take(rows.len()).enumerate() {
            for (line, to) in to[..lines].iter_mut().enumerate() {
                let from = from.wrapping_add(row * self.step + line * of_line);
                if !T::AS_STORED {
                    // they lie too far apart for the processor to foresee them
                    fetch(from.wrapping_add(AHEAD * self.step));
                }
                // SAFETY: so many elements are left of this row.
                unsafe {
                    let words = T::words(from, depth.len() - line * of_line);
                    E::Simd::store(words, std::ptr::from_mut(to).cast());
                }
            }
        }
        Part { from: copied.as_ptr().cast(), step: step * of_line, way: Way::STRAIGHT, onward: 0 }
    }
}

/// From one copied row of so many lines to the next: an odd number, so that what is written side by side in many rows does
/// not all fall into a few sets of the cache.
pub(super) fn copied_step(lines: usize) -> usize {
    lines | 1
}

/// Rows times one panel.
#[derive(Clone, Copy)]
pub(super) struct Tile<T> {
    pub(super) rows: Part<T>,
    pub(super) depth: usize,
    /// What the next panel is made of.
    pub(super) next: Source,
    pub(super) panel: *const Line,
    pub(super) sums: *mut f32,
    /// From one row of the sums to the next.
    pub(super) step: usize,
    pub(super) accumulate: bool,
}

impl<T: Copy> Tile<T> {
    /// From one of the rows on.
    pub(super) fn at_row(self, row: usize) -> Self {
        let from = self.rows.from.wrapping_add(row * self.rows.step);
        let rows = Part { from, ..self.rows };
        Self { rows, sums: self.sums.wrapping_add(row * self.step), ..self }
    }
}
