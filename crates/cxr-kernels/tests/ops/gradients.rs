//! Values and gradients of every differentiable operation, for every tensor argument, against central
//! differences of the f64 references.

use burn::tensor::{Shape, Tensor};
use cxr_kernels::{Flex, WeightCache, ops, plain};

use crate::reference::{self, Conv};
use crate::{Ad, assert_close, cooked, numbers, raw, read, tensor};

type Flat<B> = Tensor<B, 1>;
type Plain<'a> = &'a dyn Fn(&[Flat<Flex>]) -> Flat<Flex>;
type PlainBackward<'a> = &'a dyn Fn(&[Flat<Flex>], Flat<Flex>) -> Vec<Flat<Flex>>;

/// One operation at one size; its arguments flattened.
struct Case<'a> {
    name: String,
    arguments: Vec<Vec<f64>>,
    reference: &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    ops: &'a dyn Fn(&[Flat<Ad>]) -> Flat<Ad>,
    plain: Option<(Plain<'a>, PlainBackward<'a>)>,
    tolerance: f64,
}

impl Case<'_> {
    fn check(&self) {
        let expected = (self.reference)(&self.arguments);
        let weights = numbers(expected.len(), 99);
        let (value, gradients) = self.differentiate(&weights, |_| true);
        assert_close(&self.name, &value, &expected, self.tolerance);
        for (i, gradient) in gradients.iter().enumerate() {
            let gradient = gradient.as_ref().expect("all arguments are tracked");
            self.check_gradient(&format!("{}, argument {i}", self.name), i, gradient, &weights);
            // Tracked alone, an argument has the same gradient, and the others have none.
            let (_, alone) = self.differentiate(&weights, |other| other == i);
            for (other, found) in alone.iter().enumerate() {
                let expected = (other == i).then_some(gradient);
                assert_eq!(found.as_ref(), expected, "{}: {other} with {i} alone tracked", self.name);
            }
        }
        let Some((forward, backward)) = self.plain else { return };
        let name = format!("plain {}", self.name);
        let arguments: Vec<Flat<Flex>> = self.arguments.iter().map(|x| tensor(x, [x.len()])).collect();
        assert_close(&name, &read(forward(&arguments)), &expected, self.tolerance);
        let gradients = backward(&arguments, tensor(&weights, [weights.len()]));
        assert_eq!(gradients.len(), arguments.len());
        for (i, gradient) in gradients.into_iter().enumerate() {
            self.check_gradient(&format!("{name}, argument {i}"), i, &read(gradient), &weights);
        }
    }

    /// The operation's value, and the gradients of `sum(weights * value)`.
    fn differentiate(
        &self,
        weights: &[f64],
        tracked: impl Fn(usize) -> bool,
    ) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
        let leaf = |(i, x): (usize, &Vec<f64>)| {
            let x = tensor::<Ad, 1>(x, [x.len()]);
            if tracked(i) { x.require_grad() } else { x }
        };
        let leaves: Vec<_> = self.arguments.iter().enumerate().map(leaf).collect();
        let y = (self.ops)(&leaves);
        let value = read(y.clone());
        let gradients = (y * tensor(weights, [weights.len()])).sum().backward();
        (value, leaves.iter().map(|x| x.grad(&gradients).map(read)).collect())
    }

    /// Up to 48 single elements, and four random directions through all of them.
    fn check_gradient(&self, name: &str, argument: usize, gradient: &[f32], weights: &[f64]) {
        let count = self.arguments[argument].len();
        assert_eq!(gradient.len(), count, "{name}: elements of the gradient");
        let stride = count.div_ceil(48);
        let single = (0..count).step_by(stride).map(|i| {
            let mut direction = vec![0.0; count];
            direction[i] = 1.0;
            direction
        });
        let norm = gradient.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
        for direction in single.chain((0..4).map(|seed| numbers(count, seed + 7))) {
            let length = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
            let found: f64 = gradient.iter().zip(&direction).map(|(g, d)| *g as f64 * d).sum();
            let step = 1e-5;
            let at = |sign: f64| -> f64 {
                let mut arguments = self.arguments.clone();
                arguments[argument].iter_mut().zip(&direction).for_each(|(x, d)| *x += sign * step * d);
                (self.reference)(&arguments).iter().zip(weights).map(|(y, w)| y * w).sum()
            };
            let expected = (at(1.0) - at(-1.0)) / (2.0 * step);
            let error = (found - expected).abs() / (length * (norm / (count as f64).sqrt()).max(1.0));
            assert!(
                error <= 4.0 * self.tolerance,
                "{name}: derivative {found}, expected {expected}, error {error:e}"
            );
        }
    }
}

