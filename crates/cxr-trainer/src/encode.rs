//! What the frozen parts make of the data, once: neither the autoencoder nor the text encoder is needed in training.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use burn::tensor::{FloatDType, Tensor, TensorData};
use cxr_core::progress::{Progress, Stage};
use cxr_dataset::{Batch, Collection, ImageLoader};
use cxr_kernels::DiffusionBackend;
use cxr_ldm::vae::AutoencoderKl;
use cxr_tokenizer::ClipTokenizer;

use crate::{LatentSample, TrainError};

/// A prompt's embedding, row by row, and its shape `[tokens, width]`; pictures with the same prompt share it.
pub type Embedding = (Arc<Vec<f32>>, [usize; 2]);

/// The distribution of one picture's latents, scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct ScaledMoments {
    /// Mean, `[c * h * w]`.
    pub mean: Vec<f32>,
    /// Standard deviation, `[c * h * w]`.
    pub std: Vec<f32>,
}

/// Encodes the pictures of the pairs at `positions`, in that order: mean and standard deviation of the latents, not one
/// draw, times `scaling_factor`; and the latents' shape `[c, h, w]`.
///
/// `dtype` is that of the autoencoder's weights. Pictures go through it `batch` at a time, which changes memory and
/// speed, not the result.
///
/// # Errors
/// [`TrainError::Data`] for a picture that cannot be used, [`TrainError::NotFinite`] if the autoencoder made of one
/// what is no number, [`TrainError::Stopped`] if `progress` asks to stop.
pub fn moments<B: DiffusionBackend>(
    vae: &AutoencoderKl<B>,
    dtype: FloatDType,
    scaling_factor: f64,
    (collection, positions): (&Collection, &[usize]),
    images: &ImageLoader,
    batch: usize,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<(Vec<ScaledMoments>, [usize; 3]), TrainError> {
    let _stage = Stage::begin(progress, "encoding pictures", Some(positions.len() as u64));
    let (mut all, mut shape) = (Vec::with_capacity(positions.len()), [0; 3]);
    for positions in positions.chunks(batch.max(1)) {
        let pictures = Batch::load(collection, positions, images)?;
        let pixels = Tensor::<B, 4>::from_data(TensorData::new(pictures.pixels, pictures.shape), device);
        let moments = vae.encode(pixels.cast(dtype));
        let [_, c, h, w] = moments.mean.dims();
        shape = [c, h, w];
        let scaled = |tensor: Tensor<B, 4>| -> Vec<f32> {
            let tensor = tensor.cast(FloatDType::F32).mul_scalar(scaling_factor);
            tensor.into_data().iter::<f32>().collect()
        };
        let std = scaled(moments.std());
        let mean = scaled(moments.mean);
        for ((mean, std), position) in mean.chunks(c * h * w).zip(std.chunks(c * h * w)).zip(positions) {
            if !mean.iter().chain(std).all(|value| value.is_finite()) {
                let image = collection.pairs[*position].image.clone();
                return Err(TrainError::Latents { image });
            }
            all.push(ScaledMoments { mean: mean.to_vec(), std: std.to_vec() });
        }
        if progress.advance(all.len() as u64, "") == ControlFlow::Break(()) {
            return Err(TrainError::Stopped { stage: "encoding pictures" });
        }
    }
    Ok((all, shape))
}

/// Embeds prompts, each distinct one once, with the empty one among them for guidance; by their text.
///
/// `embed` is a text encoder's last hidden state of some token ids `[n, 77]`, `[n, 77, width]`.
///
/// # Errors
/// [`TrainError::Stopped`] if `progress` asks to stop.
pub fn embeddings<'a, B: DiffusionBackend>(
    embed: impl Fn(Tensor<B, 2, burn::tensor::Int>) -> Tensor<B, 3>,
    tokenizer: &ClipTokenizer,
    prompts: impl IntoIterator<Item = &'a str>,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<HashMap<String, Embedding>, TrainError> {
    let mut distinct: Vec<&str> = prompts.into_iter().chain([""]).collect();
    distinct.sort_unstable();
    distinct.dedup();
    let _stage = Stage::begin(progress, "embedding prompts", Some(distinct.len() as u64));
    let mut all = HashMap::with_capacity(distinct.len());
    for some in distinct.chunks(8) {
        let ids: Vec<i64> =
            some.iter().flat_map(|text| tokenizer.encode(text).ids.into_iter().map(i64::from)).collect();
        let width = ids.len() / some.len();
        let hidden = embed(Tensor::from_data(TensorData::new(ids, [some.len(), width]), device));
        let [_, tokens, width] = hidden.dims();
        let values: Vec<f32> = hidden.cast(FloatDType::F32).into_data().iter::<f32>().collect();
        for (text, values) in some.iter().zip(values.chunks(tokens * width)) {
            all.insert((*text).to_owned(), (Arc::new(values.to_vec()), [tokens, width]));
        }
        if progress.advance(all.len() as u64, "") == ControlFlow::Break(()) {
            return Err(TrainError::Stopped { stage: "embedding prompts" });
        }
    }
    Ok(all)
}

/// Pictures with the embeddings of their prompts.
///
/// # Panics
/// If a prompt is not among the embeddings.
pub fn pair_up<'a>(
    moments: Vec<ScaledMoments>,
    prompts: impl IntoIterator<Item = &'a str>,
    embeddings: &HashMap<String, Embedding>,
) -> Vec<LatentSample<Embedding>> {
    let sample = |(moments, prompt): (ScaledMoments, &str)| LatentSample {
        mean: moments.mean,
        std: moments.std,
        condition: embeddings[prompt].clone(),
    };
    moments.into_iter().zip(prompts).map(sample).collect()
}
