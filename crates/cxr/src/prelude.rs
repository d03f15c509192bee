//! What most programs name: `use cxr::prelude::*;`.
//!
//! Errors are left out: each library's is named by its path.

pub use crate::device::{DeviceSpec, Program, dispatch};
pub use crate::open::{StepView, Synthesizer, open};
pub use cxr_core::metadata::MetadataRow;
pub use cxr_core::progress::{Progress, Silent};
pub use cxr_dataset::{
    Batches, Collection, ImageCache, ImageLoader, ImageOptions, LeakageReport, ReadOptions, Split,
    SplitConfig, TokenFilter,
};
#[cfg(feature = "flex")]
pub use cxr_kernels::Flex;
pub use cxr_kernels::{DiffusionAutodiff, DiffusionBackend};
pub use cxr_ldm::pipeline::{
    Image, LoadOptions, ModelConfig, ModelParts, Request, SaveDtype, StableDiffusion,
};
pub use cxr_ldm::scheduler::Sampler;
pub use cxr_lora::{Adaptable, LoraConfig, TargetSet};
pub use cxr_metrics::{Card, Evaluation, FeatureExtractor};
pub use cxr_tokenizer::ClipTokenizer;
pub use cxr_trainer::{Objective, TrainConfig, Trained, train};
