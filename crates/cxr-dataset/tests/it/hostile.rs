use std::path::Path;

use cxr_dataset::{Collection, DatasetError, ImageCheck, OnProblem, ReadOptions};
use tempfile::TempDir;

use super::{open, write, write_image};

const NIH_HEADER: &str = "Image Index,Finding Labels,Patient ID,View Position\n";
const REPORTS_HEADER: &str = "uid,MeSH,Problems,impression\n";

/// A folder in NIH's layout with images `a.png`, `b.png`, `c.png`.
fn nih(rows: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "labels.csv", &format!("{NIH_HEADER}{rows}"));
    for (i, name) in ["a.png", "b.png", "c.png"].iter().enumerate() {
        write_image(folder.path(), &format!("images/{name}"), i as u8);
    }
    folder
}

/// A folder in Indiana's layout with the same images.
fn indiana(reports: &str, projections: &str) -> TempDir {
    let folder = nih("");
    std::fs::remove_file(folder.path().join("labels.csv")).unwrap();
    write(folder.path(), "indiana_reports.csv", &format!("{REPORTS_HEADER}{reports}"));
    write(folder.path(), "indiana_projections.csv", &format!("uid,filename,projection\n{projections}"));
    folder
}

fn skipping(folder: &Path, images: ImageCheck) -> Result<Collection, DatasetError> {
    Collection::open(folder, &ReadOptions { on_problem: OnProblem::Skip, images, ..ReadOptions::default() })
}

/// Stops with an error that holds these words; skips one row of this kind and keeps the others.
fn expect(folder: &TempDir, words: &[&str], kind: &str, kept: &[&str]) {
    let error = open(folder.path()).unwrap_err();
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
    assert_eq!(error.kind(), kind, "{message}");
    let rest = skipping(folder.path(), ImageCheck::Exists).unwrap();
    assert_eq!(rest.pairs.iter().map(|pair| pair.name.as_str()).collect::<Vec<_>>(), kept);
    assert_eq!(rest.preparation_report(None, None).skipped[kind], 1);
    assert!(rest.skipped.iter().any(|row| row.message == message), "{:?}", rest.skipped);
}

#[test]
fn bad_rows_of_a_label_table() {
    let good = "a.png,Mass,1,PA\n";
    let with = |bad: &str| nih(&format!("{good}{bad}\nc.png,No Finding,2,AP\n"));
    let kept = ["a.png", "c.png"];
    expect(&with("b.png,Mass"), &["row 3 of", "labels.csv", "2 cells"], "broken row", &kept);
    expect(
        &with("b.png,Fracture,1,PA"),
        &["row 3 of", "Finding Labels", "Fracture"],
        "unusable finding",
        &kept,
    );
    expect(&with("b.png,Mass|No Finding,1,PA"), &["row 3 of", "beside other"], "unusable finding", &kept);
    expect(&with("b.png,,1,PA"), &["row 3 of", "no finding given"], "unusable finding", &kept);
    expect(&with("b.png,Mass,,PA"), &["row 3 of", "\"Patient ID\""], "empty cell", &kept);
    expect(&with("a.png,Mass,1,PA"), &["row 3 of", "\"a.png\"", "row 2"], "duplicate file name", &kept);
    expect(&with("z.png,Mass,1,PA"), &["row 3 of", "z.png is missing"], "missing image", &kept);
}

#[test]
fn bad_images() {
    let rows = "a.png,Mass,1,PA\nb.png,Mass,1,PA\nc.png,Mass,2,PA\n";
    let folder = nih(rows);
    write(folder.path(), "images/b.png", "");
    expect(&folder, &["row 3 of", "b.png", "0 bytes"], "empty image", &["a.png", "c.png"]);

    // A damaged file is found when it is looked into, and when it is loaded.
    let folder = nih(rows);
    let path = folder.path().join("images/b.png");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let trusting = open(folder.path()).unwrap();
    let size = cxr_dataset::ImageOptions::new(16);
    let error = cxr_dataset::Batch::load(&trusting, &[0, 1], &size).unwrap_err().to_string();
    assert!(error.contains("row 3 of") && error.contains("b.png"), "{error}");
    let careful = skipping(folder.path(), ImageCheck::Decode).unwrap();
    assert_eq!((careful.len(), careful.skipped[0].kind.as_str()), (2, "undecodable image"));
    assert!(cxr_dataset::Batch::load(&careful, &[0, 1], &size).is_ok());
}

#[test]
fn bad_rows_of_the_indiana_tables() {
    let reports = "1,normal,normal,Clear.\n2,normal,normal,Clear lungs.\n";
    let projections = "1,a.png,Frontal\n2,b.png,Frontal\n2,c.png,Lateral\n";
    assert_eq!(open(indiana(reports, projections).path()).unwrap().len(), 3);
    expect(
        &indiana(reports, &projections.replace("1,a", "9,a")),
        &["row 2 of", "no report \"9\"", "indiana_reports.csv"],
        "no report",
        &["b.png", "c.png"],
    );
    expect(
        &indiana(&format!("{reports}1,normal,normal,Other.\n"), projections),
        &["row 4 of", "indiana_reports.csv", "\"1\"", "row 2"],
        "duplicate report",
        &["a.png", "b.png", "c.png"],
    );
    expect(
        &indiana(reports, &projections.replace("2,c.png", "2,")),
        &["row 4 of", "\"filename\""],
        "empty cell",
        &["a.png", "b.png"],
    );
    // An open quote swallows the rest of the file: never a silent loss.
    let folder = indiana("1,normal,normal,\"Clear.\n2,normal,normal,Clear lungs.\n", projections);
    assert!(open(folder.path()).is_err());
}

#[test]
fn missing_tables_columns_and_rows() {
    let folder = tempfile::tempdir().unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(error, DatasetError::NoTable { .. }), "{error}");
    assert!(error.to_string().contains("metadata.jsonl"), "{error}");
    assert!(matches!(open(&folder.path().join("nowhere")), Err(DatasetError::Read { .. })));

    write(folder.path(), "labels.csv", "Image Index,Patient ID\na.png,1\n");
    for result in [open(folder.path()), skipping(folder.path(), ImageCheck::None)] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("lacks the column(s) Finding Labels, View Position"), "{error}");
    }
    for empty in ["", NIH_HEADER] {
        write(folder.path(), "labels.csv", empty);
        assert!(open(folder.path()).is_err(), "{empty:?}");
    }
    write(folder.path(), "labels.csv", &format!("{NIH_HEADER}gone.png,Mass,1,PA\n"));
    let error = skipping(folder.path(), ImageCheck::Exists).unwrap_err();
    assert!(matches!(error, DatasetError::NoPairs { rows: 1, skipped: 1, .. }), "{error}");

    let folder = indiana("1,normal,normal,Clear.\n", "1,a.png,Frontal\n");
    std::fs::remove_file(folder.path().join("indiana_projections.csv")).unwrap();
    assert!(matches!(open(folder.path()), Err(DatasetError::NoTable { .. })));
}
