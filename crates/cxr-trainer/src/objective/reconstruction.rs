//! Training an autoencoder: pictures in, the same pictures out.

use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Tensor, TensorData};
use cxr_core::random::Stream;
use cxr_kernels::DiffusionAutodiff;
use cxr_ldm::vae::AutoencoderKl;
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
        let [c, h, w] = self.images.shape();
        let n = samples.len();
        // Side by side: a batch for a GPU would otherwise take longer to make than to learn from.
        let images = &self.images;
        let values: Vec<Vec<f32>> = samples.par_iter().map(|s| images.pixels(*s, seed)).collect();
        let values = values.concat();
        let pixels = Tensor::<B, 4>::from_data(TensorData::new(values, [n, c, h, w]), &self.device);
        let moments = model.encode(pixels.clone());
        let [_, lc, lh, lw] = moments.mean.dims();
        let noise: Vec<Vec<f32>> = samples
            .par_iter()
            .map(|s| Stream::new(seed, "posterior", s.position).normals(lc * lh * lw))
            .collect();
        let noise = noise.concat();
        let noise = Tensor::<B, 4>::from_data(TensorData::new(noise, [n, lc, lh, lw]), &self.device);
        let (mean, logvar) = (moments.mean, moments.logvar);
        let latents = mean.clone().add(logvar.clone().mul_scalar(0.5).exp().mul(noise));
        let error = model.decode(latents).sub(pixels);
        let across = error.clone().narrow(3, 1, w - 1).sub(error.clone().narrow(3, 0, w - 1));
        let down = error.clone().narrow(2, 1, h - 1).sub(error.clone().narrow(2, 0, h - 1));
        let edges = across.abs().mean().add(down.abs().mean());
        let kl = mean.clone().mul(mean).add(logvar.clone().exp()).sub(logvar).sub_scalar(1.0);
        let kl = kl.mean().mul_scalar(0.5 * self.kl);
        error.abs().mean().add(edges.mul_scalar(self.edges)).add(kl)
    }
}
