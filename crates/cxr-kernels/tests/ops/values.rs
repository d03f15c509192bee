//! Values where `gradients` does not look: random odd sizes, the ends of the number line, other ranks, half
//! precision.
//!
//! Bounds are relative to the largest element of the f64 reference; f32 has 24 bits, that is 6e-8.

use burn::tensor::{DType, Shape, Tensor, bf16, f16};
use cxr_kernels::{DiffusionBackend, Flex, WeightCache, ops, plain};
use proptest::prelude::*;

use crate::reference::{self, Conv};
use crate::{assert_close, cooked, numbers, raw, read, tensor};

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn conv2d_at_any_size(
        (n, c, h, w, out) in (1..4_usize, 1..9_usize, 1..12_usize, 1..40_usize, 1..9_usize),
        (kernel, stride, padding) in (1..4_usize, 1..4_usize, 0..3_usize),
        seed in any::<u64>(),
    ) {
        prop_assume!(h.min(w) + 2 * padding >= kernel);
        let sizes = Conv { x: [n, c, h, w], out, kernel, stride, padding };
        let (x, weight) = (numbers(n * c * h * w, seed), numbers(out * c * kernel * kernel, seed ^ 1));
        let bias = numbers(out, seed ^ 2);
        let expected = reference::conv2d(&sizes, &x, &weight, &bias);
        let y = ops::conv2d::<Flex>(
            tensor(&x, sizes.x),
            tensor(&weight, sizes.weight_shape()),
            Some(tensor(&bias, [out])),
            stride,
            padding,
            &WeightCache::new(),
        );
        let [out_h, out_w] = sizes.out_size();
        prop_assert_eq!(y.dims(), [n, out, out_h, out_w]);
        assert_close("conv2d", &read(y), &expected, 2e-6);
    }

    #[test]
    fn norms_at_any_size(
        (n, groups, width, plane) in (1..4_usize, 1..5_usize, 1..5_usize, 1..70_usize),
        offset in -100.0..100.0_f64,
        seed in any::<u64>(),
    ) {
        let c = groups * width;
        // A mean far from zero is what one-pass variances lose their digits to, and a group of one element, whose
        // variance is zero, makes the scale 300.
        let x: Vec<f64> =
            numbers(n * c * plane, seed).iter().map(|x| f64::from((x + offset) as f32)).collect();
        let (gamma, beta) = (numbers(c, seed ^ 1), numbers(c, seed ^ 2));
        let expected = reference::group_norm(&x, &gamma, &beta, plane, groups, 1e-5, reference::silu);
        let image: Tensor<Flex, 4> = tensor(&x, [n, c, plane, 1]);
        let y = ops::group_norm_silu(image, tensor(&gamma, [c]), tensor(&beta, [c]), groups, 1e-5);
        assert_close("group_norm_silu", &read(y), &expected, 3e-6);

        let (gamma, beta) = (numbers(plane, seed ^ 3), numbers(plane, seed ^ 4));
        let expected = reference::layer_norm(&x, &gamma, &beta, 1e-5);
        let rows: Tensor<Flex, 3> = tensor(&x, [n, c, plane]);
        let y = ops::layer_norm(rows, tensor(&gamma, [plane]), tensor(&beta, [plane]), 1e-5);
        assert_close("layer_norm", &read(y), &expected, 3e-6);
    }

    #[test]
    fn attention_at_any_size(
        (b, heads, n, m, d) in (1..3_usize, 1..4_usize, 1..40_usize, 1..40_usize, 1..20_usize),
        causal in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let (q, k) = (numbers(b * heads * n * d, seed), numbers(b * heads * m * d, seed ^ 1));
        let v = numbers(b * heads * m * d, seed ^ 2);
        let expected = reference::attention(&q, &k, &v, [n, m, d], causal);
        let [q, k, v]: [Tensor<Flex, 4>; 3] =
            [(&q, n), (&k, m), (&v, m)].map(|(x, tokens)| tensor(x, [b, heads, tokens, d]));
        let y = ops::attention(q, k, v, ops::AttentionOptions { causal });
        assert_close("attention", &read(y), &expected, 5e-6);
    }

    #[test]
    fn linear_and_geglu_at_any_size(
        (a, b, input, half) in (1..4_usize, 1..20_usize, 1..50_usize, 1..40_usize),
        seed in any::<u64>(),
    ) {
        let (x, weight) = (numbers(a * b * input, seed), numbers(2 * half * input, seed ^ 1));
        let bias = numbers(2 * half, seed ^ 2);
        let y = reference::linear(&x, &weight, &bias, input);
        let found = ops::linear::<Flex, 3>(
            tensor(&x, [a, b, input]),
            tensor(&weight, [2 * half, input]),
            Some(tensor(&bias, [2 * half])),
            &WeightCache::new(),
        );
        assert_close("linear", &read(found.clone()), &y, 2e-6);
        assert_close("geglu", &read(ops::geglu(found)), &reference::geglu(&y, half), 1e-5);
    }

    #[test]
    fn tokens_and_back_are_the_identity(
        [n, c, h, w] in [1..4_usize, 1..40, 1..9, 1..40],
        seed in any::<u64>(),
    ) {
        let x = numbers(n * c * h * w, seed);
        let image: Tensor<Flex, 4> = tensor(&x, [n, c, h, w]);
        let tokens = ops::image_to_tokens(image.clone());
        assert_close("image_to_tokens", &read(tokens.clone()), &reference::transpose(&x, c, h * w), 0.0);
        prop_assert_eq!(read(ops::tokens_to_image(tokens, h, w)), read(image));
    }
}

