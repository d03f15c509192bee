//! Linear layers: every token is a row, every output feature a column.

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_flex::{Flex, FlexTensor};

use super::super::elementwise::contiguous;
use super::super::half::{elements, half_tensor, widened};
use super::{Path, by_engine, panels};
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
    if path == Path::General {
        return match order {
            Order::Transposed => plain::linear::<Flex>(x, weight, bias),
            Order::Plain => plain::linear_x_backward::<Flex>(weight, x),
        };
    }
    let [rows, depth] = x.shape().dims();
    let of_weight: [usize; 2] = weight.shape().dims();
    let columns = if order == Order::Transposed { of_weight[0] } else { of_weight[1] };
    let sizes = [rows, columns, depth];
    let as_stored = weight.clone();
    let (x, weight, bias) = (contiguous(x), contiguous(weight), bias.map(widened));
    let bias = bias.as_deref();
    let of_weight = (&weight, &as_stored, cache);
    by_engine!(path, by_panels::product(&x, of_weight, bias, order, sizes)).unwrap_or_else(|| {
        let shape = Shape::new([rows, columns]);
        match x.dtype() {
            DType::F16 => half_tensor(
                panels::product::<f16>(elements(&x), elements(&weight), bias, order, sizes),
                shape,
            ),
            _ => half_tensor(
                panels::product::<bf16>(elements(&x), elements(&weight), bias, order, sizes),
                shape,
            ),
        }
    })
}

/// By an [`Engine`](super::product::Engine).
pub(super) mod by_panels {
    use std::ops::Range;
    use std::sync::Arc;

    use burn::tensor::Shape;
    #[cfg(target_arch = "x86_64")]
    use burn::tensor::bf16;
    use burn_flex::FlexTensor;

    use super::super::number::{Line, Number};
    use super::super::product::{Engine, Rows, Sink, WIDTH, multiply, row_blocks};
    #[cfg(target_arch = "x86_64")]
    use super::super::simd::Avx512;
    use super::super::simd::{LANES, Simd};
    #[cfg(target_arch = "x86_64")]
    use super::super::store::round;
    use super::super::store::{Bias, write};
    use super::super::weights::{Packed, Panels, Plain, Transposed};
    use super::super::{Target, Weights};
    use super::Order;
    use crate::WeightCache;
    use crate::flex::elementwise::filled;
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

    impl<S: Simd> Sink<S> for Lines<'_, f32> {
        #[inline(always)]
        unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32], step: usize) {
            let bias = self.bias(columns.clone());
            for (row, sums) in rows.zip(sums.chunks(step)) {
                // SAFETY: the place lies in the result, and no other task has it; the processor has what it takes.
                unsafe {
                    let place = self.target.at(row * self.columns + columns.start);
                    write::<S>(&sums[..columns.len()], bias, place);
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    impl Sink<Avx512> for Lines<'_, bf16> {
        #[inline(always)]
        unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32], step: usize) {
            let bias = self.bias(columns.clone());
            for (row, sums) in rows.zip(sums.chunks(step)) {
                // SAFETY: as above.
                unsafe {
                    let place = self.target.at(row * self.columns + columns.start);
                    round(&sums[..columns.len()], bias, place);
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

    impl<T, S: Simd> Sink<S> for Crossed<'_, T>
    where
        for<'a> Lines<'a, T>: Sink<S>,
    {
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
                            let mut words = [S::splat(0.0); LANES];
                            for (words, sums) in words.iter_mut().zip(sums.chunks(step)) {
                                *words = S::load(sums.as_ptr().add(column));
                            }
                            for (i, words) in S::transpose(words).into_iter().enumerate() {
                                let line = &mut turned[(column + i) * (WIDTH / LANES) + block];
                                S::store(words, std::ptr::from_mut(line).cast());
                            }
                        }
                    }
                }
                // SAFETY: the caller's word.
                unsafe { self.0.store(columns.clone(), slab, Line::numbers_mut(&mut turned), WIDTH) };
            }
        }
    }

    /// The panels of a weight that its cache has, or has room for, or that are worth making for one call.
    fn panels<T: Number<E::Simd>, E: Engine<T>>(
        cache: &WeightCache,
        weight: &FlexTensor,
        data: &[T],
        order: Order,
        [rows, columns, depth]: [usize; 3],
    ) -> Option<Arc<Panels>> {
        let blocks = row_blocks::<T, E>(rows, columns);
        let once = |matrix: &dyn Fn() -> Panels| (E::PACKS_ONCE && blocks > 1).then(|| Arc::new(matrix()));
        if order == Order::Plain {
            // its lines lie as those of a panel do: there is little to save
            return once(&|| Panels::new::<T, E::Simd>(&Plain { data, columns, step: columns }, depth));
        }
        let pack = || Panels::new::<T, E::Simd>(&Transposed { data, columns, step: depth }, depth);
        // how often a call would do it otherwise
        let uses = if E::PACKS_ONCE { 1 } else { blocks };
        kept(cache, weight, Panels::bytes::<T>(columns, depth), uses, pack).or_else(|| once(&pack))
    }

    /// The product with a weight: contiguous, as it is stored, and the cache that may keep its panels.
    pub(super) fn product<T: Number<E::Simd>, E: Engine<T>>(
        x: &FlexTensor,
        (weight, as_stored, cache): (&FlexTensor, &FlexTensor, &WeightCache),
        bias: Option<&[f32]>,
        order: Order,
        sizes: [usize; 3],
    ) -> FlexTensor
    where
        for<'a> Lines<'a, T>: Sink<E::Simd>,
    {
        let [rows, columns, depth] = sizes;
        let (x, weight) = (T::of(x), T::of(weight));
        let crosses = !E::PACKS_ONCE && order == Order::Transposed && rows <= FEW;
        let panels = if crosses { None } else { panels::<T, E>(cache, as_stored, weight, order, sizes) };
        // SAFETY: the product's rows and columns are all that `out` has, and each is stored.
        let data = unsafe {
            filled(rows * columns, |out| {
                let target = Target::new(out);
                let sink = Lines { target, columns, bias };
                if crosses {
                    let features = Rows { data: weight, count: columns, depth, step: depth };
                    let x = Transposed { data: x, columns: rows, step: depth };
                    return multiply::<T, E>(features, &x, &Crossed(sink), Weights::Rows);
                }
                let x = Rows { data: x, count: rows, depth, step: depth };
                match (&panels, order) {
                    (Some(panels), _) => {
                        multiply::<T, E>(x, &Packed { panels, columns }, &sink, Weights::Columns)
                    }
                    (_, Order::Transposed) => {
                        let weight = Transposed { data: weight, columns, step: depth };
                        multiply::<T, E>(x, &weight, &sink, Weights::Columns)
                    }
                    (_, Order::Plain) => {
                        let weight = Plain { data: weight, columns, step: columns };
                        multiply::<T, E>(x, &weight, &sink, Weights::Columns)
                    }
                }
            })
        };
        T::tensor(data, Shape::new([rows, columns]))
    }
}
