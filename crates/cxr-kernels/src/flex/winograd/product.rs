//! The product of one position of the transformed tiles: a block of 32 output channels by a panel of 8 tiles, in
//! registers.
//!
//! Both operands lie as they are read, so nothing is packed. Every element is the sum over the input channels in
//! their order, whatever the vectors, so it does not depend on where in a panel a tile lies. Each sum starts at zero, and
//! is added to those before it at the end: over thousands of channels this loses fewer digits than going on.

use super::super::fast_math::{Vectors, mul_add};

/// Output channels of one product.
pub(super) const LANES: usize = 32;
/// Tiles of one product.
pub(super) const PANEL: usize = 8;

/// `sums[tile][lane] += sum over depth of weights[depth][lane] * tiles[depth][tile]`; with `fresh`, `=`.
///
/// `next` are the tiles of the product that comes after, which are called into the cache meanwhile; any address will do.
///
/// # Safety
/// `vectors` must be of this processor; `weights` must hold `[depth, LANES]`, `tiles` `[depth, PANEL]`, and `sums` be
/// valid for reads (unless `fresh`) and writes of `[PANEL, LANES]`, with nothing else using them.
#[inline(always)]
pub(super) unsafe fn product(
    vectors: Vectors,
    weights: *const f32,
    tiles: *const f32,
    next: *const f32,
    sums: *mut f32,
    depth: usize,
    fresh: bool,
) {
    // SAFETY: the caller's, for all of them.
    unsafe {
        match vectors {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => x86::avx512(weights, tiles, next, sums, depth, fresh),
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2 => x86::avx2(weights, tiles, next, sums, depth, fresh),
            _ => {
                let _ = next;
                portable(weights, tiles, sums, depth, fresh)
            }
        }
    }
}

/// Lanes and tiles that 16 registers of four numbers hold, with room for the operands.
const FEW: [usize; 2] = [8, 4];

/// # Safety
/// As [`product`].
unsafe fn portable(weights: *const f32, tiles: *const f32, sums: *mut f32, depth: usize, fresh: bool) {
    const FMA: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
    for lane in (0..LANES).step_by(FEW[0]) {
        for tile in (0..PANEL).step_by(FEW[1]) {
            let mut sum = [[0.0_f32; FEW[0]]; FEW[1]];
            // SAFETY: all of it lies in the three matrices.
            unsafe {
                for d in 0..depth {
                    let w = weights.add(d * LANES + lane).cast::<[f32; FEW[0]]>().read();
                    let t = tiles.add(d * PANEL + tile).cast::<[f32; FEW[1]]>().read();
                    for i in 0..FEW[1] {
                        for j in 0..FEW[0] {
                            sum[i][j] = mul_add::<FMA>(w[j], t[i], sum[i][j]);
                        }
                    }
                }
                for (i, sum) in sum.into_iter().enumerate() {
                    let place = sums.add((tile + i) * LANES + lane).cast::<[f32; FEW[0]]>();
                    let before = if fresh { [0.0; FEW[0]] } else { place.read() };
                    place.write(std::array::from_fn(|j| sum[j] + before[j]));
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, PANEL};

    /// 16 sums in registers.
    ///
    /// # Safety
    /// As [`product`](super::product).
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(
        weights: *const f32,
        tiles: *const f32,
        next: *const f32,
        sums: *mut f32,
        depth: usize,
        fresh: bool,
    ) {
        let mut sum = [[_mm512_setzero_ps(); 2]; PANEL];
        // SAFETY: all of it lies in the three matrices.
        unsafe {
            for d in 0..depth {
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(d * PANEL).cast());
                let w = [0, 16].map(|j| _mm512_loadu_ps(weights.add(d * LANES + j)));
                for (i, sum) in sum.iter_mut().enumerate() {
                    let tile = _mm512_set1_ps(*tiles.add(d * PANEL + i));
                    sum[0] = _mm512_fmadd_ps(w[0], tile, sum[0]);
                    sum[1] = _mm512_fmadd_ps(w[1], tile, sum[1]);
                }
            }
            for (i, mut sum) in sum.into_iter().enumerate() {
                if !fresh {
                    sum[0] = _mm512_add_ps(sum[0], _mm512_loadu_ps(sums.add(i * LANES)));
                    sum[1] = _mm512_add_ps(sum[1], _mm512_loadu_ps(sums.add(i * LANES + 16)));
                }
                _mm512_storeu_ps(sums.add(i * LANES), sum[0]);
                _mm512_storeu_ps(sums.add(i * LANES + 16), sum[1]);
            }
        }
    }

    /// 16 lanes of 4 tiles at a time: 8 sums in registers.
    ///
    /// # Safety
    /// As [`product`](super::product).
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(
        weights: *const f32,
        tiles: *const f32,
        next: *const f32,
        sums: *mut f32,
        depth: usize,
        fresh: bool,
    ) {
        for lane in [0, 16] {
            for tile in [0, 4] {
                let mut sum = [[_mm256_setzero_ps(); 2]; 4];
                // SAFETY: all of it lies in the three matrices.
                unsafe {
                    let sums = sums.add(tile * LANES + lane);
                    for d in 0..depth {
                        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(d * PANEL).cast());
                        let w = [0, 8].map(|j| _mm256_loadu_ps(weights.add(d * LANES + lane + j)));
                        for (i, sum) in sum.iter_mut().enumerate() {
                            let tile = _mm256_set1_ps(*tiles.add(d * PANEL + tile + i));
                            sum[0] = _mm256_fmadd_ps(w[0], tile, sum[0]);
                            sum[1] = _mm256_fmadd_ps(w[1], tile, sum[1]);
                        }
                    }
                    for (i, mut sum) in sum.into_iter().enumerate() {
                        if !fresh {
                            sum[0] = _mm256_add_ps(sum[0], _mm256_loadu_ps(sums.add(i * LANES)));
                            sum[1] = _mm256_add_ps(sum[1], _mm256_loadu_ps(sums.add(i * LANES + 8)));
                        }
                        _mm256_storeu_ps(sums.add(i * LANES), sum[0]);
                        _mm256_storeu_ps(sums.add(i * LANES + 8), sum[1]);
                    }
                }
            }
        }
    }
}
