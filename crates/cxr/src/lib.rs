//! Synthetic chest radiographs in Rust: Stable Diffusion, LoRA, and honest measurement.
//!
//! This crate gathers the workspace's libraries under one name and chooses the backend at the edge; each library
//! is useful alone.
//!
//! | Module | What |
//! |---|---|
//! | [`ldm`] | text encoder, autoencoder, UNet, schedulers, weights, pipeline |
//! | [`lora`] | the LoRA layer, its targets, adapter files |
//! | [`dataset`] | radiographs with reports, splits that do not leak |
//! | [`trainer`] | fine-tuning, and training from scratch |
//! | [`metrics`] | distances with intervals, audits |
//! | [`tokenizer`], [`kernels`], [`core`] | what those are built on |
//! | [`open()`] | from a folder and a device's name to a [`Synthesizer`] that makes pictures |
//! | [`device`] | from a device's name to a call of a generic program |
//! | [`prelude`] | what most programs name |
//!
//! Research only: what these models draw is no radiograph of anybody, and not for diagnosis.
//!
//! # Pictures from a model folder
//!
//! [`open()`] reads a folder in diffusers' layout; the device is data, so the program has no type parameters.
//!
//! ```
//! # use cxr::ldm::{scheduler::NoiseScheduleConfig, text::ClipTextConfig, unet::UNetConfig, vae::AutoencoderKlConfig};
//! # let folder = tempfile::tempdir()?;
//! # std::env::set_current_dir(&folder)?;
//! # let config = ModelConfig {
//! #     text: ClipTextConfig::tiny(),
//! #     unet: UNetConfig::tiny(),
//! #     vae: AutoencoderKlConfig::tiny(),
//! #     schedule: NoiseScheduleConfig::sd15(),
//! # };
//! # let mut parts = config.init::<Flex>(&Default::default())?;
//! # cxr::lora::attach(&mut parts.unet, &LoraConfig::default(), 7)?;
//! # let adapter = cxr::lora::export(&parts.unet, "default", cxr::lora::UNET)?;
//! # cxr::lora::write("cxr.safetensors", &adapter, cxr::lora::Format::Diffusers)?;
//! # StableDiffusion::new(parts, &Default::default())?.save("stable-diffusion-v1-5", SaveDtype::F32)?;
//! use cxr::prelude::*;
//!
//! let mut model = cxr::open("auto", "stable-diffusion-v1-5", LoadOptions::default())?;
//! model.add_lora("cxr.safetensors".as_ref(), 1.0)?;
//! let request = Request::new("Cardiomegaly. Small left pleural effusion.").steps(30).seed(7).images_per_prompt(4);
//! for image in model.generate(&request)? {
//!     image.save_png(format!("{}.png", image.settings.seed))?; // carries prompt, sampler and model hash
//! }
//! # assert!((7..11).all(|seed| std::path::Path::new(&format!("{seed}.png")).is_file()));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The same request gives the same pictures on the CPU, however they are batched: each has a stream of random
//! numbers of its own, named by its seed.
//!
//! # Tensors, and training
//!
//! Models, layers and loops are generic over the backend. [`device::dispatch`] calls a generic [`device::Program`]
//! with the backend of a device; a program that knows its backend names it.
//!
//! ```
//! use burn::tensor::{ElementConversion, Int, Tensor};
//! use cxr::device::{DeviceSpec, Program, dispatch};
//! use cxr::kernels::DiffusionAutodiff;
//! use cxr::ldm::{text::ClipTextConfig, unet::UNetConfig};
//! use cxr::lora::{LoraConfig, attach, train_only};
//!
//! struct Loss;
//!
//! impl Program for Loss {
//!     type Output = f32;
//!
//!     fn run<B: DiffusionAutodiff>(self, device: B::Device, _name: &str) -> f32 {
//!         let text = ClipTextConfig::tiny().init::<B>(&device); // sd15() has the published sizes
//!         let mut unet = UNetConfig::tiny().init::<B>(&device); // zeros until weights are loaded
//!         attach(&mut unet, &LoraConfig::default(), 7).expect("attention has projections");
//!         train_only(&mut unet, "default").expect("it was attached");
//!         let context = unet.prepare(text.forward(Tensor::<B, 2, Int>::zeros([2, 77], &device)));
//!         let (latents, noise) = (Tensor::zeros([2, 4, 8, 8], &device), Tensor::ones([2, 4, 8, 8], &device));
//!         let timesteps = Tensor::<B, 1>::from_floats([981.0, 1.0], &device);
//!         let loss = (unet.forward(latents, timesteps, &context) - noise).powi_scalar(2).mean();
//!         let _gradients = loss.backward(); // of the adapter, and of nothing else
//!         loss.into_scalar().elem()
//!     }
//! }
//!
//! assert_eq!(dispatch(DeviceSpec::Flex, Loss)?, 1.0);
//! # Ok::<(), cxr::device::DeviceError>(())
//! ```
//!
//! [`trainer::train`] is the loop around such a loss: batches, optimizer, checkpoints, resumption.
//!
//! # Data and measurement
//!
//! ```no_run
//! use cxr::prelude::*;
//!
//! let collection = Collection::open("nih-chest-64".as_ref(), &ReadOptions::default())?;
//! let split = Split::new(&collection, &SplitConfig::default())?; // no patient on both sides
//! let leakage = LeakageReport::measure(&collection, &split, true)?; // what it lets through all the same
//! # Ok::<(), cxr::dataset::DatasetError>(())
//! ```
//!
//! [`metrics`] compares two sets of pictures and prints, beside every distance, the number of pictures, an
//! interval, and what real pictures reach against real ones.
//!
//! # Features
//!
//! `flex` (default), `cuda`, one of `wgpu` / `vulkan` / `metal`, `tch`: burn's own names, several at once. What was
//! not built in is refused by name at run time.

pub mod device;
mod open;
pub mod prelude;

pub use cxr_core as core;
pub use cxr_dataset as dataset;
pub use cxr_kernels as kernels;
pub use cxr_ldm as ldm;
pub use cxr_lora as lora;
pub use cxr_metrics as metrics;
pub use cxr_tokenizer as tokenizer;
pub use cxr_trainer as trainer;
pub use open::{Error, StepView, Synthesizer, open};
