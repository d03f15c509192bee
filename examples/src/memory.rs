//! How much memory a run will take, and whether it is there, before anything is loaded.
//!
//! Parameters are counted; activations are a number of floats for each pixel of the latents or of the picture, times
//! the channels of the network's finest level, and, in the UNet, one more than the residual blocks of a level. The
//! numbers were fitted to the peaks that `/usr/bin/time -v` saw on `flex` with two models that lie a hundred times
//! apart, and are within a third of them (the tests have the peaks). A GPU's memory is not looked at.

use anyhow::{Result, bail};
use burn::tensor::FloatDType;
use bytesize::ByteSize;
use cxr::device::{DeviceSpec, Program, built, dispatch};
use cxr::kernels::nn::parameters;
use cxr::kernels::{DEFAULT_PACK_MEMORY, DiffusionAutodiff, set_pack_memory};
use cxr::ldm::weights::ModelConfig;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::exit::{Code, OrExit};

/// The program itself, and what the allocator keeps for later, in bytes.
const PROCESS: f64 = 0.08e9;
/// What loading weights takes besides them, by their size.
const LOADING: f64 = 0.07;
/// Floats of the UNet for each pixel of the latents, channel of its finest level and residual block, forward.
const UNET: f64 = 20.0;
/// The same, kept for a backward pass.
const UNET_BACKWARD: f64 = 97.0;
/// The same, where it goes back block by block.
const UNET_BY_BLOCK: f64 = 42.0;
/// Floats of the decoder for each pixel of the picture and channel of its finest level; of the encoder not more.
const DECODER: f64 = 13.0;
/// Packed weights by the size of the weights, where it is most: in Winograd's convolutions.
const LONGEST: usize = 4;
/// Side of a tile of the decoder, in pixels.
const TILE: usize = 512;

/// `--ignore-memory` and `--pack-memory`.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct MemoryArgs {
    /// Memory for weights in the order in which the CPU multiplies them, e.g. 0, 512MiB, 2.5GB: with more of it small
    /// pictures take less time. No pixel depends on it.
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub pack_memory: ByteSize,
    /// Go on where more memory is needed than is free, by the estimate.
    #[arg(long)]
    pub ignore_memory: bool,
}

impl Default for MemoryArgs {
    fn default() -> Self {
        Self { pack_memory: ByteSize(DEFAULT_PACK_MEMORY as u64), ignore_memory: false }
    }
}

/// Parameters of a model's networks, and what their activations go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Parameters of the text encoder.
    pub text: usize,
    /// Parameters of the UNet.
    pub unet: usize,
    /// Parameters of the autoencoder.
    pub vae: usize,
    /// Channels of the UNet's finest level, times one more than its residual blocks.
    unet_units: usize,
    /// Channels of the autoencoder's finest level.
    vae_channels: usize,
    /// Pixels of a picture's side for one of the latents'.
    factor: usize,
}

/// What pictures are made at once, and how.
#[derive(Debug, Clone, Copy)]
pub struct PictureBatch {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// How many go through the UNet at once.
    pub batch: usize,
    /// How many go through the decoder at once.
    pub decoded: usize,
    /// Whether they go through it in tiles.
    pub tiled: bool,
    /// With classifier-free guidance each goes through the UNet twice.
    pub guided: bool,
    /// Dtype of the weights.
    pub dtype: FloatDType,
}

/// What a step of fine-tuning takes at once.
#[derive(Debug, Clone, Copy)]
pub struct TrainingBatch {
    /// Side of the pictures in pixels.
    pub side: usize,
    /// Pictures.
    pub batch: usize,
    /// Whether the backward pass goes block by block.
    pub by_block: bool,
    /// Whether pictures are made along the way, and in which number.
    pub samples: usize,
    /// Dtype of the frozen weights.
    pub dtype: FloatDType,
}

impl Sizes {
    /// Of a model, by its configuration alone.
    ///
    /// # Errors
    /// If the configuration is not valid.
    pub fn of(config: &ModelConfig) -> Result<Self> {
        struct Count<'a>(&'a ModelConfig);
        impl Program for Count<'_> {
            type Output = Result<Sizes>;

