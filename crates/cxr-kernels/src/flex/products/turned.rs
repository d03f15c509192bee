//! What the gradient of a convolution by its input is computed from, as a convolution of the output's gradient: kernels turned
//! by half a circle, and pixels that are put apart where the stride had left some out.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::ahead::{Source, fetch};
use super::number::{Line, Number};
use super::product::{Engine, Operand, Part, Way, copied_step};
use super::simd::{LANES, Simd};

/// Weights of a kernel of 3x3.
#[cfg(target_arch = "x86_64")]
const TAPS: usize = 9;
/// How many output channels ahead weights are called for: they lie too far apart for the processor to foresee them.
const AHEAD: usize = 2;

/// `[c, out * taps]` from weights `[out, c, taps]`, with the taps in the opposite order.
///
/// Where the engine takes any way along a row, a kernel is read backwards where it lies, or where it has become f32. Otherwise
/// it is turned. Both a part at a time, in the cache: a copy of all would have to be written and read again.
#[derive(Clone, Copy)]
pub(super) struct Turned<'a, T> {
    pub(super) weight: &'a [T],
    pub(super) out: usize,
    pub(super) c: usize,
    pub(super) taps: usize,
}

// SAFETY: what is turned is made of whole lines, with zeros at the end; otherwise the way leads through the elements of this
// part.
unsafe impl<T: Number<E>, E: Engine> Operand<E> for Turned<'_, T> {
    fn count(&self) -> usize {
        self.c
    }

    fn depth(&self) -> usize {
        self.out * self.taps
    }

    fn are_copied(&self) -> bool {
        !T::AS_STORED
    }

    fn source(&self, rows: Range<usize>, depth: Range<usize>) -> Source {
        let Self { weight, c, taps, .. } = *self;
        if T::AS_STORED || taps == 1 {
            return Source::NONE;
        }
        let (o, size) = (depth.start / taps, size_of::<T>());
        let from = weight.as_ptr().wrapping_add((o * c + rows.start) * taps).cast();
        let pieces = depth.end.div_ceil(taps) - o;
        Source { from, step: c * taps * size, pieces, bytes: rows.len() * taps * size }
    }

    /// Kernels of one tap are copied: of each line of the cache a few rows would use a part.
    #[inline(always)]
    unsafe fn part(
        &self,
        rows: Range<usize>,
        depth: Range<usize>,
        copied: &mut Vec<Line>,
    ) -> Part<E::Number> {
        // SAFETY: the caller's word; what is turned here comes in pairs.
        unsafe {
            if self.taps == 1 {
                return exchanged::<T, E>(self.weight, self.c, rows, depth, copied);
            }
            #[cfg(target_arch = "x86_64")]
            if E::PER_WORD == 2 {
                return self.turned::<E>(rows, depth, copied);
            }
            self.backwards::<E>(rows, depth, copied)
        }
    }
}

impl<T: Copy> Turned<'_, T> {
    /// From the last tap of a kernel to its first, and on to the last of the next output channel's.
    ///
    /// # Safety
    /// As [`Operand::part`].
    #[inline(always)]
    unsafe fn backwards<E: Engine>(
        &self,
        rows: Range<usize>,
        depth: Range<usize>,
        copied: &mut Vec<Line>,
    ) -> Part<E::Number>
    where
        T: Number<E>,
    {
        assert!(!E::ROWS_IN_LINES, "an engine that takes any way along a row");
        let Self { weight, c, taps, .. } = *self;
        let (o, tap) = (depth.start / taps, depth.start % taps);
        let last = taps - 1 - tap;
        let part = |from, kernels: usize, onward| {
            let way = Way { first: taps - tap, run: taps, step: -1, jump: (kernels + taps) as isize };
            Part { from, step: taps, way, onward }
        };
        if T::AS_STORED {
            let kernels = c * taps;
            let from = weight[o * kernels + rows.start * taps + last..].as_ptr();
            return part(from.cast(), kernels, depth.len() / taps * kernels);
        }
        let channels = o..depth.end.div_ceil(taps);
        let lines = (rows.len() * taps).div_ceil(LANES);
        copied.resize(channels.len() * lines, Line::ZERO);
        for (o, to) in channels.zip(copied.chunks_exact_mut(lines)) {
            let kernels = &weight[(o * c + rows.start) * taps..][..rows.len() * taps];
            fetch_ahead(kernels, AHEAD * c * taps);
            for (from, to) in kernels.chunks(LANES).zip(to) {
                // SAFETY: the processor has the instructions, says the caller; a line has room for sixteen.
                unsafe { E::Simd::store(T::words(from.as_ptr(), from.len()), std::ptr::from_mut(to).cast()) };
            }
        }
        // it lies in the first channel's kernels
        part(copied.as_ptr().cast::<E::Number>().wrapping_add(last), lines * LANES, 0)
    }

    /// Turned, in whole lines with zeros at the end.
    ///
    /// # Safety
    /// As [`Operand::part`]; the engine must multiply such numbers as they are stored, and these have two bytes.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn turned<E: Engine>(
        &self,
        rows: Range<usize>,
        depth: Range<usize>,
        copied: &mut Vec<Line>,
    ) -> Part<E::Number> {
        let Self { weight, c, taps, .. } = *self;
        let of_line = LANES * E::PER_WORD;
        let lines = depth.len().div_ceil(of_line);
        let step = copied_step(lines);
        copied.resize(rows.len() * step, Line::ZERO);
        if !depth.len().is_multiple_of(of_line) {
            copied.chunks_exact_mut(step).for_each(|row| row[lines - 1] = Line::ZERO);
        }
        let (step, to) = (step * of_line, copied.as_mut_ptr().cast::<T>());
        for o in depth.start / taps..depth.end.div_ceil(taps) {
            let of_kernel = (o * taps).max(depth.start)..((o + 1) * taps).min(depth.end);
            let kernels = &weight[(o * c + rows.start) * taps..][..rows.len() * taps];
            fetch_ahead(kernels, AHEAD * c * taps);
            for (row, kernel) in kernels.chunks_exact(taps).enumerate() {
                // SAFETY: the row has room for the elements of this depth; a kernel of 3x3 that lies in it whole has nine.
                unsafe {
                    let to = to.add(row * step + of_kernel.start - depth.start);
                    if taps == TAPS && of_kernel.len() == TAPS {
                        turn(kernel.as_ptr(), to);
                    } else {
                        for (i, at) in of_kernel.clone().enumerate() {
                            *to.add(i) = kernel[taps - 1 - (at - o * taps)];
                        }
                    }
                }
            }
        }
        Part { from: to.cast(), step, way: Way::STRAIGHT, onward: 0 }
    }
}