/// The sizes at which loops over vectors go wrong.
const SIZES: [usize; 5] = [1, 7, 16, 33, 1000];

#[test]
fn silu_and_gelu() {
    for size in SIZES {
        Case {
            name: format!("silu {size}"),
            arguments: vec![numbers(size, 1)],
            reference: &|x| reference::each(&x[0], reference::silu),
            ops: &|x| ops::silu(x[0].clone()),
            plain: Some((&|x| cooked(plain::silu::<Flex>(raw(x[0].clone()))), &|x, grad| {
                vec![cooked(plain::silu_backward::<Flex>(raw(x[0].clone()), raw(grad)))]
            })),
            tolerance: 1e-6,
        }
        .check();
        Case {
            name: format!("gelu {size}"),
            arguments: vec![numbers(size, 2)],
            reference: &|x| reference::each(&x[0], reference::gelu),
            ops: &|x| ops::gelu(x[0].clone()),
            plain: Some((&|x| cooked(plain::gelu::<Flex>(raw(x[0].clone()))), &|x, grad| {
                vec![cooked(plain::gelu_backward::<Flex>(raw(x[0].clone()), raw(grad)))]
            })),
            tolerance: 1e-6,
        }
        .check();
        Case {
            name: format!("quick_gelu {size}"),
            arguments: vec![numbers(size, 3)],
            reference: &|x| reference::each(&x[0], reference::quick_gelu),
            ops: &|x| ops::quick_gelu(x[0].clone()),
            plain: None,
            tolerance: 1e-6,
        }
        .check();
    }
}

#[test]
fn geglu() {
    for [rows, half] in [[1, 1], [3, 7], [2, 16], [5, 33], [1, 1000]] {
        let shape = [rows, 2 * half];
        Case {
            name: format!("geglu {rows} x {half}"),
            arguments: vec![numbers(rows * 2 * half, 1)],
            reference: &|x| reference::geglu(&x[0], half),
            ops: &|x| ops::geglu(x[0].clone().reshape(shape)).flatten(0, 1),
            plain: Some((
                &|x| {
                    let y: Tensor<Flex, 2> = cooked(plain::geglu::<Flex>(raw(x[0].clone().reshape(shape))));
                    y.flatten(0, 1)
                },
                &|x, grad| {
                    let (x, grad) = (raw(x[0].clone().reshape(shape)), raw(grad.reshape([rows, half])));
                    vec![cooked::<Flex, 2>(plain::geglu_backward::<Flex>(x, grad)).flatten(0, 1)]
                },
            )),
            tolerance: 1e-6,
        }
        .check();
    }
}

#[test]
fn group_norm() {
    let sizes =
        [([2, 6, 3, 5], 3), ([1, 4, 1, 7], 4), ([3, 2, 1, 1], 1), ([2, 8, 4, 4], 2), ([1, 2, 33, 31], 1)];
    for (shape, groups) in sizes {
        for silu in [false, true] {
            let [n, c, h, w] = shape;
            let eps = 1e-5;
            Case {
                name: format!("group_norm {shape:?} {groups} silu {silu}"),
                arguments: vec![numbers(n * c * h * w, 1), numbers(c, 2), numbers(c, 3)],
                reference: &|x| {
                    let after = if silu { reference::silu } else { |x| x };
                    reference::group_norm(&x[0], &x[1], &x[2], h * w, groups, eps, after)
                },
                ops: &|x| {
                    let [x, gamma, beta] = [&x[0], &x[1], &x[2]].map(Clone::clone);
                    let f = if silu { ops::group_norm_silu } else { ops::group_norm };
                    f(x.reshape(shape), gamma, beta, groups, eps).flatten(0, 3)
                },
                plain: Some((
                    &|x| {
                        let [image, gamma, beta] =
                            [raw(x[0].clone().reshape(shape)), raw(x[1].clone()), raw(x[2].clone())];
                        let y = plain::group_norm::<Flex>(image, gamma, beta, groups, eps, silu);
                        cooked::<Flex, 4>(y).flatten(0, 3)
                    },
                    &|x, grad| {
                        let [image, gamma, beta] =
                            [raw(x[0].clone().reshape(shape)), raw(x[1].clone()), raw(x[2].clone())];
                        let grad = raw(grad.reshape(shape));
                        let [x, gamma, beta] =
                            plain::group_norm_backward::<Flex>(image, gamma, beta, grad, groups, eps, silu);
                        vec![cooked::<Flex, 4>(x).flatten(0, 3), cooked(gamma), cooked(beta)]
                    },
                )),
                tolerance: 3e-6,
            }
            .check();
        }
    }
}

