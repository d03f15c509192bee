//! Training of latent diffusion models on burn: one loop, whatever learns.
//!
//! [`train`] runs an [`Objective`] over a model's trainable parameters, with checkpoints from which it goes on
//! where it stopped. Fine-tuning an adapter and training a model from scratch are two uses of it: they differ in
//! the objective and in which parameters are marked trainable.
//!
//! | Part | What |
//! |---|---|
//! | [`TrainConfig`] | everything that a run is a function of, besides data and initial weights |
//! | [`FinetuneConfig`] | the settings of a fine-tuning: presets, TOML, one at a time |
//! | [`encode`] | latents of pictures and embeddings of prompts, once |
//! | [`Objective`] | the loss of the samples at given positions: [`Diffusion`], [`Reconstruction`] |
//! | [`Training`] | a run with a validation, pictures along the way, several processes |
//! | [`distributed`] | one process for each device, under MPI (feature `mpi`) |
//! | [`checkpoint`] | weights, moments and place of a run, written to a temporary folder and renamed |
//! | [`watch`] | `metrics.jsonl` and the loss curve |
//! | [`initialize`] | initial values for training from scratch, by path from named streams |
//!
//! Everything random is drawn from streams named by the seed and the sample's position
//! (`epoch * N + place in the epoch`), so that a run that was interrupted sees what an uninterrupted one sees.

mod books;
pub mod checkpoint;
mod config;
pub mod distributed;
mod ema;
pub mod encode;
mod error;
mod finetune;
mod gradients;
mod initialize;
mod memory;
mod objective;
mod run;
pub mod watch;

pub use config::{LearningRate, OptimizerConfig, Schedule, TrainConfig};
pub use error::TrainError;
pub use finetune::{BaseDtype, FinetuneConfig, PRESETS, SampleConfig, ValidationConfig};
pub use initialize::initialize;
pub use memory::peak_memory;
pub use objective::{
    Denoise, Diffusion, DrawnSample, LatentSample, Objective, Reconstruction, ReconstructionImages, Sample,
    SnrWeight, TimestepLoss, absolute_error, image_batch, posterior_sample,
};
pub use run::{Trained, Training, train};
