//! Every backend that this build has besides `flex`, against `flex`: the same weights, inputs and noise through every
//! component, a short picture, and a training step.
//!
//! ```sh
//! cargo test --release -p cxr --no-default-features --features flex,wgpu --test backends
//! ```
//!
//! A device that was asked for by its feature and is not there is a failure. Without a graphics card, `wgpu` runs on
//! Mesa's software driver (CONTRIBUTING.md says how).

#![cfg(all(feature = "flex", any(feature = "cuda", feature = "wgpu", feature = "tch")))]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{DType, Int, Tensor, TensorData};
use cxr::core::random::Stream;
use cxr::device::{Adapter, DeviceError};
use cxr::kernels::WeightCache;
use cxr::kernels::nn::parameters;
use cxr::kernels::ops::{self, AttentionOptions};
use cxr::ldm::scheduler::NoiseScheduleConfig;
use cxr::ldm::text::ClipTextConfig;
use cxr::ldm::unet::{UNet2dCondition, UNetConfig};
use cxr::ldm::vae::AutoencoderKlConfig;
use cxr::prelude::*;
use cxr::trainer::{
    Diffusion, LatentSample, LearningRate, OptimizerConfig, Reconstruction, ReconstructionImages, Sample,
    SnrWeight,
};

/// The norm of the difference to `flex` in f32, over the norm of what `flex` has: at most this.
///
/// cuda takes f32 products in TF32, whose mantissa has 10 bits. f16 is against `flex` in f32 with the same weights,
/// rounded to f16: what is left is the rounding of activations.
const BARS: [(&str, DType, f64); 10] = [
    ("wgpu", DType::F32, 1e-4),
    ("tch", DType::F32, 1e-4),
    ("cuda", DType::F32, 2e-3),
    ("flex", DType::F16, 1e-2),
    ("wgpu", DType::F16, 1e-2),
    ("tch", DType::F16, 1e-2),
    ("cuda", DType::F16, 1e-2),
    ("wgpu", DType::BF16, 2e-2),
    ("tch", DType::BF16, 2e-2),
    ("cuda", DType::BF16, 2e-2),
];

/// The bar of gradients on cuda, each of which went through all products of the network and back. Seen on an H200: 6e-3.
const CUDA_GRADIENTS: f64 = 1e-2;

/// The same of the autoencoder, whose loss is of absolute differences: its gradient is made of signs, some of which TF32 turns.
/// Seen on an H200: 1.5e-2.
const CUDA_SIGNS: f64 = 2e-2;

/// What a changed weight has to miss the bar by, or a bar would show nothing.
const MISS: f64 = 3.0;

/// Latents of every test: one size for all, since a software driver takes its time in compiling a kernel for a shape.
const HEIGHT: usize = 24;
const WIDTH: usize = 16;

/// Values by name.
type Outputs = BTreeMap<String, Vec<f32>>;

#[test]
fn components() {
    for (name, device) in others() {
        let reference = run(DeviceSpec::Flex, Forward::f32());
        let found = run(device, Forward::f32());
        assert_meets(name, DType::F32, &found, &reference);
        // two backends add in different orders: equal bits would mean that one of them did not run
        for (part, values) in &reference {
            assert!(bits(values) != bits(&found[part]), "{name}: {part} has the bits of flex");
        }
    }
}

#[test]
fn components_in_half_precision() {
    let devices = [("flex", DeviceSpec::Flex)].into_iter().chain(others());
    for (name, device) in devices {
        if !run(device, Supports(DType::F16)) {
            println!("{name}: this device does not have f16");
            continue;
        }
        let reference = run(DeviceSpec::Flex, Forward { weights: DType::F16, ..Forward::f32() });
        let found = run(device, Forward { weights: DType::F16, dtype: DType::F16, ..Forward::f32() });
        assert_meets(name, DType::F16, &found, &reference);
    }
}