/// The nine weights of a kernel of 3x3, of two bytes each, from the last to the first.
///
/// # Safety
/// The processor must have these features, and both places be valid for nine.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn turn<T>(from: *const T, to: *mut T) {
    let backwards = _mm256_setr_epi16(8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    // SAFETY: the mask has nine lanes.
    unsafe {
        let taps = _mm256_maskz_loadu_epi16((1 << TAPS) - 1, from.cast());
        let turned = _mm256_permutexvar_epi16(backwards, taps);
        _mm256_mask_storeu_epi16(to.cast(), (1 << TAPS) - 1, turned);
    }
}

/// Rows `rows` of a matrix `[depth, c]`, whose columns they are, in whole lines with zeros at the end.
///
/// # Safety
/// The processor must have these features; the ranges must lie in the matrix.
#[inline(always)]
unsafe fn exchanged<T: Number<E>, E: Engine>(
    matrix: &[T],
    c: usize,
    rows: Range<usize>,
    depth: Range<usize>,
    copied: &mut Vec<Line>,
) -> Part<E::Number> {
    let of_line = LANES * E::PER_WORD;
    let step = copied_step(depth.len().div_ceil(of_line));
    copied.resize(rows.len().next_multiple_of(LANES) * step, Line::ZERO);
    let to = copied.as_mut_ptr();
    for (line, first) in depth.clone().step_by(of_line).enumerate() {
        for (block, row) in rows.clone().step_by(LANES).enumerate() {
            let count = rows.end - row;
            // SAFETY: the caller's word.
            let mut words = unsafe { [E::Simd::splat(0.0); LANES] };
            for (word, d) in words.iter_mut().zip((first..depth.end).step_by(E::PER_WORD)) {
                let from = |d: usize| matrix.as_ptr().wrapping_add(d * c + row);
                fetch(from(d + of_line));
                // SAFETY: past the last row nothing is read.
                unsafe {
                    let next =
                        (E::PER_WORD == 2 && d + 1 < depth.end).then(|| T::sixteen(from(d + 1), count));
                    *word = T::zipped(T::sixteen(from(d), count), next);
                }
            }
            // SAFETY: the caller's word.
            let words = unsafe { E::Simd::transpose(words) };
            for (i, words) in words.into_iter().enumerate() {
                // SAFETY: there is room for whole blocks of rows.
                unsafe { E::Simd::store(words, to.add((block * LANES + i) * step + line).cast()) };
            }
        }
    }
    Part { from: to.cast(), step: step * of_line, way: Way::STRAIGHT, onward: 0 }
}

/// Has what lies `ahead` elements behind `elements` brought into the cache, as much as they are.
#[inline(always)]
fn fetch_ahead<T>(elements: &[T], ahead: usize) {
    let from = elements.as_ptr().wrapping_add(ahead).cast::<u8>();
    for line in (0..size_of_val(elements)).step_by(size_of::<Line>()) {
        fetch(from.wrapping_add(line));
    }
}

/// Planes `[height, width]` whose pixels are put `stride` apart into planes of another size, zeros between and behind them.
pub(super) fn spread<T: Copy + Default + Send + Sync>(
    planes: &[T],
    [height, width]: [usize; 2],
    stride: usize,
    [to_height, to_width]: [usize; 2],
) -> Vec<T> {
    let count = planes.len() / (height * width).max(1);
    let mut to = vec![T::default(); count * to_height * to_width];
    let planes = planes.par_chunks_exact((height * width).max(1));
    to.par_chunks_exact_mut((to_height * to_width).max(1)).zip(planes).for_each(|(to, from)| {
        let lines = to.chunks_exact_mut(to_width).step_by(stride);
        for (to, from) in lines.zip(from.chunks_exact(width)) {
            to.iter_mut().step_by(stride).zip(from).for_each(|(to, from)| *to = *from);
        }
    });
    to
}
