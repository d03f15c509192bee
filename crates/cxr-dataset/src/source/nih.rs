//! NIH ChestX-ray14: a table of findings and a folder of images.
//!
//! The collection has no reports: the impression is built from the findings
//! ([`crate::impression::from_nih_findings`]). The group is the patient. `Patient Age`, `Patient Gender` (or
//! `Patient Sex`) and `Follow-up #` go to [`Pair::extra`] as `age`, `sex` and `follow_up` where the table has them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::csv_file::{CsvFile, Row};
use super::{ImageFolders, Intake, ReadOptions, filled, first_file};
use crate::impression::{NO_FINDING, from_nih_findings};
use crate::{Collection, DatasetError, Pair, labels};

/// The tables' names, the first one found is read.
pub const TABLES: [&str; 3] = super::NIH_TABLES;

const COLUMNS: [&str; 4] = ["Image Index", "Finding Labels", "Patient ID", "View Position"];
const EXTRAS: [(&str, &str); 4] =
    [("Patient Age", "age"), ("Patient Gender", "sex"), ("Patient Sex", "sex"), ("Follow-up #", "follow_up")];

/// Reads a folder. An image without a finding gets no label at all: `No Finding` is none.
///
/// # Errors
/// When no table is there, columns are missing, or (under [`crate::OnProblem::Stop`]) a row cannot be used.
pub fn read(folder: &Path, options: &ReadOptions) -> Result<Collection, DatasetError> {
    let table = first_file(folder, &TABLES)
        .ok_or_else(|| DatasetError::NoTable { folder: folder.into(), expected: TABLES.join(", ") })?;
    let file = CsvFile::open(&table)?;
    let columns = file.columns(COLUMNS)?;
    let extras: Vec<_> = EXTRAS.iter().filter_map(|(name, key)| Some((file.column(name)?, *key))).collect();
    let parts = (1..=12).map(|part| folder.join(format!("images_{part:03}/images")));
    let usual = [folder.join("images")].into_iter().chain(parts);
    let mut images = ImageFolders::new(folder, usual);
    if images.is_root(folder) {
        // Editions for training sort images into folders of their own, such as `train/0_normal`.
        images = ImageFolders::new(folder, subfolders(folder, 2)?);
    }
    let mut intake = Intake::new("nih", table.clone(), options);
    for row in file.rows() {
        intake.row(row.and_then(|row| pair(&row, columns, &extras, &table, &images, options).map(Some)))?;
    }
    intake.finish()
}

/// A folder and those within it, so many levels deep, in alphabetical order.
fn subfolders(folder: &Path, depth: usize) -> Result<Vec<PathBuf>, DatasetError> {
    let failed = |source| DatasetError::Read { path: folder.into(), source };
    let mut found = vec![folder.to_owned()];
    if depth == 0 {
        return Ok(found);
    }
    let mut inner = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            inner.push(path);
        }
    }
    inner.sort();
    for folder in inner {
        found.extend(subfolders(&folder, depth - 1)?);
    }
    Ok(found)
}

fn pair(
    row: &Row<'_>,
    columns: [usize; 4],
    extras: &[(usize, &str)],
    table: &Path,
    images: &ImageFolders,
    options: &ReadOptions,
) -> Result<Pair, DatasetError> {
    let cell = |i: usize| {
        let empty =
            || DatasetError::EmptyCell { path: table.into(), row: row.line, column: COLUMNS[i].into() };
        filled(row.cell(columns[i])).ok_or_else(empty)
    };
    let (name, patient) = (cell(0)?, cell(2)?);
    let mut labels = labels::parse(row.cell(columns[1]));
    let impression =
        from_nih_findings(labels.iter().map(String::as_str), options.wording, name).map_err(|reason| {
            let column = COLUMNS[1].into();
            DatasetError::Finding { path: table.into(), row: row.line, column, reason }
        })?;
    labels.remove(NO_FINDING);
    let extra: BTreeMap<String, String> = extras
        .iter()
        .filter_map(|(column, key)| Some(((*key).to_owned(), filled(row.cell(*column))?.to_owned())))
        .collect();
    Ok(Pair {
        name: name.into(),
        image: images.find(name),
        text: String::new(),
        impression,
        group: Some(patient.into()),
        labels,
        view: filled(row.cell(columns[3])).map(str::to_owned),
        row: row.line,
        extra,
    })
}