#[test]
fn a_picture() {
    for (name, device) in others() {
        let [(found, bytes), (reference, expected)] = [device, DeviceSpec::Flex].map(|d| run(d, Picture));
        assert_meets(name, DType::F32, &found, &reference);
        let apart = bytes.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(apart <= Some(1), "{name}: {apart:?} steps of 255 apart, where rounding makes one at most");
    }
}

#[test]
fn a_training_step() {
    for (name, device) in others() {
        let reference = run(DeviceSpec::Flex, Training::default());
        let found = run(device, Training::default());
        assert_meets(name, DType::F32, &found, &reference);
    }
}

/// What training a model from nothing asks of a backend: gradients of convolutions' weights, norms, embeddings.
#[test]
fn gradients_of_all_weights() {
    for (name, device) in others() {
        let reference = run(DeviceSpec::Flex, AllWeights);
        assert_meets(name, DType::F32, &run(device, AllWeights), &reference);
    }
}

/// With a convolution behind it, whose gradient has its channels last on a GPU, and at a size at which dividing
/// coordinates in f32 misses pixels: burn's own is wrong in both (docs/burn.md).
#[test]
fn upsampling() {
    for (name, device) in others() {
        assert_meets(name, DType::F32, &run(device, Upsampling), &run(DeviceSpec::Flex, Upsampling));
    }
}

/// Sizes that no tile divides, and images in either order of memory.
#[test]
fn operations() {
    for (name, device) in others() {
        let supported = |dtype| run(device, Supports(dtype));
        for dtype in [DType::F32, DType::F16, DType::BF16].into_iter().filter(|dtype| supported(*dtype)) {
            let reference = run(DeviceSpec::Flex, Operations { rounded: dtype, dtype: DType::F32 });
            let found = run(device, Operations { rounded: dtype, dtype });
            assert_meets(name, dtype, &found, &reference);
        }
    }
}

/// Changed on `flex`: the other way round is the same comparison, and slower.
#[test]
fn a_changed_weight_is_seen() {
    for (name, device) in others() {
        let assert_misses = |part: &str, changed: &str, found: &Outputs, reference: &Outputs| {
            let miss = MISS * bar(name, DType::F32, part);
            let error = relative(&found[part], &reference[part]);
            println!("{name} {part} against flex with {changed} changed: relative error {error:.1e}");
            assert!(error > miss, "{part} does not see a change of {changed}: {error:e}");
        };
        let forward = run(device, Forward::f32());
        for (changed, parts) in [
            ("text_model.encoder.layers.1.mlp.fc1.weight", &["text"][..]),
            ("mid_block.resnets.0.conv1.weight", &["unet"]),
            ("encoder.mid_block.resnets.1.conv2.weight", &["vae encode mean", "vae encode std"]),
            ("decoder.up_blocks.0.resnets.0.conv1.weight", &["vae decode"]),
        ] {
            let reference = run(DeviceSpec::Flex, Forward { changed, ..Forward::f32() });
            parts.iter().for_each(|part| assert_misses(part, changed, &forward, &reference));
        }
        let block = "mid_block.attentions.0.transformer_blocks.0";
        let training = run(device, Training::default());
        let changed = format!("{block}.attn1.to_q.weight");
        let reference = run(DeviceSpec::Flex, Training { changed: changed.clone() });
        let gradient = format!("gradient of {block}.attn1.to_q.adapters.0.lora_a");
        for part in [gradient.as_str(), "step"] {
            assert_misses(part, &changed, &training, &reference);
        }
    }
}

/// The backends of this build but `flex`, each with the device that the test takes.
fn others() -> Vec<(&'static str, DeviceSpec)> {
    let adapters = [Adapter::Discrete(0), Adapter::Integrated, Adapter::Cpu].map(DeviceSpec::Wgpu);
    let built = |feature: &str| cxr::device::built().contains(&feature);
    let mut found = Vec::new();
    if cfg!(feature = "wgpu") {
        found.push(("wgpu", first(&adapters)));
    }
    if built("cuda") {
        found.push(("cuda", first(&[DeviceSpec::Cuda(0)])));
    }
    if built("tch") {
        found.push(("tch", first(&[DeviceSpec::Tch(None)])));
    }
    found
}

