//! The loss that trains the heads.

use burn::tensor::{Tensor, backend::Backend};

/// Mean binary cross entropy of `logits` `[n, k]` against `targets` `[n, k]` in [0, 1], as a tensor of one value.
///
/// `mask` `[n, k]` weighs each label, 0 for unknown ones; the mean is over its sum (over all labels without
/// one), and 0 where it masks everything. `positive_weights` `[k]` multiply the loss of the positives of their
/// finding: negatives over positives evens out a rare one.
///
/// Equal to PyTorch's `BCEWithLogitsLoss(pos_weight)`. Softplus is taken as `(|x| + x) / 2 + ln(1 + exp(-|x|))`:
/// it neither overflows nor loses its slope of 1/2 at a logit of exactly 0, where new heads may start.
pub fn multi_label_loss<B: Backend>(
    logits: Tensor<B, 2>,
    targets: Tensor<B, 2>,
    mask: Option<Tensor<B, 2>>,
    positive_weights: Option<Tensor<B, 1>>,
) -> Tensor<B, 1> {
    let [n, k] = logits.dims();
    // ln(1 + exp(-x)) = (|x| - x) / 2 + ln(1 + exp(-|x|))
    let size = logits.clone().abs();
    let softplus = (size.clone() - logits.clone()).mul_scalar(0.5) + size.neg().exp().log1p();
    let positives = match positive_weights {
        Some(weights) => targets.clone() * (weights - 1.0).reshape([1, k]) + 1.0,
        None => Tensor::ones([1, k], &logits.device()),
    };
    let losses = (targets.neg() + 1.0) * logits + positives * softplus;
    match mask {
        Some(mask) => (losses * mask.clone()).sum() / mask.sum().clamp_min(1e-6),
        None => losses.sum().div_scalar((n * k) as f32),
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use cxr_kernels::Flex;

    use super::*;

    type B = Autodiff<Flex>;

    fn rows<const N: usize>(values: [[f32; N]; 2]) -> Tensor<B, 2> {
        Tensor::from_floats(values, &Default::default())
    }

    fn scalar(tensor: Tensor<B, 1>) -> f32 {
        tensor.into_scalar()
    }

    const LOGITS: [[f32; 3]; 2] = [[0.0, 2.0, -3.0], [0.5, -80.0, 90.0]];
    const TARGETS: [[f32; 3]; 2] = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]];

    /// -w y ln p - (1 - y) ln (1 - p), in f64.
    fn naive(mask: [[f64; 3]; 2], weights: [f64; 3]) -> f64 {
        let (mut sum, mut total) = (0.0, 0.0);
        for i in 0..2 {
            for j in 0..3 {
                let (x, y) = (f64::from(LOGITS[i][j]), f64::from(TARGETS[i][j]));
                let loss = weights[j] * y * (-x).exp().ln_1p() + (1.0 - y) * (x + (-x).exp().ln_1p());
                sum += mask[i][j] * loss;
                total += mask[i][j];
            }
        }
        sum / total
    }

    #[test]
    fn values_follow_the_definition_with_mask_and_weights() {
        let loss = |mask, weights| scalar(multi_label_loss(rows(LOGITS), rows(TARGETS), mask, weights));
        let plain = naive([[1.0; 3]; 2], [1.0; 3]) as f32;
        assert!((loss(None, None) - plain).abs() < 1e-5 * plain);
        let weights = Tensor::from_floats([3.0, 0.5, 2.0], &Default::default());
        let masked = naive([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], [3.0, 0.5, 2.0]) as f32;
        let found = loss(Some(rows([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])), Some(weights));
        assert!((found - masked).abs() < 1e-5 * masked, "{found} against {masked}");
        assert_eq!(loss(Some(rows([[0.0; 3]; 2])), None), 0.0);
    }

    #[test]
    fn the_gradient_is_the_probability_less_the_target_also_at_zero() {
        let logits = rows(LOGITS).require_grad();
        let gradients = multi_label_loss(logits.clone(), rows(TARGETS), None, None).backward();
        let found = logits.grad(&gradients).unwrap().into_data().to_vec::<f32>().unwrap();
        for (i, found) in found.iter().enumerate() {
            let (x, y) = (LOGITS[i / 3][i % 3], TARGETS[i / 3][i % 3]);
            let expected = ((1.0 / (1.0 + (-x).exp())) - y) / 6.0;
            assert!((found - expected).abs() < 1e-6, "logit {x}: {found} against {expected}");
        }
    }
}
