//! The Indiana University collection as its Kaggle edition unpacks: `indiana_reports.csv` and
//! `indiana_projections.csv`, joined on `uid`, with images in `images/images_normalized/` or `images/`.
//!
//! One pair per image; the impression is the report's, as written. The group is the `uid`: it numbers a study, and
//! the tables carry no patient beyond it. Labels are `Problems`; `MeSH` goes to [`Pair::extra`] as it is.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::csv_file::CsvFile;
use super::{ImageFolders, Intake, ReadOptions, filled};
use crate::{Collection, DatasetError, LabelSet, Pair, labels};

/// The table of reports.
pub const REPORTS: &str = "indiana_reports.csv";
/// The table of images.
pub const PROJECTIONS: &str = "indiana_projections.csv";

struct Report {
    row: u64,
    impression: String,
    labels: LabelSet,
    mesh: String,
}

/// Reads a folder.
///
/// # Errors
/// When a table or a column is missing, or (under [`crate::OnProblem::Stop`]) a row cannot be used: broken, an image
/// or a report listed twice, an image whose report is not there, an image that is not there.
pub fn read(folder: &Path, options: &ReadOptions) -> Result<Collection, DatasetError> {
    let (reports_path, projections_path) = (folder.join(REPORTS), folder.join(PROJECTIONS));
    for path in [&reports_path, &projections_path] {
        if !path.is_file() {
            let expected = format!("{REPORTS} and {PROJECTIONS} together");
            return Err(DatasetError::NoTable { folder: folder.into(), expected });
        }
    }
    let mut intake = Intake::new("kaggle", projections_path.clone(), options);
    let reports = read_reports(&reports_path, &mut intake)?;

    let mut file = CsvFile::open(&projections_path)?;
    let names = ["uid", "filename", "projection"];
    let columns = file.columns(names)?;
    let images = ImageFolders::new(
        folder,
        ["images/images_normalized", "images", "images_normalized"].map(|sub| folder.join(sub)),
    );
    while let Some(row) = file.next() {
        let pair = row.and_then(|row| {
            let cell = |i: usize| {
                filled(row.cell(columns[i])).ok_or_else(|| DatasetError::EmptyCell {
                    path: projections_path.clone(),
                    row: row.line,
                    column: names[i].into(),
                })
            };
            let (uid, name) = (cell(0)?, cell(1)?);
            let report = reports.get(uid).ok_or_else(|| DatasetError::NoReport {
                path: projections_path.clone(),
                row: row.line,
                uid: uid.into(),
                reports: reports_path.clone(),
            })?;
            Ok(Some(Pair {
                name: name.into(),
                image: images.find(name),
                text: String::new(),
                impression: report.impression.clone(),
                group: Some(uid.into()),
                labels: report.labels.clone(),
                view: filled(row.cell(columns[2])).map(str::to_owned),
                row: row.line,
                extra: BTreeMap::from([("MeSH".to_owned(), report.mesh.clone())]),
            }))
        });
        intake.row(pair)?;
    }
    intake.finish()
}

fn read_reports(path: &Path, intake: &mut Intake<'_>) -> Result<HashMap<String, Report>, DatasetError> {
    let mut file = CsvFile::open(path)?;
    let [uid_column, impression, problems, mesh] = file.columns(["uid", "impression", "Problems", "MeSH"])?;
    let mut reports: HashMap<String, Report> = HashMap::new();
    while let Some(row) = file.next() {
        let row = match row {
            Ok(row) => row,
            Err(error) => {
                intake.problem(error)?;
                continue;
            }
        };
        let Some(uid) = filled(row.cell(uid_column)) else {
            intake.problem(DatasetError::EmptyCell {
                path: path.into(),
                row: row.line,
                column: "uid".into(),
            })?;
            continue;
        };
        if let Some(first) = reports.get(uid) {
            intake.problem(DatasetError::DuplicateReport {
                path: path.into(),
                row: row.line,
                first_row: first.row,
                uid: uid.into(),
            })?;
            continue;
        }
        let report = Report {
            row: row.line,
            impression: row.cell(impression).to_owned(),
            labels: labels::parse(row.cell(problems)),
            mesh: row.cell(mesh).trim().to_owned(),
        };
        reports.insert(uid.to_owned(), report);
    }
    Ok(reports)
}
