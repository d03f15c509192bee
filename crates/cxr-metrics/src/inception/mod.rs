//! InceptionV3 of 2015-12-05: the network whose features make a Fréchet distance an FID, a kernel distance a KID,
//! and whose 1008 logits make an Inception Score.
//!
//! It is TensorFlow's network, not torchvision's: 1008 classes, batch normalization with an epsilon of 1e-3, average
//! pools that leave padding out, and a max pool in the last block (Heusel et al. 2017; the port is pytorch-fid's).
//! Weights are read strictly from pytorch-fid's and torch-fidelity's file or from safetensors; see [`find_weights`].

mod cache;
mod extractor;
#[cfg(feature = "hub")]
mod fetch;
mod layers;
mod network;
mod resize;
mod weights;

pub use extractor::{InceptionExtractor, NAME, OTHER_NAME};
#[cfg(feature = "hub")]
pub use fetch::fetch_weights;
pub use layers::{CLASSES, FEATURES, Layer, layers};
pub use resize::{INPUT_SIDE, ResizeMode};
pub use weights::{WEIGHTS_ADDRESS, WEIGHTS_BYTES, WEIGHTS_SHA256, WEIGHTS_VARIABLE, find_weights};
