//! What was encoded, on disk: safetensors of some megabytes, each of which is used whole or made again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use cxr_core::hash::sha256_hex;
use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr_dataset::{Collection, ImageOptions};

use crate::TrainError;

/// Raised when the same key stands for other values than it did.
const VERSION: &str = "cxr-encoded-1";
/// Header entry: SHA-256 of the tensors' bytes, so that a file with a bit turned is noticed.
const SUM: &str = "sha256";

/// A folder that keeps what the frozen parts of one model made.
///
/// A file is known by everything that decides its values: the model, the dtype of its weights, what is done to
/// pictures, and each picture's path, length and time of change, or each prompt's text. A file that is damaged is made
/// again; those of settings that are no longer used stay until somebody deletes them.
#[derive(Debug, Clone, Copy)]
pub struct EncodeCache<'a> {
    /// The folder; it is made if need be.
    pub folder: &'a Path,
    /// SHA-256 of the model's weights.
    pub model: &'a str,
}

impl EncodeCache<'_> {
    fn path(&self, kind: &str, settings: &str, items: impl Iterator<Item = String>) -> PathBuf {
        let head = [VERSION, kind, self.model, settings].map(str::to_owned);
        let parts: Vec<String> = head.into_iter().chain(items).collect();
        self.folder.join(format!("{kind}-{}.safetensors", &sha256_hex(parts.join("\0").as_bytes())[..32]))
    }

    /// Where the moments of some pictures are.
    pub(super) fn of_pictures(
        &self,
        settings: &str,
        images: &ImageOptions,
        (collection, positions): (&Collection, &[usize]),
    ) -> Result<PathBuf, TrainError> {
        let mut items = vec![format!("{images:?}")];
        for &position in positions {
            let image = &collection.pairs[position].image;
            let file = std::fs::metadata(image).map_err(TrainError::file(image))?;
            let changed = file.modified().map_err(TrainError::file(image))?;
            let changed = changed.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
            let path = std::path::absolute(image).map_err(TrainError::file(image))?;
            items.push(format!("{} {} {changed}", path.display(), file.len()));
        }
        Ok(self.path("moments", settings, items.into_iter()))
    }

    /// Where the embeddings of some prompts are.
    pub(super) fn of_prompts(&self, settings: &str, prompts: &[&str]) -> PathBuf {
        self.path("embeddings", settings, prompts.iter().map(|prompt| (*prompt).to_owned()))
    }
}

/// The tensors of a file, if it is there and whole; each has `n` rows.
pub(super) fn read<const N: usize>(path: &Path, names: [&str; N], n: usize) -> Option<[RawTensor; N]> {
    if !path.exists() {
        return None;
    }
    let whole = || -> Result<[RawTensor; N], String> {
        let file = TensorFile::open(path).map_err(|error| error.to_string())?;
        let tensors: Vec<RawTensor> = names
            .iter()
            .map(|name| file.read(name))
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        if file.metadata().get(SUM) != Some(&sum(&tensors)) {
            return Err("its check sum does not fit".to_owned());
        }
        if tensors.iter().any(|tensor| tensor.shape.first() != Some(&n)) {
            return Err(format!("it is not of {n} rows"));
        }
        tensors.try_into().map_err(|_| "it lacks a tensor".to_owned())
    };
    match whole() {
        Ok(tensors) => Some(tensors),
        Err(reason) => {
            log::warn!("{} is damaged and is made again: {reason}", path.display());
            None
        }
    }
}

/// Writes tensors, whole or not at all.
pub(super) fn write(path: &Path, tensors: Vec<(&str, RawTensor)>) -> Result<(), TrainError> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(TrainError::file(folder))?;
    }
    let (names, tensors): (Vec<&str>, Vec<RawTensor>) = tensors.into_iter().unzip();
    let header = BTreeMap::from([(SUM.to_owned(), sum(&tensors))]);
    let tensors: Vec<(String, RawTensor)> = names.into_iter().map(str::to_owned).zip(tensors).collect();
    Ok(write_safetensors(path, &tensors, &header)?)
}

fn sum(tensors: &[RawTensor]) -> String {
    let sums: Vec<String> =
        tensors.iter().map(|tensor| format!("{:?} {}", tensor.shape, sha256_hex(&tensor.bytes))).collect();
    sha256_hex(sums.join("\n").as_bytes())
}
