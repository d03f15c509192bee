//! The levels: down, middle, up.

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::{DiffusionBackend, ops};
use cxr_lora::{LayerMut, LayerRef};

use super::attention::Attention;
use super::config::{DownBlockType, UNetConfig, UpBlockType};
use super::context::ContextReader;
use super::transformer::Transformer;
use crate::layers::{Downsample, ResnetBlock, ResnetBlockConfig, Upsample};

/// diffusers' `CrossAttnDownBlock2D`, and `DownBlock2D` where there are no attentions.
#[derive(Module, Debug)]
pub(crate) struct DownBlock<B: Backend> {
    attentions: Vec<Transformer<B>>,
    resnets: Vec<ResnetBlock<B>>,
    downsamplers: Vec<Downsample<B>>,
}

/// diffusers' `UNetMidBlock2DCrossAttn`.
#[derive(Module, Debug)]
pub(crate) struct MidBlock<B: Backend> {
    attentions: Vec<Transformer<B>>,
    resnets: Vec<ResnetBlock<B>>,
}

/// diffusers' `CrossAttnUpBlock2D`, and `UpBlock2D` where there are no attentions.
#[derive(Module, Debug)]
pub(crate) struct UpBlock<B: Backend> {
    attentions: Vec<Transformer<B>>,
    resnets: Vec<ResnetBlock<B>>,
    upsamplers: Vec<Upsample<B>>,
}

fn resnet<B: Backend>(
    config: &UNetConfig,
    input: usize,
    output: usize,
    device: &B::Device,
) -> ResnetBlock<B> {
    let (groups, eps) = (config.norm_num_groups, config.norm_eps);
    ResnetBlockConfig { input, output, time: Some(config.time_width()), groups, eps }.init(device)
}

fn transformer<B: Backend>(config: &UNetConfig, level: usize, device: &B::Device) -> Transformer<B> {
    let (channels, heads) = (config.block_out_channels[level], config.attention_head_dim.on(level));
    Transformer::new(channels, config.cross_attention_dim, heads, config.norm_num_groups, device)
}

impl<B: Backend> DownBlock<B> {
    /// `level` counts from the finest.
    pub(crate) fn new(config: &UNetConfig, level: usize, device: &B::Device) -> Self {
        let channels = &config.block_out_channels;
        let (input, output) = (channels[level.saturating_sub(1)], channels[level]);
        let layers = config.layers_per_block;
        let attentions = match config.down_block_types[level] {
            DownBlockType::CrossAttnDownBlock2D => layers,
            DownBlockType::DownBlock2D => 0,
        };
        let is_last = level + 1 == channels.len();
        Self {
            attentions: (0..attentions).map(|_| transformer(config, level, device)).collect(),
            resnets: (0..layers)
                .map(|j| resnet(config, if j == 0 { input } else { output }, output, device))
                .collect(),
            downsamplers: (!is_last).then(|| Downsample::new(output, true, device)).into_iter().collect(),
        }
    }
}

impl<B: DiffusionBackend> DownBlock<B> {
    /// `[n, c, h, w]`; what the way up will want is pushed to `skips`.
    pub(crate) fn forward(
        &self,
        mut x: Tensor<B, 4>,
        time: &Tensor<B, 2>,
        context: &mut ContextReader<'_, B>,
        skips: &mut Vec<Tensor<B, 4>>,
    ) -> Tensor<B, 4> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            x = resnet.forward(x, Some(time));
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(x, context);
            }
            skips.push(x.clone());
        }
        for downsample in &self.downsamplers {
            x = downsample.forward(x);
            skips.push(x.clone());
        }
        x
    }
}

impl<B: Backend> MidBlock<B> {
    pub(crate) fn new(config: &UNetConfig, device: &B::Device) -> Self {
        let level = config.block_out_channels.len() - 1;
        let channels = config.block_out_channels[level];
        Self {
            attentions: vec![transformer(config, level, device)],
            resnets: (0..2).map(|_| resnet(config, channels, channels, device)).collect(),
        }
    }
}

