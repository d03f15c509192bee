//! What the gradient of a convolution by its input is computed from, as a convolution of the output's gradient.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use burn::tensor::bf16;
use rayon::prelude::*;

use super::super::elementwise::filled;
use super::number::Number;

/// Input channels of a task: what is read of an output channel is a few lines of the cache.
const CHANNELS: usize = 32;
/// How many output channels ahead weights are called for: they lie too far apart for the processor to foresee them.
const AHEAD: usize = 8;
/// Taps of the kernel that is turned in one register.
const TAPS: usize = 9;

/// `[out, c, taps]` to `[c, out, taps]`, with the taps in the opposite order: the kernels turned by half a circle.
///
/// # Panics
/// If the processor has no vectors for it.
pub(super) fn turned(weight: &[bf16], [out, c, taps]: [usize; 3]) -> Vec<bf16> {
    assert!(
        <bf16 as Number>::is_available(),
        "kernels turned by instructions that this processor does not have"
    );
    // SAFETY: the tasks are all channels, and both functions write all weights of each; the processor was asked.
    unsafe {
        filled(weight.len(), |to| {
            let tasks = to.par_chunks_mut((CHANNELS * out * taps).max(1)).enumerate();
            tasks.for_each(|(task, to)| match taps {
                TAPS => turn(weight, c, task * CHANNELS, out, to),
                _ => turn_any(weight, c, task * CHANNELS, [out, taps], to),
            });
        })
    }
}

/// [`turned`] for kernels of 3x3 and the channels from `first` on that `to` has room for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn turn(weight: &[bf16], c: usize, first: usize, out: usize, to: &mut [MaybeUninit<bf16>]) {
    let (weight, to) = (weight.as_chunks::<TAPS>().0, to.as_chunks_mut::<TAPS>().0);
    let channels = to.len() / out.max(1);
    let backwards = _mm256_setr_epi16(8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    for o in 0..out {
        let from = &weight[o * c + first..][..channels];
        let ahead = from.as_ptr().wrapping_add(AHEAD * c).cast::<i8>();
        for line in (0..size_of_val(from)).step_by(64) {
            // reads nothing, whatever the address
            #[allow(unused_unsafe, reason = "it was unsafe before Rust 1.95")]
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line));
            }
        }
        for (from, to) in from.iter().zip(to[o..].iter_mut().step_by(out)) {
            // SAFETY: the mask has as many lanes as there are taps.
            unsafe {
                let taps = _mm256_maskz_loadu_epi16((1 << TAPS) - 1, from.as_ptr().cast());
                let turned = _mm256_permutexvar_epi16(backwards, taps);
                _mm256_mask_storeu_epi16(to.as_mut_ptr().cast(), (1 << TAPS) - 1, turned);
            }
        }
    }
}

/// The same for kernels of any size.
fn turn_any(weight: &[bf16], c: usize, first: usize, [out, taps]: [usize; 2], to: &mut [MaybeUninit<bf16>]) {
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
