//! Tensors that do not lie one element after another: transposed, and sliced so that they start inside their
//! buffer. Every operation must give what it gives for a tidy copy, forward and backward.

use burn::tensor::{Tensor, TensorData};
use cxr_kernels::{Flex, WeightCache, ops};

use crate::{Ad, assert_close, numbers, raw, read, tensor};

/// The same elements, lying tidily in a buffer of their own.
fn tidy<const D: usize>(x: &Tensor<Flex, D>) -> Tensor<Flex, D> {
    Tensor::from_data(TensorData::new(read(x.clone()), x.dims()), &Default::default())
}

/// How many tensors [`disguises`] makes.
const DISGUISES: usize = 5;

/// Tensors of the given shape: transposed, sliced out of a larger one, both at once, the middle rows of a buffer,
/// and one row repeated by a stride of zero.
fn disguises<const D: usize>(shape: [usize; D], seed: u64) -> Vec<Tensor<Flex, D>> {
    let mut reversed = shape;
    reversed.swap(0, D - 1);
    let sliced = |shape: [usize; D], seed| {
        let larger = shape.map(|size| size + 3);
        let x = tensor::<Flex, D>(&numbers(larger.iter().product(), seed), larger);
        x.slice(shape.map(|size| 2..2 + size))
    };
    let transposed: Tensor<Flex, D> = tensor(&numbers(shape.iter().product(), seed), reversed);
    let mut all =
        vec![transposed.swap_dims(0, D - 1), sliced(shape, seed), sliced(reversed, seed).swap_dims(0, D - 1)];
    // Rows from the middle of a buffer: contiguous, but not from its first element.
    let mut taller = shape;
    taller[0] += 2;
    let taller: Tensor<Flex, D> = tensor(&numbers(taller.iter().product(), seed), taller);
    all.push(taller.narrow(0, 1, shape[0]));
    let mut first = shape;
    first[0] = 1;
    let first: Tensor<Flex, D> = tensor(&numbers(first.iter().product(), seed), first);
    all.push(first.expand(shape));
    assert_eq!(all.len(), DISGUISES);
    all
}

/// What an operation gives for these, and the gradient of each argument.
fn run<const D: usize, const N: usize, const E: usize>(
    f: &dyn Fn([Tensor<Ad, D>; N]) -> Tensor<Ad, E>,
    arguments: [Tensor<Flex, D>; N],
) -> Vec<Vec<f32>> {
    let leaves = arguments.map(|x| Tensor::<Ad, D>::from_inner(x).require_grad());
    let y = f(leaves.clone());
    let value = read(y.clone());
    // The gradient that arrives is a view as well: of a product of transposed tensors.
    let weights =
        Tensor::<Ad, 1>::from_inner(tensor(&numbers(value.len(), 99), [value.len()])).reshape(y.dims());
    let gradients = (y.swap_dims(0, E - 1) * weights.swap_dims(0, E - 1)).sum().backward();
    std::iter::once(value).chain(leaves.iter().map(|x| read(x.grad(&gradients).expect("tracked")))).collect()
}

/// All arguments in every disguise against their tidy copies: the same bits, for kernels that copy first.
fn check<const D: usize, const N: usize, const E: usize>(
    name: &str,
    shapes: [[usize; D]; N],
    f: &dyn Fn([Tensor<Ad, D>; N]) -> Tensor<Ad, E>,
) {
    check_within(name, shapes, 0.0, f);
}

/// As [`check`], to a relative error of `tolerance`.
fn check_within<const D: usize, const N: usize, const E: usize>(
    name: &str,
    shapes: [[usize; D]; N],
    tolerance: f64,
    f: &dyn Fn([Tensor<Ad, D>; N]) -> Tensor<Ad, E>,
) {
    for disguise in 0..DISGUISES {
        let mut seed = 0;
        let arguments = shapes.map(|shape| {
            seed += 1;
            disguises(shape, seed).swap_remove(disguise)
        });
        let expected = run(f, arguments.each_ref().map(tidy));
        for (i, (found, expected)) in run(f, arguments).iter().zip(expected).enumerate() {
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            assert_close(&format!("{name}, disguise {disguise}, result {i}"), found, &expected, tolerance);
        }
    }
}

