//! The weight file: pytorch-fid's, torch-fidelity's, or safetensors with the same names. Loading is strict.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cxr_core::hash::sha256_hex;
use cxr_core::tensor_file::TensorFile;
use cxr_kernels::DiffusionBackend;

use super::layers::{CLASSES, FEATURES, Layer, layers};
use super::network::{Classifier, ConvRelu, Folded, Network};
use crate::error::{MetricsError, Result};

/// Where weights are looked for when no path is given.
pub const WEIGHTS_VARIABLE: &str = "CXR_INCEPTION_WEIGHTS";

/// The public address of pytorch-fid's weight file; torch-fidelity's is the same file under another name.
pub const WEIGHTS_ADDRESS: &str = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth";
/// Its SHA-256.
pub const WEIGHTS_SHA256: &str = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2";
/// Its size in bytes.
pub const WEIGHTS_BYTES: u64 = 95_628_359;

/// Epsilon of every batch normalization, as in TensorFlow's network.
const NORM_EPS: f64 = 1e-3;
/// Hash of the published features' weights, as [`Loaded::hash`] has it.
const PUBLISHED_FEATURES: &str = "9da485e6a0c7f108619b52aa13846b96455ae1e91cd8a958389a6eea238267b0";

/// The weight file to use: `path`, or what the environment variable [`WEIGHTS_VARIABLE`] names, or the file that
/// `fetch_weights` (feature `hub`) has put into the cache.
///
/// # Errors
/// [`MetricsError::NoWeights`], which says where they are to be had, if there is none.
pub fn find_weights(path: Option<&Path>) -> Result<PathBuf> {
    find_among(path, std::env::var_os(WEIGHTS_VARIABLE).map(PathBuf::from), super::cache::file().ok())
}

fn find_among(path: Option<&Path>, named: Option<PathBuf>, cached: Option<PathBuf>) -> Result<PathBuf> {
    let named = named.filter(|path| !path.as_os_str().is_empty());
    match path.map(Path::to_path_buf).or(named) {
        Some(path) => Ok(path),
        None => cached.filter(|path| path.is_file()).ok_or(MetricsError::NoWeights {
            network: super::NAME,
            variable: WEIGHTS_VARIABLE,
            address: WEIGHTS_ADDRESS,
            sha256: WEIGHTS_SHA256,
        }),
    }
}

/// A network and what its file says of it.
pub(super) struct Loaded<B: DiffusionBackend> {
    pub(super) network: Network<B>,
    /// SHA-256 of the names and values of the features' weights: the same for every kind of file, and with or
    /// without the last layer.
    pub(super) hash: String,
    /// SHA-256 of the last layer's weight; none without it.
    pub(super) logits_hash: Option<String>,
    /// Whether these are the published weights.
    pub(super) published: bool,
}

/// Reads a file; every tensor has to be there with its shape, and no other.
pub(super) fn load<B: DiffusionBackend>(path: &Path, device: &B::Device) -> Result<Loaded<B>> {
    let reader = Reader { file: TensorFile::open(path).map_err(|source| broken(path, source))?, path };
    let layers = layers();
    let with_logits = reader.file.info("fc.weight").is_some() || reader.file.info("fc.bias").is_some();
    reader.check_names(&layers, with_logits)?;
    let mut digests = String::new();
    let mut folded = BTreeMap::new();
    for layer in &layers {
        let conv = reader.convolution(layer, &mut digests)?;
        folded.insert(layer.name.as_str(), ConvRelu::<B>::new(layer, conv, device));
    }
    let hash = sha256_hex(digests.as_bytes());
    let mut classifier = None;
    let mut logits_hash = None;
    if with_logits {
        let mut digest = String::new();
        let weight = reader.tensor("fc.weight", &[CLASSES, FEATURES], &mut digest)?;
        // The bias takes no part in the score: it is held against its shape alone.
        reader.tensor("fc.bias", &[CLASSES], &mut String::new())?;
        classifier = Some(Classifier::new(weight, device));
        logits_hash = Some(sha256_hex(format!("{digests}{digest}").as_bytes()));
    }
    let network = Network::new(
        &mut |name| folded.remove(name).ok_or_else(|| reader.names(vec![name.into()], vec![])),
        classifier,
    )?;
    debug_assert!(folded.is_empty(), "every layer has its place in the network");
    let published = hash == PUBLISHED_FEATURES || is_published_file(path);
    Ok(Loaded { network, hash, logits_hash, published })
}

