//! The product on AVX-512, of f32 and, where the processor has AVX-512 BF16, of bf16: `vdpbf16ps` adds the products of two
//! pairs of bf16 to an f32, in sixteen lanes.
//!
//! `result[r, c] = sum over d of rows[r, d] * columns[d, c]`. Words of 32 bits along the depth of a row, one f32 or a pair of
//! bf16, are broadcast from where they lie; columns are brought into panels, in which a vector has such a word for each of
//! sixteen columns.

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
/// Words of a panel's depth: 64 KiB with its 64 columns, read again from the second-level cache for every few rows, which
/// is cheaper than putting sums aside more often (half of it was 3 % slower for bf16). Pairs never cross its end.
pub(super) const WORDS: usize = 256;
/// Rows of a tile: with four vectors of columns, 24 of the 32 registers hold sums.
const ROWS: usize = 6;

/// A number that the product multiplies.
pub(super) trait Number: Copy + Send + Sync {
    /// How many of them a word has, neighbours along the depth.
    const PER_WORD: usize;

    /// Whether this processor has what it takes.
    fn is_available() -> bool;

    /// The product of a few rows and one panel.
    ///
    /// # Safety
    /// The processor must have what it takes; `tile.rows` must have `rows` rows of `tile.depth` elements, `tile.panel` a line
    /// of `vectors` vectors for each word of the depth, and `tile.sums` be valid for reading and writing `rows` rows of as
    /// many.
    unsafe fn multiply(tile: Tile<Self>, rows: usize, vectors: usize);

    /// Sixteen words from `from` on, zeros where there are no more than `count` elements.
    ///
    /// # Safety
    /// The processor must have what it takes, and the elements must be there.
    unsafe fn words(from: *const Self, count: usize) -> __m512i;

    /// Sixteen of them.
    type Sixteen: Copy;

    /// Sixteen that lie side by side; zeros where the mask has none.
    ///
    /// # Safety
    /// The processor must have what it takes, and those of the mask must be there.
    unsafe fn sixteen(from: *const Self, mask: __mmask16) -> Self::Sixteen;

    /// Eight and eight that lie side by side.
    ///
    /// # Safety
    /// The processor must have what it takes, and they must be there.
    unsafe fn eights(low: *const Self, high: *const Self) -> Self::Sixteen;

    /// A word for each of sixteen columns: of one line and, where a word has two elements, of the next, or zeros without
    /// it.
    ///
    /// # Safety
    /// The processor must have what it takes.
    unsafe fn zipped(line: Self::Sixteen, next: Option<Self::Sixteen>) -> __m512i;
}

/// What both kinds take.
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

/// The rows of a product: `[rows, depth]`, each beginning `step` after the one before.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub(super) data: &'a [T],
    pub(super) count: usize,
    pub(super) depth: usize,
    pub(super) step: usize,
}

/// The columns of a product, which come in panels.
///
/// # Safety
/// `pack` must write all of the panel, and `packed` return one as `pack` writes it.
pub(super) unsafe trait Columns<T>: Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// The panel that [`pack`](Self::pack) would write, if there is one already.
    fn packed(&self, columns: &Range<usize>, depth: &Range<usize>) -> Option<*const __m512i> {
        let _ = (columns, depth);
        None
    }

    /// Writes lines `depth` of `columns` into `panel`: for each line, or pair of lines, the words of all columns, which
    /// are rounded up to whole vectors. The last of an odd number of lines is paired with zeros. What columns that are
    /// not there get does not matter.
    ///
    /// # Safety
    /// The processor must have what [`Number`] takes; `depth` must begin with a word, both ranges must lie in the operand
    /// and be no larger than a panel, and `panel` must be valid for writing as much.
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut __m512i);
}

/// What becomes of the sums.
pub(super) trait Sink: Sync {
    /// Takes the sums of `columns` of one row.
    ///
    /// # Safety
    /// The processor must have what [`Number`] takes; row and columns must be those of the product.
    unsafe fn store(&self, row: usize, columns: Range<usize>, sums: &[f32]);
}

