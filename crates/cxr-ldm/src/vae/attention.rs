use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::{GroupNorm, GroupNormConfig, Linear, LinearConfig};
use cxr_kernels::ops::{self, AttentionOptions};

use super::NORM_EPS;

/// Attention over all pixels with one head, added to its input: diffusers' `Attention` as the autoencoder has it.
#[derive(Module, Debug)]
pub(crate) struct PixelAttention<B: Backend> {
    group_norm: GroupNorm<B>,
    to_q: Linear<B>,
    to_k: Linear<B>,
    to_v: Linear<B>,
    // a list in the published files, whose second part is a dropout
    to_out: Vec<Linear<B>>,
}

impl<B: Backend> PixelAttention<B> {
    pub(crate) fn new(channels: usize, groups: usize, device: &B::Device) -> Self {
        let linear = || LinearConfig::new(channels, channels).init(device);
        Self {
            group_norm: GroupNormConfig::new(groups, channels).with_eps(NORM_EPS).init(device),
            to_q: linear(),
            to_k: linear(),
            to_v: linear(),
            to_out: vec![linear()],
        }
    }
}

impl<B: DiffusionBackend> PixelAttention<B> {
    /// `[n, channels, h, w]` to the same shape.
    pub(crate) fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [_, _, h, w] = x.dims();
        let tokens = ops::image_to_tokens(self.group_norm.forward(x.clone()));
        let head = |layer: &Linear<B>| layer.forward(tokens.clone()).unsqueeze_dim::<4>(1);
        let (q, k, v) = (head(&self.to_q), head(&self.to_k), head(&self.to_v));
        let mixed = ops::attention(q, k, v, AttentionOptions::default()).squeeze_dim::<3>(1);
        let out = self.to_out.iter().fold(mixed, |y, layer| layer.forward(y));
        ops::add(x, ops::tokens_to_image(out, h, w))
    }
}
