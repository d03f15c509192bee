//! What the gradient of a convolution by its input is computed from, as a convolution of the output's gradient: kernels turned
//! by half a circle, and pixels that are put apart where the stride had left some out.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::number::{LANES, Number, TAPS};
use super::product::{Engine, Line, Operand, copied_step};

/// How many output channels ahead weights are called for: they lie too far apart for the processor to foresee them.
const AHEAD: usize = 2;

/// `[c, out * taps]` from weights `[out, c, taps]`, with the taps in the opposite order.
///
/// Turned a part at a time, in the cache: a copy of all would have to be written and read again.
#[derive(Clone, Copy)]
pub(super) struct Turned<'a, T> {
    pub(super) weight: &'a [T],
    pub(super) out: usize,
    pub(super) c: usize,
    pub(super) taps: usize,
}

// SAFETY: a part is made of whole lines, with zeros at the end.
unsafe impl<T: Number> Operand<T> for Turned<'_, T> {
    fn count(&self) -> usize {
        self.c
    }

    fn depth(&self) -> usize {
        self.out * self.taps
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn part<E: Engine<T>>(
        &self,
        rows: Range<usize>,
        depth: Range<usize>,
        copied: &mut Vec<Line>,
    ) -> (*const T, usize) {
        let Self { weight, c, taps, .. } = *self;
        let of_line = LANES * T::PER_WORD;
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
                        T::turn(kernel.as_ptr(), to);
                    } else {
                        for (i, at) in of_kernel.clone().enumerate() {
                            *to.add(i) = kernel[taps - 1 - (at - o * taps)];
                        }
                    }
                }
            }
        }
        (to, step)
    }
}

/// Has what lies `ahead` elements behind `elements` brought into the cache, as much as they are.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch_ahead<T>(elements: &[T], ahead: usize) {
    let from = elements.as_ptr().wrapping_add(ahead).cast::<i8>();
    for line in (0..size_of_val(elements)).step_by(size_of::<Line>()) {
        // reads nothing, whatever the address
        #[allow(unused_unsafe, reason = "it was unsafe before Rust 1.95")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line));
        }
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
