//! Attention by the same product: queries times keys, and their softmax times values, some queries of one head at a time.

use burn_flex::FlexTensor;

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
    #[cfg(target_arch = "x86_64")]
    {
        use burn::tensor::{Shape, bf16};

        use super::super::attention::{Geometry, Heads};
        use super::super::elementwise::tensor;
        use super::super::half::half_tensor;
        use super::Path;

        let (path, geometry) = (Path::of(q.dtype()), Geometry::new(q, k, causal));
        if !matches!(path, Path::Single | Path::Bf16) {
            return None;
        }
        let [q, k, v] = [q, k, v].map(|x| Heads::new(x.clone()));
        let shape = Shape::new([geometry.batch, geometry.queries, geometry.heads, geometry.width]);
        let y = match path {
            Path::Single => tensor(by_vectors::attention::<f32>(geometry, [&q, &k, &v]), shape),
            _ => half_tensor(by_vectors::attention::<bf16>(geometry, [&q, &k, &v]), shape),
        };
        Some(y.transpose(1, 2))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (q, k, v, causal);
        None
    }
}

/// On AVX-512.
#[cfg(target_arch = "x86_64")]
mod by_vectors {
    use std::ops::Range;

    use burn::tensor::bf16;
    use rayon::prelude::*;

    use super::super::Target;
    use super::super::linear::by_vectors::Lines;
    use super::super::product::{Buffers, LANES, Number, Rows, Sink, block};
    use super::super::weights::{Packed, Panels, Plain, Transposed};
    use crate::flex::attention::{Geometry, Heads};
    use crate::flex::elementwise::filled;
    use crate::flex::half::Half;

    /// Scores of some queries: 512 KiB, to stay in the second-level cache beside their rounded weights.
    const SCORES: usize = 128 * 1024;
    /// Queries are taken in multiples of what the product takes at once.
    const UNIT: usize = 6;

    /// A number that attention multiplies.
    pub(super) trait Weight: Number {
        /// The whole buffer of a tensor.
        fn buffer(heads: &Heads) -> &[Self];

        /// `weights` as they are multiplied, in `to` if need be.
        fn rounded<'a>(weights: &'a [f32], to: &'a mut Vec<Self>) -> &'a [Self];
    }

    impl Weight for f32 {
        fn buffer(heads: &Heads) -> &[Self] {
            heads.tensor.storage()
        }

        fn rounded<'a>(weights: &'a [f32], _: &'a mut Vec<Self>) -> &'a [Self] {
            weights
        }
    }

    impl Weight for bf16 {
        fn buffer(heads: &Heads) -> &[Self] {
            heads.tensor.storage()
        }

        fn rounded<'a>(weights: &'a [f32], to: &'a mut Vec<Self>) -> &'a [Self] {
            to.clear();
            to.reserve(weights.len());
            bf16::narrow(weights, &mut to.spare_capacity_mut()[..weights.len()]);
            // SAFETY: all of them have been written.
            unsafe { to.set_len(weights.len()) };
            to
        }
    }

    /// Leaves the sums where they are.
    struct Kept;

    impl Sink for Kept {
        unsafe fn store(&self, _: usize, _: Range<usize>, _: &[f32]) {}
    }

    /// Rows from `row` and columns from `column` on of a result.
    struct Part<'a, S> {
        of: &'a S,
        row: usize,
        column: usize,
    }

    impl<S: Sink> Sink for Part<'_, S> {
        unsafe fn store(&self, row: usize, columns: Range<usize>, sums: &[f32]) {
            let columns = self.column + columns.start..self.column + columns.end;
            // SAFETY: they are those of the result, by the word of who made this.
            unsafe { self.of.store(self.row + row, columns, sums) };
        }
    }

    /// `[b, n, heads, d]`.
    pub(super) fn attention<T: Weight>(geometry: Geometry, [q, k, v]: [&Heads; 3]) -> Vec<T>
    where
        for<'a> Lines<'a, T>: Sink,
    {
        let Geometry { batch, heads, queries, keys, width, .. } = geometry;
        let places: Vec<_> = geometry.heads().collect();
        let panels: Vec<[Panels; 2]> = places
            .par_iter()
            .map(|&place| {
                let ((start, step), panels) = (k.place(place), None);
                let k = Transposed { data: &T::buffer(k)[start..], columns: keys, step, panels };
                let (start, step) = v.place(place);
                let v = Plain { data: &T::buffer(v)[start..], columns: width, step };
                [Panels::new(&k, width), Panels::new(&v, keys)]
            })
            .collect();
        let size = (SCORES / keys).clamp(UNIT, 32 * UNIT) / UNIT * UNIT;
        let chunks = || (0..queries).step_by(size).map(|start| start..(start + size).min(queries));
        let tasks: Vec<_> =
            (0..places.len()).flat_map(|head| chunks().map(move |chunk| (head, chunk))).collect();
        // SAFETY: the processor has what it takes, or there were no panels; the chunks are all queries of all heads, and each
        // stores all columns of its own.
        unsafe {
            filled(batch * queries * heads * width, |out| {
                let lines = Lines { target: Target::new(out), columns: heads * width, bias: None };
                let buffers = || (Buffers::default(), Buffers::default(), Vec::new());
                tasks.into_par_iter().for_each_init(buffers, |(scores, sums, rounded), (head, chunk)| {
                    let (place, [k, v]) = (places[head], &panels[head]);
                    let (start, step) = q.place(place);
                    let (first, count) = (chunk.start, chunk.len());
                    let data = &T::buffer(q)[start + first * step..];
                    let rows = Rows { data, count, depth: width, step };
                    let k = Packed { panels: k, columns: keys };
                    block(rows, &k, &Kept, 0..count, 0..keys, scores);
                    let step = keys.next_multiple_of(LANES);
                    let weights = &mut scores.sums[..count * step];
                    geometry.softmax(first, weights, step);
                    let data = T::rounded(weights, rounded);
                    let rows = Rows { data, count, depth: keys, step };
                    let v = Packed { panels: v, columns: width };
                    let part = Part { of: &lines, row: place.0 * queries + first, column: place.1 * width };
                    block(rows, &v, &part, 0..count, 0..width, sums);
                });
            })
        }
    }
}
