//! The product by vectors: a word of each of six rows is broadcast from where it lies, and multiplied with the vectors of a
//! panel, which have such a word for each of their columns.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::hint::black_box;
use std::marker::PhantomData;

#[cfg(target_arch = "x86_64")]
use burn::tensor::bf16;

use super::ahead::{Ahead, fetch};
use super::number::Line;
#[cfg(target_arch = "x86_64")]
use super::number::has_bf16;
use super::product::{Engine, Part, Tile, place, words};
#[cfg(target_arch = "x86_64")]
use super::simd::Avx512;
use super::simd::{LANES, Simd};

/// Rows of a tile.
const ROWS: usize = 6;
/// Sums of a block: 384 KiB.
const SUMS: usize = 96 * 1024;

/// Calls `$function::<S, rows, vectors>` for the numbers at hand, compiled for the instructions of `$simd`.
macro_rules! by_size {
    ($function:ident::<$simd:ty>($tile:expr, $ahead:expr), $rows:expr, $vectors:expr; $($r:literal)*) => {
        match ($rows, $vectors) {
            $(
                ($r, 1) => by_size!(@ $function, $simd, $r, 1, $tile, $ahead),
                ($r, 2) => by_size!(@ $function, $simd, $r, 2, $tile, $ahead),
                ($r, 3) => by_size!(@ $function, $simd, $r, 3, $tile, $ahead),
                ($r, 4) => by_size!(@ $function, $simd, $r, 4, $tile, $ahead),
            )*
            _ => unreachable!("a tile has 1 to {ROWS} rows and 1 to 4 vectors"),
        }
    };
    (@ $function:ident, $simd:ty, $r:literal, $v:literal, $tile:expr, $ahead:expr) => {
        if $v <= <$simd>::TILE {
            <$simd>::run(#[inline(always)] || $function::<$simd, $r, $v>($tile, $ahead))
        } else {
            unreachable!("{} vectors are multiplied at once", <$simd>::TILE)
        }
    };
}

/// Multiply-add of f32.
pub(super) struct Vectors<S>(PhantomData<S>);

impl<S: Simd> Engine for Vectors<S> {
    type Number = f32;
    type Simd = S;
    const ROWS: usize = ROWS;
    const ROWS_IN_LINES: bool = false;
    const SUMS: usize = SUMS;
    const PACKS_ONCE: bool = false;

    fn is_available() -> bool {
        S::is_available()
    }

    fn begin() -> Self {
        Self(PhantomData)
    }

    unsafe fn multiply(&mut self, tile: Tile<f32>, rows: usize, vectors: usize) {
        let mut ahead = tile.ahead(rows, vectors.div_ceil(S::TILE));
        for first in (0..vectors).step_by(S::TILE) {
            let (tile, vectors) = (tile.at_vector::<Self>(first, vectors), S::TILE.min(vectors - first));
            for row in (0..rows).step_by(ROWS) {
                let (tile, ahead) = (tile.below(row, rows), &mut ahead);
                // SAFETY: the caller's word.
                unsafe { by_size!(singles::<S>(tile, ahead), ROWS.min(rows - row), vectors; 1 2 3 4 5 6) }
            }
        }
    }
}

/// `vdpbf16ps` of AVX-512, which adds the products of two pairs of bf16 to an f32.
#[cfg(target_arch = "x86_64")]
pub(super) struct Pairs;

#[cfg(target_arch = "x86_64")]
impl Engine for Pairs {
    type Number = bf16;
    type Simd = Avx512;
    const ROWS: usize = ROWS;
    const ROWS_IN_LINES: bool = false;
    const SUMS: usize = SUMS;
    const PACKS_ONCE: bool = false;

    fn is_available() -> bool {
        has_bf16()
    }

    fn begin() -> Self {
        Self
    }

    unsafe fn multiply(&mut self, tile: Tile<bf16>, rows: usize, vectors: usize) {
        let mut ahead = tile.ahead(rows, 1);
        for row in (0..rows).step_by(ROWS) {
            let (tile, ahead) = (tile.below(row, rows), &mut ahead);
            // SAFETY: the caller's word.
            unsafe { by_size!(pairs::<Avx512>(tile, ahead), ROWS.min(rows - row), vectors; 1 2 3 4 5 6) }
        }
    }
}

/// # Safety
/// As [`Engine::multiply`], with `R` rows and `V` vectors.
#[inline(always)]
unsafe fn singles<S: Simd, const R: usize, const V: usize>(tile: Tile<f32>, ahead: &mut Ahead) {
    let Part { from: mut row, step, way, onward } = tile.rows;
    // a step that the compiler does not know to be three others: it would go down the rows by five additions for each word
    let half = black_box(ROWS / 2 * step);
    // SAFETY: all places that are read and written are those that the caller vouches for.
    unsafe {
        let mut sums = tile.before::<S, R, V>();
        let mut panel = tile.panel;
        let (mut left, mut run) = (tile.depth, way.first.min(tile.depth));
        while left > 0 {
            fetch_rows::<R, _>(row, step, onward);
            ahead.call();
            for _ in 0..run {
                let columns = load::<S, V>(panel);
                panel = panel.add(V);
                let lower = row.wrapping_add(half);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let (row, r) = if r < ROWS / 2 { (row, r) } else { (lower, r - ROWS / 2) };
                    let row = S::splat(*row.add(r * step));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = S::multiply_add(row, column, *sum);
                    }
                }
                row = row.wrapping_offset(way.step);
            }
            row = row.wrapping_offset(way.jump);
            left -= run;
            run = way.run.min(left);
        }
        tile.store::<S, R, V>(sums);
    }
}

