//! What the operations promise beside their values: dtypes are checked, packed weights are never stale, attention
//! makes no score matrix, and a batch does not change its members.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Tensor, TensorData, backend::Backend, bf16, f16};
use cxr_kernels::nn::{self, parameters};
use cxr_kernels::{Flex, WeightCache, ops};

use crate::{Ad, numbers, read, tensor};

fn ones<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<Flex, D> {
    Tensor::ones(shape, (&Default::default(), dtype))
}

/// Asserts that `f` panics with a message that has every one of `words`.
#[track_caller]
fn assert_panics<T>(words: &[&str], f: impl FnOnce() -> T) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else {
        panic!("no panic; expected one with {words:?}")
    };
    let message = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()))
        .expect("a panic with a message");
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

#[test]
fn mixed_dtypes_panic_and_name_both() {
    let cache = WeightCache::new();
    // Every operation with more than one operand, with each of the others odd in turn.
    for odd in 1..3 {
        let dtype = |operand: usize| if operand == odd { DType::BF16 } else { DType::F32 };
        let vector = |operand| ones([4], dtype(operand));
        let image = |operand| ones([1, 4, 4, 4], dtype(operand));
        let both = |name| [name, "F32", "BF16"];
        assert_panics(&both("group_norm"), || ops::group_norm(image(0), vector(1), vector(2), 2, 1e-5));
        assert_panics(&both("group_norm"), || ops::group_norm_silu(image(0), vector(1), vector(2), 2, 1e-5));
        assert_panics(&both("layer_norm"), || ops::layer_norm(image(0), vector(1), vector(2), 1e-5));
        assert_panics(&both("linear"), || {
            ops::linear(image(0), ones([4, 4], dtype(1)), Some(vector(2)), &cache)
        });
        assert_panics(&both("conv2d"), || ops::conv2d(image(0), image(1), Some(vector(2)), 1, 0, &cache));
        assert_panics(&both("attention"), || {
            ops::attention(image(0), image(1), image(2), Default::default())
        });
    }
}

#[test]
fn shapes_that_do_not_fit_panic_and_name_the_operation() {
    let image = |c| ones([1, c, 4, 4], DType::F32);
    let vector = |c| ones([c], DType::F32);
    let cache = WeightCache::new();
    assert_panics(&["group_norm", "6", "4"], || ops::group_norm(image(6), vector(6), vector(6), 4, 1e-5));
    assert_panics(&["group_norm"], || ops::group_norm(image(6), vector(5), vector(6), 3, 1e-5));
    assert_panics(&["layer_norm"], || ops::layer_norm(image(6), vector(4), vector(5), 1e-5));
    assert_panics(&["linear"], || ops::linear(image(6), ones([4, 5], DType::F32), None, &cache));
    assert_panics(&["conv2d"], || ops::conv2d(image(6), image(5), None, 1, 0, &cache));
    assert_panics(&["conv2d", "stride"], || ops::conv2d(image(6), image(6), None, 0, 0, &cache));
    assert_panics(&["conv2d"], || ops::conv2d(image(6), ones([2, 6, 5, 5], DType::F32), None, 1, 0, &cache));
    assert_panics(&["attention"], || ops::attention(image(6), image(5), image(5), Default::default()));
    assert_panics(&["upsample", "4 x 4 to 8 x 6"], || ops::upsample(image(6), [8, 6]));
    assert_panics(&["upsample", "4 x 4 to 9 x 8"], || ops::upsample(image(6), [9, 8]));
    assert_panics(&["add"], || ops::add(image(6), image(1)));
    assert_panics(&["shift"], || ops::shift(image(6), ones([1, 5], DType::F32)));
    assert_panics(&["join"], || ops::join(image(6), ones([1, 6, 4, 5], DType::F32)));
    assert_panics(&["geglu", "3"], || ops::geglu(ones([2, 3], DType::F32)));
    assert_panics(&["tokens_to_image", "6"], || ops::tokens_to_image(ones([1, 6, 2], DType::F32), 2, 2));
}