fn flat<const D: usize>(x: Tensor<Ad, D>) -> Tensor<Ad, 1> {
    let count = x.dims().iter().product::<usize>();
    x.reshape([count])
}

#[test]
fn the_disguises_are_what_they_claim() {
    let layouts = disguises([4, 5, 6], 1).into_iter().map(|x| {
        let x = raw(x);
        (x.is_contiguous(), x.layout().start_offset() > 0)
    });
    // A backend that copied at once would leave nothing to test.
    assert!(layouts.clone().any(|(contiguous, _)| !contiguous), "no view is strided");
    assert!(layouts.clone().any(|(contiguous, offset)| contiguous && offset), "no view starts inside");
}

#[test]
fn activations() {
    check("silu", [[5, 7, 6]], &|[x]| ops::silu(x));
    check("gelu", [[5, 7, 6]], &|[x]| ops::gelu(x));
    check("quick_gelu", [[5, 7, 6]], &|[x]| ops::quick_gelu(x));
    check("geglu", [[5, 7, 6]], &|[x]| ops::geglu(x));
}

/// What runs in place does so only in a buffer that is all its own.
#[test]
fn views_that_alone_hold_their_buffer() {
    for disguise in 0..DISGUISES {
        let view = || disguises([5, 7, 6], 1).swap_remove(disguise);
        let expected = tidy(&view());
        for f in [ops::silu, ops::gelu] {
            assert_eq!(read(f(view())), read(f(expected.clone())), "disguise {disguise}");
        }
    }
}

#[test]
fn norms() {
    // gamma and beta travel as [c, 1]
    check("group_norm", [[3, 6, 4, 5], [6, 1, 1, 1], [6, 1, 1, 1]], &|[x, gamma, beta]| {
        ops::group_norm_silu(x, flat(gamma), flat(beta), 3, 1e-5)
    });
    check("layer_norm", [[4, 5, 6], [6, 1, 1], [6, 1, 1]], &|[x, gamma, beta]| {
        ops::layer_norm(x, flat(gamma), flat(beta), 1e-5)
    });
}

#[test]
fn products() {
    // burn's product takes strides as they come, and another order of adding with them
    check_within("linear", [[9, 7], [5, 7], [5, 1]], 1e-6, &|[x, weight, bias]| {
        ops::linear(x, weight, Some(flat(bias)), &WeightCache::new())
    });
    for stride in [1, 2] {
        check("conv2d", [[2, 3, 7, 6], [4, 3, 3, 3], [4, 1, 1, 1]], &|[x, weight, bias]| {
            ops::conv2d(x, weight, Some(flat(bias)), stride, 1, &WeightCache::new())
        });
    }
    check("conv2d 1x1", [[2, 3, 7, 6], [4, 3, 1, 1]], &|[x, weight]| {
        ops::conv2d(x, weight, None, 1, 0, &WeightCache::new())
    });
    check("attention", [[2, 3, 7, 4], [2, 3, 5, 4], [2, 3, 5, 4]], &|[q, k, v]| {
        ops::attention(q, k, v, Default::default())
    });
}

#[test]
fn images_and_tokens() {
    check("add", [[2, 17, 4, 5], [2, 17, 4, 5]], &|[x, y]| ops::add(x, y));
    check("join", [[2, 17, 4, 5], [2, 17, 4, 5]], &|[x, y]| ops::join(x, y));
    check("shift", [[2, 17, 4, 5], [2, 17, 1, 1]], &|[x, y]| ops::shift(x, y.reshape([2, 17])));
    check("upsample", [[2, 17, 4, 5]], &|[x]| ops::upsample(x, [8, 10]));
    check("upsample, one less", [[2, 17, 4, 5]], &|[x]| ops::upsample(x, [7, 9]));
    check("image_to_tokens", [[2, 17, 4, 5]], &|[x]| ops::image_to_tokens(x));
    check("tokens_to_image", [[2, 20, 17]], &|[x]| ops::tokens_to_image(x, 4, 5));
}
