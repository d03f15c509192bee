//! LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models") for any burn model: the layer, its
//! targets, adapter files.
//!
//! A model builds its projections as [`LoraLinear`] or [`LoraConv2d`] and lists them through [`Adaptable`]; everything else works on
//! that list.
//!
//! | To | Call |
//! |---|---|
//! | start training an adapter | [`attach`] with a [`LoraConfig`], later [`train_only`] |
//! | use a file | [`read`], then [`load_adapter`] or [`load_named`] |
//! | keep what was trained | [`export`], then [`write()`] |
//! | mix several | [`set_weight`], [`set_enabled`], [`detach`] |
//! | pay nothing at inference | [`merge()`], [`unmerge`], [`merge_and_detach`] |
//!
//! ```
//! use burn::module::Module;
//! use burn::tensor::{Tensor, backend::Backend};
//! use cxr_kernels::Flex;
//! use cxr_lora::{Adaptable, Format, LayerMut, LayerRef, LoraConfig, LoraLinear, LoraLinearConfig, UNET};
//!
//! #[derive(Module, Debug)]
//! struct Attention<B: Backend> {
//!     to_q: LoraLinear<B>,
//!     to_k: LoraLinear<B>,
//! }
//!
//! impl<B: Backend> Adaptable<B> for Attention<B> {
//!     fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
//!         visit("attn1.to_q", LayerRef::Linear(&self.to_q));
//!         visit("attn1.to_k", LayerRef::Linear(&self.to_k));
//!     }
//!     fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
//!         visit("attn1.to_q", LayerMut::Linear(&mut self.to_q));
//!         visit("attn1.to_k", LayerMut::Linear(&mut self.to_k));
//!     }
//! }
//!
//! let device = Default::default();
//! let projection = LoraLinearConfig::new(6, 4).with_bias(false);
//! let model = || Attention::<Flex> { to_q: projection.init(&device), to_k: projection.init(&device) };
//!
//! // A new adapter of rank 2 on both projections. B is zero, so the output is still that of the base.
//! let mut trained = model();
//! assert_eq!(cxr_lora::attach(&mut trained, &LoraConfig::new(2).with_alpha(4.0), 7)?, 2);
//! let y = trained.to_q.forward(Tensor::<Flex, 3>::ones([1, 5, 6], &device));
//! assert_eq!(y.dims(), [1, 5, 4]);
//!
//! // Out to a file that diffusers reads, and back into another model, at half strength.
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("adapter.safetensors");
//! let adapter = cxr_lora::export(&trained, "default", UNET)?;
//! cxr_lora::write(&path, &adapter, Format::Diffusers)?;
//! let (adapter, format) = cxr_lora::read(&path)?;
//! assert_eq!(format, Format::Diffusers);
//! let mut other = model();
//! assert_eq!(cxr_lora::load_adapter(&mut other, &adapter, 0.5)?, 2);
//!
//! // Into the weights, where it costs nothing.
//! assert_eq!(cxr_lora::merge(&mut other)?.layers(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The crate has no features: it is generic over [`cxr_kernels::DiffusionBackend`], and a program chooses the backend.

mod adapter;
mod branch;
mod conv;
mod dropout;
mod error;
mod format;
mod linear;
mod merge;
mod target;
mod weights;

pub use adapter::{
    DEFAULT_NAME, LoraConfig, PatternRank, attach, attached, detach, export, load_adapter, load_named,
    set_dropout_step, set_dropout_untracked, set_enabled, set_weight, train_only,
};
pub use branch::Branch;
pub use conv::{LoraConv2d, LoraConv2dConfig};
pub use dropout::DropoutStep;
pub use error::{LoraError, Result};
pub use format::{Format, factor_keys, read, weights_file, write};
pub use linear::{LoraLinear, LoraLinearConfig};
pub use merge::{Merged, detach_merged, merge, merge_and_detach, unmerge};
pub use target::{Adaptable, LayerInfo, LayerMut, LayerRef, TargetSet, layers};
pub use weights::{Adapter, LoraWeights, ModuleKey, ModuleName, Provenance, TEXT_ENCODER, UNET};
