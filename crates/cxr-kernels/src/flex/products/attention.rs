//! Attention by the same product: queries times keys, and their softmax times values, some queries of one head at a time.

use burn_flex::FlexTensor;

use super::super::attention::{Geometry, Heads};
use super::{Path, by_engine};

/// `softmax(q k^T / sqrt(d)) v` for `q` `[b, heads, n, d]`, `k` and `v` `[b, heads, m, d]`, all of one dtype; `None` for f64.
///
/// Scores, softmax and sums are f32; where bf16 is multiplied as it is, the weights are rounded before that.
pub(in super::super) fn attention(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    causal: bool,
) -> Option<FlexTensor> {
    attention_by(Path::of(q.dtype()), q, k, v, causal)
}

/// [`attention`] by one of the paths for such numbers.
pub(super) fn attention_by(
    path: Path,
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    causal: bool,
) -> Option<FlexTensor> {
    let (geometry, dtype) = (Geometry::new(q, k, causal), q.dtype());
    let [q, k, v] = [q, k, v].map(|x| Heads::new(x.clone()));
    Some(by_engine!(path, dtype, by_panels::attention(geometry, [&q, &k, &v]))?.transpose(1, 2))
}

/// By an [`Engine`](super::product::Engine).
pub(super) mod by_panels {
    use std::ops::Range;

    use burn::tensor::Shape;
    #[cfg(target_arch = "x86_64")]
    use burn::tensor::bf16;
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::super::Target;
    use super::super::linear::by_panels::Lines;
    use super::super::number::Number;
    use super::super::product::{Buffers, Engine, Rows, Sink, block, block_onto};
    use super::super::simd::{LANES, Simd};
    use super::super::vectors::Vectors;
    use super::super::weights::{Packed, Panels, Plain, Transposed};
    #[cfg(target_arch = "x86_64")]
    use super::super::{softmax, tiles::Tiles, vectors::Pairs};
    use crate::flex::attention::{Geometry, Heads};
    use crate::flex::elementwise::filled;
    use crate::flex::half::tensor_of;

    /// Scores of some queries: 512 KiB, to stay in the second-level cache beside their rounded weights.
    const SCORES: usize = 128 * 1024;
    /// Queries of a task, in multiples of what the product takes at once: no more than this.
    const MOST: usize = 192;

    /// What attention is multiplied by.
    pub(in super::super) trait Softmax: Engine {
        /// What there is of weights besides those in the place of scores.
        type Weights: Default + Send;

