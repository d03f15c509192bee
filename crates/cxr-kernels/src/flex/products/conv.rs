//! Convolution as one product: filters times unfolded pixels, of which a panel at a time exists.

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;

use super::super::conv::Geometry;
use super::super::elementwise::contiguous;
use super::super::half::widened;
use super::{Path, by_engine};

/// `x` `[n, c, h, w]`, `weight` `[out, c, kh, kw]`, `bias` `[out]`, all of one dtype: `[n, out, h', w']`; `None` for
/// f64.
pub(in super::super) fn conv2d(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
    stride: usize,
    padding: usize,
) -> Option<FlexTensor> {
    conv2d_by(Path::of(x.dtype()), x, weight, bias, stride, padding)
}

/// [`conv2d`] by one of the paths for such numbers.
pub(super) fn conv2d_by(
    path: Path,
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
    stride: usize,
    padding: usize,
) -> Option<FlexTensor> {
    let (x, weight) = (contiguous(x.clone()), contiguous(weight.clone()));
    let bias = bias.cloned().map(widened);
    let geometry = Geometry::new(&x.shape(), &weight.shape(), stride, padding);
    by_engine!(path, x.dtype(), by_panels::conv2d(&x, &weight, bias.as_deref(), &geometry))
}

/// The gradient of a convolution by its input, which has the shape `x_shape`, all of one dtype; `None` where the processor
/// has no instructions for it, or the padding is as large as the kernel.
///
/// It is itself one, of the output's gradient with turned kernels. With a stride most pixels of that gradient are zeros.
pub(in super::super) fn conv2d_x_backward(
    x_shape: &Shape,
    weight: &FlexTensor,
    grad: &FlexTensor,
    stride: usize,
    padding: usize,
) -> Option<FlexTensor> {
    conv2d_x_backward_by(Path::of(grad.dtype()), x_shape, weight, grad, stride, padding)
}

/// [`conv2d_x_backward`] by one of the paths for such numbers.
pub(super) fn conv2d_x_backward_by(
    path: Path,
    x_shape: &Shape,
    weight: &FlexTensor,
    grad: &FlexTensor,
    stride: usize,
    padding: usize,
) -> Option<FlexTensor> {
    let [_, _, kh, kw] = weight.shape().dims();
    if kh != kw || padding >= kh {
        return None;
    }
    let (weight, grad) = (contiguous(weight.clone()), contiguous(grad.clone()));
    let geometry = Geometry::new(x_shape, &weight.shape(), stride, padding);
    by_engine!(path, grad.dtype(), by_panels::x_backward(&grad, &weight, &geometry))
}

/// By an [`Engine`](super::product::Engine).
mod by_panels {
    use std::borrow::Cow;
    use std::ops::Range;

    use burn::tensor::Shape;
    use burn_flex::FlexTensor;

    use super::super::number::Number;
    use super::super::product::{Engine, Operand, Rows, Sink, multiply};
    use super::super::store::Bias;
    use super::super::turned::{Turned, spread};
    use super::super::unfolded::Unfolded;
    use super::super::{Target, Weights};
    use crate::flex::conv::Geometry;
    use crate::flex::elementwise::filled;
    use crate::flex::half::{elements, tensor_of};

    /// The result `[n, channels, plane]`, with the biases of its channels.
    pub(super) struct Planes<'a, T> {
        target: Target<T>,
        channels: usize,
        plane: usize,
        bias: Option<&'a [f32]>,
    }

    impl<T> Planes<'_, T> {
        /// Hands on sums in runs that lie side by side in one row and image, with their bias and place.
        ///
        /// # Safety
        /// Rows and columns must be those of the product.
        #[inline(always)]
        unsafe fn runs(
            &self,
            rows: Range<usize>,
            columns: Range<usize>,
            sums: &mut [f32],
            step: usize,
            store: impl Fn(&[f32], Bias<'_>, *mut T),
        ) {
            let mut done = columns.start;
            while done < columns.end {
                // as far as this image goes
                let (image, pixel) = (done / self.plane, done % self.plane);
                let end = ((image + 1) * self.plane).min(columns.end);
                let run = done - columns.start..end - columns.start;
                for (row, sums) in rows.clone().zip(sums.chunks(step)) {
                    let bias = Bias::All(self.bias.map_or(0.0, |bias| bias[row]));
                    // SAFETY: the place lies in the result.
                    let place = unsafe { self.target.at((image * self.channels + row) * self.plane + pixel) };
                    store(&sums[run.clone()], bias, place);
                }
                done = end;
            }
        }
    }

    impl<T: Number<E>, E: Engine> Sink<E> for Planes<'_, T> {
        #[inline(always)]
        unsafe fn store(&self, rows: Range<usize>, columns: Range<usize>, sums: &mut [f32], step: usize) {
            // SAFETY: no other task has these places, of which there are as many as sums; the rest is the caller's word.
            unsafe {
                self.runs(
                    rows,
                    columns,
                    sums,
                    step,
                    #[inline(always)]
                    |sums, bias, place| T::write(sums, bias, place),
                );
            }
        }
    }

    pub(super) fn conv2d<T: Number<E>, E: Engine>(
        x: &FlexTensor,
        weight: &FlexTensor,
        bias: Option<&[f32]>,
        geometry: &Geometry,
    ) -> FlexTensor {
        let depth = geometry.depth();
        let rows = Rows { data: elements::<T>(weight), count: geometry.output[0], depth, step: depth };
        convolve::<T, E>(elements::<T>(x), rows, bias, geometry)
    }

    /// The gradient by the input of a convolution of this geometry.
    pub(super) fn x_backward<T: Number<E>, E: Engine>(
        grad: &FlexTensor,
        weight: &FlexTensor,
        geometry: &Geometry,
    ) -> FlexTensor {
        let (grad, weight) = (elements::<T>(grad), elements::<T>(weight));
        let Geometry { batch, input, output, kernel, stride, padding } = *geometry;
        let ([c, h, w], [out, height, width]) = (input, output);
        // so many pixels give the input's with kernels that lie at all of them
        let [h, w] = [h, w].map(|size| size + 2 * padding + 1 - kernel[0]);
        let padding = kernel[0] - 1 - padding;
        let back = Geometry { batch, input: [out, h, w], output: input, kernel, stride: 1, padding };
        let grad =
            if stride == 1 { grad.into() } else { Cow::from(spread(grad, [height, width], stride, [h, w])) };
        let kernels = Turned { weight, out, c, taps: kernel[0] * kernel[1] };
        convolve::<T, E>(&grad, kernels, None, &back)
    }

    /// Filters, one in each row, over the pixels of `x`.
    fn convolve<T: Number<E>, E: Engine>(
        x: &[T],
        filters: impl Operand<E>,
        bias: Option<&[f32]>,
        geometry: &Geometry,
    ) -> FlexTensor {
        let [channels, height, width] = geometry.output;
        let columns = Unfolded::new(geometry, x);
        // SAFETY: the product's rows and columns are all that `out` has, and each is stored.
        let data = unsafe {
            filled(geometry.batch * geometry.output_len(), |out| {
                let target = Target::new(out);
                let sink = Planes::<T> { target, channels, plane: height * width, bias };
                multiply::<E>(filters, &columns, &sink, Weights::Rows);
            })
        };
        tensor_of(data, Shape::new([geometry.batch, channels, height, width]))
    }
}