impl<B: DiffusionBackend> MidBlock<B> {
    pub(crate) fn forward(
        &self,
        x: Tensor<B, 4>,
        time: &Tensor<B, 2>,
        context: &mut ContextReader<'_, B>,
    ) -> Tensor<B, 4> {
        let x = self.resnets[0].forward(x, Some(time));
        let blocks = self.attentions.iter().zip(&self.resnets[1..]);
        blocks.fold(x, |x, (attention, resnet)| resnet.forward(attention.forward(x, context), Some(time)))
    }
}

impl<B: Backend> UpBlock<B> {
    /// `index` counts from the coarsest.
    pub(crate) fn new(config: &UNetConfig, index: usize, device: &B::Device) -> Self {
        let channels = &config.block_out_channels;
        let level = channels.len() - 1 - index;
        let previous = channels[(level + 1).min(channels.len() - 1)];
        let (output, below) = (channels[level], channels[level.saturating_sub(1)]);
        let layers = config.layers_per_block + 1;
        let attentions = match config.up_block_types[index] {
            UpBlockType::CrossAttnUpBlock2D => layers,
            UpBlockType::UpBlock2D => 0,
        };
        // the last skip is what came into the level on the way down, with the finer level's channels
        let input = |j: usize| {
            let skip = if j + 1 == layers { below } else { output };
            if j == 0 { previous + skip } else { output + skip }
        };
        Self {
            attentions: (0..attentions).map(|_| transformer(config, level, device)).collect(),
            resnets: (0..layers).map(|j| resnet(config, input(j), output, device)).collect(),
            upsamplers: (level > 0).then(|| Upsample::new(output, device)).into_iter().collect(),
        }
    }
}

impl<B: DiffusionBackend> UpBlock<B> {
    /// `[n, c, h, w]`; takes from `skips` what it wants.
    pub(crate) fn forward(
        &self,
        mut x: Tensor<B, 4>,
        time: &Tensor<B, 2>,
        context: &mut ContextReader<'_, B>,
        skips: &mut Vec<Tensor<B, 4>>,
    ) -> Tensor<B, 4> {
        for (i, resnet) in self.resnets.iter().enumerate() {
            let skip = skips.pop().expect("the way down pushes as many as the way up pops");
            x = resnet.forward(ops::join(x, skip), Some(time));
            if let Some(attention) = self.attentions.get(i) {
                x = attention.forward(x, context);
            }
        }
        for upsample in &self.upsamplers {
            // odd sizes were rounded on the way down
            let size = skips.last().map(|skip| skip.dims()).map(|[_, _, h, w]| [h, w]);
            x = upsample.forward(x, size);
        }
        x
    }
}

/// A level: what has transformers, and layers that an adapter can be attached to.
pub(crate) trait Level<B: Backend> {
    /// The cross-attentions, in the order of the forward pass.
    fn cross_attentions<'a>(&'a self) -> impl Iterator<Item = &'a Attention<B>>
    where
        B: 'a;

    fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>));

    fn visit_layers_mut(&mut self, path: &str, visit: &mut dyn FnMut(&str, LayerMut<'_, B>));
}

macro_rules! level {
    ($block:ident: $($part:ident),*) => {
        impl<B: Backend> Level<B> for $block<B> {
            fn cross_attentions<'a>(&'a self) -> impl Iterator<Item = &'a Attention<B>>
            where
                B: 'a,
            {
                self.attentions.iter().flat_map(Transformer::cross_attentions)
            }

            fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
                $(for (i, part) in self.$part.iter().enumerate() {
                    part.visit_layers(&format!("{path}.{}.{i}", stringify!($part)), visit);
                })*
            }

            fn visit_layers_mut(&mut self, path: &str, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
                $(for (i, part) in self.$part.iter_mut().enumerate() {
                    part.visit_layers_mut(&format!("{path}.{}.{i}", stringify!($part)), visit);
                })*
            }
        }
    };
}
level!(DownBlock: attentions, resnets, downsamplers);
level!(MidBlock: attentions, resnets);
level!(UpBlock: attentions, resnets, upsamplers);
