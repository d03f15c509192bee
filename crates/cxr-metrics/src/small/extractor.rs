//! The small network as a feature extractor, and its two files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_core::hash::sha256_hex;
use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::parameters;

use super::{SmallConfig, SmallNetwork};
use crate::error::{MetricsError, Result};
use crate::extractor::{BatchOutput, FeatureExtractor};
use crate::features::expect_size;
use crate::image::{ImageSize, Picture};

/// Name of the configuration in an extractor's folder.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the weights in an extractor's folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// A trained [`SmallNetwork`] with its configuration and hash.
#[derive(Debug, Clone)]
pub struct SmallExtractor<B: Backend> {
    config: SmallConfig,
    network: SmallNetwork<B>,
    hash: String,
    device: B::Device,
}

impl<B: DiffusionBackend> SmallExtractor<B> {
    /// Takes a network (after training: `network.valid()`) of `config`'s sizes.
    ///
    /// # Errors
    /// A configuration that is not valid or not that of the network, weights that cannot be read back.
    pub fn new(config: SmallConfig, network: SmallNetwork<B>, device: &B::Device) -> Result<Self> {
        let expected = parameters::list(&config.init::<B>(device)?);
        let found = parameters::list(&network);
        for (expected, found) in expected.iter().zip(&found) {
            if (&expected.path, &expected.shape) != (&found.path, &found.shape) {
                return Err(MetricsError::InvalidParameter {
                    name: "network",
                    value: format!("{} {:?}", found.path, found.shape),
                    expected: format!("{} {:?}, as the configuration has it", expected.path, expected.shape),
                });
            }
        }
        expect_size(|| "parameters of the small network".into(), expected.len(), found.len())?;
        let hash = content_hash(&config, &network)?;
        Ok(Self { config, network, hash, device: device.clone() })
    }

    /// The configuration.
    pub fn config(&self) -> &SmallConfig {
        &self.config
    }

    /// The network.
    pub fn network(&self) -> &SmallNetwork<B> {
        &self.network
    }

    /// Writes `config.json` and `model.safetensors` (f32) into `folder`, which is created.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|source| write_error(folder, source))?;
        let weights = folder.join(WEIGHTS_FILE);
        let tensors: Vec<(String, RawTensor)> = weights_of(&self.network)?
            .into_iter()
            .map(|Weight { path, shape, values }| (path, RawTensor::from_f32(shape, values)))
            .collect();
        let metadata = BTreeMap::from([
            ("format".to_string(), "pt".to_string()),
            ("extractor".to_string(), self.config.name.clone()),
            ("sha256".to_string(), self.hash.clone()),
        ]);
        write_safetensors(&weights, &tensors, &metadata)
            .map_err(|source| MetricsError::TensorFile { path: weights, source: Box::new(source) })?;
        let config = folder.join(CONFIG_FILE);
        let json = serde_json::to_string_pretty(&self.config)
            .map_err(|source| MetricsError::Config { path: config.clone(), source })?;
        cxr_core::atomic::write_bytes(&config, json.as_bytes()).map_err(|source| write_error(&config, source))
    }

    /// Reads what [`save`](Self::save) wrote. Half-precision weights are read as f32.
    ///
    /// # Errors
    /// A file that cannot be read, a configuration that is not valid, a tensor that is missing, unused or of
    /// another shape: all names are listed.
    pub fn load(folder: &Path, device: &B::Device) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let json = std::fs::read(&path).map_err(|source| MetricsError::File {
            path: path.clone(),
            action: "read",
            source,
        })?;
        let config: SmallConfig =
            serde_json::from_slice(&json).map_err(|source| MetricsError::Config { path, source })?;
        let network = fill(config.init::<B>(device)?, &folder.join(WEIGHTS_FILE))?;
        Self::new(config, network, device)
    }

    /// Grey pixels `[n, 1, s, s]` in [-1, 1] of square pictures, resized with antialiasing where needed.
    fn pixels(&self, images: &[Cow<'_, Picture>]) -> Result<Tensor<B, 4>> {
        let side = self.config.input_size;
        let mut values = Vec::with_capacity(images.len() * side * side);
        for image in images {
            let ImageSize { width, height } = image.size();
            expect_size(
                || "height of a picture (square ones only: pad or crop it first)".into(),
                width,
                height,
            )?;
            values.extend(image.grey_at(ImageSize::square(side)));
        }
        Ok(Tensor::from_data(TensorData::new(values, [images.len(), 1, side, side]), &self.device))
    }
}

