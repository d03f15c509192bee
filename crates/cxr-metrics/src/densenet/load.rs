//! The tensors of a file, checked as a whole before any is used.

use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_core::tensor_file::{TensorFile, TensorFileError};
use cxr_kernels::nn::{Conv2d, Conv2dConfig};

use super::config::DenseNetConfig;
use crate::error::{MetricsError, Result};

/// Epsilon of every normalization.
const EPS: f64 = 1e-5;
/// The operating points that torchxrayvision keeps beside the weights; not in every file.
pub(super) const OPERATING_POINTS: &str = "op_threshs";

/// A file that has exactly the tensors of a configuration.
pub(super) struct Weights {
    path: PathBuf,
    file: TensorFile,
}

impl Weights {
    pub(super) fn open(path: &Path, config: &DenseNetConfig) -> Result<Self> {
        let file = TensorFile::open(path).map_err(|source| match source {
            TensorFileError::NotTensors { found, .. } => {
                MetricsError::PickledModel { path: path.to_path_buf(), found }
            }
            source => MetricsError::TensorFile { path: path.to_path_buf(), source: Box::new(source) },
        })?;
        let wanted = config.tensors();
        let missing: Vec<String> =
            wanted.iter().map(|(name, _)| name).filter(|name| file.info(name).is_none()).cloned().collect();
        // How many batches were trained on is of no use here.
        let known = |name: &str| {
            name == OPERATING_POINTS
                || name.ends_with(".num_batches_tracked")
                || wanted.iter().any(|(wanted, _)| wanted == name)
        };
        let unused: Vec<String> = file.names().filter(|name| !known(name)).map(str::to_owned).collect();
        if !missing.is_empty() || !unused.is_empty() {
            return Err(MetricsError::TensorNames { path: path.to_path_buf(), missing, unused });
        }
        for (tensor, expected) in wanted {
            let found = file.info(&tensor).map(|info| info.shape.clone()).unwrap_or_default();
            if found != expected {
                return Err(MetricsError::TensorShape { path: path.to_path_buf(), tensor, expected, found });
            }
        }
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// The operating points of the file, one per output; none without them.
    pub(super) fn operating_points(&self, outputs: usize) -> Result<Option<Vec<Option<f32>>>> {
        if self.file.info(OPERATING_POINTS).is_none() {
            return Ok(None);
        }
        let points = self.values(OPERATING_POINTS)?;
        if points.len() != outputs {
            return Err(MetricsError::TensorShape {
                path: self.path.clone(),
                tensor: OPERATING_POINTS.into(),
                expected: vec![outputs],
                found: vec![points.len()],
            });
        }
        // Not a number: an output without one. Outside (0, 1) there is no operating point either.
        Ok(Some(points.into_iter().map(|p| (p > 0.0 && p < 1.0).then_some(p)).collect()))
    }

    /// The values of a tensor, row-major.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let failed = |source| MetricsError::TensorFile { path: self.path.clone(), source: Box::new(source) };
        self.file.read(name).map_err(failed)?.to_f32().map_err(failed)
    }

    /// A normalization by running statistics, as a factor and a term per channel.
    pub(super) fn norm(&self, name: &str) -> Result<Affine> {
        let part = |part: &str| self.values(&format!("features.{name}.{part}"));
        let (weight, bias) = (part("weight")?, part("bias")?);
        let (mean, variance) = (part("running_mean")?, part("running_var")?);
        let factor: Vec<f64> = weight
            .iter()
            .zip(&variance)
            .map(|(weight, variance)| f64::from(*weight) / (f64::from(*variance) + EPS).sqrt())
            .collect();
        let term = bias
            .iter()
            .zip(&mean)
            .zip(&factor)
            .map(|((bias, mean), factor)| f64::from(*bias) - f64::from(*mean) * factor)
            .collect();
        Ok(Affine { factor, term })
    }

    /// A convolution `config` without a bias, and the normalization after it where there is one: that is then part
    /// of its weights.
    pub(super) fn conv<B: Backend>(
        &self,
        name: &str,
        after: Option<&str>,
        config: Conv2dConfig,
        device: &B::Device,
    ) -> Result<Conv2d<B>> {
        let name = format!("features.{name}.weight");
        let shape = self.file.info(&name).map(|info| info.shape.clone()).unwrap_or_default();
        let mut values = self.values(&name)?;
        let mut conv = config.with_bias(after.is_some()).init::<B>(device);
        if let Some(after) = after {
            let Affine { factor, term } = self.norm(after)?;
            let each = values.len() / factor.len().max(1);
            for (row, factor) in values.chunks_exact_mut(each.max(1)).zip(&factor) {
                row.iter_mut().for_each(|w| *w = (f64::from(*w) * factor) as f32);
            }
            conv.bias =
                Some(parameter::<B, 1>(term.iter().map(|t| *t as f32).collect(), &[term.len()], device));
        }
        conv.weight = parameter::<B, 4>(values, &shape, device);
        Ok(conv)
    }
}

/// `x -> factor x + term`, per channel.
pub(super) struct Affine {
    factor: Vec<f64>,
    term: Vec<f64>,
}

impl Affine {
    /// Both as `[1, c, 1, 1]`.
    pub(super) fn tensors<B: Backend>(&self, device: &B::Device) -> [Tensor<B, 4>; 2] {
        [&self.factor, &self.term].map(|values| {
            let shape = [1, values.len(), 1, 1];
            Tensor::from_data(TensorData::new(values.iter().map(|v| *v as f32).collect(), shape), device)
        })
    }
}

fn parameter<B: Backend, const D: usize>(
    values: Vec<f32>,
    shape: &[usize],
    device: &B::Device,
) -> Param<Tensor<B, D>> {
    let data = TensorData::new(values, shape.to_vec());
    Param::from_tensor(Tensor::<B, D>::from_data(data, device)).set_require_grad(false)
}
