//! torchxrayvision's DenseNet-121, a network of the domain: what its features and findings say of radiographs, as
//! RoentGen's evaluation uses them.
//!
//! Weights come from a path. What torchxrayvision downloads are pickled Python objects, which are not run here;
//! in Python, once:
//!
//! ```python
//! import torch, torchxrayvision as xrv
//! model = xrv.models.DenseNet(weights="densenet121-res224-all")
//! torch.save(model.state_dict(), "densenet121-res224-all.pt")
//! ```
//!
//! Then [`DenseNetExtractor::load`] reads the file, or the same tensors in a safetensors file, strictly: a tensor
//! that is missing, unknown or of another shape is an error.
//!
//! # Other networks of the domain
//!
//! [`FeatureExtractor`](crate::FeatureExtractor) asks nothing of a network's kind. A transformer such as RAD-DINO
//! (a ViT-B/14 at 518 pixels, by which CheXGenBench ranks) implements the same five methods:
//!
//! - `extract_batch` gets decoded pictures and does the network's own preparation (for RAD-DINO: shorter side to
//!   518 pixels by bicubic interpolation, centre crop, its own mean and deviation);
//! - it returns one vector per picture: the class token (768 features), or the mean of its 37 x 37 patch tokens;
//!   which of the two belongs into `name`, since distances in one say nothing about the other;
//! - `logit_names` stays empty: a network without heads gets some from [`LinearHeads`](crate::usefulness::LinearHeads).
//!
//! Attention is in `cxr_kernels::ops::attention`, LayerNorm, GELU and linear layers beside it.

mod config;
mod extractor;
mod load;
mod network;
mod prepare;
mod published;

pub use config::DenseNetConfig;
pub use extractor::DenseNetExtractor;
pub use prepare::centre_and_resize;
