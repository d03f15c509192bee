//! The product on AVX-512 BF16: `vdpbf16ps` adds the products of two pairs of bf16 to an f32, in sixteen lanes.
//!
//! `result[r, c] = sum over d of rows[r, d] * columns[d, c]`. Pairs along the depth of a row are broadcast from where
//! they lie; columns are brought into panels, in which a vector has such a pair for each of sixteen columns.

use std::arch::x86_64::*;
use std::ops::Range;

use burn::tensor::bf16;
use rayon::prelude::*;

use super::blocks;

/// Columns of one vector.
pub(super) const LANES: usize = 16;
/// Vectors of a panel.
pub(super) const VECTORS: usize = 4;
/// Columns of a panel.
pub(super) const WIDTH: usize = LANES * VECTORS;
/// Depth of a panel: 64 KiB with its 64 columns, read again from the second-level cache for every few rows, which is
/// cheaper than putting sums aside more often (256 was 3 % slower). Even, so that pairs never cross.
const DEPTH: usize = 512;
/// Rows of a tile: with four vectors of columns, 24 of the 32 registers hold sums.
const ROWS: usize = 6;

/// Whether this processor has what it takes.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// The rows of a product: `[rows, depth]`, one after another.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [bf16],
    pub(super) count: usize,
    pub(super) depth: usize,
}

/// The columns of a product, which come in panels.
///
/// # Safety
/// `pack` must write all of the panel.
pub(super) unsafe trait Columns: Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Writes lines `depth` of `columns` into `panel`: for each pair of lines, the pairs of all columns, which are
    /// rounded up to whole vectors. The last of an odd number of lines is paired with zeros. What columns that are
    /// not there get does not matter.
    ///
    /// # Safety
    /// The processor must have AVX-512 F, BW and VL; `depth` must begin with an even line, both ranges must lie in the
    /// operand and be no larger than a panel, and `panel` must be valid for writing as much.
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut __m512i);
}

/// What becomes of the sums.
pub(super) trait Sink: Sync {
    /// Takes the sums of `columns` of one row.
    ///
    /// # Safety
    /// The processor must have AVX-512 F, VL and BF16; row and columns must be those of the product.
    unsafe fn store(&self, row: usize, columns: Range<usize>, sums: &[f32]);
}

/// Multiplies; needs [`is_available`].
pub(super) fn multiply(rows: Rows<'_>, columns: &impl Columns, sink: &impl Sink) {
    assert!(is_available(), "a product for AVX-512 BF16 on a processor without it");
    let count = rows.count;
    let [height, width] = blocks(count, columns.count(), ROWS, WIDTH);
    let starts = |count: usize, size: usize| (0..count).step_by(size).map(move |s| s..(s + size).min(count));
    // blocks of one and the same column after another: they share what they read of it
    let tasks: Vec<_> = starts(columns.count(), width)
        .flat_map(|c| starts(count, height).map(move |r| (r, c.clone())))
        .collect();
    tasks.into_par_iter().for_each_init(Buffers::default, |buffers, (r, c)| {
        // SAFETY: the processor has the features, as asserted; the ranges lie in the product.
        unsafe { block(rows, columns, sink, r, c, buffers) }
    });
}

/// What one thread works in.
#[derive(Default)]
struct Buffers {
    sums: Vec<f32>,
    panel: Vec<Line>,
}

/// A vector's worth of a panel.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "written and read as a vector")] [u32; LANES]);

/// One block of the product.
///
/// # Safety
/// The processor must have these features; the ranges must lie in the product.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn block(
    rows: Rows<'_>,
    columns: &impl Columns,
    sink: &impl Sink,
    of_rows: Range<usize>,
    of_columns: Range<usize>,
    Buffers { sums, panel }: &mut Buffers,
) {
    let step = of_columns.len().next_multiple_of(LANES);
    if rows.depth == 0 {
        sums.clear();
    }
    sums.resize(of_rows.len() * step, 0.0);
    panel.resize(DEPTH / 2 * VECTORS, Line([0; LANES]));
    let panel = panel.as_mut_ptr().cast::<__m512i>();
    for start in (0..rows.depth).step_by(DEPTH) {
        let depth = start..(start + DEPTH).min(rows.depth);
        for first in of_columns.clone().step_by(WIDTH) {
            let group = first..(first + WIDTH).min(of_columns.end);
            let vectors = group.len().div_ceil(LANES);
            // SAFETY: the panel's buffer has room for `DEPTH` lines of `WIDTH` columns.
            unsafe { columns.pack(group, depth.clone(), panel) };
            for row in of_rows.clone().step_by(ROWS) {
                let tile = Tile {
                    // SAFETY: the row has elements from `start` on.
                    rows: unsafe { rows.data.as_ptr().add(row * rows.depth + start) },
                    row_step: rows.depth,
                    depth: depth.len(),
                    panel,
                    // SAFETY: the place lies in the sums.
                    sums: unsafe {
                        sums.as_mut_ptr().add((row - of_rows.start) * step + first - of_columns.start)
                    },
                    step,
                    accumulate: start > 0,
                };
                // SAFETY: as many rows and vectors are there, in the operands and in the sums.
                unsafe { tile.run(ROWS.min(of_rows.end - row), vectors) };
            }
        }
    }
    for (line, row) in sums.chunks_exact(step).zip(of_rows) {
        // SAFETY: they lie in the product.
        unsafe { sink.store(row, of_columns.clone(), &line[..of_columns.len()]) };
    }
}

