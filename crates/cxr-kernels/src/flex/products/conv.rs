//! Convolution as one product: filters times unfolded pixels, of which a panel at a time exists.

use burn::tensor::DType;
use burn_flex::FlexTensor;

use super::Path;

/// `x` `[n, c, h, w]`, `weight` `[out, c, kh, kw]`, `bias` `[out]`, all bf16: `[n, out, h', w']`; `None` where the
/// processor has no instructions for it.
pub(in super::super) fn conv2d(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
    stride: usize,
    padding: usize,
) -> Option<FlexTensor> {
    if x.dtype() != DType::BF16 {
        return None;
    }
    match Path::of(DType::BF16) {
        #[cfg(target_arch = "x86_64")]
        Path::Bf16 => Some(bf16s::conv2d(x.clone(), weight.clone(), bias.cloned(), stride, padding)),
        _ => None,
    }
}

/// On AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
mod bf16s {
    use std::ops::Range;

    use burn::tensor::{Shape, TensorMetadata, bf16};
    use burn_flex::FlexTensor;

    use super::super::Target;
    use super::super::product::{Bias, Rows, Sink, multiply, round};
    use super::super::unfolded::Unfolded;
    use crate::flex::conv::Geometry;
    use crate::flex::elementwise::{contiguous, filled};
    use crate::flex::half::{elements, half_tensor, widened};

    /// The result `[n, channels, plane]`, with the biases of its channels.
    struct Planes<'a> {
        target: Target<bf16>,
        channels: usize,
        plane: usize,
        bias: Option<&'a [f32]>,
    }

    impl Sink for Planes<'_> {
        unsafe fn store(&self, row: usize, columns: Range<usize>, sums: &[f32]) {
            let bias = Bias::All(self.bias.map_or(0.0, |bias| bias[row]));
            let mut done = columns.start;
            while done < columns.end {
                // as far as this image goes
                let (image, pixel) = (done / self.plane, done % self.plane);
                let end = ((image + 1) * self.plane).min(columns.end);
                let sums = &sums[done - columns.start..end - columns.start];
                // SAFETY: the place lies in the result, and no other task has it; the processor has what it takes.
                unsafe {
                    let place = self.target.at((image * self.channels + row) * self.plane + pixel);
                    round(sums, bias, place);
                }
                done = end;
            }
        }
    }

    pub(super) fn conv2d(
        x: FlexTensor,
        weight: FlexTensor,
        bias: Option<FlexTensor>,
        stride: usize,
        padding: usize,
    ) -> FlexTensor {
        let (x, weight, bias) = (contiguous(x), contiguous(weight), bias.map(widened));
        let geometry = Geometry::new(&x.shape(), &weight.shape(), stride, padding);
        let [channels, height, width] = geometry.output;
        let rows = Rows { data: elements(&weight), count: channels, depth: geometry.depth() };
        let columns = Unfolded::new(&geometry, elements(&x));
        // SAFETY: the product's rows and columns are all that `out` has, and each is stored.
        let out = unsafe {
            filled(geometry.batch * geometry.output_len(), |out| {
                let target = Target::new(out);
                let sink = Planes { target, channels, plane: height * width, bias: bias.as_deref() };
                multiply(rows, &columns, &sink);
            })
        };
        half_tensor(out, Shape::new([geometry.batch, channels, height, width]))
    }
}