/// # Safety
/// As [`Engine::multiply`], with `R` rows and `V` vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn pairs<S: Simd<Words = __m512>, const R: usize, const V: usize>(
    tile: Tile<bf16>,
    ahead: &mut Ahead,
) {
    let Part { from: mut row, step, onward, .. } = tile.rows;
    // SAFETY: all places that are read and written are those that the caller vouches for.
    unsafe {
        let mut sums = tile.before::<S, R, V>();
        let mut panel = tile.panel;
        let mut left = tile.depth / 2;
        while left > 0 {
            fetch_rows::<R, _>(row, step, onward);
            ahead.call();
            let run = left.min(LANES);
            for _ in 0..run {
                let columns = load::<S, V>(panel);
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
            let columns = load::<S, V>(panel);
            for (r, sums) in sums.iter_mut().enumerate() {
                let last = *row.add(r * step);
                add_products(sums, _mm512_set1_epi32(i32::from(last.to_bits())), columns);
            }
        }
        tile.store::<S, R, V>(sums);
    }
}

/// Has what lies `onward` elements behind some rows brought into the cache.
#[inline(always)]
fn fetch_rows<const R: usize, T>(row: *const T, step: usize, onward: usize) {
    for r in 0..R {
        fetch(row.wrapping_add(r * step).wrapping_add(onward));
    }
}

impl<T: Copy> Tile<T> {
    /// What the next panel is made of, a part for each run of each tile of these rows, and so many times over.
    fn ahead(&self, rows: usize, times: usize) -> Ahead {
        Ahead::new(self.next, times * rows.div_ceil(ROWS) * self.depth.div_ceil(LANES))
    }

    /// From vector `first` on, of so many.
    fn at_vector<E: Engine>(self, first: usize, vectors: usize) -> Self {
        let panel = self.panel.wrapping_add(place::<E::Simd>(0, first, vectors, words::<E>(self.depth)));
        Self { panel, sums: self.sums.wrapping_add(first * LANES), ..self }
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
    /// The processor must have the instructions, and the sums must be there.
    #[inline(always)]
    unsafe fn before<S: Simd, const R: usize, const V: usize>(&self) -> [[S::Words; V]; R] {
        // SAFETY: the caller's word.
        let mut sums = unsafe { [[S::splat(0.0); V]; R] };
        if self.accumulate {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: as above.
                    *sum = unsafe { S::load(self.sums.add(r * self.step + v * LANES)) };
                }
            }
        }
        sums
    }

    /// Puts the sums where they belong.
    ///
    /// # Safety
    /// As [`before`](Self::before).
    #[inline(always)]
    unsafe fn store<S: Simd, const R: usize, const V: usize>(&self, sums: [[S::Words; V]; R]) {
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: the caller's word.
                unsafe { S::store(*sum, self.sums.add(r * self.step + v * LANES)) };
            }
        }
    }
}

/// One line of a panel.
///
/// # Safety
/// The processor must have the instructions; `panel` must have that many vectors.
#[inline(always)]
unsafe fn load<S: Simd, const V: usize>(panel: *const Line) -> [S::Words; V] {
    // SAFETY: the caller's word.
    unsafe {
        let mut line = [S::splat(0.0); V];
        for (v, vector) in line.iter_mut().enumerate() {
            *vector = S::load(panel.add(v).cast());
        }
        line
    }
}

/// `sums += row * columns`, each lane the products of two pairs.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_products<const V: usize>(sums: &mut [__m512; V], row: __m512i, columns: [__m512; V]) {
    for v in 0..V {
        sums[v] = _mm512_dpbf16_ps(sums[v], as_bf16s(row), as_bf16s(_mm512_castps_si512(columns[v])));
    }
}

/// The same bits.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn as_bf16s(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes that may have any value.
    unsafe { std::mem::transmute(x) }
}
