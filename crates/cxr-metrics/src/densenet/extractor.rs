//! The network as a feature extractor.

use std::borrow::Cow;
use std::path::Path;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_core::hash::sha256_hex;
use cxr_kernels::DiffusionBackend;
use rayon::prelude::*;

use super::config::DenseNetConfig;
use super::load::Weights;
use super::network::DenseNet;
use super::prepare::centre_and_resize;
use crate::error::{MetricsError, Result};
use crate::extractor::{BatchOutput, FeatureExtractor, Staged};
use crate::image::{ImageSize, Picture};

/// torchxrayvision's DenseNet with its weights.
#[derive(Debug, Clone)]
pub struct DenseNetExtractor<B: Backend> {
    config: DenseNetConfig,
    network: DenseNet<B>,
    /// The outputs that have a name, and these names.
    outputs: Vec<usize>,
    names: Vec<String>,
    operating_points: Vec<Option<f32>>,
    hash: String,
    device: B::Device,
}

impl<B: DiffusionBackend> DenseNetExtractor<B> {
    /// Reads the weights: a safetensors file or a pickled `state_dict`, in f32 or half precision.
    ///
    /// # Errors
    /// A configuration that is not valid, a file that cannot be read or is a pickled model (see the
    /// [module](super)), tensors that are missing, unknown or of another shape.
    pub fn load(path: &Path, config: DenseNetConfig, device: &B::Device) -> Result<Self> {
        config.validate()?;
        let weights = Weights::open(path, &config)?;
        let points = weights.operating_points(config.outputs.len())?;
        let points = points.unwrap_or_else(|| config.operating_points.clone());
        let network = DenseNet::load(&config, &weights, device)?;
        let hash = content_hash(&config, &weights)?;
        let outputs: Vec<usize> =
            (0..config.outputs.len()).filter(|i| config.outputs[*i].is_some()).collect();
        Ok(Self {
            names: config.outputs.iter().flatten().cloned().collect(),
            operating_points: outputs.iter().map(|i| points[*i]).collect(),
            outputs,
            config,
            network,
            hash,
            device: device.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &DenseNetConfig {
        &self.config
    }

    /// The logit of each named output above which torchxrayvision calls a finding present; none for an output
    /// without an operating point.
    pub fn operating_logits(&self) -> Vec<Option<f32>> {
        let logit = |p: f32| (f64::from(p) / (1.0 - f64::from(p))).ln() as f32;
        self.operating_points.iter().map(|point| point.map(logit)).collect()
    }

    /// What torchxrayvision's model returns for the logits of one picture, in [0, 1]: the sigmoid, stretched so
    /// that the operating point becomes 0.5; 0.5 for an output without one.
    ///
    /// # Panics
    /// If there are not as many logits as names.
    pub fn calibrated(&self, logits: &[f32]) -> Vec<f32> {
        assert_eq!(logits.len(), self.names.len(), "logits of one picture");
        let one = |(logit, point): (&f32, &Option<f32>)| {
            let p = 1.0 / (1.0 + (-logit).exp());
            match point {
                None => 0.5,
                Some(point) if p < *point => p / (2.0 * point),
                Some(point) => 1.0 - (1.0 - p) / (2.0 * (1.0 - point)),
            }
        };
        logits.iter().zip(&self.operating_points).map(one).collect()
    }
}

impl<B: DiffusionBackend> FeatureExtractor for DenseNetExtractor<B> {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn hash(&self) -> &str {
        &self.hash
    }

    fn feature_dim(&self) -> usize {
        self.config.feature_dim()
    }

    fn input_size(&self) -> ImageSize {
        ImageSize::square(self.config.input_size)
    }

    fn logit_names(&self) -> &[String] {
        &self.names
    }

    /// The first block of 8 pictures takes 50 MB per layer's input.
    fn batch_size(&self) -> usize {
        8
    }

    fn extract_batch(&self, images: &[Cow<'_, Picture>]) -> Result<BatchOutput> {
        self.forward(self.pixels(images))
    }

    fn stage<'a>(&'a self, images: Vec<Cow<'a, Picture>>) -> Result<Staged<'a>> {
        let pixels = self.pixels(&images);
        Ok(Box::new(move || self.forward(pixels)))
    }
}

impl<B: DiffusionBackend> DenseNetExtractor<B> {
    /// `[n, 1, side, side]`.
    fn pixels(&self, images: &[Cow<'_, Picture>]) -> Vec<f32> {
        let side = self.config.input_size;
        let pixels: Vec<Vec<f32>> =
            images.par_iter().map(|picture| centre_and_resize(picture, side)).collect();
        pixels.concat()
    }

    fn forward(&self, pixels: Vec<f32>) -> Result<BatchOutput> {
        let side = self.config.input_size;
        let count = pixels.len() / (side * side);
        let data = TensorData::new(pixels, [count, 1, side, side]);
        let (features, logits) = self.network.forward(Tensor::from_data(data, &self.device));
        let all = values_of("logits", logits.into_data())?;
        let logits = all
            .chunks_exact(self.config.outputs.len())
            .flat_map(|row| self.outputs.iter().map(|i| row[*i]))
            .collect();
        Ok(BatchOutput { features: values_of("features", features.into_data())?, logits })
    }
}

/// SHA-256 of the configuration and of every tensor's name and f32 values, whatever kind of file they are in.
fn content_hash(config: &DenseNetConfig, weights: &Weights) -> Result<String> {
    let mut bytes = serde_json::to_vec(config)
        .map_err(|source| MetricsError::Config { path: config.name.clone().into(), source })?;
    for (name, _) in config.tensors() {
        bytes.extend(name.as_bytes());
        bytes.extend(weights.values(&name)?.iter().flat_map(|v| v.to_le_bytes()));
    }
    Ok(sha256_hex(&bytes))
}

fn values_of(what: &str, data: TensorData) -> Result<Vec<f32>> {
    data.convert::<f32>()
        .to_vec()
        .map_err(|error| MetricsError::Readback { what: what.into(), reason: format!("{error:?}") })
}
