//! One network from a tensor file, strictly.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{DType, FloatDType, TensorData, backend::Backend};
use cxr_core::hash::{sha256_hex, stable_hash};
use cxr_core::progress::Progress;
use cxr_core::tensor_file::{Dtype, RawTensor, TensorFile};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::parameters;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::names::{Component, canonical};
use crate::Error;

/// How many bytes of a file are read at a time; a larger tensor is read alone.
///
/// Where tensors stay as the file has them, this is memory that the model needs anyway.
const BATCH: usize = 64 << 20;

/// Tensors that are read together where none is kept.
const SKIMMED: usize = 8;

/// The largest value of f16.
pub(super) const F16_MAX: f32 = 65504.0;

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

/// The file's key for every parameter, by the parameter's path.
pub(super) type Keys = BTreeMap<String, String>;

/// Finds the key of every parameter of `module` among `tensors`: the [`canonical`] name of each and its key in
/// `file`. What is missing, left over or of another shape goes to `problems`.
pub(super) fn match_names<B: Backend, M: Module<B>>(
    module: &M,
    component: Component,
    file: &TensorFile,
    tensors: impl IntoIterator<Item = (String, String)>,
    problems: &mut Vec<TensorProblem>,
) -> Keys {
    let mut in_file: BTreeMap<String, String> = BTreeMap::new();
    let shape_of = |key: &str| file.info(key).map(|info| info.shape.clone());
    for (name, key) in tensors {
        if let Some(other) = in_file.insert(name, key) {
            // two spellings of one tensor: which one counts is nothing to guess
            problems.push(TensorProblem { expected: None, found: shape_of(&other), path: other });
        }
    }
    let mut keys = Keys::new();
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
                if found.as_ref().is_some_and(|found| fits(component, &name, &parameter.shape, found)) {
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
    keys
}

/// The same shape, or, in the autoencoder's attention, a linear layer kept as a convolution of 1x1.
fn fits(component: Component, name: &str, expected: &[usize], found: &[usize]) -> bool {
    let attention = component == Component::Vae && name.contains(".attentions.") && expected.len() == 2;
    found == expected || attention && found.len() == 4 && found[2..] == [1, 1] && found[..2] == *expected
}

/// Reads networks: tensor by tensor, by position, checked and hashed on the way.
pub(super) struct Reader<'p> {
    dtype: FloatDType,
    progress: &'p dyn Progress,
    /// Bytes that were read.
    done: u64,
    /// A line for every tensor.
    hash: Vec<String>,
}

impl<'p> Reader<'p> {
    /// Begins a stage of `total` bytes.
    pub(super) fn new(dtype: FloatDType, progress: &'p dyn Progress, total: u64) -> Self {
        progress.begin("loading weights", Some(total));
        Self { dtype, progress, done: 0, hash: Vec::new() }
    }

    /// Fills `module` from the tensors of `file` that `keys` names; each becomes a parameter of the reader's dtype.
    /// Parameters get the stable hash of their path as id.
    ///
    /// # Errors
    /// - [`Error::TensorFile`] if the file cannot be read;
    /// - [`Error::NotFinite`] naming a tensor with a NaN or an infinity, or with a value that the dtype cannot hold;
    /// - [`Error::Stopped`] if progress says so.
    pub(super) fn fill<B: DiffusionBackend, M: Module<B>>(
        &mut self,
        module: M,
        component: Component,
        file: &TensorFile,
        keys: &Keys,
    ) -> Result<M, Error> {
        let order: Vec<(String, Vec<usize>)> =
            parameters::list::<B, M>(&module).into_iter().map(|p| (p.path, p.shape)).collect();
        log::info!("{component}: {} tensors from {}", order.len(), file.path().display());
        let mut waiting = &order[..];
        let mut ready: HashMap<String, TensorData> = HashMap::new();
        let module = parameters::map_data(module, |path, _shape| {
            while !ready.contains_key(path) && !waiting.is_empty() {
                let (batch, rest) = waiting.split_at(batch_length(waiting, file, keys));
                waiting = rest;
                self.read(component, file, keys, batch, &mut ready)?;
            }
            Ok::<_, Error>(ready.remove(path))
        })?;
        let module = parameters::assign_ids(module, |path| stable_hash(path.as_bytes()));
        Ok(parameters::arrange(module))
    }

