use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;

use super::NORM_EPS;
use super::attention::PixelAttention;
use crate::layers::{ResnetBlock, ResnetBlockConfig};

/// A residual block of the autoencoder.
pub(crate) fn resnet<B: Backend>(
    input: usize,
    output: usize,
    groups: usize,
    device: &B::Device,
) -> ResnetBlock<B> {
    ResnetBlockConfig { input, output, time: None, groups, eps: NORM_EPS }.init(device)
}

/// diffusers' `UNetMidBlock2D`: residual block, attention, residual block, at the coarsest level.
#[derive(Module, Debug)]
pub(crate) struct MidBlock<B: Backend> {
    attentions: Vec<PixelAttention<B>>,
    resnets: Vec<ResnetBlock<B>>,
}

impl<B: Backend> MidBlock<B> {
    pub(crate) fn new(channels: usize, groups: usize, device: &B::Device) -> Self {
        Self {
            attentions: vec![PixelAttention::new(channels, groups, device)],
            resnets: (0..2).map(|_| resnet(channels, channels, groups, device)).collect(),
        }
    }
}

impl<B: DiffusionBackend> MidBlock<B> {
    /// `[n, channels, h, w]` to the same shape.
    pub(crate) fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let x = self.resnets[0].forward(x, None);
        let blocks = self.attentions.iter().zip(&self.resnets[1..]);
        blocks.fold(x, |x, (attention, resnet)| resnet.forward(attention.forward(x), None))
    }
}
