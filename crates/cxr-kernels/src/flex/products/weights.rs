//! Panels of a weight: of `[columns, depth]`, as a layer has it, and of `[depth, columns]`, for its gradient.

use std::ops::Range;

use rayon::prelude::*;

use super::super::elementwise::filled;
use super::ahead::Source;
use super::number::{Line, Number};
use super::product::{Columns, Engine, WIDTH, WORDS, Words, pack_whole, place, words};
use super::simd::{LANES, Simd};

/// A matrix `[columns, depth]`: a column's elements lie side by side.
#[derive(Clone, Copy)]
pub(super) struct Transposed<'a, T> {
    pub(super) data: &'a [T],
    pub(super) columns: usize,
    /// From one column to the next.
    pub(super) step: usize,
}

/// All panels of a matrix, one group of columns after another, each from the top down.
pub(super) struct Panels {
    lines: Vec<Line>,
    /// Of the depth, up to a multiple of [`LANES`].
    words: usize,
}

impl Panels {
    /// Needs [`Engine::is_available`].
    pub(super) fn new<E: Engine>(matrix: &impl Columns<E>, depth: usize) -> Self {
        assert!(E::is_available(), "panels for instructions that this processor does not have");
        let columns = matrix.count();
        let words = words::<E>(depth);
        let of_group = (words * WIDTH / LANES).max(1);
        // SAFETY: the groups cover all columns, and each panel is written whole.
        let lines = unsafe {
            filled(columns.div_ceil(LANES) * words, |lines| {
                lines.par_chunks_mut(of_group).enumerate().for_each(|(group, lines)| {
                    let group = group * WIDTH..((group + 1) * WIDTH).min(columns);
                    let vectors = group.len().div_ceil(LANES);
                    for (lines, word) in lines.chunks_mut(WORDS * vectors).zip((0..words).step_by(WORDS)) {
                        let start = word * E::PER_WORD;
                        let end = (start + WORDS * E::PER_WORD).min(depth);
                        let panel = lines.as_mut_ptr().cast();
                        E::Simd::run(
                            #[inline(always)]
                            || pack_whole(matrix, group.clone(), start..end, panel),
                        );
                    }
                });
            })
        };
        Self { lines, words }
    }

    /// The panel of these columns and this part of the depth.
    fn panel<E: Engine>(&self, columns: &Range<usize>, depth: &Range<usize>) -> *const Line {
        debug_assert!(columns.start.is_multiple_of(LANES) && depth.start.is_multiple_of(WORDS * E::PER_WORD));
        let before = columns.start / LANES * self.words;
        let above = depth.start / E::PER_WORD * columns.len().div_ceil(LANES);
        self.lines[before + above..].as_ptr()
    }

    /// What the panels of such a matrix take.
    pub(super) fn bytes<E: Engine>(columns: usize, depth: usize) -> usize {
        columns.div_ceil(LANES) * words::<E>(depth) * size_of::<Line>()
    }
}

// SAFETY: `pack` writes every line of every vector of the panel.
unsafe impl<T: Number<E>, E: Engine> Columns<E> for Transposed<'_, T> {
    fn count(&self) -> usize {
        self.columns
    }

    fn source(&self, columns: Range<usize>, depth: &Range<usize>) -> Source {
        let from = self.data[columns.start * self.step + depth.start..].as_ptr().cast();
        Source {
            from,
            step: self.step * size_of::<T>(),
            pieces: columns.len(),
            bytes: depth.len() * size_of::<T>(),
        }
    }

    #[inline(always)]
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut Line) {
        let vectors = columns.len().div_ceil(LANES);
        let (lines, words_of_panel) = (depth.len().div_ceil(E::PER_WORD), words::<E>(depth.len()));
        for (v, first) in columns.clone().step_by(LANES).enumerate() {
            let count = LANES.min(columns.end - first);
            for (block, start) in depth.clone().step_by(E::PER_WORD * LANES).enumerate() {
                // SAFETY: the caller's word.
                let mut words = unsafe { [E::Simd::splat(0.0); LANES] };
                for (i, words) in words.iter_mut().take(count).enumerate() {
                    // SAFETY: so many elements are left of this column.
                    unsafe {
                        let from = self.data.as_ptr().add((first + i) * self.step + start);
                        *words = T::words(from, depth.end - start);
                    }
                }
                // SAFETY: the caller's word.
                let words = unsafe { E::Simd::transpose(words) };
                for (line, words) in (block * LANES..lines).zip(words) {
                    // SAFETY: the panel has this line.
                    unsafe {
                        E::Simd::store(
                            words,
                            panel.add(place::<E::Simd>(line, v, vectors, words_of_panel)).cast(),
                        )
                    };
                }
            }
        }
    }
}

/// A matrix `[depth, columns]`: a line's elements lie side by side.
pub(super) struct Plain<'a, T> {
    pub(super) data: &'a [T],
    pub(super) columns: usize,
    /// From one line to the next.
    pub(super) step: usize,
}

// SAFETY: `pack` writes every line of every vector of the panel.
unsafe impl<T: Number<E>, E: Engine> Columns<E> for Plain<'_, T> {
    fn count(&self) -> usize {
        self.columns
    }

    fn source(&self, columns: Range<usize>, depth: &Range<usize>) -> Source {
        let from = self.data[depth.start * self.step + columns.start..].as_ptr().cast();
        Source {
            from,
            step: self.step * size_of::<T>(),
            pieces: depth.len(),
            bytes: columns.len() * size_of::<T>(),
        }
    }

    #[inline(always)]
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut Line) {
        let vectors = columns.len().div_ceil(LANES);
        let words = words::<E>(depth.len());
        for (word, at) in depth.clone().step_by(E::PER_WORD).enumerate() {
            for (v, first) in columns.clone().step_by(LANES).enumerate() {
                let (from, left) = (at * self.step + first, columns.end - first);
                // SAFETY: past the last column nothing is read, and the panel has this line.
                unsafe {
                    let from = self.data.as_ptr().add(from);
                    let next = (E::PER_WORD == 2 && at + 1 < depth.end).then(|| from.add(self.step));
                    // most are whole, which takes no mask
                    let vector = if left >= LANES {
                        zip::<T, E>(from, next, LANES)
                    } else {
                        zip::<T, E>(from, next, left)
                    };
                    E::Simd::store(vector, panel.add(place::<E::Simd>(word, v, vectors, words)).cast());
                }
            }
        }
    }
}

/// The words of sixteen columns of a line, and of the next, if there is one; `count` of them are there.
///
/// # Safety
/// The processor must have the instructions, and the elements be there.
#[inline(always)]
unsafe fn zip<T: Number<E>, E: Engine>(line: *const T, next: Option<*const T>, count: usize) -> Words<E> {
    // SAFETY: the caller's word.
    unsafe { T::zipped(T::sixteen(line, count), next.map(|next| T::sixteen(next, count))) }
}

/// A matrix of which there are panels alone.
pub(super) struct Packed<'a> {
    pub(super) panels: &'a Panels,
    pub(super) columns: usize,
}

// SAFETY: `packed` returns panels that `pack_whole` has written, always, so that `pack` is never called.
unsafe impl<E: Engine> Columns<E> for Packed<'_> {
    fn count(&self) -> usize {
        self.columns
    }

    fn packed(&self, columns: &Range<usize>, depth: &Range<usize>) -> Option<*const Line> {
        Some(self.panels.panel::<E>(columns, depth))
    }

    unsafe fn pack(&self, _: Range<usize>, _: Range<usize>, _: *mut Line) {
        unreachable!("the panels are there")
    }
}
