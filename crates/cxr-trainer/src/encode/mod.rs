//! What the frozen parts make of the data, once: neither the autoencoder nor the text encoder is needed in training.

mod cache;

pub use cache::EncodeCache;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use burn::tensor::{FloatDType, Int, Tensor, TensorData};
use cxr_core::progress::{Progress, Stage};
use cxr_core::tensor_file::RawTensor;
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

/// Pictures in a file of the cache.
const PICTURES: usize = 64;
/// Prompts in a file of the cache: 30 MB of Stable Diffusion's embeddings.
const PROMPTS: usize = 128;
/// Prompts that go through the text encoder at once.
const PROMPT_BATCH: usize = 8;

/// Encodes the pictures of the pairs at `positions`, in that order: mean and standard deviation of the latents, not one
/// draw, times `scaling_factor`; and the latents' shape `[c, h, w]`.
///
/// `vae` loads the autoencoder, whose weights are of `dtype`. Pictures go through it `batch` at a time, which changes
/// memory and speed, and the result by rounding at most. What is in the cache is not made again, and if all is there, the
/// autoencoder is not loaded.
///
/// # Errors
/// [`TrainError::Model`] if `vae` fails, [`TrainError::Data`] for a picture that cannot be used, [`TrainError::Latents`] if the autoencoder made of one what
/// is no number, [`TrainError::Stopped`] if `progress` asks to stop, files of the cache that cannot be written.
pub fn moments<B: DiffusionBackend>(
    vae: impl FnOnce() -> Result<AutoencoderKl<B>, cxr_ldm::Error>,
    dtype: FloatDType,
    scaling_factor: f64,
    (collection, positions): (&Collection, &[usize]),
    images: &ImageLoader,
    batch: usize,
    cache: Option<&EncodeCache<'_>>,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<(Vec<ScaledMoments>, [usize; 3]), TrainError> {
    let _stage = Stage::begin(progress, "encoding pictures", Some(positions.len() as u64));
    let settings = format!("{dtype:?} {scaling_factor}");
    let (mut all, mut shape) = (Vec::with_capacity(positions.len()), [0; 3]);
    let mut vae = Lazy::new(vae);
    for some in positions.chunks(PICTURES) {
        let of_pictures =
            |cache: &EncodeCache<'_>| cache.of_pictures(&settings, images.options(), (collection, some));
        let path = cache.map(of_pictures).transpose()?;
        let kept = path.as_deref().and_then(|path| cache::read(path, ["mean", "std"], some.len()));
        let [mean, std] = match kept {
            Some(kept) => kept,
            None => {
                let data = (collection, some);
                let made =
                    encode(vae.get()?, dtype, scaling_factor, data, images, batch, device, &mut |done| {
                        progress.advance((all.len() + done) as u64, "")
                    })?;
                if let Some(path) = &path {
                    cache::write(path, vec![("mean", made[0].clone()), ("std", made[1].clone())])?;
                }
                made
            }
        };
        shape = mean.shape[1..].try_into().unwrap_or(shape);
        let size = shape.iter().product();
        let (mean, std) = (mean.to_f32()?, std.to_f32()?);
        let rows = mean.chunks(size).zip(std.chunks(size));
        all.extend(rows.map(|(mean, std)| ScaledMoments { mean: mean.to_vec(), std: std.to_vec() }));
        if progress.advance(all.len() as u64, "") == ControlFlow::Break(()) {
            return Err(TrainError::Stopped { stage: "encoding pictures" });
        }
    }
    Ok((all, shape))
}

/// Something that is loaded when it is first needed.
struct Lazy<T, F> {
    load: Option<F>,
    loaded: Option<T>,
}

impl<T, F: FnOnce() -> Result<T, cxr_ldm::Error>> Lazy<T, F> {
    fn new(load: F) -> Self {
        Self { load: Some(load), loaded: None }
    }

    fn get(&mut self) -> Result<&T, cxr_ldm::Error> {
        let Self { load, loaded } = self;
        if let Some(load) = load.take() {
            *loaded = Some(load()?);
        }
        // The loader is gone without a result only if it failed, and then nobody asks again.
        loaded.as_ref().ok_or(cxr_ldm::Error::Stopped)
    }
}