/// Each element to a relative error of its own, so that the tails count too.
fn assert_relative(what: &str, x: &[f64], found: &[f32], f: fn(f64) -> f64, tolerance: f64) {
    assert_eq!(x.len(), found.len());
    for (x, found) in x.iter().zip(found) {
        let (expected, found) = (f(*x), f64::from(*found));
        let error = (found - expected).abs() / expected.abs().max(f64::MIN_POSITIVE);
        assert!(error <= tolerance, "{what}({x}): {found:e}, expected {expected:e}, error {error:e}");
    }
}

#[test]
fn activations_hold_from_tail_to_tail() {
    // From where the result is about to leave f32's normal numbers.
    let from = |first: i32| (first..=800).map(|i| f64::from(i) / 8.0).collect::<Vec<_>>();
    let (wide, narrow) = (from(-85 * 8), from(-12 * 8));
    let input = |x: &[f64]| tensor::<Flex, 1>(x, [x.len()]);
    assert_relative("silu", &wide, &read(ops::silu(input(&wide))), reference::silu, 5e-7);
    assert_relative("gelu", &narrow, &read(ops::gelu(input(&narrow))), reference::gelu, 1e-6);
    // The plain body loses the lower tail to cancellation, as its formula does.
    let y = cooked::<Flex, 1>(plain::gelu::<Flex>(raw(input(&narrow))));
    assert_close("plain gelu", &read(y), &reference::each(&narrow, reference::gelu), 1e-6);
}

#[test]
fn activations_neither_overflow_nor_hide_nan() {
    let x: Tensor<Flex, 1> = Tensor::from_floats([-1e30, -200.0, 200.0, 1e30, f32::NAN], &Default::default());
    for f in [ops::silu, ops::gelu] {
        let y = read(f(x.clone()));
        assert_eq!(y[..4], [0.0, 0.0, 200.0, 1e30]);
        assert!(y[4].is_nan());
    }
}

#[test]
fn attention_survives_large_scores() {
    // Scores up to 1e4 overflow an exponential whose maximum is not taken off first.
    let [n, m, d] = [5, 300, 8];
    let scaled = |count, seed| numbers(count, seed).iter().map(|x| x * 32.0).collect::<Vec<_>>();
    let (q, k, v) = (scaled(n * d, 1), scaled(m * d, 2), numbers(m * d, 3));
    let shift =
        |x: &[f64]| -> Vec<f64> { x.iter().map(|x| f64::from((x / 4.0).round() as f32) * 4.0).collect() };
    let (q, k) = (shift(&q), shift(&k)); // short mantissas: the scores themselves are exact in f32
    // the reference takes no maximum off, and f64 ends at e^709: the same softmax from scores a constant lower
    let expected: Vec<f64> = q
        .chunks(d)
        .flat_map(|q| {
            let scores: Vec<f64> = k
                .chunks(d)
                .map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt())
                .collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let total: f64 = weights.iter().sum();
            let v = &v;
            (0..d)
                .map(move |c| weights.iter().enumerate().map(|(j, w)| w * v[j * d + c]).sum::<f64>() / total)
        })
        .collect();
    let tensors = || -> [Tensor<Flex, 4>; 3] {
        [(&q, n), (&k, m), (&v, m)].map(|(x, tokens)| tensor(x, [1, 1, tokens, d]))
    };
    // scores of some thousand, scaled: an f32 has 2e-4 left behind the point
    let [a, b, c] = tensors();
    assert_close("attention", &read(ops::attention(a, b, c, Default::default())), &expected, 1e-3);
    let [a, b, c] = tensors().map(raw);
    let y = cooked::<Flex, 4>(plain::attention::<Flex>(a, b, c, false));
    assert_close("plain attention", &read(y), &expected, 1e-3);
}

