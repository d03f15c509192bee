//! SiLU and its gradient.

use burn_flex::FlexTensor;

use super::elementwise::{Binary, Unary, map, zip};
use super::fast_math::{mul_add, sigmoids};

/// `x * sigmoid(x)`; relative error below 4e-7. NaN at minus infinity, as the definition gives.
pub(super) struct Silu;

impl Unary for Silu {
    #[inline(always)]
    fn apply<const FMA: bool>(x: f32) -> f32 {
        x * sigmoids::<FMA>(x).0
    }
}

/// `grad * s * (1 + x * (1 - s))`, `s = sigmoid(x)`.
pub(super) struct SiluBackward;

impl Binary for SiluBackward {
    #[inline(always)]
    fn apply<const FMA: bool>(x: f32, grad: f32) -> f32 {
        let (s, complement) = sigmoids::<FMA>(x);
        grad * (s * mul_add::<FMA>(x, complement, 1.0))
    }
}

/// SiLU of every element.
pub(super) fn forward(x: FlexTensor) -> FlexTensor {
    map::<Silu>(x)
}

/// Gradient of [`forward`].
pub(super) fn backward(x: FlexTensor, grad: FlexTensor) -> FlexTensor {
    zip::<SiluBackward>(x, grad)
}
