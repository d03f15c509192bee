//! Attention head by head: the scores of a few queries at a time, in the cache, and never all of them.

use burn::tensor::TensorMetadata;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{contiguous, slice, tensor};
use super::fast_math::{Kernel, dispatch, exp};
use super::gemm::{Matrix, Shared, product};

/// Elements of one chunk's scores: 1 MiB, so that they stay in the cache between the two products.
const SCORE_ELEMENTS: usize = 256 * 1024;

/// The sizes of one attention.
#[derive(Clone, Copy)]
struct Geometry {
    heads: usize,
    queries: usize,
    keys: usize,
    width: usize,
    causal: bool,
}

impl Geometry {
    fn new(q: &FlexTensor, k: &FlexTensor, causal: bool) -> Self {
        let [b, heads, queries, width] = q.shape().dims();
        Self { heads: b * heads, queries, keys: k.shape()[2], width, causal }
    }

    fn scale(&self) -> f32 {
        (self.width as f32).powf(-0.5)
    }

    /// The chunks of one head: first query, and number of queries.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (queries, size) = (self.queries, (SCORE_ELEMENTS / self.keys).clamp(16, 256));
        (0..queries).step_by(size).map(move |start| (start, size.min(queries - start)))
    }

    /// The attention weights of queries `start..start + count` of one head, into `weights` `[count, keys]`.
    fn weights(&self, q: &[f32], k: &[f32], (start, count): (usize, usize), weights: &mut Vec<f32>) {
        weights.resize(count * self.keys, 0.0);
        let lhs = Matrix::rows(&q[start * self.width..], self.width);
        let rhs = Matrix::rows(k, self.width).transposed();
        // SAFETY: `weights` holds `[count, keys]`; the operands `[count, width]` and `[width, keys]`.
        unsafe {
            product([count, self.keys, self.width], lhs, rhs, weights.as_mut_ptr(), self.keys, false);
        }
        let seen = |i: usize| if self.causal { (start + i + 1).min(self.keys) } else { self.keys };
        dispatch(Softmax { weights, keys: self.keys, scale: self.scale(), seen });
    }
}

/// `softmax(scale * row)` of every row, in place; keys after the first `seen` of a row get zero.
struct Softmax<'a, S> {
    weights: &'a mut [f32],
    keys: usize,
    scale: f32,
    seen: S,
}

impl<S: Fn(usize) -> usize> Kernel for Softmax<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (i, row) in self.weights.chunks_exact_mut(self.keys).enumerate() {
            let (seen, hidden) = row.split_at_mut((self.seen)(i));
            let maximum = lanes(seen, f32::NEG_INFINITY, |m, x| if x > m { x } else { m });
            let maximum = maximum.into_iter().fold(f32::NEG_INFINITY, f32::max);
            for x in &mut *seen {
                *x = exp::<FMA>((*x - maximum) * self.scale);
            }
            let inverse = 1.0 / lanes(seen, 0.0, |sum, x| sum + x).iter().sum::<f32>();
            for x in seen {
                *x *= inverse;
            }
            hidden.fill(0.0);
        }
    }
}

/// `w * (g - sum(w * g)) * scale` of every row, into `g`: the gradient through [`Softmax`].
struct SoftmaxBackward<'a> {
    weights: &'a [f32],
    grad: &'a mut [f32],
    keys: usize,
    scale: f32,
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let rows = self.weights.chunks_exact(self.keys).zip(self.grad.chunks_exact_mut(self.keys));
        for (weights, grad) in rows {
            let (w_blocks, w_rest) = weights.as_chunks::<LANES>();
            let (g_blocks, g_rest) = grad.as_chunks::<LANES>();
            let mut sums = [0.0_f32; LANES];
            for (w, g) in w_blocks.iter().zip(g_blocks) {
                for i in 0..LANES {
                    sums[i] += w[i] * g[i];
                }
            }
            for (sum, (w, g)) in sums.iter_mut().zip(w_rest.iter().zip(g_rest)) {
                *sum += w * g;
            }
            let sum: f32 = sums.iter().sum();
            for (g, w) in grad.iter_mut().zip(weights) {
                *g = w * (*g - sum) * self.scale;
            }
        }
    }
}

/// Running results of a row's reduction: they fill the vector units, and their order is fixed.
const LANES: usize = 16;

