//! The network as a feature extractor.

use std::borrow::Cow;
use std::path::Path;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_kernels::DiffusionBackend;
use rayon::prelude::*;

use super::layers::{CLASSES, FEATURES};
use super::network::Network;
use super::resize::{INPUT_SIDE, ResizeMode};
use super::weights::{Loaded, load};
use crate::error::{MetricsError, Result};
use crate::extractor::{BatchOutput, ExtractorId, FeatureExtractor, Staged};
use crate::image::{ImageSize, Picture};

/// Name of the network with the published weights: with it, and only with it, distances are FID and KID.
pub const NAME: &str = "inception-v3-2015-12-05";
/// Name of the network with other weights.
pub const OTHER_NAME: &str = "inception-v3-other-weights";

/// Pictures per forward pass: the largest activations of 8 take 44 MB; more gain nothing.
const BATCH: usize = 8;

/// InceptionV3 of 2015-12-05 with its weights and its resize mode.
#[derive(Debug, Clone)]
pub struct InceptionExtractor<B: Backend> {
    network: Network<B>,
    resize: ResizeMode,
    hash: String,
    logits_hash: Option<String>,
    published: bool,
    logit_names: Vec<String>,
    device: B::Device,
}

impl<B: DiffusionBackend> InceptionExtractor<B> {
    /// Reads a weight file: pytorch-fid's or torch-fidelity's `.pth`, or safetensors with the same names. A file
    /// without the last layer (`fc.weight`, `fc.bias`) gives features and no logits.
    ///
    /// # Errors
    /// A file that cannot be read; a tensor that is missing, unexpected or of another shape, by name.
    pub fn load(path: &Path, resize: ResizeMode, device: &B::Device) -> Result<Self> {
        let Loaded { network, hash, logits_hash, published } = load(path, device)?;
        let logit_names = match network.has_logits() {
            true => (0..CLASSES).map(|class| format!("class {class}")).collect(),
            false => Vec::new(),
        };
        Ok(Self { network, resize, hash, logits_hash, published, logit_names, device: device.clone() })
    }

    /// How pictures are brought to the network's size.
    pub fn resize(&self) -> ResizeMode {
        self.resize
    }

    /// The same network with another resize.
    pub fn with_resize(mut self, resize: ResizeMode) -> Self {
        self.resize = resize;
        self
    }

    /// Whether the weights of the features are the published ones.
    pub fn is_published(&self) -> bool {
        self.published
    }

    /// As [`id`](FeatureExtractor::id), its hash over the last layer too: for figures taken of logits. None without
    /// that layer.
    pub fn logits_id(&self) -> Option<ExtractorId> {
        let hash = self.logits_hash.clone()?;
        Some(ExtractorId { hash, feature_dim: CLASSES, ..self.id() })
    }

    /// Features `[n, 2048]`, and logits without bias `[n, 1008]` where the weights have them, of pixels
    /// `[n, 3, 299, 299]` in the network's range, about [-1, 1].
    ///
    /// # Errors
    /// A number of values that is no multiple of a picture's; results that cannot be read back.
    pub fn forward(&self, pixels: Vec<f32>) -> Result<BatchOutput> {
        let size = 3 * INPUT_SIDE * INPUT_SIDE;
        if !pixels.len().is_multiple_of(size) {
            return Err(MetricsError::SizeMismatch {
                what: "pixels of the last picture".into(),
                expected: size,
                found: pixels.len() % size,
            });
        }
        let shape = [pixels.len() / size, 3, INPUT_SIDE, INPUT_SIDE];
        let pixels = Tensor::<B, 4>::from_data(TensorData::new(pixels, shape), &self.device);
        let (features, logits) = self.network.forward(pixels);
        Ok(BatchOutput {
            features: values_of("features", features)?,
            logits: logits.map_or(Ok(Vec::new()), |logits| values_of("logits", logits))?,
        })
    }
}

impl<B: DiffusionBackend> FeatureExtractor for InceptionExtractor<B> {
    fn name(&self) -> &str {
        if self.published { NAME } else { OTHER_NAME }
    }

    fn hash(&self) -> &str {
        &self.hash
    }

    fn feature_dim(&self) -> usize {
        FEATURES
    }

    fn input_size(&self) -> ImageSize {
        ImageSize::square(INPUT_SIDE)
    }

    fn resize_mode(&self) -> Option<&str> {
        Some(self.resize.name())
    }

    /// Of 1008 classes, without the bias of the last layer.
    fn logit_names(&self) -> &[String] {
        &self.logit_names
    }

    fn batch_size(&self) -> usize {
        BATCH
    }

    fn extract_batch(&self, images: &[Cow<'_, Picture>]) -> Result<BatchOutput> {
        self.stage(images.iter().map(|image| Cow::Borrowed(&**image)).collect())?()
    }

    fn stage<'a>(&'a self, images: Vec<Cow<'a, Picture>>) -> Result<Staged<'a>> {
        let pixels: Vec<Vec<f32>> = images.par_iter().map(|image| self.resize.pixels(image)).collect();
        let pixels = pixels.concat();
        Ok(Box::new(move || self.forward(pixels)))
    }
}

fn values_of<B: Backend>(what: &str, tensor: Tensor<B, 2>) -> Result<Vec<f32>> {
    tensor
        .into_data()
        .convert::<f32>()
        .to_vec()
        .map_err(|error| MetricsError::Readback { what: what.into(), reason: format!("{error:?}") })
}
