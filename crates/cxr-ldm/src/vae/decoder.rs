use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::{Conv2d, Conv2dConfig, GroupNorm, GroupNormConfig};

use super::mid::{MidBlock, resnet};
use super::{AutoencoderKlConfig, NORM_EPS};
use crate::layers::{ResnetBlock, Upsample, part, widens};

/// Latents, after `post_quant_conv`, to pixels.
#[derive(Module, Debug)]
pub(crate) struct Decoder<B: Backend> {
    conv_in: Conv2d<B>,
    mid_block: MidBlock<B>,
    up_blocks: Vec<UpBlock<B>>,
    conv_norm_out: GroupNorm<B>,
    conv_out: Conv2d<B>,
}

/// diffusers' `UpDecoderBlock2D`.
#[derive(Module, Debug)]
struct UpBlock<B: Backend> {
    resnets: Vec<ResnetBlock<B>>,
    upsamplers: Vec<Upsample<B>>,
}

impl<B: Backend> Decoder<B> {
    pub(crate) fn new(config: &AutoencoderKlConfig, device: &B::Device) -> Self {
        let groups = config.norm_num_groups;
        // from the coarsest level
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let block = |level: usize| {
            let (input, output) = (channels[level.saturating_sub(1)], channels[level]);
            let resnet_at = |j| resnet(if j == 0 { input } else { output }, output, groups, device);
            let is_last = level + 1 == channels.len();
            UpBlock {
                resnets: (0..config.layers_per_block + 1).map(resnet_at).collect(),
                upsamplers: (!is_last).then(|| Upsample::new(output, device)).into_iter().collect(),
            }
        };
        let conv = |input, output| Conv2dConfig::new(input, output, 3).with_padding(1).init(device);
        Self {
            conv_in: conv(config.latent_channels, first),
            mid_block: MidBlock::new(first, groups, device),
            up_blocks: (0..channels.len()).map(block).collect(),
            conv_norm_out: GroupNormConfig::new(groups, last).with_eps(NORM_EPS).init(device),
            conv_out: conv(last, config.out_channels),
        }
    }
}

impl<B: DiffusionBackend> Decoder<B> {
    /// `[n, latent_channels, h, w] -> [n, out_channels, h * factor, w * factor]`.
    pub(crate) fn forward(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        let wide = widens(self.conv_in.weight.val().dtype());
        let x = part(&self.conv_in, wide, |conv| conv.forward(latents));
        let x = part(&self.mid_block, wide, |block| block.forward(x));
        let x = self.up_blocks.iter().fold(x, |x, block| part(block, wide, |block| block.forward(x)));
        let x = part(&self.conv_norm_out, wide, |norm| norm.forward_silu(x));
        part(&self.conv_out, wide, |conv| conv.forward(x))
    }
}

impl<B: DiffusionBackend> UpBlock<B> {
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let x = self.resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
        self.upsamplers.iter().fold(x, |x, upsample| upsample.forward(x, None))
    }
}
