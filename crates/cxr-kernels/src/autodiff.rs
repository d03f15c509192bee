//! The operations under [`Autodiff`]: one backward step each, for every tracked argument.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{FloatDType, TensorMetadata};

use crate::{DiffusionBackend, WeightCache};

/// From the gradient of the output, and which of `N` inputs want theirs, to those gradients.
type BackwardFn<B, const N: usize> =
    Arc<dyn Fn(FloatTensor<B>, [bool; N]) -> [Option<FloatTensor<B>>; N] + Send + Sync>;

/// What the graph keeps between the passes: a closure over the tensors that its operation needs again.
struct Saved<B: Backend, const N: usize>(BackwardFn<B, N>);

impl<B: Backend, const N: usize> Clone for Saved<B, N> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backend, const N: usize> std::fmt::Debug for Saved<B, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Saved")
    }
}

#[derive(Debug)]
struct Step;

impl<B: Backend, const N: usize> Backward<B, N> for Step {
    type State = Saved<B, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let wanted = std::array::from_fn(|i| ops.parents[i].is_some());
        for (parent, grad) in ops.parents.into_iter().zip((ops.state.0)(grad, wanted)) {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

/// Puts `output`, computed from `parents` on the inner backend, into the graph.
fn record<B: Backend, C: CheckpointStrategy, const N: usize>(
    parents: [&FloatTensor<Autodiff<B, C>>; N],
    output: FloatTensor<B>,
    backward: impl Fn(FloatTensor<B>, [bool; N]) -> [Option<FloatTensor<B>>; N] + Send + Sync + 'static,
) -> FloatTensor<Autodiff<B, C>> {
    match Step.prepare::<C>(parents.map(|parent| parent.node.clone())).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(Saved(Arc::new(backward)), output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    }
}

/// A weight that learns changes at every step: nothing packed from it would be used twice, and keeping it would
/// only stop the optimizer from updating in place.
fn cache_unless_learning(learns: bool, cache: &WeightCache) -> WeightCache {
    if learns {
        // what pictures between the steps may have left
        cache.clear();
        return WeightCache::new();
    }
    cache.clone()
}

impl<B: DiffusionBackend, C: CheckpointStrategy> DiffusionBackend for Autodiff<B, C> {
    fn kernel_silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let saved = x.primitive.clone();
        let y = B::kernel_silu(x.primitive.clone());
        record::<B, C, 1>([&x], y, move |grad, _| [Some(B::kernel_silu_backward(saved.clone(), grad))])
    }

    fn kernel_gelu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let saved = x.primitive.clone();
        let y = B::kernel_gelu(x.primitive.clone());
        record::<B, C, 1>([&x], y, move |grad, _| [Some(B::kernel_gelu_backward(saved.clone(), grad))])
    }

