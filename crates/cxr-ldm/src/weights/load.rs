//! One network from one tensor file, strictly.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, FloatDType, TensorData, backend::Backend};
use cxr_core::hash::{sha256_hex, stable_hash};
use cxr_core::tensor_file::TensorFile;
use cxr_kernels::nn::parameters;

use super::names::{Component, canonical};
use crate::Error;

/// A tensor that is not as the model's configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorProblem {
    /// Its name: the file's where the file has it, else the parameter's path.
    pub path: String,
    /// The shape of the parameter; `None` if the model has none of that name.
    pub expected: Option<Vec<usize>>,
    /// The shape in the file; `None` if it is not there.
    pub found: Option<Vec<usize>>,
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match (&self.expected, &self.found) {
            (Some(expected), Some(found)) => write!(f, "{path}: expected {expected:?}, found {found:?}"),
            (Some(expected), None) => write!(f, "{path}: expected {expected:?}, missing"),
            (None, Some(found)) => write!(f, "{path}: unexpected, found {found:?}"),
            (None, None) => write!(f, "{path}: unexpected"),
        }
    }
}

/// `N problems: a; b; ...`, the first twenty of them.
pub(crate) fn list_problems(problems: &[TensorProblem]) -> String {
    const SHOWN: usize = 20;
    let mut text: Vec<String> = problems.iter().take(SHOWN).map(TensorProblem::to_string).collect();
    if problems.len() > SHOWN {
        text.push(format!("and {} more", problems.len() - SHOWN));
    }
    text.join("; ")
}

/// A hash of a network's weights as they are loaded, tensor by tensor.
#[derive(Debug, Default)]
pub(crate) struct WeightsHash {
    lines: Vec<String>,
}

impl WeightsHash {
    pub(crate) fn add(&mut self, component: Component, path: &str, bytes: &[u8]) {
        self.lines.push(format!("{component}/{path} {:016x}\n", stable_hash(bytes)));
    }

    /// SHA-256 in hex, independent of the order in which tensors were added.
    pub(crate) fn finish(mut self) -> String {
        self.lines.sort();
        sha256_hex(self.lines.concat().as_bytes())
    }
}

/// Fills `module` from the tensor file at `path`.
///
/// Tensors are read one at a time by position and become parameters of `dtype`; names are mapped as
/// [`canonical`] says. Parameters get the stable hash of their path as id.
///
/// # Errors
/// - [`Error::TensorFile`] if the file cannot be read;
/// - [`Error::Weights`] listing every tensor that is missing, unexpected or of another shape;
/// - [`Error::NotFinite`] naming a tensor with a NaN or an infinity, or with a value that `dtype` cannot hold.
pub(crate) fn load_module<B: Backend, M: Module<B>>(
    module: M,
    component: Component,
    path: &Path,
    dtype: FloatDType,
    hash: &mut WeightsHash,
) -> Result<M, Error> {
    let file = TensorFile::open(path)?;
    let keys = match_names::<B, M>(&module, component, path, &file)?;
    let module = parameters::map_data(module, |parameter, _shape| {
        let key = &keys[parameter];
        let tensor = file.read(key)?;
        hash.add(component, parameter, &tensor.bytes);
        let shape = tensor.shape.clone();
        let values = tensor.to_f32()?;
        let limit = if dtype == FloatDType::F16 { 65504.0 } else { f32::MAX };
        // false for NaN as well
        if !values.iter().all(|value| value.abs() <= limit) {
            return Err(Error::NotFinite { what: format!("{}: tensor {key} as {dtype:?}", path.display()) });
        }
        Ok::<_, Error>(Some(TensorData::new(values, shape).convert_dtype(DType::from(dtype))))
    })?;
    Ok(parameters::assign_ids(module, |path| stable_hash(path.as_bytes())))
}

/// The file's key for every parameter, by the parameter's path.
fn match_names<B: Backend, M: Module<B>>(
    module: &M,
    component: Component,
    path: &Path,
    file: &TensorFile,
) -> Result<BTreeMap<String, String>, Error> {
    let mut problems = Vec::new();
    let mut in_file: BTreeMap<String, String> = BTreeMap::new();
    let shape_of = |key: &str| file.info(key).map(|info| info.shape.clone());
    for key in file.names() {
        let Some(name) = canonical(component, key) else { continue };
        if in_file.insert(name, key.to_string()).is_some() {
            // two spellings of one tensor: which one counts is nothing to guess
            problems.push(TensorProblem { path: key.to_string(), expected: None, found: shape_of(key) });
        }
    }
    let mut keys = BTreeMap::new();
    for parameter in parameters::list::<B, M>(module) {
        let name = canonical(component, &parameter.path).unwrap_or_else(|| parameter.path.clone());
        match in_file.remove(&name) {
            None => problems.push(TensorProblem {
                path: parameter.path,
                expected: Some(parameter.shape),
                found: None,
            }),
            Some(key) => {
                let found = shape_of(&key);
                if found.as_ref() == Some(&parameter.shape) {
                    keys.insert(parameter.path, key);
                } else {
                    problems.push(TensorProblem { path: key, expected: Some(parameter.shape), found });
                }
            }
        }
    }
    problems.extend(in_file.into_values().map(|key| TensorProblem {
        found: shape_of(&key),
        path: key,
        expected: None,
    }));
    match problems.is_empty() {
        true => Ok(keys),
        false => Err(Error::Weights { file: path.to_path_buf(), problems }),
    }
}
