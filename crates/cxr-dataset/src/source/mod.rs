//! Readers, one file per layout; past them every pair is typed and checked.
//!
//! | Source | Table | Images | Group |
//! |---|---|---|---|
//! | [`nih`] | `labels.csv` or `Data_Entry_2017*.csv` | `images/`, `images_0NN/images/`, the folder and two levels below | patient |
//! | [`kaggle`] | `indiana_reports.csv`, `indiana_projections.csv` | `images/images_normalized/`, `images/` | `uid` |
//! | [`table`] | `metadata.jsonl`, `metadata.csv`, any `.csv` or `.jsonl` | beside the table | a named column |
//!
//! All but `.jsonl` tables need the feature `csv`, which is on by default.
//!
//! A table that lacks columns is always an error. What is wrong with a single row (broken, duplicate, without a
//! report, without a usable image) is an error too, or skipped and counted under [`OnProblem::Skip`].

#[cfg(feature = "csv")]
mod csv_file;
#[cfg(feature = "csv")]
mod csv_rows;
#[cfg(feature = "csv")]
pub mod kaggle;
#[cfg(feature = "csv")]
pub mod nih;
pub mod table;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::image::{Decoded, check_exists};
use crate::{Collection, DatasetError, Deidentified, ImageError, Pair, PromptTemplate, Skipped, Wording};

pub use table::Columns;

/// What to do with a row that cannot be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnProblem {
    /// Return the error.
    #[default]
    Stop,
    /// Leave the row out and remember it in [`Collection::skipped`].
    Skip,
}

/// How closely images are looked at while a table is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageCheck {
    /// Not at all: for work on the texts alone.
    None,
    /// The file is there and has bytes.
    #[default]
    Exists,
    /// The file can be decoded whole; takes as long as an epoch of loading. [`Collection::load_images`] does the same
    /// with progress, and keeps the result.
    Decode,
}

/// How a source reads.
///
/// | Field | Default | Used by |
/// |---|---|---|
/// | `prompt` | the impression alone | all |
/// | `deidentified` | keep | all |
/// | `wording` | varied, seed 0 | `nih` |
/// | `columns` | `file_name`, `text`, `labels`, `view`, `group` | `table` |
/// | `images` | the file exists | all |
/// | `on_problem` | stop | all |
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReadOptions {
    /// The shape of a prompt.
    pub prompt: PromptTemplate,
    /// What to do with impressions that hold `XXXX`.
    pub deidentified: Deidentified,
    /// How findings become an impression.
    pub wording: Wording,
    /// The names of the columns.
    pub columns: Columns,
    /// How closely images are looked at.
    pub images: ImageCheck,
    /// What to do with a row that cannot be used.
    pub on_problem: OnProblem,
}

/// The tables of [`kaggle`] and [`nih`]: a folder that has one is told from a folder without a table even where the
/// feature `csv` is off.
const KAGGLE_REPORTS: &str = "indiana_reports.csv";
const NIH_TABLES: [&str; 3] = ["labels.csv", "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"];

/// Reads whatever layout lies at `path`, see [`Collection::open`].
pub(crate) fn open(path: &Path, options: &ReadOptions) -> Result<Collection, DatasetError> {
    if path.is_file() {
        return table::read(path, options);
    }
    std::fs::read_dir(path).map_err(|source| DatasetError::Read { path: path.into(), source })?;
    if path.join(KAGGLE_REPORTS).is_file() {
        #[cfg(feature = "csv")]
        return kaggle::read(path, options);
        #[cfg(not(feature = "csv"))]
        return Err(DatasetError::NoCsv { path: path.join(KAGGLE_REPORTS) });
    }
    if let Some(_table) = first_file(path, &NIH_TABLES) {
        #[cfg(feature = "csv")]
        return nih::read(path, options);
        #[cfg(not(feature = "csv"))]
        return Err(DatasetError::NoCsv { path: _table });
    }
    if first_file(path, &table::TABLES).is_some() {
        return table::read(path, options);
    }
    let all = [KAGGLE_REPORTS].into_iter().chain(NIH_TABLES).chain(table::TABLES);
    Err(DatasetError::NoTable { folder: path.into(), expected: all.collect::<Vec<_>>().join(", ") })
}

