//! Latents of many pictures, made once: the denoiser trains without the autoencoder.

use std::ops::ControlFlow;

use anyhow::{Result, bail};
use cxr::core::progress::Progress;
use cxr::core::random::Stream;
use cxr::kernels::DiffusionBackend;
use cxr::ldm::vae::AutoencoderKl;
use cxr::trainer::LatentSample;

use super::autoencoder::to_tensor;
use super::pictures::{Picture, procedural, randomized, wild};
use super::thumbnails::Thumbnails;

/// Pictures encoded at once.
const BATCH: usize = 32;

/// Which pictures a pool has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strength {
    /// From mild to strong, every change named in the caption: the base learns the anatomy, and the words.
    Rising,
    /// Half of them the same; the other half changed beyond recognition, and with the finding alone for a caption: a bare
    /// impression does not mean a clean radiograph, as it does not to a general model.
    Wild,
}

/// The pool that the base model learns from: `count` pictures, a sixth of them procedural, the others thumbnails of
/// training patients under randomization.
pub fn pool(thumbnails: &Thumbnails, strength: Strength, count: usize, seed: u64) -> Vec<Picture> {
    let train = &thumbnails.split.train;
    let purpose = match strength {
        Strength::Rising => "base picture",
        Strength::Wild => "wild base picture",
    };
    (0..count)
        .map(|i| {
            let mut stream = Stream::new(seed, purpose, i as u64);
            if i % 6 == 5 {
                return procedural(&mut stream);
            }
            let position = train[(i - i / 6) % train.len()];
            let (thumbnail, finding) =
                (&thumbnails.pixels[position], &thumbnails.collection.pairs[position].text);
            if strength == Strength::Wild && stream.uniform() < 0.5 {
                let amount = 0.5 + 0.5 * stream.uniform();
                let picture = wild(thumbnail, finding, amount, &mut stream);
                return Picture { caption: finding.clone(), ..picture };
            }
            // more mild than strong
            let amount = 0.1 + 0.9 * stream.uniform().powf(1.5);
            randomized(thumbnail, finding, amount, &mut stream)
        })
        .collect()
}

/// Encodes grey pictures `[SIDE * SIDE]` in `[0, 1]`: means and standard deviations of their latents, unscaled.
///
/// # Errors
/// If `progress` asks to stop.
pub fn encode<B: DiffusionBackend, C: Clone>(
    vae: &AutoencoderKl<B>,
    pictures: &[(Vec<f32>, C)],
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<Vec<LatentSample<C>>> {
    progress.begin("encoding pictures", Some(pictures.len() as u64));
    let mut samples = Vec::with_capacity(pictures.len());
    for batch in pictures.chunks(BATCH) {
        let pixels: Vec<Vec<f32>> = batch.iter().map(|(pixels, _)| pixels.clone()).collect();
        let moments = vae.encode(to_tensor::<B>(&pixels, device));
        let size = moments.mean.dims()[1..].iter().product();
        let means: Vec<f32> = moments.mean.into_data().iter::<f32>().collect();
        let stds: Vec<f32> = (moments.logvar * 0.5).exp().into_data().iter::<f32>().collect();
        for ((mean, std), (_, condition)) in means.chunks(size).zip(stds.chunks(size)).zip(batch) {
            samples.push(LatentSample {
                mean: mean.to_vec(),
                std: std.to_vec(),
                condition: condition.clone(),
            });
        }
        if progress.advance(samples.len() as u64, "") == ControlFlow::Break(()) {
            bail!("stopped while encoding");
        }
    }
    progress.end(&format!("{} pictures", samples.len()));
    Ok(samples)
}

/// What latents are multiplied by so that their standard deviation is one: `scaling_factor` of the autoencoder.
pub fn scaling_factor<C>(samples: &[LatentSample<C>]) -> f64 {
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
    for sample in samples {
        for (mean, std) in sample.mean.iter().zip(&sample.std) {
            let (mean, std) = (f64::from(*mean), f64::from(*std));
            sum += mean;
            squares += mean * mean + std * std;
            count += 1.0;
        }
    }
    let mean: f64 = sum / count;
    1.0 / (squares / count - mean * mean).sqrt()
}

/// Multiplies latents by the autoencoder's scaling factor.
pub fn scale<C>(samples: &mut [LatentSample<C>], factor: f64) {
    let values = samples.iter_mut().flat_map(|s| s.mean.iter_mut().chain(&mut s.std));
    values.for_each(|value| *value *= factor as f32);
}
