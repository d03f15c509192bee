//! The stages: which there are, what each needs, and skipping what is done.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cxr::core::progress::Progress;
use cxr::core::{atomic, hash::sha256_hex};
use cxr_examples::progress::seconds_text;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A part of the work, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Stage {
    /// Reads the radiographs, looks at every image, splits, measures what the split lets through.
    Prepare,
    /// Pictures of the base model.
    BasePictures,
    /// The adapter.
    Finetune,
    /// Pictures of the adapted model.
    LoraPictures,
    /// Distances of both to held-out radiographs.
    Distances,
    /// The search for copies of training radiographs.
    Audit,
    /// Whether pictures show their findings, and what a classifier learns from them.
    Findings,
    /// report.html and report.md.
    Report,
}

impl Stage {
    /// As `--only` takes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::BasePictures => "base-pictures",
            Self::Finetune => "finetune",
            Self::LoraPictures => "lora-pictures",
            Self::Distances => "distances",
            Self::Audit => "audit",
            Self::Findings => "findings",
            Self::Report => "report",
        }
    }

    /// Those whose results it reads.
    fn needs(self) -> &'static [Self] {
        use Stage::*;
        match self {
            Prepare => &[],
            BasePictures | Finetune => &[Prepare],
            LoraPictures => &[Prepare, Finetune],
            Audit => &[Prepare, Finetune, LoraPictures],
            Distances | Findings => &[Prepare, BasePictures, Finetune, LoraPictures],
            Report => &[Prepare, BasePictures, Finetune, LoraPictures, Distances, Audit, Findings],
        }
    }
}

/// A stage's result with the key of its settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Done<T> {
    pub(crate) key: String,
    /// What the call took that finished it.
    pub(crate) seconds: f64,
    pub(crate) result: T,
}

/// The folder of a run, and which stages run in it.
pub(crate) struct Stages<'a> {
    pub(crate) out: &'a Path,
    pub(crate) only: Option<Stage>,
    pub(crate) progress: &'a dyn Progress,
}

impl Stages<'_> {
    /// Whether a stage has a part in this call.
    pub(crate) fn wants(&self, stage: Stage) -> bool {
        self.only.is_none_or(|only| only == stage || only.needs().contains(&stage))
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    /// The result of a stage that was done with these settings, where `whole` says that its files are there; none if it
    /// is to be done now.
    ///
    /// # Errors
    /// If it is not done and another stage alone was asked for, which needs it.
    pub(crate) fn found<T: DeserializeOwned>(
        &self,
        stage: Stage,
        record: &Path,
        key: &str,
        whole: impl FnOnce(&T) -> bool,
    ) -> Result<Option<Done<T>>> {
        if let Some(done) = read::<T>(record).filter(|done| done.key == key && whole(&done.result)) {
            self.progress.begin(stage.name(), None);
            self.progress.end(&format!("done before, in {}", seconds_text(done.seconds)));
            return Ok(Some(done));
        }
        match self.only {
            Some(only) if only != stage => bail!(
                "--only {}: it needs the result of {}, which is not in {}, or was made with other settings: run --only \
                 {} first, or leave --only out",
                only.name(),
                stage.name(),
                self.out.display(),
                stage.name()
            ),
            _ => Ok(None),
        }
    }

    /// Keeps the result of a stage that began at `started`.
    pub(crate) fn keep<T: Serialize>(
        &self,
        record: &Path,
        key: &str,
        started: Instant,
        result: T,
    ) -> Result<Done<T>> {
        let done = Done { key: key.to_owned(), seconds: started.elapsed().as_secs_f64(), result };
        write_json(record, &done)?;
        Ok(done)
    }

    /// Takes the folder of a stage with these settings back from where it was put aside, if it was.
    pub(crate) fn recall(&self, name: &str, key: &str) -> Result<()> {
        if self.out.join(format!("{name}-{key}")).is_dir() {
            self.folder(name, key)?;
        }
        Ok(())
    }

    /// The folder of a stage with these settings: as an earlier call left it, or new. One of other settings is put
    /// aside under a name with its key, and is found again there when its settings come back: hours of work may be in
    /// it.
    pub(crate) fn folder(&self, name: &str, key: &str) -> Result<PathBuf> {
        let folder = self.out.join(name);
        let settings = folder.join("key.json");
        let own: Option<String> =
            std::fs::read(&settings).ok().and_then(|text| serde_json::from_slice(&text).ok());
        if own.as_deref() == Some(key) {
            return Ok(folder);
        }
        let renamed = |from: &Path, to: &Path| {
            std::fs::rename(from, to)
                .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
        };
        if folder.exists() {
            // What has no key was not made by this program, or is of an older version.
            let aside = own.unwrap_or_else(|| "unknown".to_owned());
            let mut target = self.out.join(format!("{name}-{aside}"));
            for number in 2.. {
                if !target.exists() {
                    break;
                }
                target = self.out.join(format!("{name}-{aside}-{number}"));
            }
            renamed(&folder, &target)?;
        }
        let before = self.out.join(format!("{name}-{key}"));
        if before.is_dir() {
            renamed(&before, &folder)?;
        } else {
            std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            write_json(&settings, &key)?;
        }
        Ok(folder)
    }
}

/// A hash of everything that a stage's result is a function of.
pub(crate) fn key(settings: &impl Serialize) -> Result<String> {
    Ok(sha256_hex(&serde_json::to_vec(settings)?)[..16].to_string())
}

fn read<T: DeserializeOwned>(file: &Path) -> Option<Done<T>> {
    // What cannot be read was not written by this version: the stage is done again.
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

/// Writes JSON, whole or not at all.
pub(crate) fn write_json(file: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    atomic::write_bytes(file, text.as_bytes()).with_context(|| format!("cannot write {}", file.display()))
}
