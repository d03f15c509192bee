//! The product by vectors of AVX-512: a word of each of six rows is broadcast from where it lies, and multiplied with four
//! vectors of a panel, which have such a word for each of their columns.

use std::arch::x86_64::*;

use burn::tensor::bf16;

use super::ahead::{Ahead, fetch};
use super::number::{LANES, Number};
use super::product::{Engine, Part, Tile, VECTORS};

/// Rows of a tile: with four vectors of columns, 24 of the 32 registers hold sums.
const ROWS: usize = 6;
/// Sums of a block: 384 KiB.
const SUMS: usize = 96 * 1024;

/// Calls `$function::<rows, vectors>` for the numbers at hand.
macro_rules! by_size {
    ($function:ident($tile:expr, $ahead:expr), $rows:expr, $vectors:expr; $($r:literal)*) => {
        match ($rows, $vectors) {
            $(
                ($r, 1) => $function::<$r, 1>($tile, $ahead),
                ($r, 2) => $function::<$r, 2>($tile, $ahead),
                ($r, 3) => $function::<$r, 3>($tile, $ahead),
                ($r, 4) => $function::<$r, 4>($tile, $ahead),
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
        let mut ahead = tile.ahead(rows);
        for row in (0..rows).step_by(ROWS) {
            let tile = tile.below(row, rows);
            // SAFETY: the caller's word.
            unsafe { by_size!(singles(tile, &mut ahead), ROWS.min(rows - row), vectors; 1 2 3 4 5 6) }
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
        let mut ahead = tile.ahead(rows);
        for row in (0..rows).step_by(ROWS) {
            let tile = tile.below(row, rows);
            // SAFETY: the caller's word.
            unsafe { by_size!(pairs(tile, &mut ahead), ROWS.min(rows - row), vectors; 1 2 3 4 5 6) }
        }
    }
}

/// # Safety
/// As [`Engine::multiply`], with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn singles<const R: usize, const V: usize>(tile: Tile<f32>, ahead: &mut Ahead) {
    let Part { from: mut row, step, way, onward } = tile.rows;
    // SAFETY: all places that are read and written are those that the caller vouches for.
    unsafe {
        let mut sums = tile.before::<R, V>();
        let mut panel = tile.panel;
        let (mut left, mut run) = (tile.depth, way.first.min(tile.depth));
        while left > 0 {
            fetch_rows::<R, _>(row, step, onward);
            ahead.call();
            for _ in 0..run {
                let columns = load::<V>(panel);
                panel = panel.add(V);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let row = _mm512_set1_ps(*row.add(r * step));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(row, _mm512_castsi512_ps(column), *sum);
                    }
                }
                row = row.wrapping_offset(way.step);
            }
            row = row.wrapping_offset(way.jump);
            left -= run;
            run = way.run.min(left);
        }
        tile.store(sums);
    }
}

/// # Safety
/// As [`Engine::multiply`], with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pairs<const R: usize, const V: usize>(tile: Tile<bf16>, ahead: &mut Ahead) {
    let Part { from: mut row, step, onward, .. } = tile.rows;
    // SAFETY: all places that are read and written are those that the caller vouches for.
    unsafe {
        let mut sums = tile.before::<R, V>();
        let mut panel = tile.panel;
        let mut left = tile.depth / 2;
        while left > 0 {
            fetch_rows::<R, _>(row, step, onward);
            ahead.call();
            let run = left.min(LANES);
            for _ in 0..run {
                let columns = load::<V>(panel);
                panel = panel.add(V);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let pair = row.add(r * step).cast::<i32>();
                    add_products(sums, _mm512_set1_epi32(pair.read_unaligned()), columns);
                }
                row = row.wrapping_add(2);
            }
            left -= run;
        }
        if tile.depth % 2 == 1 {
            let columns = load::<V>(panel);
            for (r, sums) in sums.iter_mut().enumerate() {
                let last = *row.add(r * step);
                add_products(sums, _mm512_set1_epi32(i32::from(last.to_bits())), columns);
            }
        }
        tile.store(sums);
    }
}

/// Has what lies `onward` elements behind some rows brought into the cache.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch_rows<const R: usize, T>(row: *const T, step: usize, onward: usize) {
    for r in 0..R {
        fetch(row.wrapping_add(r * step).wrapping_add(onward));
    }
}

impl<T: Copy> Tile<T> {
    /// What the next panel is made of, a part for each run of each tile of these rows.
    fn ahead(&self, rows: usize) -> Ahead {
        Ahead::new(self.next, rows.div_ceil(ROWS) * self.depth.div_ceil(LANES))
    }

    /// From row `row` on, of so many. Onward are the next rows, or from the last ones the first, further down.
    fn below(self, row: usize, rows: usize) -> Self {
        let mut tile = self.at_row(row);
        let Part { step, onward, .. } = self.rows;
        tile.rows.onward = if row + ROWS < rows { ROWS * step } else { onward.wrapping_sub(row * step) };
        tile
    }

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
