//! The gradients of attention in bf16 by the product of panels: some queries of one head at a time, whose weights are
//! computed anew. Weights and the gradients of scores are rounded before they are multiplied; sums over keys and queries
//! are f32.

use burn_flex::FlexTensor;

use super::Path;

/// Gradients with respect to `q` `[b, heads, n, d]`, `k` and `v` `[b, heads, m, d]`, all bf16; `None` where the processor has no
/// instructions for it.
pub(in super::super) fn attention_backward(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    grad: &FlexTensor,
    causal: bool,
) -> Option<[FlexTensor; 3]> {
    attention_backward_by(Path::of(q.dtype()), q, k, v, grad, causal)
}

/// [`attention_backward`] by one of the paths for such numbers.
pub(super) fn attention_backward_by(
    path: Path,
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    grad: &FlexTensor,
    causal: bool,
) -> Option<[FlexTensor; 3]> {
    #[cfg(target_arch = "x86_64")]
    {
        use burn::tensor::Shape;

        use super::super::attention::{Geometry, Heads};
        use super::super::half::tensor_of;
        use super::tiles::Tiles;
        use super::vectors::Pairs;

        if !path.is_of_halves() {
            return None;
        }
        let geometry = Geometry::new(q, k, causal);
        let operands = [q, k, v, grad].map(|x| Heads::new(x.clone()));
        let [to_q, to_k, to_v] = match path {
            Path::Tiles => by_panels::backward::<Tiles>(geometry, &operands),
            _ => by_panels::backward::<Pairs>(geometry, &operands),
        };
        let joined = |data, rows| {
            let shape = Shape::new([geometry.batch, rows, geometry.heads, geometry.width]);
            tensor_of(data, shape).transpose(1, 2)
        };
        Some([joined(to_q, geometry.queries), joined(to_k, geometry.keys), joined(to_v, geometry.keys)])
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (path, q, k, v, grad, causal);
        None
    }
}

/// On AVX-512 and AMX.
#[cfg(target_arch = "x86_64")]
mod by_panels {
    use std::mem::MaybeUninit;

    use burn::tensor::bf16;
    use rayon::prelude::*;

    use super::super::Target;
    use super::super::attention::by_panels::{Part, chunk_size};
    use super::super::linear::by_panels::Lines;
    use super::super::number::{Line, Number};
    use super::super::product::{Buffers, Engine, Rows, block, block_onto};
    use super::super::simd::LANES;
    use super::super::softmax::{UNIT, Weights, backward as softmax_backward};
    use super::super::weights::{Packed, Panels, Plain, Transposed};
    use crate::flex::attention::{Geometry, Heads};
    use crate::flex::elementwise::filled;
    use crate::flex::half::{Half, Stored};

    /// `[b, n, heads, d]`, and twice `[b, m, heads, d]`.
    pub(super) fn backward<E: Engine<Number = bf16>>(
        geometry: Geometry,
        [q, k, v, grad]: &[Heads; 4],
    ) -> [Vec<bf16>; 3]
    where
        bf16: Number<E>,
    {
        let Geometry { batch, heads, queries, keys, width, .. } = geometry;
        let places: Vec<_> = geometry.heads().collect();
        let of_keys = batch * keys * heads * width;
        let (mut to_k, mut to_v) = (Vec::new(), Vec::new());
        // SAFETY: the heads are all of each result, and `head` writes all rows of its own.
        let to_q = unsafe {
            filled(batch * queries * heads * width, |to_q| {
                to_k = filled(of_keys, |to_k| {
                    to_v = filled(of_keys, |to_v| {
                        let targets = [to_q, to_k, to_v].map(Target::new);
                        places.into_par_iter().for_each_init(Work::default, |work, place| {
                            work.head::<E>(geometry, place, [q, k, v, grad], targets);
                        });
                    });
                });
            })
        };
        [to_q, to_k, to_v]
    }

    /// What one thread works in.
    #[derive(Default)]
    struct Work {
        scores: Buffers,
        to_weights: Buffers,
        to_q: Buffers,
        /// Turned, `[d, m]`: they are sums over all queries.
        to_k: Buffers,
        to_v: Buffers,
        weights: Weights,
        to_scores: Vec<Line>,
        turned: Vec<Line>,
    }

