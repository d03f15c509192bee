//! What is learnt: the loss of some samples.

mod diffusion;
mod reconstruction;

pub use diffusion::{Denoise, Diffusion, DrawnSample, LatentSample, SnrWeight};
pub use reconstruction::{Reconstruction, ReconstructionImages};

use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;

/// One sample of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Which item of the data.
    pub index: usize,
    /// `epoch * N + place in the epoch`: names the streams of everything random about this sample.
    pub position: u64,
}

/// A loss over the samples of some data, for some model.
pub trait Objective<B: AutodiffBackend> {
    /// What learns.
    type Model: burn::module::AutodiffModule<B>;

    /// How many items the data has.
    fn len(&self) -> usize;

    /// Whether the data has no items.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Says what data this is, for telling runs apart.
    fn fingerprint(&self) -> String;

    /// Readies the model for one backward pass, over the samples from `position` on: what it draws by itself, as an
    /// adapter its dropout, has its source set here. Nothing else may change.
    fn prepare(&self, model: &mut Self::Model, position: u64, seed: u64) {
        let _ = (model, position, seed);
    }

    /// The mean loss over `samples`, `[1]`; everything random is a function of their positions and `seed`.
    fn loss(&self, model: &Self::Model, samples: &[Sample], seed: u64) -> Tensor<B, 1>;
}