/// The input's gradient of a convolution whose weight is frozen, which is read as it lies.
fn input_gradient(weight: &Tensor<Flex, 4>, cache: &WeightCache) -> Vec<f32> {
    let c = weight.dims()[1];
    let x = Tensor::<Ad, 4>::from_inner(tensor(&numbers(2 * c * 25, 1), [2, c, 5, 5])).require_grad();
    let y = ops::conv2d(x.clone(), Tensor::from_inner(weight.clone()), None, 1, 1, cache);
    read(x.grad(&y.powi_scalar(2).sum().backward()).expect("x is tracked"))
}

/// A convolution by Winograd: the transformed weights are kept.
fn convolved(weight: &Tensor<Flex, 4>, cache: &WeightCache) -> Vec<f32> {
    let c = weight.dims()[1];
    let x = tensor(&numbers(c * 64, 1), [1, c, 8, 8]);
    read(ops::conv2d(x, weight.clone(), None, 1, 1, cache))
}

/// A linear layer of more than a few rows, whose panels are kept.
fn projected(weight: &Tensor<Flex, 4>, cache: &WeightCache) -> Vec<f32> {
    let [out, width, ..] = weight.dims();
    let x = tensor(&numbers(70 * width * 9, 1), [70, width * 9]);
    read(ops::linear(x, weight.clone().reshape([out, width * 9]), None, cache))
}

#[test]
fn a_changed_weight_invalidates_the_cache() {
    type Operation = fn(&Tensor<Flex, 4>, &WeightCache) -> Vec<f32>;
    let operations: [(Operation, [usize; 2], bool); 3] =
        [(input_gradient, [4, 3], false), (convolved, [32, 48], true), (projected, [32, 48], true)];
    for (operation, [out, c], packs) in operations {
        let fresh = |weight: &Tensor<Flex, 4>| operation(weight, &WeightCache::new());
        let cache = WeightCache::new();
        let mut weight: Tensor<Flex, 4> = tensor(&numbers(out * c * 9, 2), [out, c, 3, 3]);
        let mut seen = Vec::new();
        for _ in 0..4 {
            let expected = fresh(&weight);
            // met, packed, found
            for _ in 0..3 {
                assert_eq!(operation(&weight, &cache), expected);
            }
            assert_eq!(cache.is_filled(), packs, "what is not packed cannot be stale");
            assert!(!seen.contains(&expected), "the weight did not change");
            seen.push(expected);
            // An operation that may write in place, as an optimizer's does.
            weight = weight * 1.5 + 0.25;
        }
        // The same buffer in another shape is another weight too.
        for _ in 0..3 {
            assert_eq!(operation(&weight, &cache), fresh(&weight));
        }
        let reshaped = weight.reshape([c, out, 3, 3]);
        assert_eq!(operation(&reshaped, &cache), fresh(&reshaped));
    }
}

#[test]
fn a_learning_weight_is_not_packed() {
    // Packing would hold the old weight and its packed form through every optimizer step.
    let cache = WeightCache::new();
    let values: Tensor<Flex, 4> = tensor(&numbers(32 * 48 * 9, 2), [32, 48, 3, 3]);
    let weight = Tensor::<Ad, 4>::from_inner(values.clone()).require_grad();
    let x = Tensor::<Ad, 4>::from_inner(tensor(&numbers(96 * 64, 1), [2, 48, 8, 8])).require_grad();
    for _ in 0..3 {
        let y = ops::conv2d(x.clone(), weight.clone(), None, 1, 1, &cache);
        let flat = ops::linear(x.clone().reshape([128, 48]), weight.clone().reshape([288, 48]), None, &cache);
        assert!(x.grad(&(y.sum() + flat.sum()).backward()).is_some());
        assert!(!cache.is_filled());
    }
    // and what pictures between the steps left is let go with the next
    for _ in 0..2 {
        convolved(&values, &cache);
    }
    assert!(cache.is_filled());
    let _ = ops::conv2d(x, weight, None, 1, 1, &cache);
    assert!(!cache.is_filled());
}

/// Bytes that this process has had resident at most, where the system says so.
fn peak_resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib * 1024)
}

