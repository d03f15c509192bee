//! What the UNet's blocks are made of, at the sizes of each level of Stable Diffusion 1.x: a guided picture (two rows)
//! of 512 pixels. The way down and the way up have the same layers; the way up also has convolutions of two inputs
//! joined, and the middle is on the coarsest level.
//!
//! | Level | Blocks | Channels | Side |
//! |---|---|---|---|
//! | 0 | `CrossAttnDownBlock2D`, `CrossAttnUpBlock2D` | 320 | 64 |
//! | 1 | the same | 640 | 32 |
//! | 2 | the same | 1280 | 16 |
//! | middle | `UNetMidBlock2DCrossAttn`, and without attention `DownBlock2D`, `UpBlock2D` | 1280 | 8 |

use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::nn::{Conv2d, Conv2dConfig, GroupNormConfig, Linear, LinearConfig};
use cxr::kernels::ops::{self, AttentionOptions};
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr_benches::{Cost, fill, normal, on_device, unit};

const LEVELS: [(&str, usize, usize); 4] =
    [("level-0", 320, 64), ("level-1", 640, 32), ("level-2", 1280, 16), ("middle", 1280, 8)];

/// The first residual block of a level on the way up: what comes from below and the skip, joined.
const JOINED: [(&str, usize, usize, usize); 4] = [
    ("level-0", 960, 320, 64),
    ("level-1", 1920, 640, 32),
    ("level-2", 2560, 1280, 16),
    ("middle", 2560, 1280, 8),
];

const HEADS: usize = 8;
const ROWS: usize = 2;
/// Tokens of a text, and the width of its encoder.
const TEXT: [usize; 2] = [77, 768];

struct Operations<'a>(&'a mut Criterion);

impl Program for Operations<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        for level in LEVELS {
            of_image::<B::InnerBackend>(self.0, &device, level);
            of_tokens::<B::InnerBackend>(self.0, &device, level);
        }
        for (level, input, output, side) in JOINED {
            let id = ["conv3x3-joined", &format!("{level}/{input}to{output}x{side}x{side}")];
            convolution::<B::InnerBackend>(self.0, &device, id, [input, output, side]);
        }
    }
}

fn convolution<B: DiffusionBackend>(
    criterion: &mut Criterion,
    device: &B::Device,
    id: [&str; 2],
    [input, output, side]: [usize; 3],
) {
    unit::<B, _, 4>(criterion, device, id, Cost::Short, || {
        let layer: Conv2d<B> = fill(Conv2dConfig::new(input, output, 3).with_padding(1).init(device));
        let x = normal([ROWS, input, side, side], device);
        move || layer.forward(x.clone())
    });
}

/// A residual block's halves: convolution, and GroupNorm with SiLU.
fn of_image<B: DiffusionBackend>(
    criterion: &mut Criterion,
    device: &B::Device,
    (level, channels, side): (&str, usize, usize),
) {
    let size = format!("{level}/{channels}x{side}x{side}");
    convolution::<B>(criterion, device, ["conv3x3", &size], [channels, channels, side]);
    unit::<B, _, 4>(criterion, device, ["group-norm-silu", &size], Cost::Short, || {
        let layer = fill::<B, _>(GroupNormConfig::new(32, channels).init(device));
        let x = normal([ROWS, channels, side, side], device);
        move || layer.forward_silu(x.clone())
    });
}

/// A transformer block's three parts, projections included, norms and sums left out.
fn of_tokens<B: DiffusionBackend>(
    criterion: &mut Criterion,
    device: &B::Device,
    (level, channels, side): (&str, usize, usize),
) {
    let size = format!("{level}/{}x{channels}", side * side);
    let tokens = || normal::<B, 3>([ROWS, side * side, channels], device);
    unit::<B, _, 3>(criterion, device, ["self-attention", &size], Cost::Short, || {
        let layer = Attention::<B>::new(channels, channels, device);
        let x = tokens();
        move || layer.forward(x.clone(), layer.keys_values(x.clone()))
    });
    unit::<B, _, 3>(criterion, device, ["cross-attention", &size], Cost::Short, || {
        let layer = Attention::<B>::new(channels, TEXT[1], device);
        let x = tokens();
        // keys and values of the text are computed once for all steps
        let text = layer.keys_values(normal([ROWS, TEXT[0], TEXT[1]], device));
        move || layer.forward(x.clone(), text.clone())
    });
    unit::<B, _, 3>(criterion, device, ["feed-forward", &size], Cost::Short, || {
        let into: Linear<B> = fill(LinearConfig::new(channels, 8 * channels).init(device));
        let out: Linear<B> = fill(LinearConfig::new(4 * channels, channels).init(device));
        let x = tokens();
        move || out.forward(ops::geglu(into.forward(x.clone())))
    });
}

/// The UNet's attention, as `cxr-ldm` has it.
#[derive(Module, Debug)]
struct Attention<B: Backend> {
    to_q: Linear<B>,
    to_k: Linear<B>,
    to_v: Linear<B>,
    to_out: Linear<B>,
}

impl<B: DiffusionBackend> Attention<B> {
    fn new(width: usize, context: usize, device: &B::Device) -> Self {
        let plain = |input| LinearConfig::new(input, width).with_bias(false).init(device);
        fill(Self {
            to_q: plain(width),
            to_k: plain(context),
            to_v: plain(context),
            to_out: LinearConfig::new(width, width).init(device),
        })
    }

    fn keys_values(&self, context: Tensor<B, 3>) -> [Tensor<B, 4>; 2] {
        [split(self.to_k.forward(context.clone())), split(self.to_v.forward(context))]
    }

    fn forward(&self, x: Tensor<B, 3>, [keys, values]: [Tensor<B, 4>; 2]) -> Tensor<B, 3> {
        let dims = x.dims();
        let mixed = ops::attention(split(self.to_q.forward(x)), keys, values, AttentionOptions::default());
        self.to_out.forward(mixed.swap_dims(1, 2).reshape(dims))
    }
}

/// `[n, tokens, heads * d] -> [n, heads, tokens, d]`.
fn split<B: Backend>(x: Tensor<B, 3>) -> Tensor<B, 4> {
    let [n, tokens, width] = x.dims();
    x.reshape([n, tokens, HEADS, width / HEADS]).swap_dims(1, 2)
}

fn operations(criterion: &mut Criterion) {
    on_device(Operations(criterion));
}

criterion_group!(benches, operations);
criterion_main!(benches);
