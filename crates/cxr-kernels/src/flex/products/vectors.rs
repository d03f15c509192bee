//! The product by vectors of AVX-512: a word of each of six rows is broadcast from where it lies, and multiplied with four
//! vectors of a panel, which have such a word for each of their columns.

use std::arch::x86_64::*;

use burn::tensor::bf16;

use super::number::{LANES, Number};
use super::product::{Engine, Tile, VECTORS};

/// Rows of a tile: with four vectors of columns, 24 of the 32 registers hold sums.
const ROWS: usize = 6;
/// Sums of a block: 384 KiB.
const SUMS: usize = 96 * 1024;

/// Calls `$function::<rows, vectors>` for the numbers at hand.
macro_rules! by_size {
    ($function:ident($tile:expr), $rows:expr, $vectors:expr; $($r:literal)*) => {
        match ($rows, $vectors) {
            $(
                ($r, 1) => $function::<$r, 1>($tile),
                ($r, 2) => $function::<$r, 2>($tile),
                ($r, 3) => $function::<$r, 3>($tile),
                ($r, 4) => $function::<$r, 4>($tile),
            )*
            _ => unreachable!("a tile has 1 to {ROWS} rows and 1 to {VECTORS} vectors"),
        }
    };
}

/// `vfmadd231ps` for f32, and for bf16 `vdpbf16ps`, which adds the products of two pairs to an f32.
pub(super) struct Vectors;

impl Engine<f32> for Vectors {
    const ROWS: usize = ROWS;
    const ROWS_IN_LINES: bool = false;
    const SUMS: usize = SUMS;
    const PACKS_ONCE: bool = false;

    fn is_available() -> bool {
        <f32 as Number>::is_available()
    }

    fn begin() -> Self {
        Self
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn multiply(&mut self, tile: Tile<f32>, rows: usize, vectors: usize) {
        for row in (0..rows).step_by(ROWS) {
            // SAFETY: the caller's word.
            unsafe { by_size!(singles(tile.at_row(row)), ROWS.min(rows - row), vectors; 1 2 3 4 5 6) }
        }
    }
}

impl Engine<bf16> for Vectors {
    const ROWS: usize = ROWS;
    const ROWS_IN_LINES: bool = false;
    const SUMS: usize = SUMS;
    const PACKS_ONCE: bool = false;

    fn is_available() -> bool {
        <bf16 as Number>::is_available()
    }

    fn begin() -> Self {
        Self
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn multiply(&mut self, tile: Tile<bf16>, rows: usize, vectors: usize) {
        for row in (0..rows).step_by(ROWS) {
            // SAFETY: the caller's word.
            unsafe { by_size!(pairs(tile.at_row(row)), ROWS.min(rows - row), vectors; 1 2 3 4 5 6) }
        }
    }
}

/// # Safety
/// As [`Engine::multiply`], with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn singles<const R: usize, const V: usize>(tile: Tile<f32>) {
    // SAFETY: all places that are read and written are those that the caller vouches for.
    unsafe {
        let mut sums = tile.before::<R, V>();
        let mut panel = tile.panel;
        for d in 0..tile.depth {
            let columns = load::<V>(panel);
            panel = panel.add(V);
            for (r, sums) in sums.iter_mut().enumerate() {
                let row = _mm512_set1_ps(*tile.rows.add(r * tile.row_step + d));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_fmadd_ps(row, _mm512_castsi512_ps(column), *sum);
                }
            }
        }
        tile.store(sums);
    }
}

/// # Safety
/// As [`Engine::multiply`], with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pairs<const R: usize, const V: usize>(tile: Tile<bf16>) {
    // SAFETY: all places that are read and written are those that the caller vouches for.
    unsafe {
        let mut sums = tile.before::<R, V>();
        let mut panel = tile.panel;
        for pair in 0..tile.depth / 2 {
            let columns = load::<V>(panel);
            panel = panel.add(V);
            for (r, sums) in sums.iter_mut().enumerate() {
                let row = tile.rows.add(r * tile.row_step + 2 * pair).cast::<i32>();
                add_products(sums, _mm512_set1_epi32(row.read_unaligned()), columns);
            }
        }
        if tile.depth % 2 == 1 {
            let columns = load::<V>(panel);
            for (r, sums) in sums.iter_mut().enumerate() {
                let last = *tile.rows.add(r * tile.row_step + tile.depth - 1);
                add_products(sums, _mm512_set1_epi32(i32::from(last.to_bits())), columns);
            }
        }
        tile.store(sums);
    }
}

impl<T> Tile<T> {
    /// The sums of the panels before this one.
    ///
    /// # Safety
    /// The processor must have this feature, and the sums must be there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn before<const R: usize, const V: usize>(&self) -> [[__m512; V]; R] {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        if self.accumulate {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's word.
                    *sum = unsafe { _mm512_loadu_ps(self.sums.add(r * self.step + v * LANES)) };
                }
            }
        }
        sums
    }

    /// Puts the sums where they belong.
    ///
    /// # Safety
    /// As [`before`](Self::before).
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store<const R: usize, const V: usize>(&self, sums: [[__m512; V]; R]) {
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: the caller's word.
                unsafe { _mm512_storeu_ps(self.sums.add(r * self.step + v * LANES), *sum) };
            }
        }
    }
}

/// One line of a panel.
///
/// # Safety
/// The processor must have these features; `panel` must have that many vectors.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load<const V: usize>(panel: *const __m512i) -> [__m512i; V] {
    let mut line = [_mm512_setzero_si512(); V];
    for (v, vector) in line.iter_mut().enumerate() {
        // SAFETY: the caller's word.
        *vector = unsafe { _mm512_load_si512(panel.add(v)) };
    }
    line
}

/// `sums += row * columns`, each lane the products of two pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_products<const V: usize>(sums: &mut [__m512; V], row: __m512i, columns: [__m512i; V]) {
    for v in 0..V {
        sums[v] = _mm512_dpbf16_ps(sums[v], as_bf16s(row), as_bf16s(columns[v]));
    }
}

/// The same bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn as_bf16s(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes that may have any value.
    unsafe { std::mem::transmute(x) }
}