#[test]
fn half_precision_stays_near_f32() {
    let half =
        |count, shape: [usize; 4], seed, dtype| tensor::<Flex, 4>(&numbers(count, seed), shape).cast(dtype);
    // 11 and 8 bits; attention and norms take their statistics in f32, so only the ends are rounded.
    for (dtype, tolerance) in [(DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let x = half(2 * 4 * 5 * 7, [2, 4, 5, 7], 1, dtype);
        let weight = half(3 * 4 * 9, [3, 4, 3, 3], 2, dtype);
        let single = |x: &Tensor<Flex, 4>| -> Vec<f64> {
            read(x.clone().cast(DType::F32)).iter().map(|x| f64::from(*x)).collect()
        };
        let check = |what: &str, y: Tensor<Flex, 4>, expected: &[f64]| {
            assert_eq!(y.dtype(), dtype, "{what}");
            assert_close(what, &read(y.cast(DType::F32)), expected, tolerance);
        };
        check("silu", ops::silu(x.clone()), &reference::each(&single(&x), reference::silu));
        check("gelu", ops::gelu(x.clone()), &reference::each(&single(&x), reference::gelu));
        let sizes = Conv { x: [2, 4, 5, 7], out: 3, kernel: 3, stride: 1, padding: 1 };
        let y = ops::conv2d(x.clone(), weight.clone(), None, 1, 1, &WeightCache::new());
        check("conv2d", y, &reference::conv2d(&sizes, &single(&x), &single(&weight), &[]));
        let constant = |value: f64| tensor::<Flex, 1>(&[value; 4], [4]).cast(dtype);
        let y = ops::group_norm_silu(x.clone(), constant(1.0), constant(0.0), 2, 1e-5);
        let expected = reference::group_norm(&single(&x), &[1.0; 4], &[0.0; 4], 35, 2, 1e-5, reference::silu);
        check("group_norm_silu", y, &expected);
        let y = ops::attention(x.clone(), x.clone(), x.clone(), ops::AttentionOptions { causal: true });
        let q = single(&x);
        check("attention", y, &reference::attention(&q, &q, &q, [5, 5, 7], true));
    }
}

/// Kernels that convert a block at a time, in sizes of several blocks with a shorter last one: what they give is what
/// f32 gives, rounded.
#[test]
fn half_precision_is_f32_rounded_once() {
    fn check<const D: usize>(
        what: &str,
        x: &Tensor<Flex, D>,
        f: impl Fn(Tensor<Flex, D>, DType) -> Vec<f32>,
    ) {
        check_in(&[DType::F16, DType::BF16], what, x, f);
    }
    fn check_in<const D: usize>(
        dtypes: &[DType],
        what: &str,
        x: &Tensor<Flex, D>,
        f: impl Fn(Tensor<Flex, D>, DType) -> Vec<f32>,
    ) {
        for &dtype in dtypes {
            let x = x.clone().cast(dtype);
            let in_f32 = f(x.clone().cast(DType::F32), DType::F32);
            // not by `cast`: burn's goes by way of f64 and misses what is just above the middle of two numbers
            let round = |x: &f32| match dtype {
                DType::F16 => f16::from_f32(*x).to_f32(),
                _ => bf16::from_f32(*x).to_f32(),
            };
            let rounded: Vec<f32> = in_f32.iter().map(round).collect();
            assert_eq!(f(x, dtype), rounded, "{what} in {dtype:?}");
        }
    }
    fn in_f32<const D: usize>(y: Tensor<Flex, D>, dtype: DType) -> Vec<f32> {
        assert_eq!(y.dtype(), dtype);
        read(y.cast(DType::F32))
    }
    let ones = |count: usize, dtype| Tensor::<Flex, 1>::ones([count], (&Default::default(), dtype));
    let tokens = tensor::<Flex, 3>(&numbers(3 * 170 * 70, 1), [3, 170, 70]);
    check("silu", &tokens, |x, dtype| in_f32(ops::silu(x), dtype));
    check("gelu", &tokens, |x, dtype| in_f32(ops::gelu(x), dtype));
    check("add", &tokens, |x, dtype| in_f32(ops::add(x.clone(), x.flip([1])), dtype));
    check("geglu", &tokens, |x, dtype| in_f32(ops::geglu(x), dtype));
    check("tokens_to_image", &tokens, |x, dtype| in_f32(ops::tokens_to_image(x, 10, 17), dtype));
    check("layer_norm", &tokens, |x, dtype| {
        in_f32(ops::layer_norm(x, ones(70, dtype), ones(70, dtype), 1e-5), dtype)
    });
    let image = tensor::<Flex, 4>(&numbers(3 * 30 * 17 * 19, 2), [3, 30, 17, 19]);
    check("upsample", &image, |x, dtype| in_f32(ops::upsample(x, [34, 38]), dtype));
    check("join", &image, |x, dtype| in_f32(ops::join(x.clone(), x.flip([2])), dtype));
    check("image_to_tokens", &image, |x, dtype| in_f32(ops::image_to_tokens(x), dtype));
    check("group_norm_silu", &image, |x, dtype| {
        in_f32(ops::group_norm_silu(x, ones(30, dtype), ones(30, dtype), 6, 1e-5), dtype)
    });
    // split into heads, which lie side by side; where bf16 is multiplied as it is, attention rounds its weights too, and the
    // tests of `flex/products` have its error
    check_in(&[DType::F16], "attention", &tokens, |x, dtype| {
        let x = x.reshape([3, 170, 7, 10]).swap_dims(1, 2);
        in_f32(ops::attention(x.clone(), x.clone(), x, Default::default()), dtype)
    });
}

#[test]
fn convolution_with_more_weights_than_the_cache_holds() {
    // several images in a tile, several tiles in an image, a tile that ends within an image; a last task that is short
    for (n, c, out, h, w, kernel, stride) in [
        (3, 96, 700, 5, 6, 3, 1),
        (2, 96, 700, 30, 40, 3, 1),
        (2, 96, 700, 31, 17, 3, 2),
        (2, 800, 700, 6, 5, 1, 1),
    ] {
        let x = tensor::<Flex, 4>(&numbers(n * c * h * w, 1), [n, c, h, w]);
        let weight = tensor::<Flex, 4>(&numbers(out * c * kernel * kernel, 2), [out, c, kernel, kernel]);
        assert!(weight.shape().num_elements() > 512 * 1024, "a small layer goes another way");
        let bias = tensor::<Flex, 1>(&numbers(out, 3), [out]);
        for bias in [None, Some(bias)] {
            let cache = WeightCache::new();
            let y = ops::conv2d(x.clone(), weight.clone(), bias.clone(), stride, kernel / 2, &cache);
            let [px, pw] = [x.clone(), weight.clone()].map(raw);
            let pb = bias.map(|bias| bias.into_primitive().tensor());
            let expected = cooked::<Flex, 4>(plain::conv2d::<Flex>(px, pw, pb, stride, kernel / 2));
            let expected: Vec<f64> = read(expected).iter().map(|value| f64::from(*value)).collect();
            let what = format!("{n} x {c} x {h} x {w} -> {out}, kernel {kernel}, stride {stride}");
            assert_close(&what, &read(y), &expected, 1e-5);
        }
        // the gradient of the input, of a layer that is frozen
        let [out_h, out_w] = [h, w].map(|size| (size + 2 * (kernel / 2) - kernel) / stride + 1);
        let grad = tensor::<Flex, 4>(&numbers(n * out * out_h * out_w, 4), [n, out, out_h, out_w]);
        let shape = Shape::new([n, c, h, w]);
        let [pw, pg] = [weight, grad].map(raw);
        let cache = WeightCache::new();
        let [found, expected] = [
            <Flex as DiffusionBackend>::kernel_conv2d_x_backward(
                shape.clone(),
                pw.clone(),
                pg.clone(),
                stride,
                kernel / 2,
                &cache,
            ),
            plain::conv2d_x_backward::<Flex>(shape, pw, pg, stride, kernel / 2),
        ]
        .map(|x| read(cooked::<Flex, 4>(x)));
        let expected: Vec<f64> = expected.iter().map(|value| f64::from(*value)).collect();
        let what = format!("gradient, {n} x {c} x {h} x {w} -> {out}, kernel {kernel}, stride {stride}");
        assert_close(&what, &found, &expected, 1e-5);
    }
}