impl<B: DiffusionBackend> FeatureExtractor for SmallExtractor<B> {
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
        &self.config.findings
    }

    fn extract_batch(&self, images: &[Cow<'_, Picture>]) -> Result<BatchOutput> {
        let output = self.network.forward(self.pixels(images)?);
        Ok(BatchOutput {
            features: values_of("features", output.features.into_data())?,
            logits: values_of("logits", output.logits.into_data())?,
        })
    }
}

fn fill<B: DiffusionBackend>(network: SmallNetwork<B>, path: &Path) -> Result<SmallNetwork<B>> {
    let broken = |source| MetricsError::TensorFile { path: path.to_path_buf(), source: Box::new(source) };
    let file = TensorFile::open(path).map_err(broken)?;
    let wanted: Vec<String> = parameters::list(&network).into_iter().map(|p| p.path).collect();
    let missing: Vec<String> = wanted.iter().filter(|name| file.info(name).is_none()).cloned().collect();
    let unused: Vec<String> =
        file.names().map(|name| name.to_string()).filter(|name| !wanted.contains(name)).collect();
    if !missing.is_empty() || !unused.is_empty() {
        return Err(MetricsError::TensorNames { path: path.to_path_buf(), missing, unused });
    }
    parameters::map_data(network, |name, shape| {
        let tensor = file.read(name).map_err(broken)?;
        if tensor.shape != shape {
            return Err(MetricsError::TensorShape {
                path: path.to_path_buf(),
                tensor: name.into(),
                expected: shape.to_vec(),
                found: tensor.shape.clone(),
            });
        }
        Ok(Some(TensorData::new(tensor.to_f32().map_err(broken)?, shape.to_vec())))
    })
}

