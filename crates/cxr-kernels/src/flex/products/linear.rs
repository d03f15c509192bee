//! Linear layers: every token is a row, every output feature a column.

use burn::tensor::TensorMetadata;
use burn_flex::{Flex, FlexTensor};

use super::super::elementwise::contiguous;
use super::super::half::widened;
use super::{Path, by_engine};
use crate::{WeightCache, plain};

/// `x @ weight^T + bias` for `x` `[rows, in]`, `weight` `[out, in]`, `bias` `[out]`, all of one dtype.
pub(in super::super) fn linear(
    x: FlexTensor,
    weight: FlexTensor,
    bias: Option<FlexTensor>,
    cache: &WeightCache,
) -> FlexTensor {
    product(Path::of(x.dtype()), x, weight, bias, Order::Transposed, cache)
}

/// `grad @ weight` for `grad` `[rows, out]`, `weight` `[out, in]`: the gradient of [`linear`] by `x`.
pub(in super::super) fn linear_x_backward(weight: FlexTensor, grad: FlexTensor) -> FlexTensor {
    product(Path::of(grad.dtype()), grad, weight, None, Order::Plain, &WeightCache::new())
}

/// How the right operand lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// `[depth, columns]`
    Plain,
    /// `[columns, depth]`
    Transposed,
}

pub(super) fn product(
    path: Path,
    x: FlexTensor,
    weight: FlexTensor,
    bias: Option<FlexTensor>,
    order: Order,
    cache: &WeightCache,
) -> FlexTensor {
    let [rows, depth] = x.shape().dims();
    let of_weight: [usize; 2] = weight.shape().dims();
    let columns = if order == Order::Transposed { of_weight[0] } else { of_weight[1] };
    let sizes = [rows, columns, depth];
    let as_stored = weight.clone();
    let (x, weight) = (contiguous(x), contiguous(weight));
    let wide_bias = bias.clone().map(widened);
    let (of_weight, of_bias) = ((&weight, &as_stored, cache), wide_bias.as_deref());
    let found = by_engine!(path, x.dtype(), by_panels::product(&x, of_weight, of_bias, order, sizes));
    found.unwrap_or_else(|| match order {
        Order::Transposed => plain::linear::<Flex>(x, weight, bias),
        Order::Plain => plain::linear_x_backward::<Flex>(weight, x),
    })
}

/// By an [`Engine`](super::product::Engine).
pub(super) mod by_panels {
    use std::ops::Range;
    use std::sync::Arc;

    use burn::tensor::Shape;
    use burn_flex::FlexTensor;

    use super::super::number::{Line, Number};
    use super::super::product::{Engine, Rows, Sink, WIDTH, multiply, row_blocks};
    use super::super::simd::{LANES, Simd};
    use super::super::store::Bias;
    use super::super::weights::{Packed, Panels, Plain, Transposed};
    use super::super::{Target, Weights};
    use super::Order;
    use crate::WeightCache;
    use crate::flex::elementwise::filled;
    use crate::flex::half::{elements, tensor_of};
    use crate::flex::kept::kept;