/// Whether it is the published file itself, byte by byte.
fn is_published_file(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.len() == WEIGHTS_BYTES)
        && cxr_core::hash::sha256_file(path).is_ok_and(|found| found == WEIGHTS_SHA256)
}

struct Reader<'a> {
    file: TensorFile,
    path: &'a Path,
}

impl Reader<'_> {
    fn check_names(&self, layers: &[Layer], with_logits: bool) -> Result<()> {
        let mut wanted: Vec<String> =
            layers.iter().flat_map(|layer| tensors_of(layer).map(|(name, _)| name)).collect();
        if with_logits {
            wanted.extend(["fc.weight".into(), "fc.bias".into()]);
        }
        let missing: Vec<String> =
            wanted.iter().filter(|name| self.file.info(name).is_none()).cloned().collect();
        let wanted: std::collections::BTreeSet<String> = wanted.into_iter().collect();
        // A counter of training steps, which newer exports carry, is no weight.
        let is_counter =
            |name: &str| name.strip_suffix("num_batches_tracked").is_some_and(|n| n.ends_with(".bn."));
        let unexpected: Vec<String> = self
            .file
            .names()
            .filter(|name| !wanted.contains(*name) && !is_counter(name))
            .map(String::from)
            .collect();
        if missing.is_empty() && unexpected.is_empty() {
            return Ok(());
        }
        Err(self.names(missing, unexpected))
    }

    fn names(&self, missing: Vec<String>, unexpected: Vec<String>) -> MetricsError {
        MetricsError::WeightNames {
            path: self.path.into(),
            network: super::NAME,
            missing,
            unexpected,
            advice: format!("take the file of {WEIGHTS_ADDRESS}"),
        }
    }

    fn tensor(&self, name: &str, shape: &[usize], digests: &mut String) -> Result<Vec<f32>> {
        let tensor = self.file.read(name).map_err(|source| broken(self.path, source))?;
        if tensor.shape != shape {
            return Err(MetricsError::TensorShape {
                path: self.path.into(),
                tensor: name.into(),
                expected: shape.to_vec(),
                found: tensor.shape,
            });
        }
        let values = tensor.to_f32().map_err(|source| broken(self.path, source))?;
        // ReLU would turn a NaN into a zero, and nobody would know.
        if let Some(place) = values.iter().position(|value| !value.is_finite()) {
            return Err(MetricsError::NonFinite {
                what: format!("`{}`, tensor `{name}`", self.path.display()),
                row: 0,
                column: place,
                value: f64::from(values[place]),
            });
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        digests.push_str(&format!("{name} {}\n", sha256_hex(&bytes)));
        Ok(values)
    }

    /// A convolution with its normalization folded in: in f64, so that only the result is rounded.
    fn convolution(&self, layer: &Layer, digests: &mut String) -> Result<Folded> {
        let mut values =
            tensors_of(layer).into_iter().map(|(name, shape)| self.tensor(&name, &shape, digests));
        let mut next = || values.next().unwrap_or_else(|| unreachable!("a layer has five tensors"));
        let (mut weight, gamma, beta, mean, variance) = (next()?, next()?, next()?, next()?, next()?);
        let mut bias = Vec::with_capacity(layer.output);
        for (channel, kernel) in
            weight.chunks_exact_mut(layer.input * layer.kernel[0] * layer.kernel[1]).enumerate()
        {
            let scale = f64::from(gamma[channel]) / (f64::from(variance[channel]) + NORM_EPS).sqrt();
            kernel.iter_mut().for_each(|w| *w = (f64::from(*w) * scale) as f32);
            bias.push((f64::from(beta[channel]) - f64::from(mean[channel]) * scale) as f32);
        }
        Ok(Folded { weight, bias })
    }
}

/// Names and shapes of a layer's tensors.
fn tensors_of(layer: &Layer) -> [(String, Vec<usize>); 5] {
    let Layer { name, input, output, kernel, .. } = layer;
    let norm = |part: &str| (format!("{name}.bn.{part}"), vec![*output]);
    [
        (format!("{name}.conv.weight"), vec![*output, *input, kernel[0], kernel[1]]),
        norm("weight"),
        norm("bias"),
        norm("running_mean"),
        norm("running_var"),
    ]
}

fn broken(path: &Path, source: cxr_core::tensor_file::TensorFileError) -> MetricsError {
    MetricsError::TensorFile { path: path.into(), source: Box::new(source) }
}
