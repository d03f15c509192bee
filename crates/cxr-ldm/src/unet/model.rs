use burn::module::Module;
use burn::tensor::{DType, Tensor, backend::Backend};
use cxr_kernels::nn::{GroupNorm, GroupNormConfig};
use cxr_kernels::{DiffusionBackend, ops};
use cxr_lora::{Adaptable, LayerMut, LayerRef, LoraConv2d, LoraConv2dConfig};

use super::block::{DownBlock, Level, MidBlock, UpBlock};
use super::context::ContextReader;
use super::time::TimeEmbedding;
use super::{Context, UNetConfig};

/// What flows from one block of a UNet to the next.
#[derive(Debug, Clone)]
pub struct Flow<B: Backend> {
    /// `[n, c, h, w]`.
    pub x: Tensor<B, 4>,
    /// What the way up will take, the last first, `[n, c, h, w]` each: a block on the way down adds some, one on the way
    /// up takes some.
    pub skips: Vec<Tensor<B, 4>>,
    /// The timesteps, embedded, which every block reads, `[n, width]`.
    pub time: Tensor<B, 2>,
}

/// The noise predictor of latent diffusion (Rombach et al. 2022): diffusers' `UNet2DConditionModel`.
///
/// Made by [`UNetConfig::init`]. The path of a parameter is its key in the published file.
#[derive(Module, Debug)]
pub struct UNet2dCondition<B: Backend> {
    conv_in: LoraConv2d<B>,
    time_embedding: TimeEmbedding<B>,
    down_blocks: Vec<DownBlock<B>>,
    mid_block: MidBlock<B>,
    up_blocks: Vec<UpBlock<B>>,
    conv_norm_out: GroupNorm<B>,
    conv_out: LoraConv2d<B>,
}

impl<B: Backend> UNet2dCondition<B> {
    pub(crate) fn new(config: &UNetConfig, device: &B::Device) -> Self {
        let levels = config.block_out_channels.len();
        let first = config.block_out_channels[0];
        let conv = |input, output| LoraConv2dConfig::new(input, output, 3).with_padding(1).init(device);
        Self {
            conv_in: conv(config.in_channels, first),
            time_embedding: TimeEmbedding::new(config, device),
            down_blocks: (0..levels).map(|i| DownBlock::new(config, i, device)).collect(),
            mid_block: MidBlock::new(config, device),
            up_blocks: (0..levels).map(|i| UpBlock::new(config, i, device)).collect(),
            conv_norm_out: GroupNormConfig::new(config.norm_num_groups, first)
                .with_eps(config.norm_eps)
                .init(device),
            conv_out: conv(first, config.out_channels),
        }
    }
}

impl<B: Backend> UNet2dCondition<B> {
    /// The dtype of the weights, which latents and context have to have.
    pub fn dtype(&self) -> DType {
        self.conv_in.weight.val().dtype()
    }
}

impl<B: DiffusionBackend> UNet2dCondition<B> {
    /// The prediction for `latents` `[n, in_channels, h, w]` (scaled, noised) at `timesteps` `[n]`: the noise, for a
    /// model of prediction type epsilon, `[n, out_channels, h, w]`.
    ///
    /// Timesteps are f32 whatever the dtype of the rest, since bf16 would round 981 to 980; they may have fractions,
    /// as Euler's do.
    ///
    /// # Panics
    /// If rows, channels or dtypes of latents, timesteps, context and weights do not fit, or the context was
    /// prepared by a UNet of other sizes.
    pub fn forward(
        &self,
        latents: Tensor<B, 4>,
        timesteps: Tensor<B, 1>,
        context: &Context<B>,
    ) -> Tensor<B, 4> {
        let [n, ..] = latents.dims();
        assert_eq!(n, context.rows().unwrap_or(n), "rows of latents against context");
        let mut flow = self.begin(latents, timesteps);
        let mut context = context.reader();
        for index in 0..self.blocks() {
            flow = self.pass(index, flow, &mut context);
        }
        self.end(flow)
    }