/// The first of them that is there.
fn first(devices: &[DeviceSpec]) -> DeviceSpec {
    let mut missing: Vec<DeviceError> = Vec::new();
    for device in devices {
        match dispatch(*device, Supports(DType::F32)) {
            Ok(_) => return *device,
            Err(error) => missing.push(error),
        }
    }
    panic!("the feature was asked for, its device is not there: {missing:#?}");
}

fn run<P: Program>(device: DeviceSpec, program: P) -> P::Output {
    dispatch(device, program).unwrap_or_else(|error| panic!("{error}"))
}

fn bar(name: &str, dtype: DType, part: &str) -> f64 {
    if name == "cuda" && part.starts_with("gradient of autoencoder.") {
        return CUDA_SIGNS;
    }
    if name == "cuda" && (part.starts_with("gradient") || part == "step") {
        return CUDA_GRADIENTS;
    }
    let row = BARS.iter().find(|row| (row.0, row.1) == (name, dtype));
    row.unwrap_or_else(|| panic!("no bar for {name} in {dtype:?}")).2
}

fn assert_meets(name: &str, dtype: DType, found: &Outputs, reference: &Outputs) {
    assert!(found.keys().eq(reference.keys()), "{:?} against {:?}", found.keys(), reference.keys());
    let errors: Vec<(&str, f64)> =
        reference.iter().map(|(part, values)| (part.as_str(), relative(&found[part], values))).collect();
    for (part, error) in &errors {
        println!("{name} {dtype:?} {part}: relative error {error:.1e}");
    }
    for (part, error) in errors {
        let bar = bar(name, dtype, part);
        assert!(error <= bar, "{name} in {dtype:?}, {part}: relative error {error:e}, the bar is {bar:e}");
    }
}

/// The norm of the difference over the norm of the reference.
fn relative(found: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(found.len(), reference.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(reference).map(|(a, b)| f64::from(*a) - f64::from(*b)))
        / norm(&mut reference.iter().map(|b| f64::from(*b)))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Whether the device computes in a dtype.
struct Supports(DType);

impl Program for Supports {
    type Output = bool;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> bool {
        B::supports_dtype(&device, self.0)
    }
}

struct Upsampling;

impl Program for Upsampling {
    type Output = Outputs;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> Outputs {
        const CHANNELS: usize = 8;
        let (height, width) = (107, 110);
        let normal = |name: &str, shape: [usize; 4]| {
            let data = Stream::new(0, name, 0).normals(shape.iter().product());
            Tensor::<B, 4>::from_data(TensorData::new(data, shape), (&device, DType::F32))
        };
        let x = normal("x", [1, CHANNELS, height, width]).require_grad();
        let weight = normal("weight", [CHANNELS, CHANNELS, 3, 3]);
        let twice = ops::upsample(x.clone(), [2 * height, 2 * width]);
        let y = ops::conv2d(twice.clone(), weight, None, 1, 1, &WeightCache::new());
        let along = normal("along", [1, CHANNELS, 2 * height, 2 * width]);
        let gradients = (y * along).sum().backward();
        let gradient = x.grad(&gradients).expect("it was asked for");
        BTreeMap::from([
            ("upsampled".to_string(), values(twice.inner())),
            ("gradient of upsampling".to_string(), values(gradient)),
        ])
    }
}

/// Operations by themselves.
struct Operations {
    /// What the inputs are rounded to.
    rounded: DType,
    /// What is computed in.
    dtype: DType,
}

impl Operations {
    fn normal<B: Backend, const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
    ) -> impl Fn(&B::Device) -> Tensor<B, D> {
        let data = TensorData::new(normals(name, shape.iter().product()), shape);
        let data = data.convert_dtype(self.rounded).convert_dtype(self.dtype);
        let dtype = self.dtype;
        move |device| Tensor::from_data(data.clone(), (device, dtype))
    }
}

