//! The folder of pictures: what is there already, and what is added.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cxr::core::metadata::{MetadataRow, write_jsonl};
use cxr::ldm::pipeline::{Image, PngColor, read_settings_hash};
use cxr_examples::ranks::Shard;

/// Pictures and their `metadata.jsonl`.
///
/// Several processes that make one set each keep rows in a file of their own, `metadata.part-I-of-N.jsonl`, and the one
/// that finishes last puts them together.
pub(crate) struct Folder {
    path: PathBuf,
    shard: Option<Shard>,
    rows: BTreeMap<String, MetadataRow>,
    /// Names of the rows that this process's file has.
    own: BTreeSet<String>,
    /// Whether the file is no longer what `rows` says.
    changed: bool,
}

const WHOLE: &str = "metadata.jsonl";
const PART: &str = "metadata.part-";

impl Folder {
    /// Looks at what is there; a last line that broke off is left out.
    pub(crate) fn open(path: &Path, shard: Option<Shard>) -> Result<Self> {
        let mut folder = Self {
            path: path.to_path_buf(),
            shard,
            rows: BTreeMap::new(),
            own: BTreeSet::new(),
            changed: false,
        };
        let own = folder.metadata();
        let mut files = vec![path.join(WHOLE)];
        files.extend(folder.parts()?);
        for file in files.iter().filter(|file| file.is_file()) {
            let (rows, broken) = read_rows(file)?;
            // A single process takes over what several have left.
            folder.changed |= if *file == own { broken } else { shard.is_none() };
            if *file == own || shard.is_none() {
                folder.own.extend(rows.iter().map(|row| row.file_name.clone()));
            }
            folder.rows.extend(rows.into_iter().map(|row| (row.file_name.clone(), row)));
        }
        Ok(folder)
    }

    /// Whether a picture with these settings is there under that name.
    ///
    /// Another one there is an error, or forgotten if `force`.
    pub(crate) fn has(&mut self, name: &str, hash: &str, color: PngColor, force: bool) -> Result<bool> {
        let same = self.is_made(name, hash, color);
        if same && self.rows.contains_key(name) {
            return Ok(true);
        }
        let file = self.path.join(name);
        // a file without a row: the program ended between the two
        if file.is_file() && !same && !force {
            bail!(
                "{} is there already, made with other settings: choose another folder with --out, or overwrite it \
                 with --force",
                file.display()
            );
        }
        self.rows.remove(name);
        self.changed |= self.own.remove(name);
        Ok(false)
    }

    fn is_made(&self, name: &str, hash: &str, color: PngColor) -> bool {
        let found = read_settings_hash(self.path.join(name)).ok().flatten();
        found.is_some_and(|found| found == (hash.into(), color))
    }

    /// Makes the folder, and a file of rows that says what is there.
    pub(crate) fn start(&mut self) -> Result<()> {
        std::fs::create_dir_all(&self.path)
            .with_context(|| format!("cannot make {}", self.path.display()))?;
        if self.changed {
            let rows: Vec<MetadataRow> = self.own.iter().map(|name| self.rows[name].clone()).collect();
            write_jsonl(self.metadata(), &rows)?;
            self.changed = false;
        }
        if self.shard.is_none() {
            self.remove_parts()?;
        }
        Ok(())
    }

    /// Writes a picture, then its row: a row stands for a file that is whole.
    pub(crate) fn add(&mut self, image: &Image, row: MetadataRow, color: PngColor) -> Result<()> {
        image.save_png_as(self.path.join(&row.file_name), color)?;
        let line = serde_json::to_string(&row)? + "\n";
        let metadata = self.metadata();
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&metadata)
            .with_context(|| format!("cannot write {}", metadata.display()))?;
        file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", metadata.display()))?;
        self.own.insert(row.file_name.clone());
        self.rows.insert(row.file_name.clone(), row);
        Ok(())
    }

    /// Whether all pictures of the set, named with the hash of their settings, are there, those of other processes
    /// included; then their rows are put together in one file.
    pub(crate) fn finish(&self, all: &[(String, String)], color: PngColor) -> Result<bool> {
        if self.shard.is_none() {
            return Ok(true);
        }
        // What others have added since.
        let mut now = Self::open(&self.path, self.shard)?;
        let whole =
            all.iter().all(|(name, hash)| now.rows.contains_key(name) && now.is_made(name, hash, color));
        if whole {
            let rows: Vec<MetadataRow> = std::mem::take(&mut now.rows).into_values().collect();
            write_jsonl(self.path.join(WHOLE), &rows)?;
            self.remove_parts()?;
        }
        Ok(whole)
    }

    /// The file that this process appends to.
    fn metadata(&self) -> PathBuf {
        match self.shard {
            None => self.path.join(WHOLE),
            Some(Shard { index, count }) => self.path.join(format!("{PART}{index}-of-{count}.jsonl")),
        }
    }

    /// The files of processes that make parts of the set.
    fn parts(&self) -> Result<Vec<PathBuf>> {
        if !self.path.is_dir() {
            return Ok(Vec::new());
        }
        let entries = self.path.read_dir().with_context(|| format!("cannot read {}", self.path.display()))?;
        let names = entries.filter_map(Result::ok).map(|entry| entry.path());
        let is_part = |path: &PathBuf| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            name.starts_with(PART) && name.ends_with(".jsonl")
        };
        let mut parts: Vec<PathBuf> = names.filter(is_part).collect();
        parts.sort();
        Ok(parts)
    }

    /// Removes the files of parts, whose rows are in one file now; another process may be doing the same.
    fn remove_parts(&self) -> Result<()> {
        for part in self.parts()? {
            match std::fs::remove_file(&part) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", part.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The rows of a file, and whether its last line broke off.
fn read_rows(file: &Path) -> Result<(Vec<MetadataRow>, bool)> {
    let content = match std::fs::read_to_string(file) {
        Ok(content) => content,
        // another process has just put all parts together
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), false)),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let lines: Vec<&str> = content.lines().filter(|line| !line.trim().is_empty()).collect();
    let mut rows = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        match serde_json::from_str::<MetadataRow>(line) {
            Ok(row) => rows.push(row),
            Err(_) if index + 1 == lines.len() && !content.ends_with('\n') => return Ok((rows, true)),
            Err(error) => bail!("{}, line {}: {error}", file.display(), index + 1),
        }
    }
    Ok((rows, false))
}