            fn run<B: DiffusionAutodiff>(self, device: B::Device, _: &str) -> Self::Output {
                let parts = self.0.init::<B>(&device)?;
                Ok(Sizes {
                    text: parameters::count(&parts.text).0,
                    unet: parameters::count(&parts.unet).0,
                    vae: parameters::count(&parts.vae).0,
                    unet_units: self.0.unet.block_out_channels.first().copied().unwrap_or(1)
                        * (1 + self.0.unet.layers_per_block),
                    vae_channels: self.0.vae.block_out_channels.first().copied().unwrap_or(1),
                    factor: self.0.vae.factor(),
                })
            }
        }
        // No weight is made for this, so the device does not matter.
        let device = if built().contains(&"flex") { DeviceSpec::Flex } else { DeviceSpec::Auto };
        dispatch(device, Count(config))?
    }

    fn all(&self) -> usize {
        self.text + self.unet + self.vae
    }

    /// Bytes that making pictures takes at most.
    pub fn pictures(&self, of: &PictureBatch) -> u64 {
        let latents = (of.width / self.factor * (of.height / self.factor)) as f64;
        let through = (of.batch * if of.guided { 2 } else { 1 }) as f64;
        let unet = self.activations(UNET, latents * through, self.unet_units);
        let picture = of.width * of.height;
        let pixels = (of.decoded * if of.tiled { picture.min(TILE * TILE) } else { picture }) as f64;
        let decoder = self.activations(DECODER, pixels, self.vae_channels);
        (PROCESS + loaded(self.all(), of.dtype) + unet.max(decoder)) as u64
    }

    /// Bytes that fine-tuning an adapter takes at most, `encoded` pictures going through the encoder at once before.
    pub fn training(&self, of: &TrainingBatch, encoded: usize) -> u64 {
        let side = of.side / self.factor;
        let kept = if of.by_block { UNET_BY_BLOCK } else { UNET_BACKWARD };
        let step = self.activations(kept, (side * side * of.batch) as f64, self.unet_units);
        let unet = loaded(self.unet, of.dtype);
        let pixels = (of.side * of.side * encoded) as f64;
        let encoder = self.activations(DECODER, pixels, self.vae_channels) + loaded(self.vae, of.dtype);
        let text = loaded(self.text, of.dtype);
        let mut most = (unet + step).max(encoder).max(text);
        if of.samples > 0 {
            let (width, dtype) = (of.side, of.dtype);
            let made = PictureBatch {
                width,
                height: width,
                batch: 1,
                decoded: 1,
                tiled: false,
                guided: true,
                dtype,
            };
            most = most.max(self.pictures(&made) as f64 - PROCESS);
        }
        (PROCESS + most) as u64
    }

    /// Bytes that training text encoder and UNet from scratch takes at most: weights, gradients, two moments and an
    /// average, a step of `batch` pictures, and a pool of so many pictures with their latents.
    pub fn pretraining(&self, side: usize, batch: usize, pool: usize) -> u64 {
        let weights = 5.0 * 4.0 * (self.text + self.unet) as f64 + 4.0 * self.vae as f64;
        let latents = (side / self.factor * (side / self.factor)) as f64;
        let step = self.activations(UNET_BACKWARD, latents * batch as f64, self.unet_units);
        // Grey pixels, and mean and deviation of four channels.
        let kept = 4.0 * pool as f64 * ((side * side) as f64 + 2.0 * 4.0 * latents);
        (PROCESS + weights + step + kept) as u64
    }

    /// Bytes that packed weights of the UNet take at most: `--pack-memory`, or all of them in their longest form.
    pub fn packed(&self, args: MemoryArgs) -> u64 {
        args.pack_memory.as_u64().min((LONGEST * 4 * self.unet) as u64)
    }

    fn activations(&self, floats: f64, pixels: f64, channels: usize) -> f64 {
        4.0 * floats * pixels * channels as f64
    }
}

/// Bytes of so many weights while they are loaded.
fn loaded(parameters: usize, dtype: FloatDType) -> f64 {
    (1.0 + LOADING) * parameters as f64 * bytes(dtype)
}

/// Bytes of a weight.
fn bytes(dtype: FloatDType) -> f64 {
    match dtype {
        FloatDType::F16 | FloatDType::BF16 => 2.0,
        FloatDType::F64 => 8.0,
        _ => 4.0,
    }
}

/// Memory that is free on this machine, or in this container, in bytes; none where the system does not say.
pub fn free() -> Option<u64> {
    let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kinds);
    let machine = Some(system.available_memory()).filter(|bytes| *bytes > 0);
    // What a container has read of files counts as its memory, and gives way.
    let container = system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
    let container = container.filter(|bytes| *bytes > 0);
    match (machine, container) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (machine, container) => machine.or(container),
    }
}