impl Program for Operations {
    type Output = Outputs;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> Outputs {
        type Inner<B> = <B as AutodiffBackend>::InnerBackend;
        let mut outputs = Outputs::new();
        let image = |name: &str, [n, c, h, w]: [usize; 4], last: bool| match last {
            // the same numbers, channels last in memory
            true => {
                let x = self.normal::<Inner<B>, 4>(name, [n, c, h, w])(&device);
                let turned = x.permute([0, 2, 3, 1]).reshape([n * h * w, c]);
                turned.reshape([n, h, w, c]).permute([0, 3, 1, 2])
            }
            false => self.normal::<Inner<B>, 4>(name, [n, c, h, w])(&device),
        };
        let vector = |name: &str, length: usize| self.normal::<Inner<B>, 1>(name, [length])(&device);
        let cache = WeightCache::new();
        for last in [false, true] {
            let mut keep = |name: &str, x: Tensor<Inner<B>, 4>| {
                outputs.insert(format!("{name}, channels last {last}"), values(x));
            };
            // far from zero, as an image can be
            let x = image("x", [2, 30, 13, 7], last).add_scalar(3.0);
            let y = image("y", [2, 30, 13, 7], !last);
            let (gamma, beta) = (vector("gamma", 30), vector("beta", 30));
            keep("group norm", ops::group_norm(x.clone(), gamma.clone(), beta.clone(), 6, 1e-5));
            keep("group norm and SiLU", ops::group_norm_silu(x.clone(), gamma, beta, 10, 1e-6));
            let large = image("large", [1, 8, 80, 65], last);
            let ones = || vector("gamma", 8);
            keep("group norm in parts", ops::group_norm(large, ones(), ones(), 2, 1e-5));
            keep("sum", ops::add(x.clone(), y.clone()));
            let shift = self.normal::<Inner<B>, 2>("shift", [2, 30])(&device);
            keep("shifted", ops::shift(x.clone(), shift));
            keep("joined", ops::join(x.clone(), image("narrow", [2, 5, 13, 7], !last)));
            keep("upsampled", ops::upsample(x.clone(), [26, 13]));
            let weight = self.normal::<Inner<B>, 4>("kernel", [9, 30, 3, 3])(&device);
            keep(
                "convolution",
                ops::conv2d(y.clone(), weight.clone(), Some(vector("bias", 9)), 1, 1, &cache),
            );
            let arranged = ops::conv2d_weight(weight.clone());
            keep("convolution, weight arranged", ops::conv2d(y.clone(), arranged, None, 1, 1, &cache));
            keep("convolution, stride 2", ops::conv2d(y, weight, None, 2, 1, &cache));
            let small = self.normal::<Inner<B>, 4>("small kernel", [66, 64, 1, 1])(&device);
            let wide = image("wide", [2, 64, 9, 8], last);
            keep(
                "convolution of 1x1",
                ops::conv2d(wide.clone(), small, Some(vector("bias", 66)), 1, 0, &cache),
            );
            let kernel = self.normal::<Inner<B>, 4>("wide kernel", [72, 64, 3, 3])(&device);
            keep("convolution of many", ops::conv2d(wide, kernel, Some(vector("bias", 72)), 1, 1, &cache));
            keep("tokens and back", ops::tokens_to_image(ops::image_to_tokens(x.clone()), 13, 7));
            keep("SiLU", ops::silu(x));
        }
        let mut keep = |name: &str, x: Vec<f32>| {
            outputs.insert(name.to_owned(), x);
        };
        let rows = self.normal::<Inner<B>, 2>("rows", [37, 50])(&device);
        let weight = self.normal::<Inner<B>, 2>("weight", [22, 50])(&device);
        keep(
            "layer norm",
            values(ops::layer_norm(rows.clone(), vector("gamma", 50), vector("beta", 50), 1e-5)),
        );
        keep("GEGLU", values(ops::geglu(rows.clone())));
        keep("linear", values(ops::linear(rows.clone(), weight.clone(), Some(vector("bias", 22)), &cache)));
        let many = self.normal::<Inner<B>, 2>("many", [130, 100])(&device);
        let matrix = self.normal::<Inner<B>, 2>("matrix", [96, 100])(&device);
        keep("linear of many", values(ops::linear(many, matrix, Some(vector("bias", 96)), &cache)));
        keep("tokens", values(ops::image_to_tokens(image("x", [2, 30, 13, 7], true))));
        keep("linear without bias", values(ops::linear(rows, weight, None, &cache)));
        // what the matrix units take, with a rest of rows, columns and terms, few results of many terms; and the gradients
        for (n, c, h, w, out, side, stride, padding) in [
            (2, 64, 9, 8, 128, 3, 1, 1),
            (1, 320, 8, 8, 66, 3, 2, 1),
            (1, 24, 11, 12, 40, 3, 2, 1),
            (3, 8, 5, 7, 256, 3, 1, 2),
            (1, 40, 20, 17, 4, 3, 1, 1),
            (1, 72, 1, 300, 136, 1, 1, 0),
        ] {
            let x = self.normal::<B, 4>("x", [n, c, h, w])(&device).require_grad();
            let weight = self.normal::<B, 4>("weight", [out, c, side, side])(&device).require_grad();
            let bias = self.normal::<B, 1>("bias", [out])(&device);
            let y = ops::conv2d(x.clone(), weight.clone(), Some(bias), stride, padding, &cache);
            let along = self.normal::<B, 4>("along", y.dims())(&device);
            let gradients = (y.clone() * along).sum().backward();
            let name = format!("convolution of {n} x {c} x {h} x {w} to {out}, {side} wide, stride {stride}");
            let gradient = |of: &Tensor<B, 4>| values(of.grad(&gradients).expect("it was asked for"));
            keep(&format!("gradient of {name}"), gradient(&x));
            keep(&format!("gradient of the kernel of {name}"), gradient(&weight));
            keep(&name, values(y.inner()));
        }
        for (rows, width, out) in [(130, 104, 96), (136, 1000, 8), (8, 16, 258)] {
            let x = self.normal::<B, 2>("x", [rows, width])(&device).require_grad();
            let weight = self.normal::<B, 2>("weight", [out, width])(&device).require_grad();
            let bias = self.normal::<B, 1>("bias", [out])(&device);
            let y = ops::linear(x.clone(), weight.clone(), Some(bias), &cache);
            let along = self.normal::<B, 2>("along", [rows, out])(&device);
            let gradients = (y.clone() * along).sum().backward();
            let name = format!("linear layer of {rows} x {width} to {out}");
            let gradient = |of: &Tensor<B, 2>| values(of.grad(&gradients).expect("it was asked for"));
            keep(&format!("gradient of {name}"), gradient(&x));
            keep(&format!("gradient of the weight of {name}"), gradient(&weight));
            keep(&name, values(y.inner()));
        }
        // tokens and heads as a layer leaves them: the tokens of a head do not lie beside each other
        let heads = |name: &str, tokens: usize, heads: usize, d: usize| {
            let x = self.normal::<Inner<B>, 3>(name, [2, tokens, heads * d])(&device);
            x.reshape([2, tokens, heads, d]).swap_dims(1, 2)
        };
        for (n, m, d, causal) in [
            (100, 77, 40, false),
            (77, 77, 64, true),
            (130, 130, 160, false),
            (64, 64, 80, true),
            (9, 11, 5, false),
            (70, 1, 16, false),
            // wider than one pass takes: in chunks
            (130, 77, 192, true),
        ] {
            let [q, k, v] = [("q", n), ("k", m), ("v", m)].map(|(name, tokens)| heads(name, tokens, 3, d));
            let y = ops::attention(q, k, v, AttentionOptions { causal });
            keep(&format!("attention of {n} to {m}, heads of {d}, causal {causal}"), values(y));
        }
        outputs
    }
}