#[test]
fn attention_makes_no_score_matrix() {
    // One head of 16,384 queries and keys: the matrix would be 1 GiB, the operands are 1 MiB together.
    let tokens = 16_384;
    let [q, k, v] = [1, 2, 3].map(|seed| tensor::<Flex, 4>(&numbers(4 * tokens, seed), [1, 1, tokens, 4]));
    let before = peak_resident();
    let y = read(ops::attention(q.clone(), k.clone(), v.clone(), Default::default()));
    if let (Some(before), Some(after)) = (before, peak_resident()) {
        let grown = (after - before) >> 20;
        assert!(grown < 256, "attention took {grown} MiB more at its peak");
    }
    // Any single query alone has the same result, so the chunks fit together.
    for query in [0, 255, 256, 12_345, tokens - 1] {
        let alone = ops::attention(q.clone().narrow(2, query, 1), k.clone(), v.clone(), Default::default());
        for (found, expected) in y[4 * query..].iter().zip(read(alone)) {
            assert!((found - expected).abs() < 1e-6, "query {query}: {found}, alone {expected}");
        }
    }
}

/// Runs `f` on a batch of five and on each of its members, and asserts that they agree to the bit.
fn assert_same_alone<const D: usize, const E: usize>(
    name: &str,
    shape: [usize; D],
    f: impl Fn(Tensor<Flex, D>) -> Tensor<Flex, E>,
) {
    let mut batched = shape;
    batched[0] *= 5;
    let x: Tensor<Flex, D> = tensor(&numbers(batched.iter().product(), 7), batched);
    let together = read(f(x.clone()));
    for i in 0..5 {
        let alone = read(f(x.clone().narrow(0, i * shape[0], shape[0])));
        let of = i * alone.len()..(i + 1) * alone.len();
        assert!(together[of] == alone, "{name}: member {i} differs from itself alone");
    }
}

#[test]
fn a_batch_does_not_change_its_members() {
    let random = |shape: [usize; 4], seed| tensor::<Flex, 4>(&numbers(shape.iter().product(), seed), shape);
    let cache = WeightCache::new();
    for size in [4, 9, 32] {
        for (channels, kernel, stride) in [(16, 3, 1), (16, 3, 2), (16, 1, 1), (256, 3, 1)] {
            if channels * size > 4096 {
                continue;
            }
            let weight = random([channels, channels, kernel, kernel], 1);
            assert_same_alone("conv2d", [1, channels, size, size], |x| {
                ops::conv2d(x, weight.clone(), None, stride, kernel / 2, &cache)
            });
        }
        assert_same_alone("group_norm", [1, 8, size, size], |x| {
            let (gamma, beta) = (ones([8], DType::F32), ones([8], DType::F32));
            ops::group_norm_silu(x, gamma, beta, 4, 1e-5)
        });
        assert_same_alone("attention", [1, 2, size * size, 5], |x| {
            ops::attention(x.clone(), x.clone(), x, Default::default())
        });
        assert_same_alone("tokens", [1, 8, size, size], ops::image_to_tokens);
    }
    assert_same_alone("layer_norm", [1, 7, 33], |x| {
        ops::layer_norm(x, ones([33], DType::F32), ones([33], DType::F32), 1e-5)
    });
    assert_same_alone("geglu", [1, 7, 66], ops::geglu);
}

#[test]
fn a_tokens_linear_layer_hardly_knows_its_batch() {
    // The product's blocking may follow its number of rows: the last bits may differ, no more.
    let weight: Tensor<Flex, 2> = tensor(&numbers(40 * 33, 2), [40, 33]);
    let x: Tensor<Flex, 3> = tensor(&numbers(5 * 7 * 33, 1), [5, 7, 33]);
    let linear = |x: Tensor<Flex, 3>| read(ops::linear(x, weight.clone(), None, &WeightCache::new()));
    let together = linear(x.clone());
    for i in 0..5 {
        for (a, b) in together[i * 280..].iter().zip(linear(x.clone().narrow(0, i, 1))) {
            assert!((a - b).abs() <= 1e-5, "member {i}: {a} together, {b} alone");
        }
    }
}