#[test]
fn layer_norm() {
    for [rows, width] in [[1, 7], [3, 16], [5, 33], [2, 1000], [70, 40]] {
        let (shape, eps) = ([rows, width], 1e-5);
        Case {
            name: format!("layer_norm {shape:?}"),
            arguments: vec![numbers(rows * width, 1), numbers(width, 2), numbers(width, 3)],
            reference: &|x| reference::layer_norm(&x[0], &x[1], &x[2], eps),
            ops: &|x| {
                ops::layer_norm(x[0].clone().reshape(shape), x[1].clone(), x[2].clone(), eps).flatten(0, 1)
            },
            plain: Some((
                &|x| {
                    let (gamma, beta) = (raw(x[1].clone()), raw(x[2].clone()));
                    let y = plain::layer_norm::<Flex>(raw(x[0].clone().reshape(shape)), gamma, beta, eps);
                    cooked::<Flex, 2>(y).flatten(0, 1)
                },
                &|x, grad| {
                    let (rows, gamma) = (raw(x[0].clone().reshape(shape)), raw(x[1].clone()));
                    let grad = raw(grad.reshape(shape));
                    let [x, gamma, beta] = plain::layer_norm_backward::<Flex>(rows, gamma, grad, eps);
                    vec![cooked::<Flex, 2>(x).flatten(0, 1), cooked(gamma), cooked(beta)]
                },
            )),
            tolerance: 3e-6,
        }
        .check();
    }
}

#[test]
fn linear() {
    for (batch, tokens, input, output, biased) in
        [(1, 1, 1, 1, true), (2, 3, 7, 16, true), (2, 5, 33, 3, false)]
    {
        let (rows, weight_shape) = (batch * tokens, [output, input]);
        let bias = if biased { numbers(output, 3) } else { Vec::new() };
        let arguments = [numbers(rows * input, 1), numbers(output * input, 2), bias];
        Case {
            name: format!("linear {rows} x {input} -> {output}"),
            arguments: arguments.into_iter().filter(|x| !x.is_empty()).collect(),
            reference: &|x| reference::linear(&x[0], &x[1], x.get(2).map_or(&[], |b| b), input),
            ops: &|x| {
                let image = x[0].clone().reshape([batch, tokens, input]);
                let weight = x[1].clone().reshape(weight_shape);
                ops::linear(image, weight, x.get(2).cloned(), &WeightCache::new()).flatten(0, 2)
            },
            plain: Some((
                &|x| {
                    let (rows, weight) =
                        (x[0].clone().reshape([rows, input]), x[1].clone().reshape(weight_shape));
                    let y = plain::linear::<Flex>(raw(rows), raw(weight), x.get(2).cloned().map(raw));
                    cooked::<Flex, 2>(y).flatten(0, 1)
                },
                &|x, grad| {
                    let grad = grad.reshape([rows, output]);
                    let flat = |x| cooked::<Flex, 2>(x).flatten(0, 1);
                    let weight = raw(x[1].clone().reshape(weight_shape));
                    let to_x = plain::linear_x_backward::<Flex>(weight, raw(grad.clone()));
                    let from = raw(x[0].clone().reshape([rows, input]));
                    let to_weight = plain::linear_weight_backward::<Flex>(from, raw(grad.clone()));
                    let to_bias = x.get(2).map(|_| grad.sum_dim(0).flatten(0, 1));
                    [flat(to_x), flat(to_weight)].into_iter().chain(to_bias).collect()
                },
            )),
            tolerance: 3e-6,
        }
        .check();
    }
}