    fn read(
        &mut self,
        component: Component,
        file: &TensorFile,
        keys: &Keys,
        batch: &[(String, Vec<usize>)],
        ready: &mut HashMap<String, TensorData>,
    ) -> Result<(), Error> {
        let dtype = self.dtype;
        let read = |(path, shape): &(String, Vec<usize>)| {
            let tensor = file.read(&keys[path])?;
            let (bytes, hash) = (tensor.bytes.len() as u64, stable_hash(&tensor.bytes));
            let data = convert(tensor, shape, dtype)?.ok_or_else(|| Error::NotFinite {
                what: format!("{}: tensor {} as {dtype:?}", file.path().display(), keys[path]),
            })?;
            Ok((data, bytes, hash))
        };
        // all of them, so that the first error is always the same one
        let results: Vec<Result<(TensorData, u64, u64), Error>> = batch.par_iter().map(read).collect();
        for ((path, _), result) in batch.iter().zip(results) {
            let (data, bytes, hash) = result?;
            self.done += bytes;
            self.hash.push(format!("{component}/{path} {hash:016x}\n"));
            ready.insert(path.clone(), data);
        }
        match self.progress.advance(self.done, component.folder()) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Stopped),
        }
    }

    /// Takes the tensors of `file` that `keys` names into the hash, and keeps none.
    ///
    /// # Errors
    /// As [`fill`](Self::fill), but for values that are not finite.
    pub(super) fn skim(&mut self, component: Component, file: &TensorFile, keys: &Keys) -> Result<(), Error> {
        let tensors: Vec<(&String, &String)> = keys.iter().collect();
        for some in tensors.chunks(SKIMMED) {
            let read = |(path, key): &(&String, &String)| {
                let bytes = file.read(key)?.bytes;
                let line = format!("{component}/{path} {:016x}\n", stable_hash(&bytes));
                Ok::<_, Error>((line, bytes.len() as u64))
            };
            for result in some.par_iter().map(read).collect::<Vec<_>>() {
                let (line, bytes) = result?;
                self.done += bytes;
                self.hash.push(line);
            }
            if self.progress.advance(self.done, component.folder()) == ControlFlow::Break(()) {
                return Err(Error::Stopped);
            }
        }
        Ok(())
    }

    /// SHA-256 in hex over all tensors that were read, independent of their order.
    pub(super) fn finish(mut self) -> String {
        self.hash.sort();
        sha256_hex(self.hash.concat().as_bytes())
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.progress.end("");
    }
}

/// The bytes of the tensors in the file.
pub(super) fn bytes_of(file: &TensorFile, keys: &Keys) -> u64 {
    keys.values().map(|key| length(file, key) as u64).sum()
}

fn length(file: &TensorFile, key: &str) -> usize {
    file.info(key).map_or(0, |info| info.shape.iter().product::<usize>() * info.dtype.size())
}

/// How many parameters from the first are read together: one at least.
fn batch_length(waiting: &[(String, Vec<usize>)], file: &TensorFile, keys: &Keys) -> usize {
    let mut bytes = 0;
    let fits = |(path, _): &&(String, Vec<usize>)| {
        bytes += length(file, &keys[path]);
        bytes <= BATCH
    };
    waiting.iter().take_while(fits).count().max(1)
}

/// The tensor in `dtype`, in the shape of the parameter; `None` if a value is not finite or too large for it.
fn convert(tensor: RawTensor, shape: &[usize], dtype: FloatDType) -> Result<Option<TensorData>, Error> {
    let limit = if dtype == FloatDType::F16 { F16_MAX } else { f32::MAX };
    let same = matches!(
        (tensor.dtype, dtype),
        (Dtype::F32, FloatDType::F32) | (Dtype::F16, FloatDType::F16) | (Dtype::BF16, FloatDType::BF16)
    );
    // the file's bytes are the parameter's: nothing to convert, and no second copy
    if same && cfg!(target_endian = "little") {
        let finite = match tensor.dtype {
            Dtype::F32 => {
                all_finite(&tensor.bytes, |bytes| u32::from_le_bytes(bytes) & 0x7f80_0000 != 0x7f80_0000)
            }
            Dtype::F16 => all_finite(&tensor.bytes, |bytes| u16::from_le_bytes(bytes) & 0x7c00 != 0x7c00),
            _ => all_finite(&tensor.bytes, |bytes| u16::from_le_bytes(bytes) & 0x7f80 != 0x7f80),
        };
        let data = || TensorData::from_bytes_vec(tensor.bytes, shape.to_vec(), dtype.into());
        return Ok(finite.then(data));
    }
    let shape = shape.to_vec();
    Ok(match dtype {
        FloatDType::F16 => {
            let write = |from: &[f32], to: &mut [f16]| to.convert_from_f32_slice(from);
            in_blocks(&tensor, limit, write)?.map(|values| TensorData::new(values, shape))
        }
        FloatDType::BF16 => {
            let write = |from: &[f32], to: &mut [bf16]| to.convert_from_f32_slice(from);
            in_blocks(&tensor, limit, write)?.map(|values| TensorData::new(values, shape))
        }
        other => in_blocks(&tensor, limit, |from: &[f32], to: &mut [f32]| to.copy_from_slice(from))?
            .map(|values| TensorData::new(values, shape).convert_dtype(DType::from(other))),
    })
}