/// Mean and deviation of some pictures, `[n, c, h, w]`.
fn encode<B: DiffusionBackend>(
    vae: &AutoencoderKl<B>,
    dtype: FloatDType,
    scaling_factor: f64,
    (collection, positions): (&Collection, &[usize]),
    images: &ImageLoader,
    batch: usize,
    device: &B::Device,
    advance: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<[RawTensor; 2], TrainError> {
    let (mut means, mut stds, mut shape) = (Vec::new(), Vec::new(), [0; 3]);
    let mut done = 0;
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
                return Err(TrainError::Latents { image: collection.pairs[*position].image.clone() });
            }
        }
        means.extend(mean);
        stds.extend(std);
        done += positions.len();
        if advance(done) == ControlFlow::Break(()) {
            return Err(TrainError::Stopped { stage: "encoding pictures" });
        }
    }
    let [c, h, w] = shape;
    Ok([means, stds].map(|values| RawTensor::from_f32(vec![positions.len(), c, h, w], values)))
}

/// Embeds prompts, each distinct one once, with the empty one among them for guidance; by their text.
///
/// `text` loads a text encoder with weights of `dtype`: what gives its last hidden state `[n, 77, width]` of some token
/// ids `[n, 77]`. What is in the cache is not made again, and if all is there, it is not loaded.
///
/// # Errors
/// [`TrainError::Model`] if `text` fails, [`TrainError::Stopped`] if `progress` asks to stop, files of the cache that cannot be written.
pub fn embeddings<'a, B: DiffusionBackend, E: Fn(Tensor<B, 2, Int>) -> Tensor<B, 3>>(
    text: impl FnOnce() -> Result<E, cxr_ldm::Error>,
    dtype: FloatDType,
    tokenizer: &ClipTokenizer,
    prompts: impl IntoIterator<Item = &'a str>,
    cache: Option<&EncodeCache<'_>>,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<HashMap<String, Embedding>, TrainError> {
    let mut distinct: Vec<&str> = prompts.into_iter().chain([""]).collect();
    distinct.sort_unstable();
    distinct.dedup();
    let _stage = Stage::begin(progress, "embedding prompts", Some(distinct.len() as u64));
    let mut all = HashMap::with_capacity(distinct.len());
    let mut text = Lazy::new(text);
    for some in distinct.chunks(PROMPTS) {
        // A vocabulary of the model's own gives other ids for the same text.
        let ids: Vec<Vec<i64>> =
            some.iter().map(|text| tokenizer.encode(text).ids.into_iter().map(i64::from).collect()).collect();
        let path = cache.map(|cache| cache.of_prompts(&format!("{dtype:?} {ids:?}"), some));
        let kept = path.as_deref().and_then(|path| cache::read(path, ["embeddings"], some.len()));
        let [made] = match kept {
            Some(kept) => kept,
            None => {
                let made = embed_all(text.get()?, &ids, device, &mut |done| {
                    progress.advance((all.len() + done) as u64, "")
                })?;
                if let Some(path) = &path {
                    cache::write(path, vec![("embeddings", made.clone())])?;
                }
                [made]
            }
        };
        let shape = [made.shape[1], made.shape[2]];
        let values = made.to_f32()?;
        for (text, values) in some.iter().zip(values.chunks(shape[0] * shape[1])) {
            all.insert((*text).to_owned(), (Arc::new(values.to_vec()), shape));
        }
        if progress.advance(all.len() as u64, "") == ControlFlow::Break(()) {
            return Err(TrainError::Stopped { stage: "embedding prompts" });
        }
    }
    Ok(all)
}

/// Embeddings of some prompts, `[n, tokens, width]`.
fn embed_all<B: DiffusionBackend>(
    embed: &impl Fn(Tensor<B, 2, Int>) -> Tensor<B, 3>,
    ids: &[Vec<i64>],
    device: &B::Device,
    advance: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<RawTensor, TrainError> {
    let (mut values, mut shape, mut done) = (Vec::new(), [0; 2], 0);
    for some in ids.chunks(PROMPT_BATCH) {
        let data = TensorData::new(some.concat(), [some.len(), some[0].len()]);
        let hidden = embed(Tensor::from_data(data, device));
        let [_, tokens, width] = hidden.dims();
        shape = [tokens, width];
        values.extend(hidden.cast(FloatDType::F32).into_data().iter::<f32>());
        done += some.len();
        if advance(done) == ControlFlow::Break(()) {
            return Err(TrainError::Stopped { stage: "embedding prompts" });
        }
    }
    Ok(RawTensor::from_f32(vec![ids.len(), shape[0], shape[1]], values))
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
