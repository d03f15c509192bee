//! Attention by the same product: queries times keys, and their softmax times values, some queries of one head at a time.

use burn_flex::FlexTensor;

use super::super::attention::{Geometry, Heads};
use super::{Path, by_engine};

/// `softmax(q k^T / sqrt(d)) v` for `q` `[b, heads, n, d]`, `k` and `v` `[b, heads, m, d]`, all f32 or all bf16; `None` where
/// the processor has no instructions for it.
///
/// Scores, softmax and sums are f32; in bf16 the weights are rounded before they are multiplied with the values.
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
    let geometry = Geometry::new(q, k, causal);
    let [q, k, v] = [q, k, v].map(|x| Heads::new(x.clone()));
    Some(by_engine!(path, by_panels::attention(geometry, [&q, &k, &v]))?.transpose(1, 2))
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
    use super::super::number::{Element, Number};
    use super::super::product::{Buffers, Engine, Rows, Sink, block, block_onto};
    use super::super::simd::{LANES, Simd};
    #[cfg(target_arch = "x86_64")]
    use super::super::softmax;
    use super::super::weights::{Packed, Panels, Plain, Transposed};
    use crate::flex::attention::{Geometry, Heads};
    use crate::flex::elementwise::filled;

    /// Scores of some queries: 512 KiB, to stay in the second-level cache beside their rounded weights.
    const SCORES: usize = 128 * 1024;
    /// Queries of a task, in multiples of what the product takes at once: no more than this.
    const MOST: usize = 192;

    /// A number that attention multiplies.
    pub(in super::super) trait Weight: Element {
        /// What there is of weights besides those in the place of scores.
        type Weights: Default + Send;

        /// The whole buffer of a tensor.
        fn buffer(heads: &Heads) -> &[Self];

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
        ) -> (Rows<'a, Self>, &'a [f32]);
    }

    impl Weight for f32 {
        type Weights = Vec<f32>;

        fn buffer(heads: &Heads) -> &[Self] {
            heads.tensor.storage()
        }

        unsafe fn weights<'a>(
            geometry: &Geometry,
            first: usize,
            scores: &'a mut [f32],
            step: usize,
            factors: &'a mut Vec<f32>,
        ) -> (Rows<'a, Self>, &'a [f32]) {
            geometry.exponentials(first, scores, step, factors);
            (Rows { count: scores.len() / step, data: scores, depth: geometry.keys, step }, factors)
        }
    }

    #[cfg(target_arch = "x86_64")]
    impl Weight for bf16 {
        type Weights = softmax::Weights;

        fn buffer(heads: &Heads) -> &[Self] {
            heads.tensor.storage()
        }

        unsafe fn weights<'a>(
            geometry: &Geometry,
            first: usize,
            scores: &'a mut [f32],
            step: usize,
            to: &'a mut softmax::Weights,
        ) -> (Rows<'a, Self>, &'a [f32]) {
            // the panels of the values go on with zeros, as these weights do
            let (count, width) = (scores.len() / step, geometry.keys.next_multiple_of(softmax::UNIT));
            // SAFETY: the caller's word.
            unsafe { to.fill(scores, step, count, width, geometry.scale(), |i| geometry.seen(first + i)) };
            (Rows { data: to.as_slice(), count, depth: width, step: width }, &to.factors)
        }
    }

    /// Rows from `row` and columns from `column` on of a result, each row times its factor, if there are any.
    pub(in super::super) struct Part<'a, S> {
        pub(in super::super) of: &'a S,
        pub(in super::super) row: usize,
        pub(in super::super) column: usize,
        pub(in super::super) factors: &'a [f32],
    }

    /// How many queries are taken at once.
    pub(in super::super) fn chunk_size<T, E: Engine<T>>(keys: usize) -> usize {
        (SCORES / keys).clamp(E::ROWS, MOST) / E::ROWS * E::ROWS
    }

    impl<S: Simd, To: Sink<S>> Sink<S> for Part<'_, To> {
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
    pub(in super::super) fn attention<T: Weight + Number<E::Simd>, E: Engine<T>>(
        geometry: Geometry,
        [q, k, v]: [&Heads; 3],
    ) -> FlexTensor
    where
        for<'a> Lines<'a, T>: Sink<E::Simd>,
    {
        let Geometry { batch, heads, queries, keys, width, .. } = geometry;
        let places: Vec<_> = geometry.heads().collect();
        let panels: Vec<[Panels; 2]> = places
            .par_iter()
            .map(|&place| {
                let (start, step) = k.place(place);
                let k = Transposed { data: &T::buffer(k)[start..], columns: keys, step };
                let (start, step) = v.place(place);
                let v = Plain { data: &T::buffer(v)[start..], columns: width, step };
                [Panels::new::<T, E::Simd>(&k, width), Panels::new::<T, E::Simd>(&v, keys)]
            })
            .collect();
        let size = chunk_size::<T, E>(keys);
        let chunks = || (0..queries).step_by(size).map(|start| start..(start + size).min(queries));
        let tasks: Vec<_> =
            (0..places.len()).flat_map(|head| chunks().map(move |chunk| (head, chunk))).collect();
        // SAFETY: the processor has what it takes, or there were no panels; the chunks are all queries of all heads, and each
        // stores all columns of its own.
        let data = unsafe {
            filled(batch * queries * heads * width, |out| {
                let lines = Lines { target: Target::new(out), columns: heads * width, bias: None };
                let buffers = || (Buffers::default(), Buffers::default(), T::Weights::default());
                tasks.into_par_iter().for_each_init(buffers, |(scores, sums, weights), (head, chunk)| {
                    let (place, [k, v]) = (places[head], &panels[head]);
                    let (start, step) = q.place(place);
                    let (first, count) = (chunk.start, chunk.len());
                    let data = &T::buffer(q)[start + first * step..];
                    let rows = Rows { data, count, depth: width, step };
                    let k = Packed { panels: k, columns: keys };
                    block_onto::<T, E>(rows, &k, 0..count, 0..keys, false, scores);
                    let step = keys.next_multiple_of(LANES);
                    let scores = &mut scores.sums.as_mut_slice()[..count * step];
                    let (rows, factors) = T::weights(&geometry, first, scores, step, weights);
                    let v = Packed { panels: v, columns: width };
                    let (row, column) = (place.0 * queries + first, place.1 * width);
                    let part = Part { of: &lines, row, column, factors };
                    block::<T, E>(rows, &v, &part, 0..count, 0..width, sums);
                });
            })
        };
        T::tensor(data, Shape::new([batch, queries, heads, width]))
    }
}