/// Every component by itself.
struct Forward {
    /// What the weights and inputs are rounded to.
    weights: DType,
    /// What they are kept and computed in.
    dtype: DType,
    /// A parameter that is made half as large again.
    changed: &'static str,
}

impl Forward {
    fn f32() -> Self {
        Self { weights: DType::F32, dtype: DType::F32, changed: "" }
    }

    fn fill<B: Backend, M: Module<B>>(&self, module: M) -> M {
        fill(module, self.weights, self.dtype, self.changed)
    }

    fn normal<B: Backend, const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        device: &B::Device,
    ) -> Tensor<B, D> {
        let data = TensorData::new(normals(name, shape.iter().product()), shape);
        let data = data.convert_dtype(self.weights).convert_dtype(self.dtype);
        Tensor::from_data(data, (device, self.dtype))
    }
}

impl Program for Forward {
    type Output = Outputs;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> Outputs {
        type Inner<B> = <B as AutodiffBackend>::InnerBackend;
        let text = self.fill(ClipTextConfig::tiny().init::<Inner<B>>(&device));
        let prompts = ["", "Cardiomegaly. Small left pleural effusion."].map(|prompt| {
            ClipTokenizer::embedded().encode(prompt).ids.iter().map(|&id| i64::from(id)).collect::<Vec<_>>()
        });
        let ids = TensorData::new(prompts.concat(), [2, 77]);
        let hidden = text.forward(Tensor::<Inner<B>, 2, Int>::from_data(ids, &device));

        let unet = self.fill(UNetConfig::tiny().init::<Inner<B>>(&device));
        let context = unet.prepare(self.normal("hidden", [2, 77, 32], &device));
        let latents: Tensor<Inner<B>, 4> = self.normal("latents", [1, 4, HEIGHT, WIDTH], &device);
        let both = Tensor::cat(vec![latents.clone(), latents], 0);
        // the UNet takes timesteps in f32, whatever its weights are in
        let timesteps = Tensor::from_data(TensorData::from([981.0_f32; 2]), (&device, DType::F32));
        let eps = unet.forward(both, timesteps, &context);

        let vae = self.fill(AutoencoderKlConfig::tiny().init::<Inner<B>>(&device));
        let moments = vae.encode(self.normal("pixels", [1, 3, 2 * HEIGHT, 2 * WIDTH], &device));
        let pixels = vae.decode(self.normal("unscaled latents", [1, 4, HEIGHT, WIDTH], &device));
        BTreeMap::from([
            ("text".to_string(), values(hidden)),
            ("unet".to_string(), values(eps)),
            ("vae encode mean".to_string(), values(moments.mean.clone())),
            ("vae encode std".to_string(), values(moments.std())),
            ("vae decode".to_string(), values(pixels)),
        ])
    }
}

