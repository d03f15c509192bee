//! All paths against sums in f64, in odd sizes, and what a row must not depend on.

use burn::tensor::{DType, Shape, TensorData, TensorMetadata, bf16, f16};
use burn_flex::FlexTensor;
use proptest::prelude::*;

use super::super::half::{narrow, widened};
use super::Path;
use super::attention::attention_by;
use super::attention_backward::attention_backward_by;
use super::conv::{conv2d_by, conv2d_x_backward_by};
use super::linear::{Order, product};
use super::simd::{self, LANES, Simd};
#[cfg(target_arch = "x86_64")]
use super::{number, tiles};
use crate::WeightCache;

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// The paths of ours that this processor has for `dtype`: all of them, not just the one that is taken.
fn paths(dtype: DType) -> Vec<Path> {
    #[cfg(target_arch = "x86_64")]
    let all = [
        (Path::Avx512, simd::Avx512::is_available()),
        (Path::Avx2, simd::Avx2::is_available()),
        (Path::Portable, true),
        (Path::Pairs, number::has_bf16()),
        (Path::Tiles, tiles::is_available()),
    ];
    #[cfg(target_arch = "aarch64")]
    let all = [(Path::Neon, simd::Neon::is_available()), (Path::Portable, true)];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all = [(Path::Portable, true)];
    let of_dtype = all.into_iter().filter(|(path, _)| dtype == DType::BF16 || !path.is_of_halves());
    let found = of_dtype.filter(|(path, is_here)| {
        if !is_here {
            eprintln!("skipped: {path:?}, which this processor does not have");
        }
        *is_here
    });
    found.map(|(path, _)| path).collect()
}

/// Those of bf16 as it is.
fn of_halves() -> Vec<Path> {
    paths(DType::BF16).into_iter().filter(|path| path.is_of_halves()).collect()
}

/// Numbers of `[-2, 2)` as `dtype` has them, different for each seed.
fn numbers(shape: &[usize], seed: u64, dtype: DType) -> FlexTensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 22) as f32 - 2.0
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    narrow(FlexTensor::from_data(TensorData::new(values, Shape::from(shape.to_vec()))), dtype)
}

/// Asserts that `found` is the sum of `terms` of each element within what rounding allows: every addition in f32, and
/// the result once.
#[track_caller]
fn assert_sums(what: &str, found: FlexTensor, terms: impl Fn(usize) -> Vec<f64>) {
    let digits = match found.dtype() {
        DType::BF16 => 8,
        DType::F16 => 11,
        _ => 24,
    };
    for (i, found) in widened(found).into_iter().enumerate() {
        let terms = terms(i);
        let expected: f64 = terms.iter().sum();
        let size: f64 = terms.iter().map(|term| term.abs()).sum();
        let of_sums = terms.len() as f64 * 2_f64.powi(-24) * size;
        // below the smallest normal number of f16 there are fewer digits
        let of_result = 2_f64.powi(-digits) * (expected.abs() + of_sums) + 2_f64.powi(-25);
        let error = (f64::from(found) - expected).abs();
        assert!(error <= of_sums + of_result, "{what}, element {i}: {found}, expected {expected}");
    }
}

