//! Panels of a weight: of `[columns, depth]`, as a layer has it, and of `[depth, columns]`, for its gradient.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::super::elementwise::filled;
use super::super::fast_math::first_lanes;
use super::ahead::Source;
use super::number::{LANES, Number};
use super::product::{Columns, Line, WIDTH, WORDS, pack_whole};

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
    /// Needs [`Number::is_available`].
    pub(super) fn new<T: Number>(matrix: &impl Columns<T>, depth: usize) -> Self {
        assert!(T::is_available(), "panels for AVX-512 on a processor without it");
        let columns = matrix.count();
        let words = words::<T>(depth);
        let of_group = (words * WIDTH / LANES).max(1);
        // SAFETY: the groups cover all columns, and each panel is written whole.
        let lines = unsafe {
            filled(columns.div_ceil(LANES) * words, |lines| {
                lines.par_chunks_mut(of_group).enumerate().for_each(|(group, lines)| {
                    let group = group * WIDTH..((group + 1) * WIDTH).min(columns);
                    let vectors = group.len().div_ceil(LANES);
                    for (lines, word) in lines.chunks_mut(WORDS * vectors).zip((0..words).step_by(WORDS)) {
                        let start = word * T::PER_WORD;
                        let end = (start + WORDS * T::PER_WORD).min(depth);
                        pack_whole(matrix, group.clone(), start..end, lines.as_mut_ptr().cast());
                    }
                });
            })
        };
        Self { lines, words }
    }

    /// The panel of these columns and this part of the depth.
    fn panel<T: Number>(&self, columns: &Range<usize>, depth: &Range<usize>) -> *const __m512i {
        debug_assert!(columns.start.is_multiple_of(WIDTH) && depth.start.is_multiple_of(WORDS * T::PER_WORD));
        let before = columns.start / LANES * self.words;
        let above = depth.start / T::PER_WORD * columns.len().div_ceil(LANES);
        self.lines[before + above..].as_ptr().cast()
    }

    /// What the panels of such a matrix take.
    pub(super) fn bytes<T: Number>(columns: usize, depth: usize) -> usize {
        columns.div_ceil(LANES) * words::<T>(depth) * size_of::<Line>()
    }
}

/// The words that panels of such a depth have.
fn words<T: Number>(depth: usize) -> usize {
    depth.div_ceil(T::PER_WORD).next_multiple_of(LANES)
}

// SAFETY: `pack` writes every line of every vector of the panel.
unsafe impl<T: Number> Columns<T> for Transposed<'_, T> {
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

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut __m512i) {
        let vectors = columns.len().div_ceil(LANES);
        let lines = depth.len().div_ceil(T::PER_WORD);
        for (v, first) in columns.clone().step_by(LANES).enumerate() {
            let count = LANES.min(columns.end - first);
            for (block, start) in depth.clone().step_by(T::PER_WORD * LANES).enumerate() {
                let mut words = [_mm512_setzero_si512(); LANES];
                for (i, words) in words.iter_mut().take(count).enumerate() {
                    // SAFETY: so many elements are left of this column.
                    unsafe {
                        let from = self.data.as_ptr().add((first + i) * self.step + start);
                        *words = T::words(from, depth.end - start);
                    }
                }
                let words = transpose(words);
                for (line, words) in (block * LANES..lines).zip(words) {
                    // SAFETY: the panel has this line.
                    unsafe { _mm512_store_si512(panel.add(line * vectors + v), words) };
                }
            }
        }
    }
}

/// Sixteen vectors of sixteen words: word `i` of vector `j` becomes word `j` of vector `i`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(x: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut pairs = x;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    let mut fours = pairs;
    for i in 0..4 {
        fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
        fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
        fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
        fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    }
    // quarter `q` of `fours[4 * i + j]` now has words `4 * q + j` of vectors `4 * i` to `4 * i + 3`
    let mut out = fours;
    for j in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(fours[j], fours[4 + j]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(fours[j], fours[4 + j]);
        let even_too = _mm512_shuffle_i32x4::<0x88>(fours[8 + j], fours[12 + j]);
        let odd_too = _mm512_shuffle_i32x4::<0xdd>(fours[8 + j], fours[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0x88>(even, even_too);
        out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, even_too);
        out[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd_too);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_too);
    }
    out
}

/// A matrix `[depth, columns]`: a line's elements lie side by side.
pub(super) struct Plain<'a, T> {
    pub(super) data: &'a [T],
    pub(super) columns: usize,
    /// From one line to the next.
    pub(super) step: usize,
}

// SAFETY: `pack` writes every line of every vector of the panel.
unsafe impl<T: Number> Columns<T> for Plain<'_, T> {
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

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut __m512i) {
        let vectors = columns.len().div_ceil(LANES);
        for (word, at) in depth.clone().step_by(T::PER_WORD).enumerate() {
            for (v, first) in columns.clone().step_by(LANES).enumerate() {
                let mask = first_lanes(columns.end - first);
                // SAFETY: the mask leaves out what is past the last column, and the panel has this line.
                unsafe {
                    let from = self.data.as_ptr().add(at * self.step + first);
                    let line = |i: usize| T::sixteen(from.add(i * self.step), mask);
                    let next = (T::PER_WORD == 2 && at + 1 < depth.end).then(|| line(1));
                    _mm512_store_si512(panel.add(word * vectors + v), T::zipped(line(0), next));
                }
            }
        }
    }
}

/// A matrix of which there are panels alone.
pub(super) struct Packed<'a> {
    pub(super) panels: &'a Panels,
    pub(super) columns: usize,
}

// SAFETY: `packed` returns panels that `pack_whole` has written, always, so that `pack` is never called.
unsafe impl<T: Number> Columns<T> for Packed<'_> {
    fn count(&self) -> usize {
        self.columns
    }

    fn packed(&self, columns: &Range<usize>, depth: &Range<usize>) -> Option<*const __m512i> {
        Some(self.panels.panel::<T>(columns, depth))
    }

    unsafe fn pack(&self, _: Range<usize>, _: Range<usize>, _: *mut __m512i) {
        unreachable!("the panels are there")
    }
}
