//! The Indiana University collection as its Kaggle edition unpacks: `indiana_reports.csv` and
//! `indiana_projections.csv`, joined on `uid`, with images in `images/images_normalized/` or `images/`.
//!
//! One pair per image; the impression is the report's, as written. The group is the `uid`: it numbers a study, and
//! the tables carry no patient beyond it. Labels are `Problems`; `MeSH` goes to [`Pair::extra`] as it is.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use polars::prelude::{
    BooleanChunked, DataFrame, DataFrameJoinOps, JoinArgs, JoinType, MaintainOrderJoin, NewChunkedArray,
    StringChunked,
};

use super::csv_file::{CsvFile, table_error};
use super::{ImageFolders, Intake, ReadOptions, filled};
use crate::{Collection, DatasetError, Pair, labels};

/// The table of reports.
pub const REPORTS: &str = super::KAGGLE_REPORTS;
/// The table of images.
pub const PROJECTIONS: &str = "indiana_projections.csv";

/// The columns of each table; the first one joins them.
const REPORT_COLUMNS: [&str; 4] = ["uid", "impression", "Problems", "MeSH"];
const PROJECTION_COLUMNS: [&str; 3] = ["uid", "filename", "projection"];
/// What the line of a report is called once it stands beside an image.
const REPORT_LINE: &str = "line_right";

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

    let file = CsvFile::open(&projections_path)?;
    let columns = file.columns(PROJECTION_COLUMNS)?;
    let images = ImageFolders::new(
        folder,
        ["images/images_normalized", "images", "images_normalized"].map(|sub| folder.join(sub)),
    );
    // Every image once, in the order of its table, with its report beside it or nothing.
    let joining = JoinArgs { maintain_order: MaintainOrderJoin::Left, ..JoinArgs::new(JoinType::Left) };
    let joined = file
        .frame(&PROJECTION_COLUMNS)?
        .join(&reports, ["uid"], ["uid"], joining, None)
        .map_err(|error| table_error(&projections_path, &error))?;
    let text = |name: &str| {
        let column = joined.column(name).and_then(|column| column.str().cloned());
        column.map_err(|error| table_error(&reports_path, &error))
    };
    let (impressions, problems, mesh) = (text("impression")?, text("Problems")?, text("MeSH")?);
    let report_lines = joined
        .column(REPORT_LINE)
        .and_then(|column| column.u64().cloned())
        .map_err(|error| table_error(&reports_path, &error))?;

    for row in file.rows() {
        let pair = row.and_then(|row| {
            let cell = |i: usize| {
                filled(row.cell(columns[i])).ok_or_else(|| DatasetError::EmptyCell {
                    path: projections_path.clone(),
                    row: row.line,
                    column: PROJECTION_COLUMNS[i].into(),
                })
            };
            let (uid, name) = (cell(0)?, cell(1)?);
            if report_lines.get(row.index).is_none() {
                return Err(DatasetError::NoReport {
                    path: projections_path.clone(),
                    row: row.line,
                    uid: uid.into(),
                    reports: reports_path.clone(),
                });
            }
            let of_report = |column: &StringChunked| column.get(row.index).unwrap_or_default().to_owned();
            Ok(Some(Pair {
                name: name.into(),
                image: images.find(name),
                text: String::new(),
                impression: of_report(&impressions),
                group: Some(uid.into()),
                labels: labels::parse(&of_report(&problems)),
                view: filled(row.cell(columns[2])).map(str::to_owned),
                row: row.line,
                extra: BTreeMap::from([("MeSH".to_owned(), of_report(&mesh).trim().to_owned())]),
            }))
        });
        intake.row(pair)?;
    }
    intake.finish()
}

/// The reports that can be joined to images: each `uid` once.
fn read_reports(path: &Path, intake: &mut Intake<'_>) -> Result<DataFrame, DatasetError> {
    let file = CsvFile::open(path)?;
    let [uid_column, ..] = file.columns(REPORT_COLUMNS)?;
    let frame = file.frame(&REPORT_COLUMNS)?;
    let mut usable = vec![false; frame.height()];
    let mut seen: HashMap<&str, u64> = HashMap::new();
    for row in file.rows() {
        let checked = row.and_then(|row| {
            let empty = || DatasetError::EmptyCell { path: path.into(), row: row.line, column: "uid".into() };
            let uid = filled(row.cell(uid_column)).ok_or_else(empty)?;
            if let Some(&first_row) = seen.get(uid) {
                let (path, row, uid) = (path.into(), row.line, uid.into());
                return Err(DatasetError::DuplicateReport { path, row, first_row, uid });
            }
            seen.insert(uid, row.line);
            usable[row.index] = true;
            Ok(())
        });
        if let Err(error) = checked {
            intake.problem(error)?;
        }
    }
    frame
        .filter(&BooleanChunked::from_slice("usable".into(), &usable))
        .map_err(|error| table_error(path, &error))
}