/// `f` over the elements of `row`, in [`LANES`] interleaved parts.
#[inline(always)]
fn lanes(row: &[f32], start: f32, f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [start; LANES];
    for block in blocks {
        for i in 0..LANES {
            lanes[i] = f(lanes[i], block[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = f(*lane, *x);
    }
    lanes
}

/// `q` `[b, heads, n, d]`, `k` and `v` `[b, heads, m, d]`: `[b, heads, n, d]`.
pub(super) fn forward(q: FlexTensor, k: FlexTensor, v: FlexTensor, causal: bool) -> FlexTensor {
    let geometry = Geometry::new(&q, &k, causal);
    let shape = q.shape();
    let [q, k, v] = [q, k, v].map(contiguous);
    let (q, k, v) = (slice(&q), slice(&k), slice(&v));
    let (per_query, per_key) = (geometry.queries * geometry.width, geometry.keys * geometry.width);
    let mut out = vec![0.0_f32; q.len()];
    let target = Shared::new(&mut out);
    let tasks: Vec<_> = (0..geometry.heads).flat_map(|h| geometry.chunks().map(move |c| (h, c))).collect();
    tasks.into_par_iter().for_each_init(Vec::new, |weights, (head, chunk)| {
        let (start, count) = chunk;
        let v = &v[head * per_key..(head + 1) * per_key];
        geometry.weights(
            &q[head * per_query..(head + 1) * per_query],
            &k[head * per_key..(head + 1) * per_key],
            chunk,
            weights,
        );
        // SAFETY: this task alone writes these queries of this head, which lie in `out`.
        unsafe {
            let sizes = [count, geometry.width, geometry.keys];
            let to = target.at(head * per_query + start * geometry.width);
            let weights = Matrix::rows(weights, geometry.keys);
            product(sizes, weights, Matrix::rows(v, geometry.width), to, geometry.width, false);
        }
    });
    tensor(out, shape)
}

/// Gradients with respect to `q`, `k`, `v`; each head is one task, its chunks in order.
pub(super) fn backward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    grad: FlexTensor,
    causal: bool,
) -> [FlexTensor; 3] {
    let geometry = Geometry::new(&q, &k, causal);
    let (q_shape, k_shape) = (q.shape(), k.shape());
    let [q, k, v, grad] = [q, k, v, grad].map(contiguous);
    let (q, k, v, grad) = (slice(&q), slice(&k), slice(&v), slice(&grad));
    let (per_query, per_key) = (geometry.queries * geometry.width, geometry.keys * geometry.width);
    let mut to_q = vec![0.0_f32; q.len()];
    let mut to_k = vec![0.0_f32; k.len()];
    let mut to_v = vec![0.0_f32; v.len()];
    let heads =
        to_q.par_chunks_mut(per_query).zip(to_k.par_chunks_mut(per_key)).zip(to_v.par_chunks_mut(per_key));
    heads.enumerate().for_each_init(
        || (Vec::new(), Vec::new()),
        |(weights, to_weights), (head, ((to_q, to_k), to_v))| {
            let of_queries = head * per_query..(head + 1) * per_query;
            let of_keys = head * per_key..(head + 1) * per_key;
            let head = Head {
                q: &q[of_queries.clone()],
                k: &k[of_keys.clone()],
                v: &v[of_keys],
                grad: &grad[of_queries],
            };
            for chunk in geometry.chunks() {
                geometry.weights(head.q, head.k, chunk, weights);
                head.chunk_backward(geometry, chunk, weights, to_weights, [to_q, to_k, to_v]);
            }
        },
    );
    [(to_q, q_shape), (to_k, k_shape.clone()), (to_v, k_shape)].map(|(data, shape)| tensor(data, shape))
}

/// The operands of one head: `[n, d]`, `[m, d]`, `[m, d]`, `[n, d]`.
struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    grad: &'a [f32],
}

impl Head<'_> {
    /// Adds one chunk's part to the gradients; `weights` are its attention weights.
    fn chunk_backward(
        &self,
        geometry: Geometry,
        (start, count): (usize, usize),
        weights: &[f32],
        to_weights: &mut Vec<f32>,
        [to_q, to_k, to_v]: [&mut [f32]; 3],
    ) {
        let Geometry { keys, width, .. } = geometry;
        to_weights.resize(count * keys, 0.0);
        let rows = |data: &[f32]| Matrix::rows(&data[start * width..], width);
        let (q, grad) = (rows(self.q), rows(self.grad));
        let weight_rows = Matrix::rows(weights, keys);
        // SAFETY: every buffer holds the matrix it is named for: `[count, keys]` the weights and their gradient,
        // `[count, width]` from `start` on `q`, `grad`, `to_q`, `[keys, width]` the others; all are this task's.
        unsafe {
            product([keys, width, count], weight_rows.transposed(), grad, to_v.as_mut_ptr(), width, true);
            let v = Matrix::rows(self.v, width).transposed();
            product([count, keys, width], grad, v, to_weights.as_mut_ptr(), keys, false);
        }
        dispatch(SoftmaxBackward { weights, grad: to_weights, keys, scale: geometry.scale() });
        let to_scores = Matrix::rows(to_weights, keys);
        // SAFETY: as above.
        unsafe {
            let to_q = to_q[start * width..].as_mut_ptr();
            product([count, width, keys], to_scores, Matrix::rows(self.k, width), to_q, width, false);
            product([keys, width, count], to_scores.transposed(), q, to_k.as_mut_ptr(), width, true);
        }
    }
}
