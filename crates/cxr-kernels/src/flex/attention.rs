//! The gradients of attention head by head: the scores of a few queries at a time, in the cache, and never all of them. The
//! forward pass, which works so too, is with the other [`products`](super::products).

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{contiguous, tensor};
use super::fast_math::{Kernel, dispatch, exp_below};
use super::gemm::{Matrix, Shared, product};

/// Elements of one chunk's scores: 1 MiB, so that they stay in the cache between the two products.
const SCORE_ELEMENTS: usize = 256 * 1024;

/// The sizes of one attention.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) width: usize,
    causal: bool,
}

impl Geometry {
    pub(super) fn new(q: &FlexTensor, k: &FlexTensor, causal: bool) -> Self {
        let [b, heads, queries, width] = q.shape().dims();
        Self { batch: b, heads, queries, keys: k.shape()[2], width, causal }
    }

    pub(super) fn scale(&self) -> f32 {
        (self.width as f32).powf(-0.5)
    }

    /// The scores of queries from `start` on, whose rows begin `step` apart, become exponentials; what those of each row have
    /// to be multiplied by to be attention weights goes into `factors`.
    pub(super) fn exponentials(&self, start: usize, scores: &mut [f32], step: usize, factors: &mut Vec<f32>) {
        let seen = |i: usize| self.seen(start + i);
        factors.clear();
        dispatch(Exponentials { scores, keys: self.keys, step, scale: self.scale(), seen, factors });
    }

    /// How many keys a query attends to: the first ones.
    pub(super) fn seen(&self, query: usize) -> usize {
        if self.causal { (query + 1).min(self.keys) } else { self.keys }
    }

    /// Every head: batch and head.
    pub(super) fn heads(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let heads = self.heads;
        (0..self.batch).flat_map(move |b| (0..heads).map(move |h| (b, h)))
    }

    /// The chunks of one head: first query, and number of queries.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (queries, size) = (self.queries, (SCORE_ELEMENTS / self.keys).clamp(16, 256));
        (0..queries).step_by(size).map(move |start| (start, size.min(queries - start)))
    }

    /// The attention weights of queries `start..start + count` of one head, into `weights` `[count, keys]`.
    fn weights(&self, q: Rows<'_>, k: Rows<'_>, (start, count): (usize, usize), weights: &mut Vec<f32>) {
        weights.resize(count * self.keys, 0.0);
        let (lhs, rhs) = (q.from(start), k.from(0).transposed());
        // SAFETY: `weights` holds `[count, keys]`; the operands `[count, width]` and `[width, keys]`.
        unsafe {
            product([count, self.keys, self.width], lhs, rhs, weights.as_mut_ptr(), self.keys, false);
        }
        let mut factors = Vec::with_capacity(count);
        self.exponentials(start, weights, self.keys, &mut factors);
        for (row, factor) in weights.chunks_exact_mut(self.keys).zip(factors) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// `e^(scale * (score - the largest of its row))`, in place, and one divided by the sum of each row: what multiplies the
/// products of a row is cheaper than what divides its weights. Keys after the first `seen` of a row get zero.
struct Exponentials<'a, S> {
    scores: &'a mut [f32],
    keys: usize,
    /// From one row to the next.
    step: usize,
    scale: f32,
    seen: S,
    factors: &'a mut Vec<f32>,
}

impl<S: Fn(usize) -> usize> Kernel for Exponentials<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (i, row) in self.scores.chunks_exact_mut(self.step).enumerate() {
            let (seen, hidden) = row[..self.keys].split_at_mut((self.seen)(i));
            let maximum = lanes(seen, f32::NEG_INFINITY, |m, x| if x > m { x } else { m });
            let maximum = maximum.into_iter().fold(f32::NEG_INFINITY, f32::max);
            // sums in interleaved parts, as those of `lanes`
            let mut sums = [0.0_f32; LANES];
            let (blocks, rest) = seen.as_chunks_mut::<LANES>();
            for block in blocks {
                for (x, sum) in block.iter_mut().zip(&mut sums) {
                    *x = exp_below::<FMA>((*x - maximum) * self.scale);
                    *sum += *x;
                }
            }
            for (x, sum) in rest.iter_mut().zip(&mut sums) {
                *x = exp_below::<FMA>((*x - maximum) * self.scale);
                *sum += *x;
            }
            self.factors.push(1.0 / sums.iter().sum::<f32>());
            hidden.fill(0.0);
        }
    }
}

/// `w * (g - sum(w * g)) * scale` of every row, into `g`: the gradient through the softmax.
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

/// A tensor `[b, heads, rows, d]` read as it lies, which after a split into heads is `[b, rows, heads, d]`.
pub(super) struct Heads {
    pub(super) tensor: FlexTensor,
    strides: [usize; 3],
}

impl Heads {
    /// Copies only what a row-wise reader cannot take: rows whose elements are apart, or that run backwards.
    pub(super) fn new(tensor: FlexTensor) -> Self {
        let readable = tensor.layout().has_positive_strides() && tensor.layout().strides()[3] == 1;
        let tensor = if readable { tensor } else { contiguous(tensor) };
        let strides = std::array::from_fn(|dim| tensor.layout().strides()[dim].unsigned_abs());
        Self { tensor, strides }
    }

