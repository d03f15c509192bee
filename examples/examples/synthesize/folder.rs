//! The folder of pictures: what is there already, and what is added.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cxr::core::metadata::{MetadataRow, write_jsonl};
use cxr::ldm::pipeline::{Image, PngColor, read_settings_hash};

/// Pictures and their `metadata.jsonl`.
pub(crate) struct Folder {
    path: PathBuf,
    rows: BTreeMap<String, MetadataRow>,
    /// Whether `rows` is no longer what the file says.
    changed: bool,
}

impl Folder {
    /// Looks at what is there; a last line that broke off is left out.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = path.join("metadata.jsonl");
        let (mut rows, mut changed) = (BTreeMap::new(), false);
        if file.is_file() {
            let content =
                std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let lines: Vec<&str> = content.lines().filter(|line| !line.trim().is_empty()).collect();
            for (index, line) in lines.iter().enumerate() {
                match serde_json::from_str::<MetadataRow>(line) {
                    Ok(row) => {
                        rows.insert(row.file_name.clone(), row);
                    }
                    Err(_) if index + 1 == lines.len() && !content.ends_with('\n') => changed = true,
                    Err(error) => bail!("{}, line {}: {error}", file.display(), index + 1),
                }
            }
        }
        Ok(Self { path: path.to_path_buf(), rows, changed })
    }

    /// Whether a picture with these settings is there under that name.
    ///
    /// Another one there is an error, or forgotten if `force`.
    pub(crate) fn has(&mut self, name: &str, hash: &str, color: PngColor, force: bool) -> Result<bool> {
        let file = self.path.join(name);
        if !file.is_file() {
            self.changed |= self.rows.remove(name).is_some();
            return Ok(false);
        }
        // a file without a row: the program ended between the two
        let same =
            read_settings_hash(&file).ok().flatten().is_some_and(|found| found == (hash.into(), color));
        if same && self.rows.contains_key(name) {
            return Ok(true);
        }
        if !same && !force {
            bail!(
                "{} is there already, made with other settings: choose another folder with --out, or overwrite it \
                 with --force",
                file.display()
            );
        }
        self.changed |= self.rows.remove(name).is_some();
        Ok(false)
    }

    /// Makes the folder, and a `metadata.jsonl` that says what is there.
    pub(crate) fn start(&mut self) -> Result<()> {
        std::fs::create_dir_all(&self.path)
            .with_context(|| format!("cannot make {}", self.path.display()))?;
        if self.changed {
            let rows: Vec<MetadataRow> = self.rows.values().cloned().collect();
            write_jsonl(self.metadata(), &rows)?;
            self.changed = false;
        }
        Ok(())
    }

    /// Writes a picture, then its row: a row stands for a file that is whole.
    pub(crate) fn add(&mut self, image: &Image, row: MetadataRow, color: PngColor) -> Result<()> {
        image.save_png_as(self.path.join(&row.file_name), color)?;
        let line = serde_json::to_string(&row)? + "\n";
        let metadata = self.metadata();
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&metadata)
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .with_context(|| format!("cannot write {}", metadata.display()))?;
        self.rows.insert(row.file_name.clone(), row);
        Ok(())
    }

    fn metadata(&self) -> PathBuf {
        self.path.join("metadata.jsonl")
    }
}
