//! `cxr-small`: a small convolutional network for 64-pixel grey radiographs, trained on finding labels.
//!
//! Distances in its features need no download and run in seconds on a CPU. They are no FID: they compare runs
//! of one project, and say so by the extractor's name and hash on every figure.

mod config;
mod extractor;
mod loss;
mod network;

pub use config::SmallConfig;
pub use extractor::{CONFIG_FILE, SmallExtractor, WEIGHTS_FILE};
pub use loss::multi_label_loss;
pub use network::{SmallNetwork, SmallOutput, SmallStage, grey_channel};
