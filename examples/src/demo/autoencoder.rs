//! Training the embedded autoencoder, and judging it.

use burn::tensor::{Tensor, TensorData};
use cxr::core::hash::sha256_hex;
use cxr::core::random::Stream;
use cxr::kernels::DiffusionBackend;
use cxr::ldm::vae::AutoencoderKl;
use cxr::trainer::{ReconstructionImages, Sample};

use super::pictures::{Picture, SIDE, procedural, randomized, recoloured, to_rgb};

/// Strongest randomization that the autoencoder sees; half of it is the mean.
const STRENGTH: f32 = 0.6;
/// Procedural pictures per thumbnail.
const PROCEDURAL: f32 = 0.15;

/// The pictures that the autoencoder learns from: another randomization of a thumbnail each time it is asked for,
/// and procedural pictures among them.
pub struct AutoencoderPictures {
    /// Grey thumbnails of training patients, `[SIDE * SIDE]` in `[0, 1]`.
    pub thumbnails: Vec<Vec<f32>>,
    /// Whether every other thumbnail has its pixels where they were. Turning and zooming interpolate, and a decoder that
    /// sees nothing else draws what is interpolated.
    pub sharp: bool,
}

impl AutoencoderPictures {
    fn picture(&self, sample: Sample, seed: u64) -> Picture {
        let purpose = if self.sharp { "sharp picture" } else { "autoencoder picture" };
        let mut stream = Stream::new(seed, purpose, sample.position);
        let Some(thumbnail) = self.thumbnails.get(sample.index) else {
            return procedural(&mut stream);
        };
        let strength = STRENGTH * stream.uniform();
        if self.sharp && stream.uniform() < 0.5 {
            recoloured(thumbnail, strength, &mut stream)
        } else {
            randomized(thumbnail, "", strength, &mut stream)
        }
    }
}

impl ReconstructionImages for AutoencoderPictures {
    fn len(&self) -> usize {
        let thumbnails = self.thumbnails.len();
        thumbnails + (PROCEDURAL * thumbnails as f32) as usize
    }

    fn shape(&self) -> [usize; 3] {
        [3, SIDE, SIDE]
    }

    fn pixels(&self, sample: Sample, seed: u64) -> Vec<f32> {
        self.picture(sample, seed).to_rgb()
    }

    fn fingerprint(&self) -> String {
        let bytes: Vec<u8> = self.thumbnails.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        let hash = &sha256_hex(&bytes)[..16];
        let kind = if self.sharp { "every other unmoved, " } else { "" };
        format!("{kind}thumbnails {hash} strength {STRENGTH} procedural {PROCEDURAL}")
    }
}

/// Pictures that went through the autoencoder, without noise in the latents.
pub struct Reconstructions {
    /// Grey pixels `[SIDE * SIDE]` in `[0, 1]`, clamped: the mean of the three channels.
    pub pixels: Vec<Vec<f32>>,
    /// Mean over the pictures of the peak signal-to-noise ratio, in dB.
    pub psnr: f64,
}

/// Encodes and decodes grey pictures `[SIDE * SIDE]` in `[0, 1]`.
pub fn reconstruct<B: DiffusionBackend>(
    vae: &AutoencoderKl<B>,
    pictures: &[Vec<f32>],
    device: &B::Device,
) -> Reconstructions {
    let plane = SIDE * SIDE;
    let mut pixels = Vec::with_capacity(pictures.len());
    let mut psnr = 0.0;
    for batch in pictures.chunks(32) {
        let decoded = vae.decode(vae.encode(to_tensor::<B>(batch, device)).mean);
        let values: Vec<f32> = decoded.into_data().iter::<f32>().collect();
        for (source, planes) in batch.iter().zip(values.chunks_exact(3 * plane)) {
            let grey: Vec<f32> = (0..plane)
                .map(|i| {
                    let mean = (planes[i] + planes[plane + i] + planes[2 * plane + i]) / 3.0;
                    (0.5 * mean + 0.5).clamp(0.0, 1.0)
                })
                .collect();
            let error: f64 = source.iter().zip(&grey).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            psnr -= 10.0 * (error / plane as f64).max(1e-12).log10() / pictures.len() as f64;
            pixels.push(grey);
        }
    }
    Reconstructions { pixels, psnr }
}

/// Three equal channels in `[-1, 1]`, `[n, 3, SIDE, SIDE]`.
pub fn to_tensor<B: DiffusionBackend>(pictures: &[Vec<f32>], device: &B::Device) -> Tensor<B, 4> {
    let values: Vec<f32> = pictures.iter().flat_map(|pixels| to_rgb(pixels)).collect();
    Tensor::from_data(TensorData::new(values, [pictures.len(), 3, SIDE, SIDE]), device)
}