    impl Work {
        /// The gradients of one head.
        ///
        /// # Safety
        /// The processor must have what numbers and engine take; no other task may write this head.
        unsafe fn head<E: Engine<Number = bf16>>(
            &mut self,
            geometry: Geometry,
            place: (usize, usize),
            [q, k, v, grad]: [&Heads; 4],
            [to_q, to_k, to_v]: [Target<bf16>; 3],
        ) where
            bf16: Number<E>,
        {
            let Geometry { heads, queries, keys, width, .. } = geometry;
            let transposed = |x: &Heads| {
                let (data, step) = rows(x, place);
                Panels::new::<E>(&Transposed { data, columns: keys, step }, width)
            };
            let (keys_turned, values_turned) = (transposed(k), transposed(v));
            let (data, step) = rows(k, place);
            let keys_plain = Panels::new::<E>(&Plain { data, columns: width, step }, keys);
            let [keys_turned, values_turned] =
                [&keys_turned, &values_turned].map(|panels| Packed { panels, columns: keys });
            let keys_plain = Packed { panels: &keys_plain, columns: width };
            let lines = Lines { target: to_q, columns: heads * width, bias: None };
            let size = chunk_size::<E>(keys);
            for first in (0..queries).step_by(size) {
                let count = size.min(queries - first);
                let chunk = |x| {
                    let (data, step) = rows(x, place);
                    Rows { data: &data[first * step..], count, depth: width, step }
                };
                let (of_q, of_grad) = (chunk(q), chunk(grad));
                // SAFETY: the processor has what it takes, says the caller; the ranges are those of the operands.
                unsafe {
                    block_onto::<E>(of_q, &keys_turned, 0..count, 0..keys, false, &mut self.scores);
                    let (scores, step) = (self.scores.sums.as_mut_slice(), keys.next_multiple_of(LANES));
                    let padded = keys.next_multiple_of(UNIT);
                    let seen = |i: usize| geometry.seen(first + i);
                    self.weights.fill(scores, step, count, padded, geometry.scale(), seen);
                    block_onto::<E>(of_grad, &values_turned, 0..count, 0..keys, false, &mut self.to_weights);
                    let to_weights = self.to_weights.sums.as_mut_slice();
                    softmax_backward(&self.weights, to_weights, step, geometry.scale(), &mut self.to_scores);
                    let to_scores = Line::numbers::<bf16>(&self.to_scores);

                    let of_scores = Rows { data: to_scores, count, depth: padded, step: padded };
                    let (row, column) = (place.0 * queries + first, place.1 * width);
                    let sink = Part { of: &lines, row, column, factors: &[] };
                    block::<E>(of_scores, &keys_plain, &sink, 0..count, 0..width, &mut self.to_q);

                    let onto = first > 0;
                    let columns = Plain { data: to_scores, columns: keys, step: padded };
                    let rows = turn(of_q, &[], &mut self.turned);
                    block_onto::<E>(rows, &columns, 0..width, 0..keys, onto, &mut self.to_k);
                    let columns = Plain { data: self.weights.as_slice(), columns: keys, step: padded };
                    let rows = turn(of_grad, &self.weights.factors, &mut self.turned);
                    block_onto::<E>(rows, &columns, 0..width, 0..keys, onto, &mut self.to_v);
                }
            }
            for (sums, target) in [(&mut self.to_k, to_k), (&mut self.to_v, to_v)] {
                let (sums, step) = (sums.sums.as_mut_slice(), keys.next_multiple_of(LANES));
                let mut row = vec![0.0; width];
                for key in 0..keys {
                    row.iter_mut().zip(sums[key..].iter().step_by(step)).for_each(|(to, sum)| *to = *sum);
                    // SAFETY: this row of the head lies in the result.
                    unsafe {
                        let to = target.at(((place.0 * keys + key) * heads + place.1) * width);
                        bf16::narrow(
                            &row,
                            std::slice::from_raw_parts_mut(to.cast::<MaybeUninit<_>>(), width),
                        );
                    }
                }
            }
        }
    }

    /// The rows of one head, and the step from one to the next.
    fn rows(x: &Heads, place: (usize, usize)) -> (&[bf16], usize) {
        let (start, step) = x.place(place);
        (&bf16::buffer(&x.tensor)[start..], step)
    }

    /// Columns for rows, in `to`; each of the rows that there are is multiplied by its factor, if they have some.
    fn turn<'a>(rows: Rows<'_, bf16>, factors: &[f32], to: &'a mut Vec<Line>) -> Rows<'a, bf16> {
        let step = rows.count.next_multiple_of(UNIT);
        to.clear();
        to.resize(rows.depth * step / UNIT, Line::ZERO);
        let data = Line::numbers_mut::<bf16>(to);
        for (i, row) in rows.data.chunks(rows.step).take(rows.count).enumerate() {
            for (to, x) in data[i..].iter_mut().step_by(step).zip(&row[..rows.depth]) {
                *to = factors.get(i).map_or(*x, |factor| bf16::from_f32(x.to_f32() * factor));
            }
        }
        Rows { data, count: rows.depth, depth: rows.count, step }
    }
}
