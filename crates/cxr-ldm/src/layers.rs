//! What UNet and autoencoder share: residual blocks and the layers that change the size.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, FloatDType, Tensor, backend::Backend};
use cxr_kernels::nn::{GroupNorm, GroupNormConfig};
use cxr_kernels::{DiffusionBackend, ops};
use cxr_lora::{LayerMut, LayerRef, LoraConv2d, LoraConv2dConfig, LoraLinear, LoraLinearConfig};

/// Sizes of a [`ResnetBlock`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResnetBlockConfig {
    pub(crate) input: usize,
    pub(crate) output: usize,
    /// Width of the time embedding; `None` without one.
    pub(crate) time: Option<usize>,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
}

/// diffusers' `ResnetBlock2D`.
#[derive(Module, Debug)]
pub(crate) struct ResnetBlock<B: Backend> {
    norm1: GroupNorm<B>,
    conv1: LoraConv2d<B>,
    time_emb_proj: Option<LoraLinear<B>>,
    norm2: GroupNorm<B>,
    conv2: LoraConv2d<B>,
    conv_shortcut: Option<LoraConv2d<B>>,
}

impl ResnetBlockConfig {
    pub(crate) fn init<B: Backend>(&self, device: &B::Device) -> ResnetBlock<B> {
        let &Self { input, output, time, groups, eps } = self;
        let norm = |channels| GroupNormConfig::new(groups, channels).with_eps(eps).init(device);
        let conv = |channels| LoraConv2dConfig::new(channels, output, 3).with_padding(1).init(device);
        ResnetBlock {
            norm1: norm(input),
            conv1: conv(input),
            time_emb_proj: time.map(|width| LoraLinearConfig::new(width, output).init(device)),
            norm2: norm(output),
            conv2: conv(output),
            conv_shortcut: (input != output).then(|| LoraConv2dConfig::new(input, output, 1).init(device)),
        }
    }
}

impl<B: Backend> ResnetBlock<B> {
    pub(crate) fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        visit(&format!("{path}.conv1"), LayerRef::Conv2d(&self.conv1));
        if let Some(layer) = &self.time_emb_proj {
            visit(&format!("{path}.time_emb_proj"), LayerRef::Linear(layer));
        }
        visit(&format!("{path}.conv2"), LayerRef::Conv2d(&self.conv2));
        if let Some(layer) = &self.conv_shortcut {
            visit(&format!("{path}.conv_shortcut"), LayerRef::Conv2d(layer));
        }
    }

    pub(crate) fn visit_layers_mut(&mut self, path: &str, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        visit(&format!("{path}.conv1"), LayerMut::Conv2d(&mut self.conv1));
        if let Some(layer) = &mut self.time_emb_proj {
            visit(&format!("{path}.time_emb_proj"), LayerMut::Linear(layer));
        }
        visit(&format!("{path}.conv2"), LayerMut::Conv2d(&mut self.conv2));
        if let Some(layer) = &mut self.conv_shortcut {
            visit(&format!("{path}.conv_shortcut"), LayerMut::Conv2d(layer));
        }
    }
}

impl<B: DiffusionBackend> ResnetBlock<B> {
    /// `x` `[n, input, h, w]`, `time` `[n, width]` (after SiLU) for a block with a time embedding;
    /// `[n, output, h, w]`.
    pub(crate) fn forward(&self, x: Tensor<B, 4>, time: Option<&Tensor<B, 2>>) -> Tensor<B, 4> {
        let mut hidden = self.conv1.forward(self.norm1.forward_silu(x.clone()));
        if let (Some(projection), Some(time)) = (&self.time_emb_proj, time) {
            hidden = ops::shift(hidden, projection.forward(time.clone()));
        }
        let hidden = self.conv2.forward(self.norm2.forward_silu(hidden));
        match &self.conv_shortcut {
            Some(shortcut) => ops::add(shortcut.forward(x), hidden),
            None => ops::add(x, hidden),
        }
    }
}