    /// The result `[rows, columns]`, with the biases of its columns.
    pub(in super::super) struct Lines<'a, T> {
        pub(in super::super) target: Target<T>,
        pub(in super::super) columns: usize,
        pub(in super::super) bias: Option<&'a [f32]>,
    }

    impl<T> Lines<'_, T> {
        fn bias(&self, columns: Range<usize>) -> Bias<'_> {
            self.bias.map_or(Bias::All(0.0), |bias| Bias::Each(&bias[columns]))
        }
    }

    impl<T: Number<E>, E: Engine> Sink<E> for Lines<'_, T> {
        #[inline(always)]
        unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32], step: usize) {
            let bias = self.bias(columns.clone());
            for (row, sums) in rows.zip(sums.chunks(step)) {
                // SAFETY: the place lies in the result, and no other task has it; the processor has what it takes.
                unsafe {
                    let place = self.target.at(row * self.columns + columns.start);
                    T::write(&sums[..columns.len()], bias, place);
                }
            }
        }
    }

    /// Rows up to which it is they that come in panels, and the weight's features that are the product's rows: read where they
    /// lie, while bringing them into panels would take a good part of the time that so few rows need. With more than one
    /// panel it no longer pays.
    const FEW: usize = WIDTH;

    /// [`Lines`] of a product whose rows are their columns.
    struct Crossed<'a, T>(Lines<'a, T>);

    impl<T: Number<E>, E: Engine> Sink<E> for Crossed<'_, T> {
        #[inline(always)]
        unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32], step: usize) {
            let mut turned = [Line::ZERO; WIDTH * WIDTH / LANES];
            for (slab, sums) in rows.clone().step_by(WIDTH).zip(sums.chunks(WIDTH * step)) {
                let slab = slab..(slab + WIDTH).min(rows.end);
                for (block, sums) in sums.chunks(LANES * step).enumerate() {
                    for column in (0..columns.len()).step_by(LANES) {
                        // SAFETY: sums go on to the end of a vector, and a line is one; the processor has the instructions, says
                        // the caller.
                        unsafe {
                            let mut words = [E::Simd::splat(0.0); LANES];
                            for (words, sums) in words.iter_mut().zip(sums.chunks(step)) {
                                *words = E::Simd::load(sums.as_ptr().add(column));
                            }
                            for (i, words) in E::Simd::transpose(words).into_iter().enumerate() {
                                let line = &mut turned[(column + i) * (WIDTH / LANES) + block];
                                E::Simd::store(words, std::ptr::from_mut(line).cast());
                            }
                        }
                    }
                }
                // SAFETY: the caller's word.
                unsafe {
                    Sink::<E>::store(&self.0, columns.clone(), slab, Line::numbers_mut(&mut turned), WIDTH)
                };
            }
        }
    }

    /// The panels of a weight that its cache has, or has room for, or that are worth making for one call.
    fn panels<T: Number<E>, E: Engine>(
        cache: &WeightCache,
        weight: &FlexTensor,
        data: &[T],
        order: Order,
        [rows, columns, depth]: [usize; 3],
    ) -> Option<Arc<Panels>> {
        let blocks = row_blocks::<E>(rows, columns);
        let once = |matrix: &dyn Fn() -> Panels| (E::PACKS_ONCE && blocks > 1).then(|| Arc::new(matrix()));
        if order == Order::Plain {
            // its lines lie as those of a panel do: there is little to save
            return once(&|| Panels::new::<E>(&Plain { data, columns, step: columns }, depth));
        }
        let pack = || Panels::new::<E>(&Transposed { data, columns, step: depth }, depth);
        // how often a call would do it otherwise
        let uses = if E::PACKS_ONCE { 1 } else { blocks };
        kept(cache, weight, Panels::bytes::<E>(columns, depth), uses, pack).or_else(|| once(&pack))
    }

    /// The product with a weight: contiguous, as it is stored, and the cache that may keep its panels.
    pub(super) fn product<T: Number<E>, E: Engine>(
        x: &FlexTensor,
        (weight, as_stored, cache): (&FlexTensor, &FlexTensor, &WeightCache),
        bias: Option<&[f32]>,
        order: Order,
        sizes: [usize; 3],
    ) -> FlexTensor {
        let [rows, columns, depth] = sizes;
        let (x, weight) = (elements::<T>(x), elements::<T>(weight));
        let crosses = !E::PACKS_ONCE && order == Order::Transposed && rows <= FEW;
        let panels = if crosses { None } else { panels::<T, E>(cache, as_stored, weight, order, sizes) };
        // SAFETY: the product's rows and columns are all that `out` has, and each is stored.
        let data = unsafe {
            filled(rows * columns, |out| {
                let target = Target::new(out);
                let sink = Lines::<T> { target, columns, bias };
                if crosses {
                    let features = Rows { data: weight, count: columns, depth, step: depth };
                    let x = Transposed { data: x, columns: rows, step: depth };
                    return multiply::<E>(features, &x, &Crossed(sink), Weights::Rows);
                }
                let x = Rows { data: x, count: rows, depth, step: depth };
                match (&panels, order) {
                    (Some(panels), _) => {
                        multiply::<E>(x, &Packed { panels, columns }, &sink, Weights::Columns)
                    }
                    (_, Order::Transposed) => {
                        let weight = Transposed { data: weight, columns, step: depth };
                        multiply::<E>(x, &weight, &sink, Weights::Columns)
                    }
                    (_, Order::Plain) => {
                        let weight = Plain { data: weight, columns, step: columns };
                        multiply::<E>(x, &weight, &sink, Weights::Columns)
                    }
                }
            })
        };
        tensor_of(data, Shape::new([rows, columns]))
    }
}
