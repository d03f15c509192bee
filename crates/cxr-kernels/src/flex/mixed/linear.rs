//! Linear layers: every token is a row, every output feature a column.

use burn::tensor::{DType, Shape, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;

use super::super::elementwise::contiguous;
use super::super::half::{elements, half_tensor, widened};
use super::{Path, panels};

/// `x @ weight^T + bias` for `x` `[rows, in]`, `weight` `[out, in]`, `bias` `[out]`, all f16 or all bf16.
pub(in super::super) fn linear(x: FlexTensor, weight: FlexTensor, bias: Option<FlexTensor>) -> FlexTensor {
    product(Path::of(x.dtype()), x, weight, bias, Order::Transposed)
}

/// `grad @ weight` for `grad` `[rows, out]`, `weight` `[out, in]`: the gradient of [`linear`] by `x`.
pub(in super::super) fn linear_x_backward(weight: FlexTensor, grad: FlexTensor) -> FlexTensor {
    product(Path::of(grad.dtype()), grad, weight, None, Order::Plain)
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
) -> FlexTensor {
    let [rows, depth] = x.shape().dims();
    let of_weight: [usize; 2] = weight.shape().dims();
    let columns = if order == Order::Transposed { of_weight[0] } else { of_weight[1] };
    let sizes = [rows, columns, depth];
    let (x, weight, bias) = (contiguous(x), contiguous(weight), bias.map(widened));
    let (bias, shape) = (bias.as_deref(), Shape::new([rows, columns]));
    match (path, x.dtype()) {
        #[cfg(target_arch = "x86_64")]
        (Path::Bf16, _) => {
            half_tensor(bf16s::product(elements(&x), elements(&weight), bias, order, sizes), shape)
        }
        (Path::Panels, DType::F16) => {
            half_tensor(panels::product::<f16>(elements(&x), elements(&weight), bias, order, sizes), shape)
        }
        (Path::Panels, _) => {
            half_tensor(panels::product::<bf16>(elements(&x), elements(&weight), bias, order, sizes), shape)
        }
    }
}

/// On AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
mod bf16s {
    use std::ops::Range;

    use burn::tensor::bf16;

    use super::super::Target;
    use super::super::product::{Bias, Rows, Sink, multiply, round};
    use super::super::weights::{Plain, Transposed};
    use super::Order;
    use crate::flex::elementwise::filled;

    /// The result `[rows, columns]`, with the biases of its columns.
    struct Lines<'a> {
        target: Target<bf16>,
        columns: usize,
        bias: Option<&'a [f32]>,
    }

    impl Sink for Lines<'_> {
        unsafe fn store(&self, row: usize, columns: Range<usize>, sums: &[f32]) {
            let bias = self.bias.map_or(Bias::All(0.0), |bias| Bias::Each(&bias[columns.clone()]));
            // SAFETY: the place lies in the result, and no other task has it; the processor has what it takes.
            unsafe { round(sums, bias, self.target.at(row * self.columns + columns.start)) };
        }
    }

    pub(super) fn product(
        x: &[bf16],
        weight: &[bf16],
        bias: Option<&[f32]>,
        order: Order,
        [rows, columns, depth]: [usize; 3],
    ) -> Vec<bf16> {
        // SAFETY: the product's rows and columns are all that `out` has, and each is stored.
        unsafe {
            filled(rows * columns, |out| {
                let target = Target::new(out);
                let sink = Lines { target, columns, bias };
                let rows = Rows { data: x, count: rows, depth };
                match order {
                    Order::Transposed => multiply(rows, &Transposed { data: weight, columns, depth }, &sink),
                    Order::Plain => multiply(rows, &Plain { data: weight, columns }, &sink),
                }
            })
        }
    }
}