/// diffusers' `Downsample2D`: half the size.
#[derive(Module, Debug)]
pub(crate) struct Downsample<B: Backend> {
    conv: LoraConv2d<B>,
    /// Zeros on all sides (UNet); otherwise right and below alone (autoencoder).
    symmetric: bool,
}

impl<B: Backend> Downsample<B> {
    pub(crate) fn new(channels: usize, symmetric: bool, device: &B::Device) -> Self {
        let padding = usize::from(symmetric);
        let conv = LoraConv2dConfig::new(channels, channels, 3).with_stride(2).with_padding(padding);
        Self { conv: conv.init(device), symmetric }
    }
}

impl<B: DiffusionBackend> Downsample<B> {
    /// `[n, c, h, w] -> [n, c, h / 2, w / 2]`.
    pub(crate) fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.conv.forward(if self.symmetric { x } else { pad_right_and_bottom(x) })
    }
}

macro_rules! has_one_convolution {
    ($($layer:ident),*) => {$(
        impl<B: Backend> $layer<B> {
            pub(crate) fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
                visit(&format!("{path}.conv"), LayerRef::Conv2d(&self.conv));
            }

            pub(crate) fn visit_layers_mut(
                &mut self,
                path: &str,
                visit: &mut dyn FnMut(&str, LayerMut<'_, B>),
            ) {
                visit(&format!("{path}.conv"), LayerMut::Conv2d(&mut self.conv));
            }
        }
    )*};
}
has_one_convolution!(Downsample, Upsample);

/// diffusers' `Upsample2D`: nearest neighbour, then a convolution.
#[derive(Module, Debug)]
pub(crate) struct Upsample<B: Backend> {
    conv: LoraConv2d<B>,
}

impl<B: Backend> Upsample<B> {
    pub(crate) fn new(channels: usize, device: &B::Device) -> Self {
        Self { conv: LoraConv2dConfig::new(channels, channels, 3).with_padding(1).init(device) }
    }
}

impl<B: DiffusionBackend> Upsample<B> {
    /// `[n, c, h, w] -> [n, c, size]`; twice the size unless given.
    pub(crate) fn forward(&self, x: Tensor<B, 4>, size: Option<[usize; 2]>) -> Tensor<B, 4> {
        let [_, _, h, w] = x.dims();
        let size = size.unwrap_or([2 * h, 2 * w]);
        self.conv.forward(ops::upsample(x, size))
    }
}

/// One column of zeros on the right and one row below.
fn pad_right_and_bottom<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [n, c, h, w] = x.dims();
    // `Tensor::pad` makes zeros of the device's default dtype, which need not be that of `x`
    let zeros = Tensor::zeros([n, c, h + 1, w + 1], (&x.device(), x.dtype()));
    zeros.slice_assign([0..n, 0..c, 0..h, 0..w], x)
}

/// The module with its parameters in f32.
pub(crate) fn as_f32<B: DiffusionBackend, M: Module<B>>(module: M) -> M {
    struct ToF32;
    impl<B: DiffusionBackend> ModuleMapper<B> for ToF32 {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(|tensor| ops::cast(tensor, FloatDType::F32))
        }
    }
    module.map(&mut ToF32)
}

/// Whether the autoencoder computes in f32 although its weights are of `dtype`.
///
/// bf16 has 8 bits, as many as a picture: rounded after each of some sixty layers, pictures are several levels off.
pub(crate) fn widens(dtype: DType) -> bool {
    dtype == DType::BF16
}

/// What `forward` makes of a part of the autoencoder, whose parameters are widened for it if `wide`: one part at a
/// time, so that no more of the weights are ever there twice.
pub(crate) fn part<B: DiffusionBackend, M: Module<B>>(
    module: &M,
    wide: bool,
    forward: impl FnOnce(&M) -> Tensor<B, 4>,
) -> Tensor<B, 4> {
    match wide {
        true => forward(&as_f32(module.clone())),
        false => forward(module),
    }
}
