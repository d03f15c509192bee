//! Anybody's data: a CSV file with a header, or a JSONL file with one object per line, with named columns.
//!
//! The defaults are the ones of [`cxr_core::metadata::MetadataRow`], which this project's programs write beside
//! their pictures, and which image folders on Hugging Face use: `file_name`, `text`, `labels`, `view`, `group`.
//! Image names are relative to the table's folder, unless a column [`IMAGE_PATH`] says where an image lies: a table of
//! pairs from several places, written beside none of them, keeps the names that a split file lists.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

#[cfg(feature = "csv")]
use super::csv_file::CsvFile;
use super::{Intake, ReadOptions, filled, first_file};
use crate::{Collection, DatasetError, LabelSet, Pair, labels};

/// The tables that are looked for in a folder, in this order.
pub const TABLES: [&str; 2] = ["metadata.jsonl", "metadata.csv"];

/// The column that says where an image lies, relative to the table's folder; a row where it is empty has its image
/// under its name.
pub const IMAGE_PATH: &str = "image_path";

/// The names of a table's columns.
///
/// | Field | Default | When the column is not in the table |
/// |---|---|---|
/// | `image` | `file_name` | an error |
/// | `text` | `text` | an error |
/// | `group` | `group` | no groups, unless it was named here: then an error |
/// | `view` | `view` | no views, unless it was named here: then an error |
/// | `labels` | `labels` | no labels, unless it was named here: then an error |
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Columns {
    /// The image's file name.
    pub image: Option<String>,
    /// The impression.
    pub text: Option<String>,
    /// Patient or study.
    pub group: Option<String>,
    /// Projection.
    pub view: Option<String>,
    /// Label columns: cells of names separated by `;` or `|`, JSON arrays of names, or numbers and truth values,
    /// which set the column's own name where they are above zero or true.
    pub labels: Vec<String>,
}

/// The columns by name, resolved against the defaults.
struct Names {
    image: String,
    text: String,
    group: String,
    view: String,
    labels: Vec<String>,
    /// Image, text, and what was named by hand.
    required: Vec<String>,
}

impl Names {
    fn new(columns: &Columns) -> Self {
        let or = |name: &Option<String>, default: &str| name.clone().unwrap_or_else(|| default.into());
        let (image, text) = (or(&columns.image, "file_name"), or(&columns.text, "text"));
        let mut required = vec![image.clone(), text.clone()];
        required.extend(columns.group.iter().chain(&columns.view).chain(&columns.labels).cloned());
        Self {
            image,
            text,
            group: or(&columns.group, "group"),
            view: or(&columns.view, "view"),
            labels: if columns.labels.is_empty() { vec!["labels".into()] } else { columns.labels.clone() },
            required,
        }
    }

    fn check(path: &Path, required: &[String], found: &BTreeSet<String>) -> Result<(), DatasetError> {
        let missing: Vec<&str> =
            required.iter().filter(|name| !found.contains(*name)).map(String::as_str).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let found = found.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        Err(DatasetError::MissingColumns { path: path.into(), missing: missing.join(", "), found })
    }
}

/// Reads a table (`.jsonl`, anything else is CSV), or the table in a folder.
///
/// # Errors
/// When no table is there, columns are missing, or (under [`crate::OnProblem::Stop`]) a row cannot be used. In JSONL
/// the first row must have `image` and `text`, or they are missing columns; a later row that lacks them is broken.
pub fn read(path: &Path, options: &ReadOptions) -> Result<Collection, DatasetError> {
    let table = if path.is_dir() {
        first_file(path, &TABLES)
            .ok_or_else(|| DatasetError::NoTable { folder: path.into(), expected: TABLES.join(", ") })?
    } else {
        path.to_owned()
    };
    let names = Names::new(&options.columns);
    let intake = Intake::new("table", table.clone(), options);
    if table.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl")) {
        read_jsonl(&table, &names, intake)
    } else {
        read_csv(&table, &names, intake)
    }
}

#[cfg(not(feature = "csv"))]
fn read_csv(table: &Path, _: &Names, _: Intake<'_>) -> Result<Collection, DatasetError> {
    Err(DatasetError::NoCsv { path: table.into() })
}

