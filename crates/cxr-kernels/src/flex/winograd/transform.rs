//! The three transforms of F(4x4, 3x3), in one dimension, for vectors of numbers (Lavin and Gray, 2016; the points
//! are 0, 1, -1, 2, -2 and infinity), and in two for what lies lane by lane.

use super::super::fast_math::{Kernel, Vectors, mul_add};
use super::product::LANES;

/// Side of an input tile: four outputs and the two beside them that a 3x3 kernel sees.
pub(super) const SIDE: usize = 6;
/// Positions of a transformed tile.
pub(super) const POSITIONS: usize = SIDE * SIDE;
/// Outputs along a side.
pub(super) const OUTPUTS: usize = 4;
/// Weights of a kernel.
pub(super) const TAPS: usize = 9;

/// Six inputs in a row.
#[inline(always)]
pub(super) fn of_inputs<const FMA: bool>(d: [f32; SIDE]) -> [f32; SIDE] {
    let [d0, d1, d2, d3, d4, d5] = d;
    let even = mul_add::<FMA>(d2, -4.0, d4);
    let odd = mul_add::<FMA>(d1, -4.0, d3);
    let (near, far) = (d4 - d2, d3 - d1);
    [
        mul_add::<FMA>(d0, 4.0, mul_add::<FMA>(d2, -5.0, d4)),
        even + odd,
        even - odd,
        mul_add::<FMA>(far, 2.0, near),
        mul_add::<FMA>(far, -2.0, near),
        mul_add::<FMA>(d1, 4.0, mul_add::<FMA>(d3, -5.0, d5)),
    ]
}

/// Three weights in a row.
#[inline(always)]
fn of_weights<const FMA: bool>([g0, g1, g2]: [f32; 3]) -> [f32; SIDE] {
    let outer = (g0 + g2) * (-1.0 / 6.0);
    let skewed = mul_add::<FMA>(g0, 1.0 / 24.0, g2 * (1.0 / 6.0));
    [
        g0 * 0.25,
        mul_add::<FMA>(g1, -1.0 / 6.0, outer),
        mul_add::<FMA>(g1, 1.0 / 6.0, outer),
        mul_add::<FMA>(g1, 1.0 / 12.0, skewed),
        mul_add::<FMA>(g1, -1.0 / 12.0, skewed),
        g2,
    ]
}

/// Four outputs of six sums.
#[inline(always)]
fn of_outputs<const FMA: bool>([m0, m1, m2, m3, m4, m5]: [f32; SIDE]) -> [f32; OUTPUTS] {
    let (sum, difference) = (m1 + m2, m1 - m2);
    let (far_sum, far_difference) = (m3 + m4, m3 - m4);
    [
        m0 + sum + far_sum,
        mul_add::<FMA>(far_difference, 2.0, difference),
        mul_add::<FMA>(far_sum, 4.0, sum),
        mul_add::<FMA>(far_difference, 8.0, difference) + m5,
    ]
}

/// One number for each lane.
pub(super) type Lanes = [f32; LANES];

/// Kernels `[depth, TAPS, LANES]` to `[POSITIONS][depth, LANES]`, positions `step` apart.
pub(super) struct Weights<'a> {
    pub(super) from: &'a [[Lanes; TAPS]],
    /// Where the first depth's lanes of the first position go.
    pub(super) to: &'a mut [f32],
    pub(super) step: usize,
}

impl Kernel for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, to, step } = self;
        for (depth, taps) in from.iter().enumerate() {
            let mut columns = [[[0.0_f32; LANES]; 3]; SIDE];
            for x in 0..3 {
                for lane in 0..LANES {
                    let column = of_weights::<FMA>([taps[x][lane], taps[3 + x][lane], taps[6 + x][lane]]);
                    for y in 0..SIDE {
                        columns[y][x][lane] = column[y];
                    }
                }
            }
            for (y, row) in columns.iter().enumerate() {
                let mut rows = [[0.0_f32; LANES]; SIDE];
                for lane in 0..LANES {
                    let values = of_weights::<FMA>([row[0][lane], row[1][lane], row[2][lane]]);
                    for x in 0..SIDE {
                        rows[x][lane] = values[x];
                    }
                }
                for (x, values) in rows.iter().enumerate() {
                    to[(y * SIDE + x) * step + depth * LANES..][..LANES].copy_from_slice(values);
                }
            }
        }
    }
}