/// A parameter's path, shape and values.
struct Weight {
    path: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// Every parameter, by path.
fn weights_of<B: Backend>(network: &SmallNetwork<B>) -> Result<Vec<Weight>> {
    let mut all = Vec::new();
    parameters::read(network, |path, data| {
        let shape = data.shape.to_vec();
        all.push(values_of(path, data).map(|values| Weight { path: path.to_string(), shape, values }));
    });
    let mut all = all.into_iter().collect::<Result<Vec<Weight>>>()?;
    all.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(all)
}

/// SHA-256 of the configuration and of every parameter's path, shape and f32 values: the same for a network
/// in memory and for its file, whatever the order of tensors in it.
fn content_hash<B: Backend>(config: &SmallConfig, network: &SmallNetwork<B>) -> Result<String> {
    let mut bytes = serde_json::to_vec(config)
        .map_err(|source| MetricsError::Config { path: CONFIG_FILE.into(), source })?;
    for Weight { path, shape, values } in weights_of(network)? {
        bytes.extend(format!("{path} {shape:?}\n").into_bytes());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
    Ok(sha256_hex(&bytes))
}

fn values_of(what: &str, data: TensorData) -> Result<Vec<f32>> {
    data.convert::<f32>()
        .to_vec()
        .map_err(|error| MetricsError::Readback { what: what.into(), reason: format!("{error:?}") })
}

fn write_error(path: &Path, source: std::io::Error) -> MetricsError {
    MetricsError::File { path: path.to_path_buf(), action: "write", source }
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;
    use cxr_kernels::Flex;

    use super::*;

    fn config() -> SmallConfig {
        SmallConfig {
            channels: vec![4, 8],
            groups: 2,
            input_size: 8,
            ..SmallConfig::v1(vec!["Effusion".into(), "Mass".into(), "Nodule".into()])
        }
    }

    fn extractor(seed: u64) -> SmallExtractor<Flex> {
        let device = Default::default();
        SmallExtractor::new(config(), config().init_random(seed, &device).unwrap(), &device).unwrap()
    }

    fn pictures(side: usize) -> Vec<Picture> {
        let picture = |i: usize| {
            let pixels = (0..side * side).map(|p| ((p * (i + 3) * 37) % 251) as u8).collect();
            Picture::new(ImageSize::square(side), 1, pixels).unwrap()
        };
        (0..40).map(picture).collect()
    }

    #[test]
    fn features_have_the_shape_they_say_and_do_not_depend_on_the_batch() {
        let extractor = extractor(0);
        let all = extractor.extract(&pictures(8), &Silent).unwrap();
        assert_eq!((all.features.len(), all.features.width()), (40, 8));
        assert_eq!(all.logits.as_ref().unwrap().width(), 3);
        let alone = extractor.extract(&pictures(8)[33..34].to_vec(), &Silent).unwrap();
        for (a, b) in alone.features.row(0).iter().zip(all.features.row(33)) {
            assert!((a - b).abs() < 1e-5, "{a} against {b}");
        }
        assert_ne!(all.features.row(0), all.features.row(1));
        // A larger picture is resized, an oblong one refused.
        assert_eq!(extractor.extract(&pictures(24), &Silent).unwrap().resolution, ImageSize::square(24));
        let oblong = vec![Picture::new(ImageSize { width: 8, height: 9 }, 1, vec![0; 72]).unwrap()];
        assert!(matches!(extractor.extract(&oblong, &Silent), Err(MetricsError::SizeMismatch { .. })));
    }

    #[test]
    fn saved_and_loaded_is_the_same_network_with_the_same_hash() {
        let folder = tempfile::tempdir().unwrap();
        let saved = extractor(1);
        saved.save(folder.path()).unwrap();
        let loaded = SmallExtractor::<Flex>::load(folder.path(), &Default::default()).unwrap();
        assert_eq!(loaded.id(), saved.id());
        assert_eq!(loaded.config(), saved.config());
        let [a, b] = [&saved, &loaded].map(|e| e.extract(&pictures(8), &Silent).unwrap());
        assert_eq!(a, b);
        assert_ne!(saved.hash(), extractor(2).hash());
        let renamed = SmallConfig { name: "other".into(), ..config() };
        let renamed = SmallExtractor::new(renamed, saved.network().clone(), &Default::default()).unwrap();
        assert_ne!(saved.hash(), renamed.hash());
    }

    #[test]
    fn loading_is_strict() {
        let load = |folder: &Path| SmallExtractor::<Flex>::load(folder, &Default::default()).unwrap_err();
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(load(folder.path()), MetricsError::File { .. }));
        extractor(1).save(folder.path()).unwrap();
        let edit = |change: fn(&mut SmallConfig)| {
            let mut config = config();
            change(&mut config);
            std::fs::write(folder.path().join(CONFIG_FILE), serde_json::to_vec(&config).unwrap()).unwrap();
        };
        edit(|config| config.channels = vec![4, 8, 8]);
        let error = load(folder.path());
        assert!(matches!(&error, MetricsError::TensorNames { missing, .. } if missing.len() == 8), "{error}");
        edit(|config| config.convs_per_stage = 1);
        let error = load(folder.path());
        assert!(matches!(&error, MetricsError::TensorNames { unused, .. } if unused.len() == 8), "{error}");
        edit(|config| config.findings.truncate(2));
        assert!(matches!(load(folder.path()), MetricsError::TensorShape { .. }));
        std::fs::write(folder.path().join(CONFIG_FILE), "{}").unwrap();
        assert!(matches!(load(folder.path()), MetricsError::Config { .. }));
        std::fs::write(folder.path().join(WEIGHTS_FILE), b"short").unwrap();
        edit(|_| ());
        assert!(matches!(load(folder.path()), MetricsError::TensorFile { .. }));
    }

    #[test]
    fn a_network_of_other_sizes_is_refused() {
        let device = Default::default();
        let other = SmallConfig { channels: vec![4, 6], ..config() }.init::<Flex>(&device).unwrap();
        assert!(matches!(
            SmallExtractor::new(config(), other, &device),
            Err(MetricsError::InvalidParameter { name: "network", .. })
        ));
    }

    #[test]
    fn extractors_cross_threads() {
        fn assert_send_sync<T: Send + Sync>() {}
        assert_send_sync::<SmallExtractor<Flex>>();
    }
}