fn check_product(sizes: [usize; 3], order: Order, with_bias: bool, dtype: DType, seed: u64) {
    let [rows, columns, depth] = sizes;
    let of_weight = if order == Order::Transposed { [columns, depth] } else { [depth, columns] };
    let x = numbers(&[rows, depth], seed, dtype);
    let weight = numbers(&of_weight, seed + 1, dtype);
    let bias = with_bias.then(|| numbers(&[columns], seed + 2, dtype));
    let [x64, weight64] = [&x, &weight].map(|tensor| widened(tensor.clone()));
    let bias64 = bias.clone().map(widened);
    for path in paths(dtype) {
        let cache = WeightCache::new();
        let again = || product(path, x.clone(), weight.clone(), bias.clone(), order, &cache);
        let y = again();
        // the second time a weight may be packed, the third time it is found
        let bits = widened(y.clone());
        assert_eq!([again(), again()].map(widened), [bits.clone(), bits]);
        let packs = match path {
            #[cfg(target_arch = "x86_64")]
            Path::Tiles => order == Order::Transposed,
            _ => order == Order::Transposed && rows > 64,
        };
        assert_eq!(cache.is_filled(), packs);
        assert_eq!((y.shape(), y.dtype()), (Shape::new([rows, columns]), dtype));
        assert_sums(&format!("{path:?} {sizes:?} {order:?} {dtype:?}"), y, |i| {
            let (row, column) = (i / columns, i % columns);
            let terms = (0..depth).map(|d| {
                let weight = match order {
                    Order::Transposed => weight64[column * depth + d],
                    Order::Plain => weight64[d * columns + column],
                };
                f64::from(x64[row * depth + d]) * f64::from(weight)
            });
            terms.chain(bias64.iter().map(|bias| f64::from(bias[column]))).collect()
        });
    }
}

fn check_conv(
    x: [usize; 4],
    out: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    dtype: DType,
    seed: u64,
) {
    let [n, c, h, w] = x;
    let x = numbers(&[n, c, h, w], seed, dtype);
    let weight = numbers(&[out, c, kernel, kernel], seed + 1, dtype);
    let bias = numbers(&[out], seed + 2, dtype);
    let found: Vec<_> = paths(dtype)
        .into_iter()
        .map(|path| (path, conv2d_by(path, &x, &weight, Some(&bias), stride, padding).expect("it is there")))
        .collect();
    let [height, width] = [h, w].map(|size| (size + 2 * padding - kernel) / stride + 1);
    let [x, weight, bias] = [x, weight, bias].map(widened);
    let terms = |i: usize| {
        let (column, row, o) = (i % width, i / width % height, i / (width * height) % out);
        let image = i / (width * height * out);
        let mut terms = vec![f64::from(bias[o])];
        for tap in 0..c * kernel * kernel {
            let (channel, dy, dx) = (tap / (kernel * kernel), tap / kernel % kernel, tap % kernel);
            let from_y = (row * stride + dy).wrapping_sub(padding);
            let from_x = (column * stride + dx).wrapping_sub(padding);
            let inside = from_y < h && from_x < w;
            let x = if inside { x[((image * c + channel) * h + from_y) * w + from_x] } else { 0.0 };
            terms.push(f64::from(x) * f64::from(weight[o * c * kernel * kernel + tap]));
        }
        terms
    };
    for (path, y) in found {
        assert_eq!((y.shape(), y.dtype()), (Shape::new([n, out, height, width]), dtype));
        let sizes = [n, c, h, w];
        let what = format!("{path:?} {sizes:?} out {out} kernel {kernel} stride {stride} padding {padding}");
        assert_sums(&what, y, terms);
    }
}