/// Sums `[POSITIONS][tiles, LANES]`, positions `step` apart, to pixels `[OUTPUTS rows][tiles * OUTPUTS, LANES]`, plus
/// a bias.
pub(super) struct Outputs<'a> {
    pub(super) from: &'a [f32],
    pub(super) step: usize,
    pub(super) bias: &'a Lanes,
    pub(super) tiles: usize,
    pub(super) to: &'a mut [Lanes],
}

impl Kernel for Outputs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, step, bias, tiles, to } = self;
        for tile in 0..tiles {
            let mut columns = [[[0.0_f32; LANES]; SIDE]; OUTPUTS];
            for x in 0..SIDE {
                let sums: [&Lanes; SIDE] = std::array::from_fn(|y| {
                    from[(y * SIDE + x) * step + tile * LANES..].first_chunk().expect("all tiles' lanes")
                });
                for lane in 0..LANES {
                    let column = of_outputs::<FMA>(std::array::from_fn(|y| sums[y][lane]));
                    for y in 0..OUTPUTS {
                        columns[y][x][lane] = column[y];
                    }
                }
            }
            for (y, row) in columns.iter().enumerate() {
                let pixels = &mut to[(y * tiles + tile) * OUTPUTS..][..OUTPUTS];
                for lane in 0..LANES {
                    let values = of_outputs::<FMA>(std::array::from_fn(|x| row[x][lane]));
                    for x in 0..OUTPUTS {
                        pixels[x][lane] = values[x] + bias[lane];
                    }
                }
            }
        }
    }
}

/// Three by three: the rows of strips of tiles, one strip after another, to their positions.
///
/// `from` has [`SIDE`] rows of each strip, transformed down its columns: `[SIDE][OUTPUTS * (lanes + 1)]`. A lane is a
/// tile; where a strip ends, the lane between it and the next is of no use.
pub(super) struct Across<'a> {
    pub(super) from: &'a [f32],
    pub(super) lanes: usize,
    pub(super) to: &'a mut [f32],
}

impl Across<'_> {
    /// The transform compiled for `vectors`, or written for them: the compiler makes none of steps of four.
    ///
    /// # Safety
    /// `vectors` must be of this processor.
    pub(super) unsafe fn run_by(self, vectors: Vectors) {
        // SAFETY: the caller's.
        unsafe {
            match vectors {
                #[cfg(target_arch = "x86_64")]
                Vectors::Avx512 => x86::across(self),
                _ => vectors.run(self),
            }
        }
    }
}

impl Kernel for Across<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, lanes, to } = self;
        let rows = from.chunks_exact(OUTPUTS * (lanes + 1)).zip(to.chunks_exact_mut(SIDE * lanes));
        for (from, to) in rows {
            let (quads, _) = from.as_chunks::<OUTPUTS>();
            let (here, next) = (&quads[..lanes], &quads[1..lanes + 1]);
            let (to0, rest) = to.split_at_mut(lanes);
            let (to1, rest) = rest.split_at_mut(lanes);
            let (to2, rest) = rest.split_at_mut(lanes);
            let (to3, rest) = rest.split_at_mut(lanes);
            let (to4, to5) = rest.split_at_mut(lanes);
            let to5 = &mut to5[..lanes];
            for lane in 0..lanes {
                let (d, e) = (here[lane], next[lane]);
                let values = of_inputs::<FMA>([d[0], d[1], d[2], d[3], e[0], e[1]]);
                to0[lane] = values[0];
                to1[lane] = values[1];
                to2[lane] = values[2];
                to3[lane] = values[3];
                to4[lane] = values[4];
                to5[lane] = values[5];
            }
        }
    }
}