/// The first of these files that is in the folder.
fn first_file(folder: &Path, names: &[&str]) -> Option<PathBuf> {
    names.iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

/// Where images may lie; a name is looked for in each folder in turn.
#[cfg(feature = "csv")]
struct ImageFolders(Vec<PathBuf>);

#[cfg(feature = "csv")]
impl ImageFolders {
    fn new(root: &Path, candidates: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut folders: Vec<PathBuf> = candidates.into_iter().filter(|folder| folder.is_dir()).collect();
        if folders.is_empty() {
            folders.push(root.into());
        }
        Self(folders)
    }

    /// Whether none of the candidates was there, so that the root itself is looked in.
    fn is_root(&self, root: &Path) -> bool {
        self.0 == [root]
    }

    /// The path of an image; the first candidate where it is nowhere, so that the error names a place.
    fn find(&self, name: &str) -> PathBuf {
        let mut paths = self.0.iter().map(|folder| folder.join(name));
        match self.0.as_slice() {
            [only] => only.join(name),
            folders => paths.find(|path| path.is_file()).unwrap_or_else(|| folders[0].join(name)),
        }
    }
}

/// Where rows come together: every source hands its rows in, and the same checks and policies hold for all.
struct Intake<'a> {
    options: &'a ReadOptions,
    source: &'static str,
    table: PathBuf,
    rows_read: usize,
    seen: HashMap<String, u64>,
    pairs: Vec<Pair>,
    skipped: Vec<Skipped>,
    dropped_deidentified: usize,
}

impl<'a> Intake<'a> {
    fn new(source: &'static str, table: PathBuf, options: &'a ReadOptions) -> Self {
        Self {
            options,
            source,
            table,
            rows_read: 0,
            seen: HashMap::new(),
            pairs: Vec::new(),
            skipped: Vec::new(),
            dropped_deidentified: 0,
        }
    }

    /// Counts a row; what is wrong with it goes through the policy. An error that no row can be blamed for (the file
    /// cannot be read any further) always stops.
    fn row(&mut self, row: Result<Option<Pair>, DatasetError>) -> Result<(), DatasetError> {
        self.rows_read += 1;
        match row.and_then(|pair| pair.map(|pair| self.admit(pair)).transpose()) {
            Ok(_) => Ok(()),
            Err(error) => self.problem(error),
        }
    }

    fn problem(&mut self, error: DatasetError) -> Result<(), DatasetError> {
        if self.options.on_problem == OnProblem::Stop || error.concerns_more_than_a_row() {
            return Err(error);
        }
        skip(&mut self.skipped, &error);
        Ok(())
    }

    fn admit(&mut self, mut pair: Pair) -> Result<(), DatasetError> {
        if let Some(&first_row) = self.seen.get(&pair.name) {
            let (path, row, name) = (self.table.clone(), pair.row, pair.name);
            return Err(DatasetError::DuplicateName { path, row, first_row, name });
        }
        self.seen.insert(pair.name.clone(), pair.row);
        match crate::impression::apply(&pair.impression, self.options.deidentified) {
            None => self.dropped_deidentified += 1,
            Some(impression) => {
                pair.text = self.options.prompt.render(&impression, pair.view.as_deref());
                pair.impression = impression;
                self.pairs.push(pair);
            }
        }
        Ok(())
    }

    /// Looks at the images in parallel, and hands out the collection in the order of the table.
    fn finish(mut self) -> Result<Collection, DatasetError> {
        let check = |path: &Path| -> Result<(), ImageError> {
            match self.options.images {
                ImageCheck::None => Ok(()),
                ImageCheck::Exists => check_exists(path),
                ImageCheck::Decode => Decoded::open(path).map(drop),
            }
        };
        let checks: Vec<_> = self.pairs.par_iter().map(|pair| check(&pair.image).err()).collect();
        let mut pairs = Vec::with_capacity(self.pairs.len());
        for (pair, problem) in std::mem::take(&mut self.pairs).into_iter().zip(checks) {
            match problem {
                None => pairs.push(pair),
                Some(source) => {
                    self.problem(DatasetError::Image { table: self.table.clone(), row: pair.row, source })?;
                }
            }
        }
        if pairs.is_empty() {
            let (path, rows, skipped) = (self.table, self.rows_read, self.skipped.len());
            return Err(DatasetError::NoPairs { path, rows, skipped });
        }
        Ok(Collection {
            source: self.source.into(),
            table: self.table,
            pairs,
            rows_read: self.rows_read,
            skipped: self.skipped,
            dropped_deidentified: self.dropped_deidentified,
            token_filter: None,
        })
    }
}

/// How many skipped rows are logged as warnings; a folder that lacks its images would give thousands.
const WARNINGS: usize = 10;

/// Remembers a row that is left out.
pub(crate) fn skip(skipped: &mut Vec<Skipped>, error: &DatasetError) {
    match skipped.len() {
        0..WARNINGS => log::warn!("skipped: {error}"),
        WARNINGS => log::warn!("skipped: {error}; the rows that follow are counted without a word"),
        _ => log::debug!("skipped: {error}"),
    }
    skipped.push(Skipped { kind: error.kind().into(), message: error.to_string() });
}

/// A trimmed cell, or `None` when nothing is in it.
fn filled(cell: &str) -> Option<&str> {
    Some(cell.trim()).filter(|cell| !cell.is_empty())
}