fn check_conv2d(sizes: Conv, biased: bool) {
    let Conv { x: shape, out, stride, padding, .. } = sizes;
    let weight_shape = sizes.weight_shape();
    let [height, width] = sizes.out_size();
    let bias = if biased { numbers(out, 3) } else { Vec::new() };
    let arguments = [numbers(shape.iter().product(), 1), numbers(weight_shape.iter().product(), 2), bias];
    Case {
        name: format!("conv2d {sizes:?} bias {biased}"),
        arguments: arguments.into_iter().filter(|x| !x.is_empty()).collect(),
        reference: &|x| reference::conv2d(&sizes, &x[0], &x[1], x.get(2).map_or(&[], |b| b)),
        ops: &|x| {
            let (image, weight) = (x[0].clone().reshape(shape), x[1].clone().reshape(weight_shape));
            ops::conv2d(image, weight, x.get(2).cloned(), stride, padding, &WeightCache::new()).flatten(0, 3)
        },
        plain: Some((
            &|x| {
                let (image, weight) =
                    (raw(x[0].clone().reshape(shape)), raw(x[1].clone().reshape(weight_shape)));
                let y = plain::conv2d::<Flex>(image, weight, x.get(2).cloned().map(raw), stride, padding);
                cooked::<Flex, 4>(y).flatten(0, 3)
            },
            &|x, grad| {
                let (image, weight) =
                    (raw(x[0].clone().reshape(shape)), raw(x[1].clone().reshape(weight_shape)));
                let grad = grad.reshape([shape[0], out, height, width]);
                let g = raw(grad.clone());
                let to_x = plain::conv2d_x_backward::<Flex>(
                    Shape::new(shape),
                    weight.clone(),
                    g.clone(),
                    stride,
                    padding,
                );
                let to_weight = plain::conv2d_weight_backward::<Flex>(image, weight, g, stride, padding);
                let to_bias = x.get(2).map(|_| grad.sum_dim(0).sum_dim(2).sum_dim(3).flatten(0, 3));
                let flat = |x| cooked::<Flex, 4>(x).flatten(0, 3);
                [flat(to_x), flat(to_weight)].into_iter().chain(to_bias).collect()
            },
        )),
        tolerance: 3e-6,
    }
    .check();
}

#[test]
fn conv2d() {
    for kernel in [1, 3] {
        for stride in [1, 2] {
            for padding in [0, 1] {
                let sizes = Conv { x: [2, 3, 5, 6], out: 4, kernel, stride, padding };
                check_conv2d(sizes, true);
                check_conv2d(Conv { x: [1, 1, 7, 3], out: 1, ..sizes }, false);
            }
        }
    }
    check_conv2d(Conv { x: [1, 17, 16, 33], out: 5, kernel: 3, stride: 1, padding: 1 }, true);
}

fn check_attention([b, heads, n, m, d]: [usize; 5], causal: bool) {
    let (q_shape, k_shape) = ([b, heads, n, d], [b, heads, m, d]);
    let keys = b * heads * m * d;
    let shaped = |x: &[Flat<Flex>]| {
        [(0, q_shape), (1, k_shape), (2, k_shape)].map(|(i, shape)| raw(x[i].clone().reshape(shape)))
    };
    Case {
        name: format!("attention {q_shape:?} {m} keys, causal {causal}"),
        arguments: vec![numbers(b * heads * n * d, 1), numbers(keys, 2), numbers(keys, 3)],
        reference: &|x| reference::attention(&x[0], &x[1], &x[2], [n, m, d], causal),
        ops: &|x| {
            let [q, k, v] = [(0, q_shape), (1, k_shape), (2, k_shape)].map(|(i, s)| x[i].clone().reshape(s));
            ops::attention(q, k, v, ops::AttentionOptions { causal }).flatten(0, 3)
        },
        plain: Some((
            &|x| {
                let [q, k, v] = shaped(x);
                cooked::<Flex, 4>(plain::attention::<Flex>(q, k, v, causal)).flatten(0, 3)
            },
            &|x, grad| {
                let [q, k, v] = shaped(x);
                let grad = raw(grad.reshape(q_shape));
                let gradients = plain::attention_backward::<Flex>(q, k, v, grad, causal);
                gradients.into_iter().map(|x| cooked::<Flex, 4>(x).flatten(0, 3)).collect()
            },
        )),
        tolerance: 5e-6,
    }
    .check();
}

#[test]
fn attention() {
    for causal in [false, true] {
        check_attention([1, 1, 1, 1, 1], causal);
        check_attention([2, 3, 7, 7, 5], causal);
        check_attention([1, 2, 16, 33, 8], causal);
        check_attention([1, 2, 33, 16, 8], causal);
        check_attention([1, 2, 300, 300, 4], causal);
        // more scores than the default makes at once: two chunks of queries
        check_attention([1, 1, 1030, 1030, 4], causal);
    }
    check_attention([2, 1, 600, 5, 3], false);
}