/// Six rows of an image, `width` each, to the six rows of a strip that is transformed down its columns.
pub(super) struct Down<'a> {
    pub(super) from: [&'a [f32]; SIDE],
    pub(super) to: [&'a mut [f32]; SIDE],
}

impl Kernel for Down<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { from, to } = self;
        let width = from[0].len();
        let [f0, f1, f2, f3, f4, f5] = from.map(|row| &row[..width]);
        let [t0, t1, t2, t3, t4, t5] = to.map(|row| &mut row[..width]);
        for x in 0..width {
            let values = of_inputs::<FMA>([f0[x], f1[x], f2[x], f3[x], f4[x], f5[x]]);
            t0[x] = values[0];
            t1[x] = values[1];
            t2[x] = values[2];
            t3[x] = values[3];
            t4[x] = values[4];
            t5[x] = values[5];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::super::fast_math::first_lanes;
    use super::{Across, OUTPUTS, SIDE};

    /// Tiles of a vector.
    const TILES: usize = 16;

    /// [`Across`], sixteen tiles at a time.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
    pub(super) fn across(Across { from, lanes, to }: Across<'_>) {
        let rows = from.chunks_exact(OUTPUTS * (lanes + 1)).zip(to.chunks_exact_mut(SIDE * lanes));
        for (from, to) in rows {
            for lane in (0..lanes).step_by(TILES) {
                let quads = &from[OUTPUTS * lane..];
                let tiles = first_lanes(lanes - lane);
                let columns = columns(quads);
                let values = of_inputs(columns);
                for (to, values) in to.chunks_exact_mut(lanes).zip(values) {
                    // SAFETY: the mask leaves out what is past the last tile.
                    unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr().add(lane), tiles, values) };
                }
            }
        }
    }

    /// The six inputs of each of sixteen tiles that follow each other four apart; zeros where there are no more.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
    fn columns(quads: &[f32]) -> [__m512; SIDE] {
        let from = [0, 16, 32, 48].map(|start| {
            let there = quads.len().saturating_sub(start);
            // SAFETY: the mask leaves out what is past the end.
            unsafe { _mm512_maskz_loadu_ps(first_lanes(there), quads.as_ptr().wrapping_add(start)) }
        });
        let every_fourth = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
        let column = |j: i32| {
            let picked = _mm512_add_epi32(every_fourth, _mm512_set1_epi32(j));
            let low = _mm512_permutex2var_ps(from[0], picked, from[1]);
            let high = _mm512_permutex2var_ps(from[2], picked, from[3]);
            _mm512_insertf32x8::<1>(low, _mm512_castps512_ps256(high))
        };
        let next = |column: __m512, j: usize| {
            let shifted = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
            let last = quads.get(OUTPUTS * TILES + j).copied().unwrap_or(0.0);
            _mm512_permutex2var_ps(column, shifted, _mm512_set1_ps(last))
        };
        let [d0, d1, d2, d3] = [column(0), column(1), column(2), column(3)];
        [d0, d1, d2, d3, next(d0, 0), next(d1, 1)]
    }

    /// [`of_inputs`](super::of_inputs), operation by operation: of a loop over lanes that calls it the compiler makes no
    /// vectors here either, and a convolution takes half as long again.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn of_inputs([d0, d1, d2, d3, d4, d5]: [__m512; SIDE]) -> [__m512; SIDE] {
        let times = |a, b: f32, c| _mm512_fmadd_ps(a, _mm512_set1_ps(b), c);
        let even = times(d2, -4.0, d4);
        let odd = times(d1, -4.0, d3);
        let (near, far) = (_mm512_sub_ps(d4, d2), _mm512_sub_ps(d3, d1));
        [
            times(d0, 4.0, times(d2, -5.0, d4)),
            _mm512_add_ps(even, odd),
            _mm512_sub_ps(even, odd),
            times(far, 2.0, near),
            times(far, -2.0, near),
            times(d1, 4.0, times(d3, -5.0, d5)),
        ]
    }
}
