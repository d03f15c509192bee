//! What the gradient of a convolution by its input is computed from, as a convolution of the output's gradient.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::super::elementwise::filled;

/// Input channels of a task: what is read of an output channel is a few lines of the cache.
const CHANNELS: usize = 32;

/// `[out, c, taps]` to `[c, out, taps]`, with the taps in the opposite order: the kernels turned by half a circle.
pub(super) fn turned<T: Copy + Send + Sync>(weight: &[T], [out, c, taps]: [usize; 3]) -> Vec<T> {
    // SAFETY: the tasks are all channels, and `turn` writes all weights of each.
    unsafe {
        filled(weight.len(), |to| {
            let tasks = to.par_chunks_mut((CHANNELS * out * taps).max(1)).enumerate();
            tasks.for_each(|(task, to)| match taps {
                9 => turn::<T, 9>(weight, c, task * CHANNELS, out, to),
                _ => turn_any(weight, c, task * CHANNELS, [out, taps], to),
            });
        })
    }
}

/// [`turned`] for the channels from `first` on that `to` has room for, whose kernels have a size that the compiler knows.
fn turn<T: Copy, const TAPS: usize>(
    weight: &[T],
    c: usize,
    first: usize,
    out: usize,
    to: &mut [MaybeUninit<T>],
) {
    let (weight, to) = (weight.as_chunks::<TAPS>().0, to.as_chunks_mut::<TAPS>().0);
    for o in 0..out {
        for (channel, to) in to.chunks_exact_mut(out).enumerate() {
            let from = &weight[o * c + first + channel];
            to[o] = std::array::from_fn(|tap| MaybeUninit::new(from[TAPS - 1 - tap]));
        }
    }
}

/// The same for kernels of any size.
fn turn_any<T: Copy>(
    weight: &[T],
    c: usize,
    first: usize,
    [out, taps]: [usize; 2],
    to: &mut [MaybeUninit<T>],
) {
    for o in 0..out {
        for (channel, to) in to.chunks_exact_mut(out * taps).enumerate() {
            let from = &weight[(o * c + first + channel) * taps..][..taps];
            for (to, from) in to[o * taps..][..taps].iter_mut().zip(from.iter().rev()) {
                to.write(*from);
            }
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