#[test]
fn sums_and_joins() {
    for [n, a, b, h, w] in [[1, 1, 1, 1, 1], [2, 3, 5, 7, 2], [1, 40, 9, 33, 31]] {
        let (first, second) = (n * a * h * w, n * b * h * w);
        Case {
            name: format!("join {n} {a}+{b} {h} {w}"),
            arguments: vec![numbers(first, 1), numbers(second, 2)],
            reference: &|x| {
                let pictures = x[0].chunks(a * h * w).zip(x[1].chunks(b * h * w));
                pictures.flat_map(|(x, y)| x.iter().chain(y).copied()).collect()
            },
            ops: &|x| {
                let (x, y) = (x[0].clone().reshape([n, a, h, w]), x[1].clone().reshape([n, b, h, w]));
                ops::join(x, y).flatten(0, 3)
            },
            plain: Some((
                &|x| {
                    let (x, y) = (x[0].clone().reshape([n, a, h, w]), x[1].clone().reshape([n, b, h, w]));
                    cooked::<Flex, 4>(plain::join::<Flex>(raw(x), raw(y))).flatten(0, 3)
                },
                &|_, grad| {
                    let parts = plain::split::<Flex>(raw(grad.reshape([n, a + b, h, w])), a);
                    parts.map(|part| cooked::<Flex, 4>(part).flatten(0, 3)).to_vec()
                },
            )),
            tolerance: 1e-6,
        }
        .check();
        Case {
            name: format!("add {first}"),
            arguments: vec![numbers(first, 1), numbers(first, 2)],
            reference: &|x| x[0].iter().zip(&x[1]).map(|(x, y)| x + y).collect(),
            ops: &|x| ops::add(x[0].clone(), x[1].clone()),
            plain: None,
            tolerance: 1e-6,
        }
        .check();
        Case {
            name: format!("shift {n} {a} {h} {w}"),
            arguments: vec![numbers(first, 1), numbers(n * a, 2)],
            reference: &|x| x[0].iter().enumerate().map(|(i, value)| value + x[1][i / (h * w)]).collect(),
            ops: &|x| {
                let (x, shift) = (x[0].clone().reshape([n, a, h, w]), x[1].clone().reshape([n, a]));
                ops::shift(x, shift).flatten(0, 3)
            },
            plain: None,
            tolerance: 1e-5,
        }
        .check();
    }
}

#[test]
fn upsampling() {
    for [n, c, h, w, height, width] in
        [[1, 1, 1, 1, 2, 2], [2, 3, 5, 7, 10, 14], [1, 2, 3, 4, 5, 8], [1, 2, 3, 4, 6, 7], [1, 3, 1, 2, 1, 3]]
    {
        let whole = [height, width] == [2 * h, 2 * w];
        let into_plain = |x: &[Tensor<Flex, 1>]| {
            let y = plain::upsample::<Flex>(raw(x[0].clone().reshape([n, c, h, w])));
            cooked::<Flex, 4>(y).flatten(0, 3)
        };
        let back_plain = |_: &[Tensor<Flex, 1>], grad: Tensor<Flex, 1>| {
            let x = plain::upsample_backward::<Flex>(raw(grad.reshape([n, c, height, width])));
            vec![cooked::<Flex, 4>(x).flatten(0, 3)]
        };
        Case {
            name: format!("upsample {n} {c} {h} {w} to {height} {width}"),
            arguments: vec![numbers(n * c * h * w, 1)],
            reference: &|x| reference::nearest(&x[0], [h, w], [height, width]),
            ops: &|x| ops::upsample(x[0].clone().reshape([n, c, h, w]), [height, width]).flatten(0, 3),
            plain: whole.then_some((&into_plain, &back_plain)),
            tolerance: 1e-6,
        }
        .check();
    }
}

#[test]
fn images_and_tokens() {
    for [n, c, h, w] in [[1, 1, 1, 1], [2, 3, 5, 7], [1, 16, 4, 4], [2, 33, 4, 8], [1, 40, 6, 6]] {
        let tokens = h * w;
        Case {
            name: format!("image_to_tokens {n} {c} {h} {w}"),
            arguments: vec![numbers(n * c * tokens, 1)],
            reference: &|x| reference::transpose(&x[0], c, tokens),
            ops: &|x| ops::image_to_tokens(x[0].clone().reshape([n, c, h, w])).flatten(0, 2),
            plain: Some((
                &|x| {
                    let y = plain::image_to_tokens::<Flex>(raw(x[0].clone().reshape([n, c, h, w])));
                    cooked::<Flex, 3>(y).flatten(0, 2)
                },
                &|_, grad| {
                    let grad = raw(grad.reshape([n, tokens, c]));
                    vec![cooked::<Flex, 4>(plain::tokens_to_image::<Flex>(grad, h, w)).flatten(0, 3)]
                },
            )),
            tolerance: 1e-6,
        }
        .check();
        Case {
            name: format!("tokens_to_image {n} {c} {h} {w}"),
            arguments: vec![numbers(n * c * tokens, 1)],
            reference: &|x| reference::transpose(&x[0], tokens, c),
            ops: &|x| ops::tokens_to_image(x[0].clone().reshape([n, tokens, c]), h, w).flatten(0, 3),
            plain: None,
            tolerance: 1e-6,
        }
        .check();
    }
}