/// A few guided steps of either kind of sampler, from a prompt to pixels.
struct Picture;

impl Program for Picture {
    type Output = (Outputs, Vec<u8>);

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> Self::Output {
        let config = ModelConfig {
            text: ClipTextConfig::tiny(),
            unet: UNetConfig::tiny(),
            vae: AutoencoderKlConfig::tiny(),
            schedule: NoiseScheduleConfig::sd15(),
        };
        let parts = config.init::<B::InnerBackend>(&device).expect("the parts fit together");
        let filled = Forward::f32();
        let parts = ModelParts {
            text: filled.fill(parts.text),
            unet: filled.fill(parts.unet),
            vae: filled.fill(parts.vae),
            ..parts
        };
        let model = StableDiffusion::new(parts, &device).expect("the parts fit together");
        let request =
            Request::new("Cardiomegaly.").steps(4).seed(3).guidance(5.0).size(2 * WIDTH, 2 * HEIGHT);
        let (mut outputs, mut bytes) = (Outputs::new(), Vec::new());
        for sampler in [Sampler::ddim(), Sampler::DpmPp2m] {
            let mut last = None;
            let pictures = model.generate_with(&request.clone().sampler(sampler), &Silent, &mut |preview| {
                last = Some(preview.step.latents.clone());
                ControlFlow::Continue(())
            });
            let picture = pictures.expect("the request can be met").remove(0);
            let latents = last.expect("there were steps");
            let pixels = model.decode(latents.clone()).expect("pixels are finite");
            outputs.insert(format!("{} latents", sampler.name()), values(latents));
            outputs.insert(format!("{} pixels", sampler.name()), pixels.iter::<f32>().collect());
            bytes.extend(picture.rgb);
        }
        (outputs, bytes)
    }
}