/// Says what is needed, and refuses what does not fit; `advice` is how it could. Sets the bound of packed weights.
///
/// # Errors
/// If more is needed than is free, unless `args` say to go on.
pub fn check(needed: u64, device: DeviceSpec, args: MemoryArgs, quiet: bool, advice: &str) -> Result<()> {
    set_pack_memory(usize::try_from(args.pack_memory.as_u64()).unwrap_or(usize::MAX));
    // With a GPU the weights are elsewhere, and how much is free there is not known.
    let on_host = device == DeviceSpec::Flex || (device == DeviceSpec::Auto && built() == ["flex"]);
    if !on_host {
        return Ok(());
    }
    compare(needed, free(), args, quiet, advice).or_exit(Code::Memory)
}

fn compare(needed: u64, free: Option<u64>, args: MemoryArgs, quiet: bool, advice: &str) -> Result<()> {
    let Some(free) = free else {
        if !quiet {
            eprintln!("memory: about {}", gigabytes(needed));
        }
        return Ok(());
    };
    if needed <= free {
        if !quiet {
            eprintln!("memory: about {} of {} that are free", gigabytes(needed), gigabytes(free));
        }
        return Ok(());
    }
    let lacks = format!("about {} of memory are needed, and {} are free", gigabytes(needed), gigabytes(free));
    if args.ignore_memory {
        eprintln!("warning: {lacks}");
        return Ok(());
    }
    bail!("{lacks}: {advice}, or go on all the same with --ignore-memory")
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use cxr::kernels::Flex;

    use super::*;

    fn picture(side: usize) -> PictureBatch {
        let (batch, dtype) = (1, FloatDType::F32);
        PictureBatch { width: side, height: side, batch, decoded: batch, tiled: false, guided: true, dtype }
    }

    #[test]
    fn parameters_are_those_of_the_published_model() {
        let sizes = Sizes::of(&ModelConfig::sd15()).unwrap();
        assert_eq!((sizes.unet, sizes.vae), (859_520_964, 83_653_863));
        let made = ModelConfig::sd15().init::<Flex>(&Default::default()).unwrap();
        assert_eq!(sizes.text, parameters::count(&made.text).0);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_gone_on_with_if_asked() {
        let sizes = Sizes::of(&ModelConfig::sd15()).unwrap();
        let needed = sizes.pictures(&picture(512));
        let refused =
            compare(needed, Some(needed - 1), MemoryArgs::default(), true, "a smaller --size takes less");
        let error = refused.unwrap_err().to_string();
        assert!(
            error.contains("--size") && error.contains("--ignore-memory") && error.contains(" GB"),
            "{error}"
        );
        compare(needed, Some(needed), MemoryArgs::default(), true, "").unwrap();
        compare(needed, None, MemoryArgs::default(), true, "").unwrap();
        compare(needed, Some(1), MemoryArgs { ignore_memory: true, ..Default::default() }, true, "").unwrap();
    }

    #[test]
    fn packed_weights_take_what_they_may_or_what_there_are() {
        let args = |bytes| MemoryArgs { pack_memory: ByteSize(bytes), ..Default::default() };
        let large = Sizes::of(&ModelConfig::sd15()).unwrap();
        assert_eq!([0, 5_000].map(|bytes| large.packed(args(bytes))), [0, 5_000]);
        let by_default: ByteSize = "256MiB".parse().unwrap();
        assert_eq!(by_default, MemoryArgs::default().pack_memory);
        let small = Sizes { unet: 1000, ..large };
        assert_eq!(small.packed(args(u64::MAX)), 16_000);
    }

    #[test]
    fn less_is_needed_for_what_takes_less() {
        let sizes = Sizes::of(&ModelConfig::sd15()).unwrap();
        let whole = sizes.pictures(&picture(1024));
        let tiled = sizes.pictures(&PictureBatch { tiled: true, ..picture(1024) });
        let half = sizes.pictures(&PictureBatch { dtype: FloatDType::BF16, ..picture(1024) });
        assert!(tiled < whole && half < whole && sizes.pictures(&picture(512)) < whole);
        let batch =
            TrainingBatch { side: 512, batch: 2, by_block: false, samples: 0, dtype: FloatDType::F32 };
        let by_block = TrainingBatch { by_block: true, ..batch };
        // with more pictures at once the encoder, which goes before, would take most
        assert!(sizes.training(&by_block, 1) < sizes.training(&batch, 1));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn free_memory_is_known() {
        assert!(free().unwrap() > 1 << 20);
    }
}