    /// [`forward`](Self::forward) up to the first block. With [`block`](Self::block) and [`end`](Self::end) it is the same
    /// pass in pieces: for those who go back through one block at a time.
    ///
    /// # Panics
    /// If rows of latents and timesteps, or channels or dtypes do not fit.
    pub fn begin(&self, latents: Tensor<B, 4>, timesteps: Tensor<B, 1>) -> Flow<B> {
        assert_eq!(latents.dims()[0], timesteps.dims()[0], "rows of latents against timesteps");
        // every residual block starts with its SiLU
        let time = ops::silu(self.time_embedding.forward(timesteps, latents.dtype()));
        let x = self.conv_in.forward(latents);
        Flow { skips: vec![x.clone()], x, time }
    }

    /// How many blocks there are: those down, one in the middle, those up.
    pub fn blocks(&self) -> usize {
        self.down_blocks.len() + 1 + self.up_blocks.len()
    }

    /// One block, on what flows into it; `hidden` is the text encoder's last hidden state `[n, tokens, width]`.
    ///
    /// # Panics
    /// If there is no such block, or shapes or dtypes do not fit.
    pub fn block(&self, index: usize, flow: Flow<B>, hidden: Tensor<B, 3>) -> Flow<B> {
        self.pass(index, flow, &mut Context::new(hidden).reader())
    }

    fn pass(&self, index: usize, flow: Flow<B>, context: &mut ContextReader<'_, B>) -> Flow<B> {
        let Flow { x, mut skips, time } = flow;
        let down = self.down_blocks.len();
        let x = match index {
            _ if index < down => self.down_blocks[index].forward(x, &time, context, &mut skips),
            _ if index == down => self.mid_block.forward(x, &time, context),
            _ => self.up_blocks[index - down - 1].forward(x, &time, context, &mut skips),
        };
        Flow { x, skips, time }
    }

    /// The prediction, of what flows out of the last block.
    pub fn end(&self, flow: Flow<B>) -> Tensor<B, 4> {
        self.conv_out.forward(self.conv_norm_out.forward_silu(flow.x))
    }

    /// A context whose keys and values are computed now, once for every step that uses it.
    ///
    /// `hidden` is `[n, tokens, cross_attention_dim]`. It holds for the weights as they are: prepare again after an
    /// adapter is attached, changed or trained.
    ///
    /// # Panics
    /// If the width or dtype of `hidden` does not fit.
    pub fn prepare(&self, hidden: Tensor<B, 3>) -> Context<B> {
        let down = self.down_blocks.iter().flat_map(Level::cross_attentions);
        let up = self.up_blocks.iter().flat_map(Level::cross_attentions);
        let layers = down.chain(self.mid_block.cross_attentions()).chain(up);
        Context::prepared(layers.map(|layer| layer.keys_values(hidden.clone())).collect())
    }
}

/// Every layer that has a weight of two dimensions or four: those of the attentions and feed-forward layers, the
/// residual blocks, the convolutions that change the size, and those at both ends.
impl<B: Backend> Adaptable<B> for UNet2dCondition<B> {
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        visit("conv_in", LayerRef::Conv2d(&self.conv_in));
        self.time_embedding.visit_layers("time_embedding", visit);
        for (i, block) in self.down_blocks.iter().enumerate() {
            block.visit_layers(&format!("down_blocks.{i}"), visit);
        }
        self.mid_block.visit_layers("mid_block", visit);
        for (i, block) in self.up_blocks.iter().enumerate() {
            block.visit_layers(&format!("up_blocks.{i}"), visit);
        }
        visit("conv_out", LayerRef::Conv2d(&self.conv_out));
    }

    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        visit("conv_in", LayerMut::Conv2d(&mut self.conv_in));
        self.time_embedding.visit_layers_mut("time_embedding", visit);
        for (i, block) in self.down_blocks.iter_mut().enumerate() {
            block.visit_layers_mut(&format!("down_blocks.{i}"), visit);
        }
        self.mid_block.visit_layers_mut("mid_block", visit);
        for (i, block) in self.up_blocks.iter_mut().enumerate() {
            block.visit_layers_mut(&format!("up_blocks.{i}"), visit);
        }
        visit("conv_out", LayerMut::Conv2d(&mut self.conv_out));
    }
}