    fn kernel_geglu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let saved = x.primitive.clone();
        let y = B::kernel_geglu(x.primitive.clone());
        record::<B, C, 1>([&x], y, move |grad, _| [Some(B::kernel_geglu_backward(saved.clone(), grad))])
    }

    fn kernel_group_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        groups: usize,
        eps: f64,
        silu: bool,
    ) -> FloatTensor<Self> {
        let saved = (x.primitive.clone(), gamma.primitive.clone(), beta.primitive.clone());
        let y = B::kernel_group_norm(
            x.primitive.clone(),
            gamma.primitive.clone(),
            beta.primitive.clone(),
            groups,
            eps,
            silu,
        );
        record::<B, C, 3>([&x, &gamma, &beta], y, move |grad, [_, want_gamma, want_beta]| {
            let (x, gamma, beta) = saved.clone();
            if want_gamma || want_beta {
                return B::kernel_group_norm_backward(x, gamma, beta, grad, groups, eps, silu).map(Some);
            }
            [Some(B::kernel_group_norm_x_backward(x, gamma, beta, grad, groups, eps, silu)), None, None]
        })
    }

    fn kernel_layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        let saved = (x.primitive.clone(), gamma.primitive.clone());
        let y =
            B::kernel_layer_norm(x.primitive.clone(), gamma.primitive.clone(), beta.primitive.clone(), eps);
        record::<B, C, 3>([&x, &gamma, &beta], y, move |grad, [_, want_gamma, want_beta]| {
            let (x, gamma) = saved.clone();
            if want_gamma || want_beta {
                return B::kernel_layer_norm_backward(x, gamma, grad, eps).map(Some);
            }
            [Some(B::kernel_layer_norm_x_backward(x, gamma, grad, eps)), None, None]
        })
    }

    fn kernel_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let cache = cache_unless_learning(weight.is_tracked(), cache);
        let y = B::kernel_linear(
            x.primitive.clone(),
            weight.primitive.clone(),
            bias.as_ref().map(|bias| bias.primitive.clone()),
            &cache,
        );
        // The input is kept only for the weight's gradient: a frozen layer costs the graph nothing.
        let saved_x = weight.is_tracked().then(|| x.primitive.clone());
        let saved_weight = weight.primitive.clone();
        let to_x_and_weight = move |grad: FloatTensor<B>, x: bool, weight: bool| {
            let to_weight = match &saved_x {
                Some(saved_x) if weight => {
                    Some(B::kernel_linear_weight_backward(saved_x.clone(), grad.clone()))
                }
                _ => None,
            };
            (x.then(|| B::kernel_linear_x_backward(saved_weight.clone(), grad, &cache)), to_weight)
        };
        match bias {
            None => record::<B, C, 2>([&x, &weight], y, move |grad, [want_x, want_weight]| {
                let (x, weight) = to_x_and_weight(grad, want_x, want_weight);
                [x, weight]
            }),
            Some(bias) => {
                record::<B, C, 3>([&x, &weight, &bias], y, move |grad, [want_x, want_weight, want_bias]| {
                    let to_bias = want_bias.then(|| B::kernel_bias_backward(grad.clone()));
                    let (x, weight) = to_x_and_weight(grad, want_x, want_weight);
                    [x, weight, to_bias]
                })
            }
        }
    }

    fn kernel_conv2d(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
        stride: usize,
        padding: usize,
        cache: &WeightCache,
    ) -> FloatTensor<Self> {
        let cache = cache_unless_learning(weight.is_tracked(), cache);
        let y = B::kernel_conv2d(
            x.primitive.clone(),
            weight.primitive.clone(),
            bias.as_ref().map(|bias| bias.primitive.clone()),
            stride,
            padding,
            &cache,
        );
        let saved_x = weight.is_tracked().then(|| x.primitive.clone());
        let x_shape = x.primitive.shape();
        let saved_weight = weight.primitive.clone();
        let to_x_and_weight = move |grad: FloatTensor<B>, want_x: bool, want_weight: bool| {
            let weight = saved_weight.clone();
            let to_weight = match &saved_x {
                Some(x) if want_weight => Some(B::kernel_conv2d_weight_backward(
                    x.clone(),
                    weight.clone(),
                    grad.clone(),
                    stride,
                    padding,
                )),
                _ => None,
            };
            let to_x = want_x
                .then(|| B::kernel_conv2d_x_backward(x_shape.clone(), weight, grad, stride, padding, &cache));
            (to_x, to_weight)
        };
        match bias {
            None => record::<B, C, 2>([&x, &weight], y, move |grad, [want_x, want_weight]| {
                let (x, weight) = to_x_and_weight(grad, want_x, want_weight);
                [x, weight]
            }),
            Some(bias) => {
                record::<B, C, 3>([&x, &weight, &bias], y, move |grad, [want_x, want_weight, want_bias]| {
                    let to_bias = want_bias.then(|| B::kernel_bias_backward(grad.clone()));
                    let (x, weight) = to_x_and_weight(grad, want_x, want_weight);
                    [x, weight, to_bias]
                })
            }
        }
    }

    fn kernel_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        causal: bool,
    ) -> FloatTensor<Self> {
        let saved = [&q, &k, &v].map(|t| t.primitive.clone());
        let y = B::kernel_attention(q.primitive.clone(), k.primitive.clone(), v.primitive.clone(), causal);
        record::<B, C, 3>([&q, &k, &v], y, move |grad, _| {
            let [q, k, v] = saved.clone();
            B::kernel_attention_backward(q, k, v, grad, causal).map(Some)
        })
    }

    fn kernel_cast(x: FloatTensor<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        let from = FloatDType::from(x.dtype());
        let y = B::kernel_cast(x.primitive.clone(), dtype);
        record::<B, C, 1>([&x], y, move |grad, _| [Some(B::kernel_cast(grad, from))])
    }

    fn kernel_add(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let sum = B::kernel_add(x.primitive.clone(), y.primitive.clone());
        record::<B, C, 2>([&x, &y], sum, move |grad, _| [Some(grad.clone()), Some(grad)])
    }

    fn kernel_conv2d_weight(weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let arranged = B::kernel_conv2d_weight(weight.primitive.clone());
        record::<B, C, 1>([&weight], arranged, move |grad, _| [Some(grad)])
    }

    fn kernel_shift(x: FloatTensor<Self>, shift: FloatTensor<Self>) -> FloatTensor<Self> {
        let sum = B::kernel_shift(x.primitive.clone(), shift.primitive.clone());
        record::<B, C, 2>([&x, &shift], sum, move |grad, [_, wanted]| {
            [Some(grad.clone()), wanted.then(|| B::kernel_shift_backward(grad))]
        })
    }

    fn kernel_join(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let first = x.primitive.shape()[1];
        let joined = B::kernel_join(x.primitive.clone(), y.primitive.clone());
        record::<B, C, 2>([&x, &y], joined, move |grad, _| B::kernel_split(grad, first).map(Some))
    }

    fn kernel_upsample(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let y = B::kernel_upsample(x.primitive.clone());
        record::<B, C, 1>([&x], y, move |grad, _| [Some(B::kernel_upsample_backward(grad))])
    }

    fn kernel_image_to_tokens(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let [_, _, h, w] = x.primitive.shape().dims();
        let y = B::kernel_image_to_tokens(x.primitive.clone());
        record::<B, C, 1>([&x], y, move |grad, _| [Some(B::kernel_tokens_to_image(grad, h, w))])
    }

    fn kernel_tokens_to_image(x: FloatTensor<Self>, height: usize, width: usize) -> FloatTensor<Self> {
        let y = B::kernel_tokens_to_image(x.primitive.clone(), height, width);
        record::<B, C, 1>([&x], y, move |grad, _| [Some(B::kernel_image_to_tokens(grad))])
    }
}
