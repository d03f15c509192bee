//! Preparing the data, and skipping what is done.

use std::path::Path;

use anyhow::{Context, Result};
use cxr::core::{atomic, hash::sha256_hex};
use cxr::dataset::LeakageReport;
use cxr_examples::demo::{self, thumbnails::Thumbnails};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Args;

/// Reads and splits the radiographs; writes the split and what was found in `data/`, and hands on what the split lets
/// through.
pub(crate) fn prepare(args: &Args) -> Result<(Thumbnails, LeakageReport)> {
    let folder = args.data.clone().unwrap_or_else(demo::data_folder);
    let thumbnails = Thumbnails::open(&folder)?;
    let target = args.out.join("data");
    std::fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
    thumbnails.split.write(&target.join("split.json"), &thumbnails.collection)?;
    let leakage = thumbnails.leakage()?;
    let report = thumbnails.collection.preparation_report(Some(&thumbnails.split), Some(leakage.clone()));
    write_json(&target.join("report.json"), &report)?;
    if !args.run.quiet {
        let (train, test) = (thumbnails.split.train.len(), thumbnails.split.test.len());
        eprintln!("radiographs: {train} to train on, {test} of other patients held out");
    }
    Ok((thumbnails, leakage))
}

/// A hash of everything that a stage's result is a function of.
pub(crate) fn key(settings: &impl Serialize) -> Result<String> {
    Ok(sha256_hex(&serde_json::to_vec(settings)?)[..16].to_string())
}

/// A stage's result with the key of its settings.
#[derive(serde::Serialize, serde::Deserialize)]
struct Done<T> {
    key: String,
    result: T,
}

/// The result of a stage that was done with these settings, if it was.
pub(crate) fn done<T: DeserializeOwned>(file: &Path, key: &str) -> Option<T> {
    let text = std::fs::read(file).ok()?;
    // What cannot be read was not written by this version: the stage is done again.
    let done: Done<T> = serde_json::from_slice(&text).ok()?;
    (done.key == key).then_some(done.result)
}

/// Keeps the result of a stage.
pub(crate) fn keep(file: &Path, key: &str, result: &impl Serialize) -> Result<()> {
    write_json(file, &Done { key: key.to_string(), result })
}

/// Writes JSON, whole or not at all.
pub(crate) fn write_json(file: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    atomic::write_bytes(file, text.as_bytes()).with_context(|| format!("cannot write {}", file.display()))
}