fn check_conv_x_backward(
    x: [usize; 4],
    out: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    dtype: DType,
    seed: u64,
) {
    let [n, c, h, w] = x;
    let [height, width] = [h, w].map(|size| (size + 2 * padding - kernel) / stride + 1);
    let grad = numbers(&[n, out, height, width], seed, dtype);
    let weight = numbers(&[out, c, kernel, kernel], seed + 1, dtype);
    let found: Vec<_> = paths(dtype)
        .into_iter()
        .map(|path| {
            let y = conv2d_x_backward_by(path, &Shape::new(x), &weight, &grad, stride, padding);
            (path, y.expect("it is there"))
        })
        .collect();
    let [grad, weight] = [grad, weight].map(widened);
    for (path, y) in found {
        assert_eq!((y.shape(), y.dtype()), (Shape::new(x), dtype));
        let what = format!("{path:?} {x:?} out {out} kernel {kernel} stride {stride} padding {padding}");
        assert_sums(&what, y, |i| {
            let (column, row, channel, image) = (i % w, i / w % h, i / (w * h) % c, i / (w * h * c));
            let mut terms = vec![0.0];
            for tap in 0..out * kernel * kernel {
                let (o, dy, dx) = (tap / (kernel * kernel), tap / kernel % kernel, tap % kernel);
                // the output pixels that have seen this one through this tap
                let at = |place: usize, tap: usize| {
                    let from = (place + padding).checked_sub(tap)?;
                    from.is_multiple_of(stride).then_some(from / stride)
                };
                if let (Some(y), Some(x)) = (at(row, dy), at(column, dx))
                    && y < height
                    && x < width
                {
                    let grad = grad[((image * out + o) * height + y) * width + x];
                    let weight = weight[((o * c + channel) * kernel + dy) * kernel + dx];
                    terms.push(f64::from(grad) * f64::from(weight));
                }
            }
            terms
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]

    #[test]
    fn products_of_odd_sizes_are_sums_rounded_once(
        sizes in (1_usize..100, 1_usize..150, 0_usize..600),
        transposed: bool,
        with_bias: bool,
        dtype in prop::sample::select(&DTYPES),
        seed in 0_u64..1000,
    ) {
        let order = if transposed { Order::Transposed } else { Order::Plain };
        check_product(sizes.into(), order, with_bias, dtype, seed);
    }

    #[test]
    fn convolutions_of_odd_sizes_are_sums_rounded_once(
        batch in 1_usize..4,
        channels in 1_usize..40,
        size in (1_usize..20, 1_usize..20),
        out in 1_usize..20,
        kernel in 1_usize..4,
        stride in 1_usize..3,
        padding in 0_usize..3,
        dtype in prop::sample::select(&DTYPES),
        seed in 0_u64..1000,
    ) {
        prop_assume!(size.0 + 2 * padding >= kernel && size.1 + 2 * padding >= kernel);
        check_conv([batch, channels, size.0, size.1], out, kernel, stride, padding, dtype, seed);
    }

    #[test]
    fn gradients_of_convolutions_of_odd_sizes_are_sums_rounded_once(
        batch in 1_usize..4,
        channels in 1_usize..40,
        size in (1_usize..20, 1_usize..20),
        out in 1_usize..20,
        kernel in 1_usize..4,
        stride in 1_usize..3,
        padding in 0_usize..3,
        dtype in prop::sample::select(&DTYPES),
        seed in 0_u64..1000,
    ) {
        prop_assume!(size.0 + 2 * padding >= kernel && size.1 + 2 * padding >= kernel && padding < kernel);
        check_conv_x_backward([batch, channels, size.0, size.1], out, kernel, stride, padding, dtype, seed);
    }
}

#[test]
fn products_of_several_blocks_are_sums_rounded_once() {
    for dtype in DTYPES {
        check_product([300, 450, 300], Order::Transposed, true, dtype, 1);
        check_product([61, 450, 600], Order::Transposed, true, dtype, 1);
        check_product([300, 450, 300], Order::Plain, false, dtype, 2);
    }
    for dtype in DTYPES {
        check_conv([2, 40, 16, 16], 100, 3, 1, 1, dtype, 3);
        check_conv([3, 40, 8, 8], 100, 3, 1, 1, dtype, 4);
        check_conv([1, 20, 24, 24], 100, 3, 2, 1, dtype, 5);
        check_conv([5, 100, 7, 1], 10, 1, 1, 0, dtype, 6);
        // kernels that parts of the depth cut in two
        check_conv_x_backward([2, 90, 8, 8], 70, 3, 1, 1, dtype, 7);
        check_conv_x_backward([1, 90, 9, 8], 70, 3, 2, 1, dtype, 8);
        check_conv_x_backward([2, 450, 4, 4], 130, 2, 1, 0, dtype, 9);
        check_conv_x_backward([2, 90, 5, 7], 600, 1, 1, 0, dtype, 10);
    }
}

/// The first `count` of the rows of a matrix.
fn first_rows(x: &FlexTensor, count: usize) -> FlexTensor {
    let [_, width] = x.shape().dims();
    let dtype = x.dtype();
    let values = widened(x.clone())[..count * width].to_vec();
    narrow(FlexTensor::from_data(TensorData::new(values, [count, width])), dtype)
}

fn in_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads").install(f)
}

#[test]
fn a_row_has_the_same_bits_alone_in_a_batch_and_with_any_number_of_threads() {
    for dtype in DTYPES {
        for order in [Order::Transposed, Order::Plain] {
            let x = numbers(&[333, 700], 1, dtype);
            let weight =
                numbers(if order == Order::Transposed { &[450, 700] } else { &[700, 450] }, 2, dtype);
            for path in paths(dtype) {
                // packed with some number of threads, used with others
                let cache = WeightCache::new();
                let of = |count: usize, threads: usize| {
                    let x = first_rows(&x, count);
                    in_threads(threads, || widened(product(path, x, weight.clone(), None, order, &cache)))
                };
                let all = of(333, 2);
                assert_eq!(all, of(333, 1));
                assert_eq!(all, of(333, 7));
                for count in [1, 2, 5, 17, 96, 200] {
                    let some = of(count, 2);
                    assert_eq!(some, all[..some.len()], "{path:?} {dtype:?} {order:?}: {count} rows of 333");
                }
            }
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn avx2_gives_the_bits_of_avx512() {
    if !simd::Avx512::is_available() {
        return eprintln!("skipped: AVX-512, which this processor does not have");
    }
    for dtype in DTYPES {
        for rows in [5, 64, 150] {
            for (order, of_weight) in [(Order::Transposed, [210, 700]), (Order::Plain, [700, 210])] {
                let (x, weight) = (numbers(&[rows, 700], 1, dtype), numbers(&of_weight, 2, dtype));
                let of = |path| {
                    widened(product(path, x.clone(), weight.clone(), None, order, &WeightCache::new()))
                };
                assert!(of(Path::Avx2) == of(Path::Avx512), "{dtype:?}, {rows} rows, {order:?}");
            }
        }
        let (x, weight) = (numbers(&[2, 70, 9, 9], 1, dtype), numbers(&[90, 70, 3, 3], 2, dtype));
        let of = |path| conv2d_by(path, &x, &weight, None, 1, 1).map(widened);
        assert!(of(Path::Avx2) == of(Path::Avx512), "{dtype:?}, convolution");
    }
}

/// Asserts that all numbers of two bytes become what they are, as many of them as there are, and zeros behind them.
fn check_widening<S: Simd>(name: &str) {
    if !S::is_available() {
        return eprintln!("skipped: {name}, which this processor does not have");
    }
    let bits: Vec<u16> = (0..=u16::MAX).collect();
    for (at, bits) in bits.chunks(LANES).enumerate() {
        let (bf16s, f16s) =
            (bits.iter().map(|x| bf16::from_bits(*x)), bits.iter().map(|x| f16::from_bits(*x)));
        let (bf16s, f16s): (Vec<_>, Vec<_>) = (bf16s.collect(), f16s.collect());
        let count = if at.is_multiple_of(3) { at % LANES } else { LANES };
        let mut found = [[0.0_f32; LANES]; 2];
        // SAFETY: the processor was asked; there are so many, and room for sixteen.
        unsafe {
            S::store(S::load_bf16(bf16s.as_ptr(), count), found[0].as_mut_ptr());
            S::store(S::load_f16(f16s.as_ptr(), count), found[1].as_mut_ptr());
        }
        for i in 0..LANES {
            let expected = if i < count { [bf16s[i].to_f32(), f16s[i].to_f32()] } else { [0.0; 2] };
            for (found, expected) in found.iter().map(|of| of[i]).zip(expected) {
                let same =
                    if expected.is_nan() { found.is_nan() } else { found.to_bits() == expected.to_bits() };
                assert!(same, "{name}, {:#x}: {found}, {expected}", bits[i]);
            }
        }
    }
}

#[test]
fn half_precision_becomes_f32_without_loss() {
    #[cfg(target_arch = "x86_64")]
    {
        check_widening::<simd::Avx512>("AVX-512");
        check_widening::<simd::Avx2>("AVX2");
    }
    #[cfg(target_arch = "aarch64")]
    check_widening::<simd::Neon>("NEON");
    check_widening::<simd::Portable>("what every processor has");
}

#[test]
fn an_image_has_the_same_bits_alone_and_in_a_batch() {
    let cases = [3, 8, 16, 20].map(|side| DTYPES.map(|dtype| (side, dtype))).concat();
    for (side, dtype) in cases {
        let x = numbers(&[3, 70, side, side], 1, dtype);
        let weight = numbers(&[90, 70, 3, 3], 2, dtype);
        let one = widened(x.clone())[..70 * side * side].to_vec();
        let one = narrow(FlexTensor::from_data(TensorData::new(one, [1, 70, side, side])), dtype);
        for path in paths(dtype) {
            let of = |x| conv2d_by(path, x, &weight, None, 1, 1).map(widened).expect("it is there");
            let (one, all) = (of(&one), of(&x));
            assert_eq!(one, all[..one.len()], "{path:?} side {side} {dtype:?}");
        }
    }
}

/// Attention of one head in f64.
fn reference(q: &[f32], k: &[f32], v: &[f32], width: usize, causal: bool) -> Vec<Vec<(f64, f64)>> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let rows = q.chunks_exact(width).enumerate().flat_map(|(i, q)| {
        let seen = if causal { i + 1 } else { usize::MAX };
        let scores: Vec<f64> =
            k.chunks_exact(width).take(seen).map(|k| dot(q, k) / (width as f64).sqrt()).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let all: f64 = scores.iter().map(|score| (score - most).exp()).sum();
        let weights: Vec<f64> = scores.into_iter().map(|score| (score - most).exp() / all).collect();
        (0..width).map(move |d| {
            let terms = weights.iter().zip(v.chunks_exact(width)).map(|(w, v)| (*w, f64::from(v[d])));
            terms.collect()
        })
    });
    rows.collect()
}

/// Asserts that attention gives what f64 gives, within what rounding weights and result once allows.
fn check_attention([b, heads, n, m, d]: [usize; 5], causal: bool, dtype: DType, seed: u64) {
    // as a split into heads leaves them
    let split = |rows: usize, seed| numbers(&[b, rows, heads, d], seed, dtype).transpose(1, 2);
    let (q, k, v) = (split(n, seed), split(m, seed + 1), split(m, seed + 2));
    let own = |path| attention_by(path, &q, &k, &v, causal).expect("it is there");
    let own: Vec<_> = paths(dtype).into_iter().map(own).collect();
    let unit = match dtype {
        DType::BF16 => 2_f64.powi(-8),
        DType::F16 => 2_f64.powi(-11),
        _ => 2_f64.powi(-24),
    };
    let [q, k, v] = [q, k, v].map(widened);
    for y in &own {
        assert_eq!((y.shape(), y.dtype()), (Shape::new([b, heads, n, d]), dtype));
    }
    let found: Vec<_> = own.into_iter().map(widened).collect();
    let of = |x: &[f32], head: usize, rows: usize| x[head * rows * d..][..rows * d].to_vec();
    for head in 0..b * heads {
        let expected = reference(&of(&q, head, n), &of(&k, head, m), &of(&v, head, m), d, causal);
        for (i, terms) in expected.into_iter().enumerate() {
            let expected: f64 = terms.iter().map(|(w, v)| w * v).sum();
            let size: f64 = terms.iter().map(|(w, v)| (w * v).abs()).sum();
            // scores of at most 4 d / sqrt(d), sums of at most m terms, in f32
            let of_f32 = size * 2_f64.powi(-23) * (4.0 * (d as f64).powf(1.5) + m as f64 + 8.0);
            let bound = unit * (size + expected.abs()) * 1.01 + of_f32;
            for y in &found {
                let found = y[head * n * d + i];
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error <= bound,
                    "{dtype:?} [{b}, {heads}, {n}, {m}, {d}], head {head}, {i}: {found}, {expected}"
                );
            }
        }
    }
}

/// Asserts that the gradients of attention in bf16 are those of f64, within what rounding weights, the gradients of scores
/// and results once each allows.
fn check_attention_backward([b, heads, n, m, d]: [usize; 5], causal: bool, seed: u64) {
    let split = |rows: usize, seed| numbers(&[b, rows, heads, d], seed, DType::BF16).transpose(1, 2);
    let (q, k, v, grad) = (split(n, seed), split(m, seed + 1), split(m, seed + 2), split(n, seed + 3));
    let of = |path| attention_backward_by(path, &q, &k, &v, &grad, causal).expect("it is there");
    let found: Vec<_> = of_halves().into_iter().map(|path| (path, of(path))).collect();
    for (path, results) in &found {
        for (result, like) in results.iter().zip([&q, &k, &v]) {
            assert_eq!((result.shape(), result.dtype()), (like.shape(), DType::BF16), "{path:?}");
        }
    }
    let found: Vec<_> = found.into_iter().map(|(path, results)| (path, results.map(widened))).collect();
    let [q, k, v, grad] = [q, k, v, grad].map(|x| widened(x).into_iter().map(f64::from).collect::<Vec<_>>());
    // half of the last digit, and what sums in f32 lose
    let unit = 2_f64.powi(-8) * 1.02;
    for head in 0..b * heads {
        let row = |x: &'_ [f64], rows: usize, i: usize| x[(head * rows + i) * d..][..d].to_vec();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        // the sum of each element, and the largest error it may have
        let [mut to_q, mut to_k, mut to_v] = [n, m, m].map(|rows| vec![[0.0_f64; 2]; rows * d]);
        let scale = (d as f64).sqrt().recip();
        for i in 0..n {
            let seen = if causal { (i + 1).min(m) } else { m };
            let (of_q, of_grad) = (row(&q, n, i), row(&grad, n, i));
            let scores: Vec<f64> = (0..seen).map(|j| scale * dot(&of_q, &row(&k, m, j))).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let all: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp() / all).collect();
            let to_weights: Vec<f64> = (0..seen).map(|j| dot(&of_grad, &row(&v, m, j))).collect();
            let mean = dot(&weights, &to_weights);
            let of_mean: f64 = weights.iter().zip(&to_weights).map(|(w, g)| (w * g).abs()).sum();
            for j in 0..seen {
                let to_score = weights[j] * (to_weights[j] - mean) * scale;
                let error = unit * weights[j] * scale * (2.0 * (to_weights[j] - mean).abs() + of_mean);
                let (of_k, at) = (row(&k, m, j), |rows: usize, d: usize| rows * of_q.len() + d);
                for c in 0..d {
                    let add = |to: &mut [[f64; 2]], i: usize, x: f64, error: f64| {
                        to[at(i, c)][0] += x;
                        to[at(i, c)][1] += error + 1e-6 * x.abs();
                    };
                    add(&mut to_q, i, to_score * of_k[c], error * of_k[c].abs());
                    add(&mut to_k, j, to_score * of_q[c], error * of_q[c].abs());
                    let to_value = weights[j] * of_grad[c];
                    add(&mut to_v, j, to_value, 2.0 * unit * to_value.abs());
                }
            }
        }
        for (path, results) in &found {
            let expected = [(&to_q, n), (&to_k, m), (&to_v, m)];
            for ((name, found), (expected, rows)) in ["q", "k", "v"].iter().zip(results).zip(expected) {
                for (i, [expected, error]) in expected.iter().enumerate() {
                    let found = f64::from(found[head * rows * d + i]);
                    let bound = error + unit * (expected.abs() + error) + 1e-6;
                    assert!(
                        (found - expected).abs() <= bound,
                        "{path:?} [{b}, {heads}, {n}, {m}, {d}], gradient of {name}, head {head}, {i}: {found}, {expected}"
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn attention_of_odd_sizes_is_that_of_f64(
        sizes in (1_usize..3, 1_usize..4, 1_usize..50, 1_usize..150, 1_usize..70),
        causal: bool,
        dtype in prop::sample::select(&DTYPES),
        seed in 0_u64..1000,
    ) {
        let (b, heads, n, m, d) = sizes;
        check_attention([b, heads, n, if causal { n } else { m }, d], causal, dtype, seed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    #[test]
    fn gradients_of_attention_of_odd_sizes_are_those_of_f64(
        sizes in (1_usize..3, 1_usize..3, 1_usize..50, 1_usize..80, 1_usize..50),
        causal: bool,
        seed in 0_u64..1000,
    ) {
        let (b, heads, n, m, d) = sizes;
        check_attention_backward([b, heads, n, if causal { n } else { m }, d], causal, seed);
    }
}

#[test]
fn gradients_of_attention_of_several_chunks_and_panels_are_those_of_f64() {
    check_attention_backward([1, 2, 200, 1100, 40], false, 1);
    check_attention_backward([1, 1, 300, 300, 16], true, 2);
    check_attention_backward([2, 1, 20, 30, 600], false, 3);
}

#[test]
fn attention_of_several_chunks_and_panels_is_that_of_f64() {
    for dtype in DTYPES {
        check_attention([1, 2, 200, 1100, 40], false, dtype, 1);
        check_attention([1, 1, 300, 300, 16], true, dtype, 2);
        check_attention([2, 1, 20, 30, 600], false, dtype, 3);
    }
}

#[test]
fn a_query_has_the_same_bits_alone_and_with_any_number_of_threads() {
    for dtype in DTYPES {
        let [q, k, v] = [1, 2, 3].map(|seed| numbers(&[2, 3, 700, 24], seed, dtype));
        for path in paths(dtype) {
            let of = |q: FlexTensor, heads: usize, threads: usize| {
                let [k, v] = [&k, &v].map(|x| x.narrow(1, 0, heads));
                in_threads(threads, || {
                    attention_by(path, &q, &k, &v, false).map(widened).expect("it is there")
                })
            };
            let all = of(q.clone(), 3, 2);
            assert_eq!(of(q.clone(), 3, 7), all);
            // the first queries of the first head of each
            let alone = of(q.narrow(1, 0, 1).narrow(2, 0, 5), 1, 1);
            assert_eq!(alone[..5 * 24], all[..5 * 24]);
            assert_eq!(alone[5 * 24..], all[3 * 700 * 24..][..5 * 24]);
        }
    }
}

#[test]
fn what_is_not_finite_stays_so_and_reaches_no_other_row_or_column() {
    for dtype in DTYPES {
        for path in paths(dtype) {
            let (rows, columns, depth) = (9, 35, 65);
            let mut x = widened(numbers(&[rows, depth], 1, dtype));
            x[4 * depth] = f32::NAN;
            x[7 * depth + 64] = f32::INFINITY;
            let mut weight = widened(numbers(&[columns, depth], 2, dtype));
            weight[33 * depth + 64] = f32::NAN;
            let tensor = |values: Vec<f32>, shape: [usize; 2]| {
                narrow(FlexTensor::from_data(TensorData::new(values, shape)), dtype)
            };
            let (x, weight) = (tensor(x, [rows, depth]), tensor(weight, [columns, depth]));
            let y = widened(product(path, x, weight, None, Order::Transposed, &WeightCache::new()));
            for (i, y) in y.iter().enumerate() {
                let lost = [4, 7].contains(&(i / columns)) || i % columns == 33;
                assert_eq!(
                    !y.is_finite(),
                    lost,
                    "{path:?} {dtype:?} row {} column {}",
                    i / columns,
                    i % columns
                );
            }
        }
    }
}