/// A few rows times one panel.
#[derive(Clone, Copy)]
struct Tile {
    rows: *const bf16,
    row_step: usize,
    depth: usize,
    panel: *const __m512i,
    sums: *mut f32,
    /// From one row of the sums to the next.
    step: usize,
    accumulate: bool,
}

/// Calls `$method::<rows, vectors>` for the numbers at hand.
macro_rules! by_size {
    ($tile:expr, $rows:expr, $vectors:expr; $($r:literal)*) => {
        match ($rows, $vectors) {
            $(
                ($r, 1) => $tile.sized::<$r, 1>(),
                ($r, 2) => $tile.sized::<$r, 2>(),
                ($r, 3) => $tile.sized::<$r, 3>(),
                ($r, 4) => $tile.sized::<$r, 4>(),
            )*
            _ => unreachable!("a tile has 1 to {ROWS} rows and 1 to {VECTORS} vectors"),
        }
    };
}

impl Tile {
    /// # Safety
    /// The processor must have these features; `rows` must have `count` rows of `depth` elements, `panel` as many lines
    /// of `vectors` vectors, and `sums` must be valid for reading and writing `count` rows of as many.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn run(self, count: usize, vectors: usize) {
        // SAFETY: the caller's word.
        unsafe { by_size!(self, count, vectors; 1 2 3 4 5 6) }
    }

    /// # Safety
    /// As [`run`](Self::run), with `R` rows and `V` vectors.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn sized<const R: usize, const V: usize>(self) {
        // SAFETY: all places that are read and written are those that the caller vouches for.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            if self.accumulate {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(self.sums.add(r * self.step + v * LANES));
                    }
                }
            }
            let mut panel = self.panel;
            for pair in 0..self.depth / 2 {
                let columns = load::<V>(panel);
                panel = panel.add(V);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let row = self.rows.add(r * self.row_step + 2 * pair).cast::<i32>();
                    add_products(sums, _mm512_set1_epi32(row.read_unaligned()), columns);
                }
            }
            if self.depth % 2 == 1 {
                let columns = load::<V>(panel);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let last = *self.rows.add(r * self.row_step + self.depth - 1);
                    add_products(sums, _mm512_set1_epi32(i32::from(last.to_bits())), columns);
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    _mm512_storeu_ps(self.sums.add(r * self.step + v * LANES), *sum);
                }
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

/// The mask of the first `count` lanes.
pub(super) fn first_lanes(count: usize) -> __mmask16 {
    if count >= LANES { !0 } else { (1 << count) - 1 }
}

/// Rounds `sums + bias` to `out`, with a bias for each or one for all.
///
/// # Safety
/// The processor must have these features; `out` must be valid for writing as many elements.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
pub(super) unsafe fn round(sums: &[f32], bias: Bias<'_>, out: *mut bf16) {
    if let Bias::Each(bias) = bias {
        assert_eq!(bias.len(), sums.len(), "a bias for every sum");
    }
    for start in (0..sums.len()).step_by(LANES) {
        let mask = first_lanes(sums.len() - start);
        // SAFETY: the mask leaves out what is past the end of the slices and of `out`.
        unsafe {
            let sum = _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(start));
            let bias = match bias {
                Bias::Each(bias) => _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(start)),
                Bias::All(bias) => _mm512_set1_ps(bias),
            };
            let rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum, bias));
            let rounded = std::mem::transmute::<__m256bh, __m256i>(rounded);
            _mm256_mask_storeu_epi16(out.add(start).cast(), mask, rounded);
        }
    }
}

/// What is added to sums before they are rounded.
#[derive(Clone, Copy)]
pub(super) enum Bias<'a> {
    /// A number for each.
    Each(&'a [f32]),
    /// The same for all.
    All(f32),
}