    /// Where in the tensor's buffer the rows of one head begin, and the step from one to the next.
    pub(super) fn place(&self, (batch, head): (usize, usize)) -> (usize, usize) {
        let [of_batch, of_head, of_row] = self.strides;
        (self.tensor.layout().start_offset() + batch * of_batch + head * of_head, of_row)
    }

    /// The rows of one head.
    fn rows(&self, head: (usize, usize)) -> Rows<'_> {
        let (start, step) = self.place(head);
        Rows { data: &self.tensor.storage::<f32>()[start..], step }
    }
}

/// Rows that begin `step` apart.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    step: usize,
}

impl Rows<'_> {
    /// The rows from `start` on.
    fn from(self, start: usize) -> Matrix {
        Matrix::rows(&self.data[start * self.step..], self.step)
    }
}

/// Where a result `[b, heads, rows, d]` is written: as `[b, rows, heads, d]`, so that joining the heads costs nothing.
#[derive(Clone, Copy)]
struct Target {
    data: Shared,
    heads: usize,
    rows: usize,
    width: usize,
}

impl Target {
    fn new(data: &mut [f32], [_, heads, rows, width]: [usize; 4]) -> Self {
        Self { data: Shared::new(data), heads, rows, width }
    }

    /// The step from one row of a head to the next.
    fn step(self) -> usize {
        self.heads * self.width
    }

    /// The first element of a row.
    ///
    /// # Safety
    /// Batch, head and row must be those of the result.
    unsafe fn at(self, (batch, head): (usize, usize), row: usize) -> *mut f32 {
        // SAFETY: it lies in the result, by the caller's word.
        unsafe { self.data.at(((batch * self.rows + row) * self.heads + head) * self.width) }
    }
}

/// The tensor `[b, heads, rows, d]` of what was written through a [`Target`].
fn join(data: Vec<f32>, [batch, heads, rows, width]: [usize; 4]) -> FlexTensor {
    tensor(data, Shape::new([batch, rows, heads, width])).transpose(1, 2)
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
    let (q_shape, k_shape): ([usize; 4], [usize; 4]) = (q.shape().dims(), k.shape().dims());
    let [q, k, v, grad] = [q, k, v, grad].map(Heads::new);
    let mut results = [q_shape, k_shape, k_shape].map(|shape| vec![0.0_f32; shape.iter().product()]);
    let [to_q, to_k, to_v] = &mut results;
    let targets = [Target::new(to_q, q_shape), Target::new(to_k, k_shape), Target::new(to_v, k_shape)];
    let heads: Vec<_> = geometry.heads().collect();
    heads.into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(weights, to_weights), place| {
            let [q, k, v, grad] = [&q, &k, &v, &grad].map(|heads| heads.rows(place));
            let head = Head { place, q, k, v, grad };
            for chunk in geometry.chunks() {
                geometry.weights(q, k, chunk, weights);
                head.chunk_backward(geometry, chunk, weights, to_weights, targets);
            }
        },
    );
    let [to_q, to_k, to_v] = results;
    [join(to_q, q_shape), join(to_k, k_shape), join(to_v, k_shape)]
}

/// The operands of one head: `[n, d]`, `[m, d]`, `[m, d]`, `[n, d]`.
struct Head<'a> {
    /// Batch and head.
    place: (usize, usize),
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    grad: Rows<'a>,
}

impl Head<'_> {
    /// Adds one chunk's part to the gradients; `weights` are its attention weights.
    fn chunk_backward(
        &self,
        geometry: Geometry,
        (start, count): (usize, usize),
        weights: &[f32],
        to_weights: &mut Vec<f32>,
        [to_q, to_k, to_v]: [Target; 3],
    ) {
        let Geometry { keys, width, .. } = geometry;
        to_weights.resize(count * keys, 0.0);
        let (q, grad) = (self.q.from(start), self.grad.from(start));
        let weight_rows = Matrix::rows(weights, keys);
        // SAFETY: every buffer holds the matrix it is named for: `[count, keys]` the weights and their gradient,
        // `[count, width]` from `start` on `q`, `grad`, `to_q`, `[keys, width]` the others; this head of the
        // results is this task's.
        unsafe {
            let to_v_rows = to_v.at(self.place, 0);
            product([keys, width, count], weight_rows.transposed(), grad, to_v_rows, to_v.step(), true);
            let v = self.v.from(0).transposed();
            product([count, keys, width], grad, v, to_weights.as_mut_ptr(), keys, false);
        }
        dispatch(SoftmaxBackward { weights, grad: to_weights, keys, scale: geometry.scale() });
        let to_scores = Matrix::rows(to_weights, keys);
        // SAFETY: as above.
        unsafe {
            let to_q_rows = to_q.at(self.place, start);
            product([count, width, keys], to_scores, self.k.from(0), to_q_rows, to_q.step(), false);
            let to_k_rows = to_k.at(self.place, 0);
            product([keys, width, count], to_scores.transposed(), q, to_k_rows, to_k.step(), true);
        }
    }
}