#[test]
fn caches_stay_out_of_a_module_and_modules_are_send_and_sync() {
    fn shared<T: Send + Sync>(_: &T) {}
    let layer = nn::Conv2dConfig::new(3, 4, 3).init::<Flex>(&Default::default());
    shared(&layer);
    shared(&WeightCache::new());
    let paths: Vec<_> = nn::parameters::list::<Flex, _>(&layer).into_iter().map(|p| p.path).collect();
    assert_eq!(paths, ["weight", "bias"]);
}

/// The trait holds where it should: a function that compiles.
#[test]
fn the_trait_holds_for_autodiff_over_it() {
    fn inner<B: cxr_kernels::DiffusionAutodiff>() -> String {
        B::InnerBackend::name(&Default::default())
    }
    assert_eq!(inner::<Ad>(), Flex::name(&Default::default()));
}

#[test]
fn arranging_keeps_what_a_parameter_is() {
    type Training = burn::backend::Autodiff<Flex>;
    let conv = |trainable| {
        let conv = nn::Conv2dConfig::new(3, 4, 3).init::<Training>(&Default::default());
        let conv = parameters::set_trainable(conv, |path| trainable == (path == "weight"));
        // made, and no longer lazy
        parameters::map_data(conv, |_, shape| {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
            Ok::<_, std::convert::Infallible>(Some(TensorData::new(values, shape.to_vec())))
        })
    };
    for trainable in [true, false] {
        let Ok(conv) = conv(trainable);
        let before = parameters::list::<Training, _>(&conv);
        let conv = parameters::arrange(conv);
        assert_eq!(parameters::list::<Training, _>(&conv), before);
        parameters::read::<Training, _>(&conv, |path, data| {
            let expected = (0..data.num_elements()).map(|i| i as f32);
            assert!(data.iter::<f32>().eq(expected), "{path}");
        });
        // a leaf still: its gradient is found
        let image = Tensor::<Training, 4>::ones([1, 3, 5, 5], &Default::default());
        let gradients = conv.forward(image).sum().backward();
        assert_eq!(conv.weight.val().grad(&gradients).is_some(), trainable);
    }
}

#[test]
fn a_cast_rounds_to_the_nearest_and_its_gradient_goes_back_in_the_dtype_of_the_argument() {
    let device = Default::default();
    // long enough for several tasks, and not a multiple of anything
    let values: Vec<f32> = numbers(70_001, 3).into_iter().map(|x| x as f32).collect();
    let data = TensorData::new(values, [70_001]);
    for (from, to) in [
        (DType::F32, DType::BF16),
        (DType::F32, DType::F16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F32),
        (DType::F16, DType::BF16),
        (DType::F32, DType::F32),
    ] {
        // not burn's own cast, which goes by f64 and loses what lies just above a tie
        let rounded = |x: f32, dtype| match dtype {
            DType::BF16 => bf16::from_f32(x).to_f32(),
            DType::F16 => f16::from_f32(x).to_f32(),
            _ => x,
        };
        let of = |x: TensorData| x.convert_dtype(DType::F32).to_vec::<f32>().expect("numbers");
        let plain = Tensor::<Flex, 1>::from_data(data.clone(), (&device, from));
        let expected: Vec<f32> = of(plain.to_data()).into_iter().map(|x| rounded(x, to)).collect();
        let found = of(ops::cast(plain, to.into()).into_data());
        let first = found.iter().zip(&expected).enumerate().find(|(_, (found, expected))| found != expected);
        assert_eq!(first, None, "{from:?} to {to:?}");

        let x = Tensor::<Ad, 1>::from_data(data.clone(), (&device, from)).require_grad();
        let y = ops::cast(x.clone(), to.into());
        assert_eq!(y.dtype(), to);
        let grad = x.grad(&y.mul_scalar(0.5).sum().backward()).expect("a gradient");
        assert_eq!(grad.dtype(), from);
        assert!(of(grad.into_data()).iter().all(|grad| *grad == 0.5), "{from:?} to {to:?}");
    }
}