/// Whether the exponent of no element is that of infinities and NaN.
fn all_finite<const N: usize>(bytes: &[u8], finite: impl Fn([u8; N]) -> bool) -> bool {
    // in blocks: without a branch for every element, which takes several times as long
    let (elements, _) = bytes.as_chunks::<N>();
    elements.chunks(4096).all(|block| block.iter().fold(true, |all, element| all & finite(*element)))
}

/// The values, converted a block at a time, so that there is no second copy in f32.
fn in_blocks<T: Default + Copy>(
    tensor: &RawTensor,
    limit: f32,
    write: impl Fn(&[f32], &mut [T]),
) -> Result<Option<Vec<T>>, Error> {
    const BLOCK: usize = 4096;
    let size = tensor.dtype.size();
    let mut values = vec![T::default(); tensor.bytes.len() / size];
    for (bytes, values) in tensor.bytes.chunks(BLOCK * size).zip(values.chunks_mut(BLOCK)) {
        let block =
            RawTensor { dtype: tensor.dtype, shape: vec![values.len()], bytes: bytes.to_vec() }.to_f32()?;
        // false for NaN as well
        if !block.iter().fold(true, |all, value| all & (value.abs() <= limit)) {
            return Ok(None);
        }
        write(&block, values);
    }
    Ok(Some(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(values: &[f32]) -> RawTensor {
        RawTensor::from_f32(vec![values.len()], values.to_vec())
    }

    #[test]
    fn every_dtype_becomes_every_other_as_burn_converts() {
        let values: Vec<f32> = (0..10_000).map(|i| (i as f32 - 5000.0) * 0.37).collect();
        let half = floats(&values).to_f16_raw();
        let bytes = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        let brain = RawTensor { dtype: Dtype::BF16, shape: vec![values.len()], bytes };
        let bytes = values.iter().flat_map(|value| f64::from(*value).to_le_bytes()).collect();
        let double = RawTensor { dtype: Dtype::F64, shape: vec![values.len()], bytes };
        for tensor in [floats(&values), half, brain, double] {
            for dtype in [FloatDType::F32, FloatDType::F16, FloatDType::BF16] {
                let found = convert(tensor.clone(), &[100, 100], dtype).unwrap().unwrap();
                let expected =
                    TensorData::new(tensor.to_f32().unwrap(), [100, 100]).convert_dtype(dtype.into());
                assert_eq!(found, expected, "{:?} as {dtype:?}", tensor.dtype);
            }
        }
        let integers = RawTensor::from_i64(vec![1], vec![1]);
        assert!(convert(integers, &[1], FloatDType::F32).is_err());
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_stands() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 4095, 4096, 9999] {
                let mut values = vec![1.0; 10_000];
                values[place] = bad;
                let tensor = floats(&values);
                for tensor in [tensor.clone(), tensor.to_f16_raw()] {
                    for dtype in [FloatDType::F32, FloatDType::F16, FloatDType::BF16] {
                        assert!(convert(tensor.clone(), &[10_000], dtype).unwrap().is_none());
                    }
                }
            }
        }
        for (value, dtype, fits) in [
            (65504.0, FloatDType::F16, true),
            (-70000.0, FloatDType::F16, false),
            (3e38, FloatDType::BF16, true),
            (f32::MAX, FloatDType::F32, true),
        ] {
            assert_eq!(convert(floats(&[value]), &[1], dtype).unwrap().is_some(), fits, "{value} {dtype:?}");
        }
    }
}