#[cfg(feature = "csv")]
fn read_csv(table: &Path, names: &Names, mut intake: Intake<'_>) -> Result<Collection, DatasetError> {
    let file = CsvFile::open(table)?;
    Names::check(table, &names.required, &file.header().iter().cloned().collect())?;
    let header = file.header();
    for row in file.rows() {
        let pair = row.and_then(|row| {
            let cells =
                header.iter().enumerate().map(|(i, name)| (name.clone(), row.cell(i).into())).collect();
            pair(table, row.line, cells, names).map(Some)
        });
        intake.row(pair)?;
    }
    intake.finish()
}

fn read_jsonl(table: &Path, names: &Names, mut intake: Intake<'_>) -> Result<Collection, DatasetError> {
    let failed = |source| DatasetError::Read { path: table.into(), source };
    let mut reader = BufReader::new(std::fs::File::open(table).map_err(failed)?);
    let mut seen = BTreeSet::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(failed)? == 0 {
            break;
        }
        let text = if number == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line) } else { &line };
        if text.trim_ascii().is_empty() {
            continue;
        }
        let object = serde_json::from_slice::<Map<String, Value>>(text).map_err(|error| {
            DatasetError::BrokenRow { path: table.into(), row: number, reason: error.to_string() }
        });
        if let Ok(object) = &object {
            let first = seen.is_empty();
            seen.extend(object.keys().cloned());
            if first {
                Names::check(table, &names.required[..2], &seen)?;
            }
        }
        intake.row(object.and_then(|object| pair(table, number, object, names).map(Some)))?;
    }
    // Columns that may be left out of a row need only stand in one.
    if !seen.is_empty() {
        Names::check(table, &names.required, &seen)?;
    }
    intake.finish()
}

fn pair(table: &Path, row: u64, mut cells: Map<String, Value>, names: &Names) -> Result<Pair, DatasetError> {
    let broken = |reason: String| DatasetError::BrokenRow { path: table.into(), row, reason };
    let mut take = |name: &str| -> Result<Option<String>, DatasetError> {
        match cells.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            // Patients are often numbered.
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(other) => Err(broken(format!("{name:?} is {other}, expected text"))),
        }
    };
    let name = take(&names.image)?.unwrap_or_default();
    let empty = || DatasetError::EmptyCell { path: table.into(), row, column: names.image.clone() };
    let name = filled(&name).ok_or_else(empty)?.to_owned();
    let text = take(&names.text)?.ok_or_else(|| broken(format!("it has no {:?}", names.text)))?;
    let group = take(&names.group)?.as_deref().and_then(filled).map(str::to_owned);
    let view = take(&names.view)?.as_deref().and_then(filled).map(str::to_owned);
    let place = match &names.image {
        image if image == IMAGE_PATH => None,
        _ => take(IMAGE_PATH)?,
    };
    let mut labels = LabelSet::new();
    for column in &names.labels {
        if let Some(value) = cells.remove(column) {
            add_labels(column, &value, &mut labels).ok_or_else(|| {
                broken(format!("{column:?} is {value}, expected names, or a number, or true or false"))
            })?;
        }
    }
    let plain = |value: Value| if let Value::String(text) = value { text } else { value.to_string() };
    let extra: BTreeMap<String, String> = cells.into_iter().map(|(key, value)| (key, plain(value))).collect();
    let folder: PathBuf = table.parent().unwrap_or(Path::new("")).into();
    Ok(Pair {
        image: folder.join(place.as_deref().and_then(filled).unwrap_or(&name)),
        name,
        text: String::new(),
        impression: text,
        group,
        labels,
        view,
        row,
        extra,
    })
}

/// Adds what a cell says; `None` when it is neither names nor a truth value.
fn add_labels(column: &str, value: &Value, labels: &mut LabelSet) -> Option<()> {
    let mut number = |number: f64| {
        if number > 0.0 {
            labels.insert(column.to_owned());
        }
    };
    match value {
        Value::Null => {}
        Value::Bool(set) => number(f64::from(u8::from(*set))),
        Value::Number(value) => number(value.as_f64()?),
        Value::String(text) => match text.trim().parse() {
            // `nan` and `inf` would parse too, but are words.
            Ok(value) if !text.contains(char::is_alphabetic) => number(value),
            _ => labels.extend(labels::parse(text)),
        },
        Value::Array(values) => {
            for value in values {
                labels.extend(
                    Some(value.as_str()?.trim()).filter(|label| !label.is_empty()).map(str::to_owned),
                );
            }
        }
        Value::Object(_) => return None,
    }
    Some(())
}
