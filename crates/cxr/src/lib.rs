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
//! | [`device`] | from `--device auto` to a generic program |
//!
//! # Features
//!
//! `flex` (default), `cuda`, one of `wgpu` / `vulkan` / `metal`, `tch`: burn's own names, several at once.

pub mod device;

pub use cxr_core as core;
pub use cxr_dataset as dataset;
pub use cxr_kernels as kernels;
pub use cxr_ldm as ldm;
pub use cxr_lora as lora;
pub use cxr_metrics as metrics;
pub use cxr_tokenizer as tokenizer;
pub use cxr_trainer as trainer;