/// Loss and gradients of an adapter, and one step of AdamW.
#[derive(Default)]
struct Training {
    /// A parameter that is made half as large again.
    changed: String,
}

impl Program for Training {
    type Output = Outputs;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> Outputs {
        let fill = |module| fill::<B, _>(module, DType::F32, DType::F32, &self.changed);
        let mut unet = fill(UNetConfig::tiny().init::<B>(&device));
        cxr::lora::attach(&mut unet, &LoraConfig::new(3), 6).expect("attention has projections");
        // a new adapter's B is zero, and with it the gradient of A
        let unet = fill(unet);
        let objective = diffusion::<B>(&device);
        let batch = [0, 1].map(|index| Sample { index, position: index as u64 });
        let loss = objective.loss(&unet, &batch, 9);
        let mut outputs = Outputs::from([("loss".to_string(), values(loss.clone()))]);
        read_gradients(&[], &unet, loss, &mut outputs);

        let before = adapter_values::<B>(&unet);
        let config = TrainConfig {
            steps: 1,
            batch_size: 2,
            learning_rate: LearningRate::constant(1e-2),
            // Adam divides a gradient by its size; where it is but rounding, that would be all one sees
            optimizer: OptimizerConfig { epsilon: 1e-3, weight_decay: 1e-2, ..OptimizerConfig::default() },
            clip_norm: Some(1.0),
            ..TrainConfig::default()
        };
        let folder = tempfile::tempdir().expect("a folder for the run");
        let trained = train::<B, _>(unet, &objective, &config, folder.path(), &Silent).expect("one step");
        let after = adapter_values::<B>(&trained.model);
        outputs.insert("step".to_string(), after.iter().zip(&before).map(|(a, b)| a - b).collect());
        outputs
    }
}

/// Gradients of every weight of UNet and autoencoder.
struct AllWeights;

impl Program for AllWeights {
    type Output = Outputs;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> Outputs {
        let mut outputs = Outputs::new();
        let batch = [0, 1].map(|index| Sample { index, position: index as u64 });
        let unet = fill::<B, _>(UNetConfig::tiny().init::<B>(&device), DType::F32, DType::F32, "");
        let loss = diffusion::<B>(&device).loss(&unet, &batch, 9);
        read_gradients(&["unet"], &unet, loss, &mut outputs);
        // a norm with a channel to a group does not see the bias before it: that gradient is rounding alone
        let config = AutoencoderKlConfig { norm_num_groups: 16, ..AutoencoderKlConfig::tiny() };
        let vae = fill::<B, _>(config.init::<B>(&device), DType::F32, DType::F32, "");
        let objective = Reconstruction { images: Noise, edges: 1.0, kl: 1e-2, device };
        read_gradients(&["autoencoder"], &vae, objective.loss(&vae, &batch, 9), &mut outputs);
        let weights = parameters::list::<B, _>(&unet).len() + parameters::list::<B, _>(&vae).len();
        assert_eq!(outputs.len(), weights, "a gradient for every weight");
        // and attention not what is added to all keys
        outputs.retain(|part, _| !part.ends_with("to_k.bias"));
        outputs
    }
}

