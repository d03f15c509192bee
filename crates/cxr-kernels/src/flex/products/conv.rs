//! Convolution as one product: filters times unfolded pixels, of which a panel at a time exists.

use burn_flex::FlexTensor;

use super::Path;

/// `x` `[n, c, h, w]`, `weight` `[out, c, kh, kw]`, `bias` `[out]`, all f32 or all bf16: `[n, out, h', w']`; `None` where the
/// processor has no instructions for it.
pub(in super::super) fn conv2d(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
    stride: usize,
    padding: usize,
) -> Option<FlexTensor> {
    #[cfg(target_arch = "x86_64")]
    {
        use burn::tensor::{Shape, TensorMetadata, bf16};

        use super::super::conv::Geometry;
        use super::super::elementwise::{contiguous, slice, tensor};
        use super::super::half::{elements, half_tensor, widened};

        let path = Path::of(x.dtype());
        if !matches!(path, Path::Single | Path::Bf16) {
            return None;
        }
        let (x, weight) = (contiguous(x.clone()), contiguous(weight.clone()));
        let bias = bias.cloned().map(widened);
        let geometry = Geometry::new(&x.shape(), &weight.shape(), stride, padding);
        let [channels, height, width] = geometry.output;
        let shape = Shape::new([geometry.batch, channels, height, width]);
        Some(match path {
            Path::Single => {
                tensor(by_vectors::conv2d(slice(&x), slice(&weight), bias.as_deref(), &geometry), shape)
            }
            _ => half_tensor(
                by_vectors::conv2d::<bf16>(elements(&x), elements(&weight), bias.as_deref(), &geometry),
                shape,
            ),
        })
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (x, weight, bias, stride, padding, Path::General);
        None
    }
}

/// On AVX-512.
#[cfg(target_arch = "x86_64")]
mod by_vectors {
    use std::ops::Range;

    use burn::tensor::bf16;

    use super::super::Target;
    use super::super::product::{Bias, Number, Rows, Sink, multiply, round, write};
    use super::super::unfolded::Unfolded;
    use crate::flex::conv::Geometry;
    use crate::flex::elementwise::filled;

    /// The result `[n, channels, plane]`, with the biases of its channels.
    pub(super) struct Planes<'a, T> {
        target: Target<T>,
        channels: usize,
        plane: usize,
        bias: Option<&'a [f32]>,
    }

    impl<T> Planes<'_, T> {
        /// Hands on the sums of a row in runs that lie side by side in one image, with their bias and place.
        ///
        /// # Safety
        /// Row and columns must be those of the product.
        unsafe fn runs(
            &self,
            row: usize,
            columns: Range<usize>,
            sums: &[f32],
            store: impl Fn(&[f32], Bias<'_>, *mut T),
        ) {
            let bias = Bias::All(self.bias.map_or(0.0, |bias| bias[row]));
            let mut done = columns.start;
            while done < columns.end {
                // as far as this image goes
                let (image, pixel) = (done / self.plane, done % self.plane);
                let end = ((image + 1) * self.plane).min(columns.end);
                // SAFETY: the place lies in the result.
                let place = unsafe { self.target.at((image * self.channels + row) * self.plane + pixel) };
                store(&sums[done - columns.start..end - columns.start], bias, place);
                done = end;
            }
        }
    }

    impl Sink for Planes<'_, f32> {
        unsafe fn store(&self, row: usize, columns: Range<usize>, sums: &[f32]) {
            // SAFETY: no other task has these places, of which there are as many as sums; the processor has what it takes.
            unsafe { self.runs(row, columns, sums, |sums, bias, place| write(sums, bias, place)) };
        }
    }

    impl Sink for Planes<'_, bf16> {
        unsafe fn store(&self, row: usize, columns: Range<usize>, sums: &[f32]) {
            // SAFETY: as above.
            unsafe { self.runs(row, columns, sums, |sums, bias, place| round(sums, bias, place)) };
        }
    }

    pub(super) fn conv2d<T: Number + Default>(
        x: &[T],
        weight: &[T],
        bias: Option<&[f32]>,
        geometry: &Geometry,
    ) -> Vec<T>
    where
        for<'a> Planes<'a, T>: Sink,
    {
        let [channels, height, width] = geometry.output;
        let depth = geometry.depth();
        let rows = Rows { data: weight, count: channels, depth, step: depth };
        let columns = Unfolded::new(geometry, x);
        // SAFETY: the product's rows and columns are all that `out` has, and each is stored.
        unsafe {
            filled(geometry.batch * geometry.output_len(), |out| {
                let target = Target::new(out);
                let sink = Planes { target, channels, plane: height * width, bias };
                multiply(rows, &columns, &sink);
            })
        }
    }
}
