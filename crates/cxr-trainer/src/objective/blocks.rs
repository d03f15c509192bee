//! Going backward one block at a time.
//!
//! burn's own checkpointing saves what frozen layers make all the same (docs/burn.md), so this is a loop: forward without
//! a graph, keeping what flows between blocks; then, from the last block to the first, each once more with a graph, and
//! back through it with the gradient of what it gave. The memory of one block's graph is taken instead of all of them,
//! for about a third more time (Chen et al., 2016, "Training deep nets with sublinear memory cost").

use burn::module::AutodiffModule;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use cxr_kernels::DiffusionAutodiff;
use cxr_ldm::unet::{Flow, UNet2dCondition};

use crate::gradients;

/// The loss of a prediction and its gradients by the parameters of `unet`.
///
/// `latents` `[n, c, h, w]`, `timesteps` `[n]` and `hidden` `[n, tokens, width]` are as in
/// [`UNet2dCondition::forward`]; `loss` gives `[1]` for a prediction. The masks of adapters with dropout have to be the
/// same each time, as they are once their step is set.
pub(super) fn gradients<B: DiffusionAutodiff>(
    unet: &UNet2dCondition<B>,
    latents: Tensor<B, 4>,
    timesteps: Tensor<B, 1>,
    hidden: Tensor<B, 3>,
    loss: &dyn Fn(Tensor<B, 4>) -> Tensor<B, 1>,
) -> (f64, GradientsParams) {
    let mut plain = unet.valid();
    cxr_lora::set_dropout_untracked(&mut plain, true);
    let mut flow = plain.begin(latents.clone().inner(), timesteps.clone().inner());
    let mut inputs = Vec::with_capacity(plain.blocks());
    for index in 0..plain.blocks() {
        let next = plain.block(index, flow.clone(), hidden.clone().inner());
        inputs.push(std::mem::replace(&mut flow, next));
    }

    let output = tracked(flow);
    let x = output.x.clone();
    let loss = loss(unet.end(output));
    let value = loss.clone().into_data().iter::<f64>().sum();
    let mut back = loss.backward();
    let mut given = Given { x: x.grad_remove(&mut back), skips: Vec::new(), time: None };
    let mut total = GradientsParams::from_grads(back, unet);

    for (index, input) in inputs.into_iter().enumerate().rev() {
        let input = tracked(input);
        let output = unet.block(index, input.clone(), hidden.clone());
        // What passes by untouched keeps the gradient that it has.
        let kept = input.skips.len().min(output.skips.len());
        let mut back = given.product(&output, kept).backward();
        given.x = input.x.grad_remove(&mut back);
        given.skips.extend(input.skips[kept..].iter().map(|skip| skip.grad_remove(&mut back)));
        given.time = match (given.time, input.time.grad_remove(&mut back)) {
            (Some(sum), Some(more)) => Some(sum.add(more)),
            (sum, more) => sum.or(more),
        };
        gradients::accumulate::<B, _>(unet, &mut total, GradientsParams::from_grads(back, unet), 1.0);
    }

    // The gradient of the latents is nobody's; tracking them makes a graph even if nothing here learns.
    let output = unet.begin(latents.detach().require_grad(), timesteps);
    let time = given.time.take().map(|by| output.time.clone().mul(Tensor::from_inner(by)).sum());
    let mut sum = given.product(&output, 0);
    if let Some(time) = time {
        sum = sum.add(time);
    }
    let back = sum.backward();
    gradients::accumulate::<B, _>(unet, &mut total, GradientsParams::from_grads(back, unet), 1.0);
    (value, total)
}

/// What flows into a block, as the leaves of a graph.
fn tracked<B: DiffusionAutodiff>(flow: Flow<B::InnerBackend>) -> Flow<B> {
    let leaf = |x| Tensor::<B, 4>::from_inner(x).require_grad();
    Flow {
        x: leaf(flow.x),
        skips: flow.skips.into_iter().map(leaf).collect(),
        time: Tensor::from_inner(flow.time).require_grad(),
    }
}

/// The gradients of the loss by what a block gives.
struct Given<B: DiffusionAutodiff> {
    x: Option<Tensor<B::InnerBackend, 4>>,
    skips: Vec<Option<Tensor<B::InnerBackend, 4>>>,
    time: Option<Tensor<B::InnerBackend, 2>>,
}

impl<B: DiffusionAutodiff> Given<B> {
    /// The sum of what a block gives, each times its gradient: going back through it is going back through the block.
    /// Takes the skips from `kept` on.
    fn product(&mut self, output: &Flow<B>, kept: usize) -> Tensor<B, 1> {
        let times = |x: &Tensor<B, 4>, by: Option<Tensor<B::InnerBackend, 4>>| {
            by.map(|by| x.clone().mul(Tensor::from_inner(by)).sum())
        };
        let by_skips = self.skips.split_off(kept.min(self.skips.len()));
        let skips = output.skips[kept..].iter().zip(by_skips).filter_map(|(skip, by)| times(skip, by));
        let sum = times(&output.x, self.x.take());
        let first = sum.unwrap_or_else(|| output.x.clone().mul_scalar(0.0).sum());
        skips.fold(first, Tensor::add)
    }
}