/// The gradients of all that learns in `model`, which lies at `path`.
fn read_gradients<B: AutodiffBackend, M: burn::module::AutodiffModule<B>>(
    path: &[&str],
    model: &M,
    loss: Tensor<B, 1>,
    into: &mut Outputs,
) {
    let before = into.len();
    let grads = GradientsParams::from_grads(loss.backward(), model);
    let path = path.iter().map(|name| name.to_string()).collect();
    Module::<B>::visit(model, &mut ReadGradients::<'_> { path, grads, into });
    let trainable = parameters::list::<B, _>(model).iter().filter(|info| info.trainable).count();
    assert_eq!(into.len() - before, trainable, "a gradient for all that learns");
}

/// Pictures of noise.
struct Noise;

impl ReconstructionImages for Noise {
    fn len(&self) -> usize {
        2
    }

    fn shape(&self) -> [usize; 3] {
        [3, 2 * HEIGHT, 2 * WIDTH]
    }

    fn pixels(&self, sample: Sample, _: u64) -> Vec<f32> {
        let pixels = normals(&format!("picture {}", sample.index), self.shape().iter().product());
        pixels.into_iter().map(f32::tanh).collect()
    }

    fn fingerprint(&self) -> String {
        "noise".to_string()
    }
}

/// Two pictures of noise, with captions of noise.
fn diffusion<B: DiffusionAutodiff>(device: &B::Device) -> Diffusion<B, UNet2dCondition<B>> {
    let condition = |name: &str| (Arc::new(normals(name, 77 * 32)), [77, 32]);
    let shape = [4, HEIGHT, WIDTH];
    let elements = shape.iter().product();
    let sample = |name: &str| LatentSample {
        mean: normals(name, elements),
        std: (0..elements).map(|i| 0.1 + 1e-4 * i as f32).collect(),
        condition: condition(&format!("caption of {name}")),
    };
    let schedule = cxr::ldm::scheduler::NoiseSchedule::new(NoiseScheduleConfig::sd15());
    let (samples, unconditional) = (vec![sample("one"), sample("two")], condition("no caption"));
    let fingerprint = "two pictures of noise".to_string();
    let schedule = schedule.expect("published settings");
    let plain = Diffusion::new(&schedule, samples, shape, unconditional, fingerprint, device);
    Diffusion { weight: SnrWeight::MinSnr(5.0), ..plain }
}

/// Reads the gradients that there are, by path.
struct ReadGradients<'a> {
    path: Vec<String>,
    grads: GradientsParams,
    into: &'a mut Outputs,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for ReadGradients<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }
    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(grad) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            self.into.insert(format!("gradient of {}", self.path.join(".")), values(grad));
        }
    }
}

/// All factors of the adapter, one after the other.
fn adapter_values<B: Backend>(unet: &UNet2dCondition<B>) -> Vec<f32> {
    let mut found = Vec::new();
    parameters::read(unet, |path, data| {
        if path.contains("lora_") {
            found.extend(data.iter::<f32>());
        }
    });
    found
}

fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Standard normal numbers that the name alone decides.
fn normals(name: &str, count: usize) -> Vec<f32> {
    Stream::new(0, name, 0).normals(count)
}

/// The last layers of what is added to a shortcut.
const LAST: [&str; 6] =
    ["conv2.weight", "to_out.0.weight", "proj_out.weight", "net.2.weight", "fc2.weight", "out_proj.weight"];

/// Weights that the path alone decides: nothing is zero or one, and signals keep their size. What is added to a shortcut
/// is half of it, so that half precision does not lose a digit at every block.
///
/// Rounded to `rounded`, kept in `dtype`; the parameter called `changed` is half as large again.
fn fill<B: Backend, M: Module<B>>(module: M, rounded: DType, dtype: DType, changed: &str) -> M {
    let filled = parameters::map_data(module, |path, shape| -> Result<_, Infallible> {
        let fan_in: usize = shape[1..].iter().product();
        let gain = if LAST.iter().any(|last| path.ends_with(last)) { 0.5 } else { 1.0 };
        let (centre, deviation) = match shape.len() {
            1 if path.ends_with("weight") => (1.0, 0.1),
            1 => (0.0, 0.1),
            _ => (0.0, gain * (fan_in as f32).powf(-0.5)),
        };
        let scale = if path == changed { 1.5 } else { 1.0 };
        let values = normals(path, shape.iter().product());
        let values: Vec<f32> = values.into_iter().map(|v| scale * (centre + deviation * v)).collect();
        let data = TensorData::new(values, shape.to_vec());
        Ok(Some(data.convert_dtype(rounded).convert_dtype(dtype)))
    });
    let Ok(filled) = filled;
    filled
}
