//! Against the definition in f64, on every kind of vectors that this processor has.

use burn::tensor::{Shape, bf16, f16};
use proptest::prelude::*;

use super::super::elementwise::filled;
use super::super::fast_math::Vectors;
use super::super::half::Half;
use super::{Kernels, Plan, Transformed, applies, convolve};

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32) / (1_u64 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

/// The definition, `weight` `[out, c, 3, 3]`.
fn reference(
    [batch, c, h, w]: [usize; 4],
    out: usize,
    padding: usize,
    x: &[f32],
    weight: impl Fn(usize, usize, usize) -> f32,
    bias: &[f32],
) -> Vec<f64> {
    let [out_h, out_w] = [h, w].map(|size| size + 2 * padding - 2);
    let mut y = vec![0.0; batch * out * out_h * out_w];
    for (i, y) in y.iter_mut().enumerate() {
        let (column, row) = (i % out_w, i / out_w % out_h);
        let (o, image) = (i / (out_w * out_h) % out, i / (out_w * out_h * out));
        *y = f64::from(bias[o]);
        for channel in 0..c {
            for tap in 0..9 {
                let from_y = (row + tap / 3).wrapping_sub(padding);
                let from_x = (column + tap % 3).wrapping_sub(padding);
                if from_y < h && from_x < w {
                    let x = x[((image * c + channel) * h + from_y) * w + from_x];
                    *y += f64::from(x) * f64::from(weight(o, channel, tap));
                }
            }
        }
    }
    y
}

/// The norm of the difference over the norm of the reference.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |squares: &mut dyn Iterator<Item = f64>| squares.sum::<f64>().sqrt();
    let difference =
        norm(&mut found.iter().zip(expected).map(|(found, expected)| (f64::from(*found) - expected).powi(2)));
    difference / norm(&mut expected.iter().map(|value| value * value))
}

/// Asserts that kernels in half precision give the bits that they give in f32, transformed before or not.
fn check_halves<H: Half>(plan: Plan, vectors: Vectors, x: &[f32], kernels: Kernels<'_, f32>) {
    // SAFETY: `narrow` writes all of it.
    let narrow = unsafe { filled(kernels.data.len(), |to| H::narrow(kernels.data, to)) };
    let mut wide = vec![0.0; narrow.len()];
    H::widen(&narrow, &mut wide);
    let Kernels { outputs, inputs, rotated, .. } = kernels;
    let wide = Kernels { data: &wide, outputs, inputs, rotated };
    let narrow = Kernels { data: &narrow, outputs, inputs, rotated };
    let expected = convolve(plan, vectors, x, wide, None, None);
    assert!(convolve(plan, vectors, x, narrow, None, None) == expected, "{vectors:?}: bits of halves");
    let transformed = Some(Transformed::new(vectors, narrow).into());
    assert!(convolve(plan, vectors, x, narrow, None, transformed) == expected, "{vectors:?}: bits of halves");
}

/// Asserts that `weight` and `x` from `seed` give the definition's result, on every kind of vectors.
fn check([batch, c, h, w]: [usize; 4], out: usize, padding: usize, rotated: bool, seed: u64) {
    let (x, data) = (numbers(batch * c * h * w, seed), numbers(out * c * 9, seed ^ 1));
    let bias = numbers(out, seed ^ 2);
    let weight = |o: usize, i: usize, tap: usize| match rotated {
        false => data[(o * c + i) * 9 + tap],
        true => data[(i * out + o) * 9 + 8 - tap],
    };
    let expected = reference([batch, c, h, w], out, padding, &x, weight, &bias);
    let plan = Plan::new(batch, [c, h, w], [out, h + 2 * padding - 2, w + 2 * padding - 2], padding);
    let kernels = Kernels { data: &data, outputs: out, inputs: c, rotated };
    for vectors in [Vectors::Avx512, Vectors::Avx2, Vectors::Portable] {
        if vectors.are_here() {
            let y = convolve(plan, vectors, &x, kernels, Some(&bias), None);
            let error = error(&y, &expected);
            assert!(error < 4e-6, "{vectors:?}: {error:e}");
            let transformed = Some(Transformed::new(vectors, kernels).into());
            assert_eq!(
                convolve(plan, vectors, &x, kernels, Some(&bias), transformed),
                y,
                "{vectors:?}: bits"
            );
            check_halves::<bf16>(plan, vectors, &x, kernels);
            check_halves::<f16>(plan, vectors, &x, kernels);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn it_is_the_convolution_on_all_vectors(
        (batch, c, h, w, out) in (1..4_usize, 1..80_usize, 1..20_usize, 1..40_usize, 1..70_usize),
        (padding, rotated) in (0..3_usize, any::<bool>()),
        seed in any::<u64>(),
    ) {
        prop_assume!(h.min(w) + 2 * padding >= 3);
        check([batch, c, h, w], out, padding, rotated, seed);
    }
}

#[test]
fn many_channels_cost_no_digits() {
    // in one sum from the first channel to the last, the error would be 1e-5
    for rotated in [false, true] {
        check([1, 2560, 8, 9], 40, 1, rotated, 5);
    }
}

#[test]
fn it_is_chosen_by_layer_and_image() {
    let layer = |out, c, side, kernel, stride| {
        let weight = Shape::new([out, c, kernel, kernel]);
        applies(&Shape::new([1, c, side, side]), &weight, stride, kernel / 2)
    };
    assert!(layer(320, 64, 16, 3, 1));
    assert!(!layer(320, 64, 16, 3, 2), "stride");
    assert!(!layer(320, 64, 16, 1, 1), "1x1");
    assert!(!layer(320, 64, 2, 3, 1), "small images");
    assert!(!layer(128, 3, 64, 3, 1), "few channels");
}
