use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::{Conv2d, Conv2dConfig, GroupNorm, GroupNormConfig};

use super::mid::{MidBlock, resnet};
use super::{AutoencoderKlConfig, NORM_EPS};
use crate::layers::{Downsample, ResnetBlock, part, widens};

/// Pixels to moments, before `quant_conv`.
#[derive(Module, Debug)]
pub(crate) struct Encoder<B: Backend> {
    conv_in: Conv2d<B>,
    down_blocks: Vec<DownBlock<B>>,
    mid_block: MidBlock<B>,
    conv_norm_out: GroupNorm<B>,
    conv_out: Conv2d<B>,
}

/// diffusers' `DownEncoderBlock2D`.
#[derive(Module, Debug)]
struct DownBlock<B: Backend> {
    resnets: Vec<ResnetBlock<B>>,
    downsamplers: Vec<Downsample<B>>,
}

impl<B: Backend> Encoder<B> {
    pub(crate) fn new(config: &AutoencoderKlConfig, device: &B::Device) -> Self {
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let block = |level: usize| {
            let (input, output) = (channels[level.saturating_sub(1)], channels[level]);
            let resnet_at = |j| resnet(if j == 0 { input } else { output }, output, groups, device);
            let is_last = level + 1 == channels.len();
            DownBlock {
                resnets: (0..config.layers_per_block).map(resnet_at).collect(),
                downsamplers: (!is_last)
                    .then(|| Downsample::new(output, false, device))
                    .into_iter()
                    .collect(),
            }
        };
        let conv = |input, output| Conv2dConfig::new(input, output, 3).with_padding(1).init(device);
        Self {
            conv_in: conv(config.in_channels, first),
            down_blocks: (0..channels.len()).map(block).collect(),
            mid_block: MidBlock::new(last, groups, device),
            conv_norm_out: GroupNormConfig::new(groups, last).with_eps(NORM_EPS).init(device),
            conv_out: conv(last, 2 * config.latent_channels),
        }
    }
}

impl<B: DiffusionBackend> Encoder<B> {
    /// `[n, in_channels, h, w] -> [n, 2 * latent_channels, h / factor, w / factor]`.
    pub(crate) fn forward(&self, pixels: Tensor<B, 4>) -> Tensor<B, 4> {
        let wide = widens(self.conv_in.weight.val().dtype());
        let x = part(&self.conv_in, wide, |conv| conv.forward(pixels));
        let x = self.down_blocks.iter().fold(x, |x, block| part(block, wide, |block| block.forward(x)));
        let x = part(&self.mid_block, wide, |block| block.forward(x));
        let x = part(&self.conv_norm_out, wide, |norm| norm.forward_silu(x));
        part(&self.conv_out, wide, |conv| conv.forward(x))
    }
}

impl<B: DiffusionBackend> DownBlock<B> {
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let x = self.resnets.iter().fold(x, |x, resnet| resnet.forward(x, None));
        self.downsamplers.iter().fold(x, |x, downsample| downsample.forward(x))
    }
}
