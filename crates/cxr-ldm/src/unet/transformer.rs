use std::marker::PhantomData;

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::nn::{GroupNorm, GroupNormConfig, LayerNorm, LayerNormConfig};
use cxr_kernels::{DiffusionBackend, ops};
use cxr_lora::{LayerMut, LayerRef, LoraConv2d, LoraConv2dConfig, LoraLinear, LoraLinearConfig};

use super::attention::Attention;
use super::context::ContextReader;

/// The transformers' own epsilon; no configuration has it.
const NORM_EPS: f64 = 1e-6;

/// diffusers' `Transformer2DModel`: the pixels of a level attend to each other and to the context.
#[derive(Module, Debug)]
pub(crate) struct Transformer<B: Backend> {
    norm: GroupNorm<B>,
    proj_in: LoraConv2d<B>,
    transformer_blocks: Vec<TransformerBlock<B>>,
    proj_out: LoraConv2d<B>,
}

/// diffusers' `BasicTransformerBlock`.
#[derive(Module, Debug)]
struct TransformerBlock<B: Backend> {
    norm1: LayerNorm<B>,
    attn1: Attention<B>,
    norm2: LayerNorm<B>,
    attn2: Attention<B>,
    norm3: LayerNorm<B>,
    ff: FeedForward<B>,
}

/// diffusers' `FeedForward`; its second part is a dropout.
#[derive(Module, Debug)]
struct FeedForward<B: Backend> {
    net: (Geglu<B>, PhantomData<B>, LoraLinear<B>),
}

/// diffusers' `GEGLU`.
#[derive(Module, Debug)]
struct Geglu<B: Backend> {
    proj: LoraLinear<B>,
}

impl<B: Backend> Transformer<B> {
    pub(crate) fn new(
        channels: usize,
        context: usize,
        heads: usize,
        groups: usize,
        device: &B::Device,
    ) -> Self {
        Self {
            norm: GroupNormConfig::new(groups, channels).with_eps(NORM_EPS).init(device),
            proj_in: LoraConv2dConfig::new(channels, channels, 1).init(device),
            transformer_blocks: vec![TransformerBlock::new(channels, context, heads, device)],
            proj_out: LoraConv2dConfig::new(channels, channels, 1).init(device),
        }
    }

    /// The cross-attentions, in the order of the forward pass.
    pub(crate) fn cross_attentions(&self) -> impl Iterator<Item = &Attention<B>> {
        self.transformer_blocks.iter().map(|block| &block.attn2)
    }

    pub(crate) fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        visit(&format!("{path}.proj_in"), LayerRef::Conv2d(&self.proj_in));
        for (i, block) in self.transformer_blocks.iter().enumerate() {
            let path = format!("{path}.transformer_blocks.{i}");
            block.attn1.visit_layers(&format!("{path}.attn1"), visit);
            block.attn2.visit_layers(&format!("{path}.attn2"), visit);
            visit(&format!("{path}.ff.net.0.proj"), LayerRef::Linear(&block.ff.net.0.proj));
            visit(&format!("{path}.ff.net.2"), LayerRef::Linear(&block.ff.net.2));
        }
        visit(&format!("{path}.proj_out"), LayerRef::Conv2d(&self.proj_out));
    }

    pub(crate) fn visit_layers_mut(&mut self, path: &str, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        visit(&format!("{path}.proj_in"), LayerMut::Conv2d(&mut self.proj_in));
        for (i, block) in self.transformer_blocks.iter_mut().enumerate() {
            let path = format!("{path}.transformer_blocks.{i}");
            block.attn1.visit_layers_mut(&format!("{path}.attn1"), visit);
            block.attn2.visit_layers_mut(&format!("{path}.attn2"), visit);
            visit(&format!("{path}.ff.net.0.proj"), LayerMut::Linear(&mut block.ff.net.0.proj));
            visit(&format!("{path}.ff.net.2"), LayerMut::Linear(&mut block.ff.net.2));
        }
        visit(&format!("{path}.proj_out"), LayerMut::Conv2d(&mut self.proj_out));
    }
}

impl<B: DiffusionBackend> Transformer<B> {
    /// `[n, channels, h, w]` to the same shape.
    pub(crate) fn forward(&self, x: Tensor<B, 4>, context: &mut ContextReader<'_, B>) -> Tensor<B, 4> {
        let [_, _, h, w] = x.dims();
        let tokens = ops::image_to_tokens(self.proj_in.forward(self.norm.forward(x.clone())));
        let tokens = self.transformer_blocks.iter().fold(tokens, |y, block| block.forward(y, context));
        ops::add(self.proj_out.forward(ops::tokens_to_image(tokens, h, w)), x)
    }
}

impl<B: Backend> TransformerBlock<B> {
    fn new(width: usize, context: usize, heads: usize, device: &B::Device) -> Self {
        let norm = || LayerNormConfig::new(width).init(device);
        let linear = |input, output| LoraLinearConfig::new(input, output).init(device);
        Self {
            norm1: norm(),
            attn1: Attention::new(width, width, heads, device),
            norm2: norm(),
            attn2: Attention::new(width, context, heads, device),
            norm3: norm(),
            ff: FeedForward {
                net: (Geglu { proj: linear(width, 8 * width) }, PhantomData, linear(4 * width, width)),
            },
        }
    }
}

impl<B: DiffusionBackend> TransformerBlock<B> {
    fn forward(&self, x: Tensor<B, 3>, context: &mut ContextReader<'_, B>) -> Tensor<B, 3> {
        let normed = self.norm1.forward(x.clone());
        let own = self.attn1.keys_values(normed.clone());
        let x = ops::add(self.attn1.forward(normed, own), x);
        let x = ops::add(self.attn2.forward(self.norm2.forward(x.clone()), context.next(&self.attn2)), x);
        ops::add(self.ff.forward(self.norm3.forward(x.clone())), x)
    }
}

impl<B: DiffusionBackend> FeedForward<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let (geglu, _, out) = &self.net;
        out.forward(ops::geglu(geglu.proj.forward(x)))
    }
}
