//! What is learnt: the loss of some samples.

mod blocks;
mod diffusion;
mod reconstruction;

pub use diffusion::{Denoise, Diffusion, DrawnSample, LatentSample, SnrWeight, TimestepLoss};
pub use reconstruction::{
    Reconstruction, ReconstructionImages, absolute_error, image_batch, posterior_sample,
};

use burn::module::AutodiffModule;
use burn::optim::GradientsParams;
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
    type Model: AutodiffModule<B>;

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

    /// [`loss`](Self::loss), and its gradients by the trainable parameters.
    fn gradients(&self, model: &Self::Model, samples: &[Sample], seed: u64) -> (f64, GradientsParams) {
        loss_and_gradients(model, self.loss(model, samples, seed))
    }
}

/// A loss `[1]` as a number, and its gradients by the parameters of `model`.
fn loss_and_gradients<B: AutodiffBackend, M: AutodiffModule<B>>(
    model: &M,
    loss: Tensor<B, 1>,
) -> (f64, GradientsParams) {
    let value = loss.clone().into_data().iter::<f64>().sum();
    (value, GradientsParams::from_grads(loss.backward(), model))
}
