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
//! # Progress, previews, and stopping
//!
//! The callback gets every step of every batch. What it answers decides whether there is another; pictures of batches
//! that were finished before are returned. [`Progress`](core::progress::Progress) is the same for counting alone, and
//! for loading and training as well.
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
//! # let parts = config.init::<Flex>(&Default::default())?;
//! # StableDiffusion::new(parts, &Default::default())?.save("stable-diffusion-v1-5", SaveDtype::F32)?;
//! use std::ops::ControlFlow;
//! use cxr::prelude::*;
//!
//! let model = cxr::open("auto", "stable-diffusion-v1-5", LoadOptions::default())?;
//! let request = Request::new("Cardiomegaly.").steps(20).images_per_prompt(4).batch(2);
//! let images = model.generate_with(&request, &Silent, &mut |step| {
//!     if step.index % 5 == 4 {
//!         let previews = step.preview().unwrap_or_default(); // a run of the decoder: now and then
//!         assert_eq!(previews[0].rgb.len(), previews[0].width * previews[0].height * 3);
//!     }
//!     // enough seen in the second batch
//!     if step.images.start < 2 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
//! })?;
//! assert_eq!(images.len(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Several threads, and pictures that are no files
//!
//! A model is `Send + Sync`; one serves any number of threads. On the CPU a call uses all cores by itself, so that
//! several at once take as long as one after the other.
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
//! # let parts = config.init::<Flex>(&Default::default())?;
//! # StableDiffusion::new(parts, &Default::default())?.save("stable-diffusion-v1-5", SaveDtype::F32)?;
//! use std::sync::Arc;
//! use cxr::ldm::pipeline::PngColor;
//! use cxr::prelude::*;
//!
//! let model: Arc<dyn Synthesizer + Send + Sync> =
//!     cxr::open("auto", "stable-diffusion-v1-5", LoadOptions::default())?.into();
//! let draw = |seed| {
//!     let model = Arc::clone(&model);
//!     std::thread::spawn(move || model.generate(&Request::new("Edema.").steps(5).seed(seed)))
//! };
//! for worker in [draw(0), draw(1)] {
//!     for image in worker.join().expect("no panic")? {
//!         let bytes = image.to_png(PngColor::Gray)?; // a PNG file with its settings, in memory
//!         assert!(bytes.starts_with(b"\x89PNG"));
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
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
//! # What an embedding program can rely on
//!
//! - Nothing here prints, exits, or installs a handler. Warnings (a prompt that was cut) go to the `log` crate.
//! - Bad input is an error that names the file, flag or setting; a panic is a mistake of the calling program, and
//!   documented.
//! - Files appear whole or not at all.
//! - The same request gives the same pictures on `flex`, whatever the batch and the number of threads.
//!
//! # Features
//!
//! `flex` (default), `cuda`, one of `wgpu` / `vulkan` / `metal`, `tch`: burn's own names, several at once. What was
//! not built in is refused by name at run time. `autotune` beside `cuda` or `wgpu` has burn time its kernels at the first
//! run of each shape, for minutes.

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
