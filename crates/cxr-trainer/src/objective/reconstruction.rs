//! Training an autoencoder: pictures in, the same pictures out.

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorData};
use cxr_core::random::Stream;
use cxr_kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr_ldm::vae::{AutoencoderKl, Moments};
use rayon::prelude::*;

use super::{Objective, Sample};

/// Pictures for [`Reconstruction`], made or read when they are asked for.
pub trait ReconstructionImages: Send + Sync {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `[channels, height, width]` of every picture.
    fn shape(&self) -> [usize; 3];

    /// The pixels of one picture in `[-1, 1]`; what is random about it comes from `seed` and `position`.
    fn pixels(&self, sample: Sample, seed: u64) -> Vec<f32>;

    /// Says what data this is.
    fn fingerprint(&self) -> String;
}

/// Absolute error, absolute error of the differences between neighbours, and a small KL term
/// (Kingma and Welling, 2014; Rombach et al., 2022, appendix G, without its perceptual network).
pub struct Reconstruction<B: AutodiffBackend, I> {
    /// The pictures.
    pub images: I,
    /// Weight of the error of differences between neighbouring pixels: keeps edges.
    pub edges: f64,
    /// Weight of the KL divergence to the standard normal, per latent element.
    pub kl: f64,
    /// Where the tensors go.
    pub device: B::Device,
}

impl<B: DiffusionAutodiff, I: ReconstructionImages> Objective<B> for Reconstruction<B, I> {
    type Model = AutoencoderKl<B>;

    fn len(&self) -> usize {
        self.images.len()
    }

    fn fingerprint(&self) -> String {
        format!("{} edges {} kl {}", self.images.fingerprint(), self.edges, self.kl)
    }

    fn loss(&self, model: &Self::Model, samples: &[Sample], seed: u64) -> Tensor<B, 1> {
        let pixels = image_batch::<B, _>(&self.images, samples, seed, &self.device);
        let moments = model.encode(pixels.clone());
        let latents = posterior_sample(&moments, samples, seed);
        let error = model.decode(latents).sub(pixels);
        let Moments { mean, logvar } = moments;
        let kl = mean.clone().mul(mean).add(logvar.clone().exp()).sub(logvar).sub_scalar(1.0);
        let kl = kl.mean().mul_scalar(0.5 * self.kl);
        absolute_error(error, self.edges).add(kl)
    }
}

/// The pictures of some samples, `[n, channels, height, width]` in `[-1, 1]`, made side by side: a batch for a GPU would
/// otherwise take longer to make than to learn from.
pub fn image_batch<B: Backend, I: ReconstructionImages>(
    images: &I,
    samples: &[Sample],
    seed: u64,
    device: &B::Device,
) -> Tensor<B, 4> {
    let [c, h, w] = images.shape();
    let values: Vec<Vec<f32>> = samples.par_iter().map(|s| images.pixels(*s, seed)).collect();
    Tensor::from_data(TensorData::new(values.concat(), [samples.len(), c, h, w]), device)
}

/// Latents drawn from the posterior of some samples, of the shape of `moments`; the noise is a function of their positions
/// and `seed`.
pub fn posterior_sample<B: DiffusionBackend>(
    moments: &Moments<B>,
    samples: &[Sample],
    seed: u64,
) -> Tensor<B, 4> {
    let shape = moments.mean.dims();
    let size = shape[1..].iter().product();
    let noise: Vec<Vec<f32>> =
        samples.par_iter().map(|s| Stream::new(seed, "posterior", s.position).normals(size)).collect();
    let noise = TensorData::new(noise.concat(), shape);
    moments.sample(Tensor::from_data(noise, &moments.mean.device()))
}

/// The mean of an error's absolute values `[n, c, h, w]`, and `edges` times that of the differences between its
/// neighbours, across and down: `[1]`.
pub fn absolute_error<B: Backend>(error: Tensor<B, 4>, edges: f64) -> Tensor<B, 1> {
    let [_, _, h, w] = error.dims();
    let across = error.clone().narrow(3, 1, w - 1).sub(error.clone().narrow(3, 0, w - 1));
    let down = error.clone().narrow(2, 1, h - 1).sub(error.clone().narrow(2, 0, h - 1));
    let at_edges = across.abs().mean().add(down.abs().mean());
    error.abs().mean().add(at_edges.mul_scalar(edges))
}