/// Multiplies; needs [`Number::is_available`].
pub(super) fn multiply<T: Number>(rows: Rows<'_, T>, columns: &impl Columns<T>, sink: &impl Sink) {
    assert!(T::is_available(), "a product for AVX-512 on a processor without it");
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

/// In how many blocks of rows [`multiply`] goes over the columns.
pub(super) fn row_blocks(rows: usize, columns: usize) -> usize {
    rows.div_ceil(blocks(rows, columns, ROWS, WIDTH)[0])
}

/// What one thread works in.
#[derive(Default)]
pub(super) struct Buffers {
    /// Of the rows of the last [`block`], each rounded up to whole vectors.
    pub(super) sums: Vec<f32>,
    panel: Vec<Line>,
}

/// A vector's worth of a panel.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(#[expect(dead_code, reason = "written and read as a vector")] [u32; LANES]);

/// One block of the product, on this thread.
///
/// # Safety
/// The processor must have what it takes; the ranges must lie in the product.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn block<T: Number>(
    rows: Rows<'_, T>,
    columns: &impl Columns<T>,
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
    panel.resize(WORDS * VECTORS, Line([0; LANES]));
    let panel = panel.as_mut_ptr().cast::<__m512i>();
    for start in (0..rows.depth).step_by(WORDS * T::PER_WORD) {
        let depth = start..(start + WORDS * T::PER_WORD).min(rows.depth);
        for first in of_columns.clone().step_by(WIDTH) {
            let group = first..(first + WIDTH).min(of_columns.end);
            let vectors = group.len().div_ceil(LANES);
            let panel = columns.packed(&group, &depth).unwrap_or_else(|| {
                // SAFETY: the panel's buffer has room for `WORDS` words of `WIDTH` columns.
                unsafe { columns.pack(group, depth.clone(), panel) };
                panel
            });
            for row in of_rows.clone().step_by(ROWS) {
                let tile = Tile {
                    // SAFETY: the row has elements from `start` on.
                    rows: unsafe { rows.data.as_ptr().add(row * rows.step + start) },
                    row_step: rows.step,
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
                unsafe { T::multiply(tile, ROWS.min(of_rows.end - row), vectors) };
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
pub(super) struct Tile<T> {
    rows: *const T,
    row_step: usize,
    depth: usize,
    panel: *const __m512i,
    sums: *mut f32,
    /// From one row of the sums to the next.
    step: usize,
    accumulate: bool,
}

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

impl Number for f32 {
    const PER_WORD: usize = 1;

    fn is_available() -> bool {
        has_avx512()
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn multiply(tile: Tile<Self>, rows: usize, vectors: usize) {
        // SAFETY: the caller's word.
        unsafe { by_size!(singles(tile), rows, vectors; 1 2 3 4 5 6) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn words(from: *const Self, count: usize) -> __m512i {
        // SAFETY: the mask leaves out what is not there.
        unsafe { _mm512_maskz_loadu_epi32(first_lanes(count), from.cast()) }
    }

    type Sixteen = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(from: *const Self, mask: __mmask16) -> __m512i {
        // SAFETY: the caller's word.
        unsafe { _mm512_maskz_loadu_epi32(mask, from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn eights(low: *const Self, high: *const Self) -> __m512i {
        // SAFETY: the caller's word.
        unsafe {
            let [low, high] = [low, high].map(|from| _mm256_loadu_si256(from.cast()));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn zipped(line: __m512i, _: Option<__m512i>) -> __m512i {
        line
    }
}

/// # Safety
/// As [`Number::multiply`], with `R` rows and `V` vectors.
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

impl Number for bf16 {
    const PER_WORD: usize = 2;

    fn is_available() -> bool {
        has_avx512() && is_x86_feature_detected!("avx512bf16")
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn multiply(tile: Tile<Self>, rows: usize, vectors: usize) {
        // SAFETY: the caller's word.
        unsafe { by_size!(pairs(tile), rows, vectors; 1 2 3 4 5 6) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn words(from: *const Self, count: usize) -> __m512i {
        let halves = if count >= 2 * LANES { !0 } else { (1 << count) - 1 };
        // SAFETY: the mask leaves out what is not there.
        unsafe { _mm512_maskz_loadu_epi16(halves, from.cast()) }
    }

    type Sixteen = __m256i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn sixteen(from: *const Self, mask: __mmask16) -> __m256i {
        // SAFETY: the caller's word.
        unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn eights(low: *const Self, high: *const Self) -> __m256i {
        // SAFETY: the caller's word.
        unsafe {
            let [low, high] = [low, high].map(|from| _mm_loadu_si128(from.cast()));
            _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn zipped(line: __m256i, next: Option<__m256i>) -> __m512i {
        let next = next.unwrap_or(_mm256_setzero_si256());
        _mm512_or_si512(_mm512_cvtepu16_epi32(line), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(next)))
    }
}

/// # Safety
/// As [`Number::multiply`], with `R` rows and `V` vectors.
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

/// The mask of the first `count` lanes.
pub(super) fn first_lanes(count: usize) -> __mmask16 {
    if count >= LANES { !0 } else { (1 << count) - 1 }
}

/// Writes `sums + bias` to `out`.
///
/// # Safety
/// The processor must have these features; `out` must be valid for writing as many elements.
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
pub(super) unsafe fn write(sums: &[f32], bias: Bias<'_>, out: *mut f32) {
    for start in (0..sums.len()).step_by(LANES) {
        let mask = first_lanes(sums.len() - start);
        // SAFETY: the mask leaves out what is past the end of the slices and of `out`.
        unsafe {
            let sum = _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(start));
            _mm512_mask_storeu_ps(out.add(start), mask, _mm512_add_ps(sum, bias.load(mask, start)));
        }
    }
}

/// Rounds `sums + bias` to `out`, with a bias for each or one for all.
///
/// # Safety
/// The processor must have these features; `out` must be valid for writing as many elements.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16")]
pub(super) unsafe fn round(sums: &[f32], bias: Bias<'_>, out: *mut bf16) {
    for start in (0..sums.len()).step_by(LANES) {
        let mask = first_lanes(sums.len() - start);
        // SAFETY: the mask leaves out what is past the end of the slices and of `out`.
        unsafe {
            let sum = _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(start));
            let rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum, bias.load(mask, start)));
            let rounded = std::mem::transmute::<__m256bh, __m256i>(rounded);
            _mm256_mask_storeu_epi16(out.add(start).cast(), mask, rounded);
        }
    }
}

/// What is added to sums at the end.
#[derive(Clone, Copy)]
pub(super) enum Bias<'a> {
    /// A number for each.
    Each(&'a [f32]),
    /// The same for all.
    All(f32),
}

impl Bias<'_> {
    /// For the sums of the mask, from `start` on.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(self, mask: __mmask16, start: usize) -> __m512 {
        match self {
            Self::Each(bias) => {
                let bias = &bias[start..];
                assert!(first_lanes(bias.len()) & mask == mask, "a bias for every sum");
                // SAFETY: the mask has no more lanes than there are.
                unsafe { _mm512_maskz_loadu_ps(mask, bias.as_ptr()) }
            }
            Self::All(bias) => _mm512_set1_ps(bias),
        }
    }
}
