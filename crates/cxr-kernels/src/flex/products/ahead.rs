//! What will be needed soon is called for while something else is multiplied: rows of a weight lie too far apart for the
//! processor to foresee which comes next, and from memory they take longer than it can wait for in passing.

use super::number::Line;

/// Memory to be called for: `pieces` of `bytes`, `step` bytes apart.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) from: *const u8,
    pub(super) step: usize,
    pub(super) pieces: usize,
    pub(super) bytes: usize,
}

impl Source {
    pub(super) const NONE: Self = Self { from: std::ptr::null(), step: 0, pieces: 0, bytes: 0 };

    /// This, unless it is [`NONE`](Self::NONE).
    pub(super) fn or(self, other: Self) -> Self {
        if self.pieces > 0 { self } else { other }
    }
}

/// A [`Source`] that is called for a few lines of the cache at a time: the processor waits for no more than that.
pub(super) struct Ahead {
    piece: *const u8,
    step: usize,
    /// Lines of a piece.
    of_piece: usize,
    /// The next of them.
    line: usize,
    /// Lines of all pieces that have not been called for.
    left: usize,
    /// Lines at a time.
    each: usize,
}

impl Ahead {
    /// In so many times, of which none may be left out.
    pub(super) fn new(source: Source, times: usize) -> Self {
        let Source { from, step, pieces, bytes } = source;
        let of_piece = bytes.div_ceil(size_of::<Line>());
        let left = pieces * of_piece;
        Self { piece: from, step, of_piece, line: 0, left, each: left.div_ceil(times.max(1)) }
    }

    /// Calls for the next few lines.
    #[inline(always)]
    pub(super) fn call(&mut self) {
        for _ in 0..self.each.min(self.left) {
            fetch(self.piece.wrapping_add(self.line * size_of::<Line>()));
            self.left -= 1;
            self.line += 1;
            if self.line == self.of_piece {
                self.line = 0;
                self.piece = self.piece.wrapping_add(self.step);
            }
        }
    }
}

/// Has the line of the cache that has this address brought there, on processors that can be asked for it; it may be any
/// address.
#[inline(always)]
pub(super) fn fetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // reads nothing
        #[allow(unused_unsafe, reason = "it was unsafe before Rust 1.95")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: reads nothing.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}