        /// What the scores of some queries, from `first` on, become before they are multiplied with the values, in their
        /// place or in `to`: weights that are not normalized, and what their sums are multiplied by.
        ///
        /// # Safety
        /// The processor must have the instructions; `scores` must be those of the queries, `step` apart.
        unsafe fn weights<'a>(
            geometry: &Geometry,
            first: usize,
            scores: &'a mut [f32],
            step: usize,
            to: &'a mut Self::Weights,
        ) -> (Rows<'a, Self::Number>, &'a [f32]);
    }

    impl<S: Simd> Softmax for Vectors<S> {
        type Weights = Vec<f32>;

        unsafe fn weights<'a>(
            geometry: &Geometry,
            first: usize,
            scores: &'a mut [f32],
            step: usize,
            factors: &'a mut Vec<f32>,
        ) -> (Rows<'a, f32>, &'a [f32]) {
            geometry.exponentials(first, scores, step, factors);
            (Rows { count: scores.len() / step, data: scores, depth: geometry.keys, step }, factors)
        }
    }

    /// In bf16.
    #[cfg(target_arch = "x86_64")]
    macro_rules! rounded {
        ($($engine:ty),*) => { $(
            impl Softmax for $engine {
                type Weights = softmax::Weights;

                unsafe fn weights<'a>(
                    geometry: &Geometry,
                    first: usize,
                    scores: &'a mut [f32],
                    step: usize,
                    to: &'a mut softmax::Weights,
                ) -> (Rows<'a, bf16>, &'a [f32]) {
                    // the panels of the values go on with zeros, as these weights do
                    let (count, width) = (scores.len() / step, geometry.keys.next_multiple_of(softmax::UNIT));
                    let (scale, seen) = (geometry.scale(), |i| geometry.seen(first + i));
                    // SAFETY: the caller's word.
                    unsafe { to.fill(scores, step, count, width, scale, seen) };
                    (Rows { data: to.as_slice(), count, depth: width, step: width }, &to.factors)
                }
            }
        )* };
    }
    #[cfg(target_arch = "x86_64")]
    rounded!(Pairs, Tiles);

    /// Rows from `row` and columns from `column` on of a result, each row times its factor, if there are any.
    pub(in super::super) struct Part<'a, S> {
        pub(in super::super) of: &'a S,
        pub(in super::super) row: usize,
        pub(in super::super) column: usize,
        pub(in super::super) factors: &'a [f32],
    }

    /// How many queries are taken at once.
    pub(in super::super) fn chunk_size<E: Engine>(keys: usize) -> usize {
        (SCORES / keys).clamp(E::ROWS, MOST) / E::ROWS * E::ROWS
    }

    impl<E: Engine, To: Sink<E>> Sink<E> for Part<'_, To> {
        #[inline(always)]
        unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32], step: usize) {
            for (sums, factor) in sums.chunks_mut(step).zip(self.factors.iter().skip(rows.start)) {
                sums.iter_mut().take(columns.len()).for_each(|sum| *sum *= factor);
            }
            let rows = self.row + rows.start..self.row + rows.end;
            let columns = self.column + columns.start..self.column + columns.end;
            // SAFETY: they are those of the result, by the word of who made this.
            unsafe { self.of.store(rows, columns, sums, step) };
        }
    }

    /// `[b, n, heads, d]`.
    pub(in super::super) fn attention<T: Number<E>, E: Softmax>(
        geometry: Geometry,
        [q, k, v]: [&Heads; 3],
    ) -> FlexTensor {
        let Geometry { batch, heads, queries, keys, width, .. } = geometry;
        let places: Vec<_> = geometry.heads().collect();
        let panels: Vec<[Panels; 2]> = places
            .par_iter()
            .map(|&place| {
                let (start, step) = k.place(place);
                let k = Transposed { data: &T::buffer(&k.tensor)[start..], columns: keys, step };
                let (start, step) = v.place(place);
                let v = Plain { data: &T::buffer(&v.tensor)[start..], columns: width, step };
                [Panels::new::<E>(&k, width), Panels::new::<E>(&v, keys)]
            })
            .collect();
        let size = chunk_size::<E>(keys);
        let chunks = || (0..queries).step_by(size).map(|start| start..(start + size).min(queries));
        let tasks: Vec<_> =
            (0..places.len()).flat_map(|head| chunks().map(move |chunk| (head, chunk))).collect();
        // SAFETY: the processor has what it takes, or there were no panels; the chunks are all queries of all heads, and each
        // stores all columns of its own.
        let data = unsafe {
            filled(batch * queries * heads * width, |out| {
                let lines = Lines::<T> { target: Target::new(out), columns: heads * width, bias: None };
                let buffers = || (Buffers::default(), Buffers::default(), E::Weights::default());
                tasks.into_par_iter().for_each_init(buffers, |(scores, sums, weights), (head, chunk)| {
                    let (place, [k, v]) = (places[head], &panels[head]);
                    let (start, step) = q.place(place);
                    let (first, count) = (chunk.start, chunk.len());
                    let data = &T::buffer(&q.tensor)[start + first * step..];
                    let rows = Rows { data, count, depth: width, step };
                    let k = Packed { panels: k, columns: keys };
                    block_onto::<E>(rows, &k, 0..count, 0..keys, false, scores);
                    let step = keys.next_multiple_of(LANES);
                    let scores = &mut scores.sums.as_mut_slice()[..count * step];
                    let (rows, factors) = E::weights(&geometry, first, scores, step, weights);
                    let v = Packed { panels: v, columns: width };
                    let (row, column) = (place.0 * queries + first, place.1 * width);
                    let part = Part { of: &lines, row, column, factors };
                    block::<E>(rows, &v, &part, 0..count, 0..width, sums);
                });
            })
        };
        tensor_of(data, Shape::new([batch, queries, heads, width]))
    }
}
