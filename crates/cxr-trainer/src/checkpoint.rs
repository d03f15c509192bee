//! What a run needs to go on: trainable parameters, moments, averages, and its place.
//!
//! A checkpoint is a folder `checkpoint-STEP`, written under another name and renamed, so that it is whole or not
//! there. It holds `parameters.safetensors` (f32, by path, what learns alone), `ema.safetensors` when there is an
//! average, `optimizer.bin` (burn's record in full precision) and `state.json`. Frozen weights are not in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::TensorData;
use burn::tensor::backend::Backend;
use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr_kernels::nn::parameters;
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// Name of the parameters' file.
pub const PARAMETERS: &str = "parameters.safetensors";
/// Name of the averages' file.
pub const EMA: &str = "ema.safetensors";
/// Name of the optimizer's file, without burn's extension.
pub const OPTIMIZER: &str = "optimizer";
/// Name of the state's file.
pub const STATE: &str = "state.json";

/// The place of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Exponential average of the loss.
    pub smoothed_loss: Option<f64>,
    /// Steps that were left out because their loss was not finite.
    pub not_finite: usize,
    /// Settings and data of the run, hashed.
    pub fingerprint: String,
    /// The best checkpoint so far, where a validation says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
}

/// The step with the lowest validation loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps done by then.
    pub step: u64,
    /// Its validation loss.
    pub loss: f64,
}

impl Best {
    /// Its checkpoint in the folder of its run.
    pub fn checkpoint(&self, folder: &Path) -> PathBuf {
        path(folder, self.step)
    }
}

/// The parameters of a checkpoint in `module`: the averaged ones where there are any.
///
/// # Errors
/// As [`load_trainable`].
pub fn load_weights<B: Backend, M: Module<B>>(module: M, checkpoint: &Path) -> Result<M, TrainError> {
    let averages = checkpoint.join(EMA);
    let file = if averages.exists() { averages } else { checkpoint.join(PARAMETERS) };
    load_trainable(module, &file)
}

/// What the names of checkpoints begin with; the step follows.
const PREFIX: &str = "checkpoint-";

/// The checkpoint of a step in the folder of its run.
pub fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("{PREFIX}{step}"))
}

/// The checkpoints in a run's folder, oldest first.
///
/// # Errors
/// If the folder cannot be read.
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>, TrainError> {
    let mut found = Vec::new();
    if !folder.exists() {
        return Ok(found);
    }
    for entry in std::fs::read_dir(folder).map_err(TrainError::file(folder))? {
        let path = entry.map_err(TrainError::file(folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix(PREFIX).and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads a checkpoint's place.
///
/// # Errors
/// If it is not there or not readable.
pub fn read_state(checkpoint: &Path) -> Result<State, TrainError> {
    let path = checkpoint.join(STATE);
    let text = std::fs::read_to_string(&path).map_err(TrainError::file(&path))?;
    serde_json::from_str(&text).map_err(|problem| TrainError::Checkpoint {
        path: checkpoint.to_path_buf(),
        problem: format!("{STATE}: {problem}"),
    })
}

/// Writes the trainable parameters of a module, by path, in f32.
///
/// # Errors
/// If the file cannot be written.
pub fn save_trainable<B: Backend, M: Module<B>>(module: &M, path: &Path) -> Result<(), TrainError> {
    let trainable: BTreeMap<String, bool> =
        parameters::list(module).into_iter().map(|info| (info.path, info.trainable)).collect();
    let mut tensors = Vec::new();
    parameters::read(module, |name, data| {
        if trainable.get(name).copied().unwrap_or(false) {
            let shape = data.shape.to_vec();
            tensors.push((name.to_string(), RawTensor::from_f32(shape, data.iter::<f32>().collect())));
        }
    });
    Ok(write_safetensors(path, &tensors, &BTreeMap::new())?)
}

/// Reads what [`save_trainable`] wrote into the module's trainable parameters: all of them, and nothing else.
///
/// # Errors
/// If the file does not hold exactly these parameters.
pub fn load_trainable<B: Backend, M: Module<B>>(module: M, path: &Path) -> Result<M, TrainError> {
    let file = TensorFile::open(path)?;
    let wrong = |problem: String| TrainError::Checkpoint { path: path.to_path_buf(), problem };
    let wanted: BTreeMap<String, Vec<usize>> = parameters::list(&module)
        .into_iter()
        .filter(|info| info.trainable)
        .map(|info| (info.path, info.shape))
        .collect();
    if let Some(name) = file.names().find(|name| !wanted.contains_key(*name)) {
        return Err(wrong(format!("{name} is no trainable parameter of this model")));
    }
    parameters::map_data(module, |name, shape| {
        if !wanted.contains_key(name) {
            return Ok(None);
        }
        let raw = file.read(name)?;
        if raw.shape != shape {
            return Err(wrong(format!("{name}: expected shape {shape:?}, found {:?}", raw.shape)));
        }
        Ok(Some(TensorData::new(raw.to_f32()?, shape.to_vec())))
    })
}

/// Removes all but the newest `keep` checkpoints, and that of `best`.
///
/// # Errors
/// If one cannot be removed.
pub fn prune(folder: &Path, keep: usize, best: Option<Best>) -> Result<(), TrainError> {
    let all = list(folder)?;
    for (step, path) in all.iter().take(all.len().saturating_sub(keep)) {
        if best.is_none_or(|best| best.step != *step) {
            // A process that is killed meanwhile must not leave half a checkpoint under a checkpoint's name.
            let aside = folder.join(format!("{}{PREFIX}{step}", cxr_core::atomic::PREFIX));
            std::fs::rename(path, &aside).map_err(TrainError::file(path))?;
            std::fs::remove_dir_all(&aside).map_err(TrainError::file(&aside))?;
        }
    }
    Ok(())
}

/// Removes what a process left that was killed while it wrote a checkpoint.
pub(crate) fn clean(folder: &Path) -> Result<(), TrainError> {
    for entry in std::fs::read_dir(folder).map_err(TrainError::file(folder))? {
        let path = entry.map_err(TrainError::file(folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.starts_with(cxr_core::atomic::PREFIX) {
            continue;
        }
        log::info!("removing {}, which was left half written", path.display());
        let removed =
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(TrainError::file(&path))?;
    }
    Ok(())
}
