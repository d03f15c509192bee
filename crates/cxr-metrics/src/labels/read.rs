//! The table beside the pictures of a folder.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use cxr_core::metadata::{MetadataError, MetadataRow, read_jsonl};

use super::record::ImageRecord;
use crate::error::{MetricsError, Result};

/// The tables that are looked for in a folder, in this order: what `synthesize` writes, what image folders on
/// Hugging Face have, and what `prepare` writes.
pub const TABLES: [&str; 3] = ["metadata.jsonl", "metadata.csv", "pairs.csv"];

/// Column names that mean the same, this project's own first, NIH's among them.
const NAME: [&str; 2] = ["file_name", "Image Index"];
const PLACE: [&str; 1] = ["image_path"];
const TEXT: [&str; 3] = ["text", "prompt", "impression"];
const GROUP: [&str; 2] = ["group", "Patient ID"];
const VIEW: [&str; 2] = ["view", "View Position"];
const LABELS: [&str; 2] = ["labels", "Finding Labels"];
const SIDE: [&str; 1] = ["side"];

/// Reads a table (`.jsonl`, anything else is CSV), or the table in a folder; none for a folder without one.
///
/// A row needs `file_name`; `text`, `group`, `view`, `labels` (in CSV names separated by `;` or `|`), `side` and
/// `image_path` (where the picture is, if not in the table's folder under its name) may be there. An empty cell,
/// and an empty list of labels, is something that is not known. Rows keep their order.
///
/// # Errors
/// With the table and the line: a file that cannot be read, a row that is none, columns that are missing or there
/// twice, a picture without a name, named twice or not there.
pub fn read_records(path: &Path) -> Result<Option<Vec<ImageRecord>>> {
    let table = if path.is_dir() {
        let Some(found) = TABLES.iter().map(|name| path.join(name)).find(|table| table.is_file()) else {
            return Ok(None);
        };
        found
    } else {
        path.to_path_buf()
    };
    let jsonl = table.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl"));
    let rows = if jsonl { jsonl_rows(&table)? } else { csv_rows(&table)? };
    check(&table, &rows)?;
    Ok(Some(rows.into_iter().map(|(_, record)| record).collect()))
}

/// The records of pictures that were listed otherwise, in the order of `pictures`.
///
/// # Errors
/// A picture without a record.
pub fn records_of(pictures: &[PathBuf], records: &[ImageRecord]) -> Result<Vec<ImageRecord>> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let known: HashMap<PathBuf, &ImageRecord> = records.iter().map(|r| (real(&r.path), r)).collect();
    let found: Vec<Option<&&ImageRecord>> = pictures.iter().map(|path| known.get(&real(path))).collect();
    if let Some(first) = found.iter().position(Option::is_none) {
        return Err(MetricsError::WithoutRecord {
            picture: pictures[first].clone(),
            count: found.iter().filter(|f| f.is_none()).count(),
            total: pictures.len(),
        });
    }
    Ok(found.into_iter().flatten().map(|record| (*record).clone()).collect())
}

/// A record and its line in the table.
type Row = (u64, ImageRecord);

fn jsonl_rows(table: &Path) -> Result<Vec<Row>> {
    let rows = read_jsonl(table).map_err(|error| match error {
        MetadataError::File { path, source } => MetricsError::File { path, action: "read", source },
        MetadataError::Line { path, line, problem } => {
            MetricsError::TableRow { path, line: line as u64, problem }
        }
    })?;
    let folder = table.parent().unwrap_or(Path::new(""));
    let record = |row: MetadataRow| {
        let extra = |name: &str| row.extra.get(name).and_then(|value| value.as_str()).and_then(filled);
        ImageRecord {
            path: folder.join(extra("image_path").unwrap_or(&row.file_name)),
            side: extra("side").map(str::to_owned),
            prompt: filled(&row.text).map(str::to_owned),
            group: row.group.as_deref().and_then(filled).map(str::to_owned),
            view: row.view.as_deref().and_then(filled).map(str::to_owned),
            labels: (!row.labels.is_empty()).then(|| row.labels.iter().cloned().collect()),
            name: row.file_name,
        }
    };
    // Empty lines are left out by the reader: the number is that of the row, which is the line without them.
    Ok(rows.into_iter().enumerate().map(|(i, row)| (i as u64 + 1, record(row))).collect())
}

fn csv_rows(table: &Path) -> Result<Vec<Row>> {
    let broken = |error: csv::Error| {
        let line = error.position().map_or(1, csv::Position::line);
        match error.into_kind() {
            csv::ErrorKind::Io(source) => {
                MetricsError::File { path: table.to_path_buf(), action: "read", source }
            }
            kind => MetricsError::TableRow { path: table.to_path_buf(), line, problem: problem_of(kind) },
        }
    };
    let mut reader = csv::Reader::from_path(table).map_err(broken)?;
    let columns = Columns::find(table, reader.headers().map_err(broken)?)?;
    let folder = table.parent().unwrap_or(Path::new(""));
    let mut rows = Vec::new();
    for row in reader.records() {
        let row = row.map_err(broken)?;
        let cell = |column: Option<usize>| column.and_then(|i| row.get(i)).and_then(filled);
        let name = cell(Some(columns.name)).unwrap_or_default().to_owned();
        let labels = cell(columns.labels).map(|cell| {
            let names = cell.split([';', '|']).map(str::trim).filter(|label| !label.is_empty());
            names.map(str::to_owned).collect::<BTreeSet<String>>()
        });
        let record = ImageRecord {
            path: folder.join(cell(columns.place).unwrap_or(&name)),
            side: cell(columns.side).map(str::to_owned),
            prompt: cell(columns.text).map(str::to_owned),
            group: cell(columns.group).map(str::to_owned),
            view: cell(columns.view).map(str::to_owned),
            labels: labels.filter(|labels| !labels.is_empty()),
            name,
        };
        rows.push((row.position().map_or(0, csv::Position::line), record));
    }
    Ok(rows)
}

/// Where the columns are.
struct Columns {
    name: usize,
    place: Option<usize>,
    text: Option<usize>,
    group: Option<usize>,
    view: Option<usize>,
    labels: Option<usize>,
    side: Option<usize>,
}

impl Columns {
    fn find(table: &Path, header: &csv::StringRecord) -> Result<Self> {
        // Spreadsheets write a byte-order mark.
        let names: Vec<&str> = header.iter().map(|name| name.trim_start_matches('\u{feff}').trim()).collect();
        let failed =
            |problem: String| Err(MetricsError::TableRow { path: table.to_path_buf(), line: 1, problem });
        if let Some(twice) = (1..names.len()).find(|i| names[..*i].contains(&names[*i])) {
            return failed(format!("the column {:?} is there twice", names[twice]));
        }
        let column = |of: &[&str]| of.iter().find_map(|name| names.iter().position(|found| found == name));
        let Some(name) = column(&NAME) else {
            return failed(format!("expected a column {}, found {}", NAME.join(" or "), names.join(", ")));
        };
        Ok(Self {
            name,
            place: column(&PLACE),
            text: column(&TEXT),
            group: column(&GROUP),
            view: column(&VIEW),
            labels: column(&LABELS),
            side: column(&SIDE),
        })
    }
}

fn problem_of(kind: csv::ErrorKind) -> String {
    match kind {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!(
                "expected {expected_len} cells as in the header, found {len}: is a comma or a quote missing?"
            )
        }
        csv::ErrorKind::Utf8 { .. } => "the text is not UTF-8: save the table as UTF-8".into(),
        kind => format!("{kind:?}"),
    }
}

fn check(table: &Path, rows: &[Row]) -> Result<()> {
    let failed =
        |line: u64, problem: String| Err(MetricsError::TableRow { path: table.to_path_buf(), line, problem });
    if rows.is_empty() {
        return failed(1, "there is no row: expected one for each picture".into());
    }
    let mut seen: HashMap<&Path, u64> = HashMap::new();
    for (line, record) in rows {
        if record.name.trim().is_empty() {
            return failed(*line, "the picture has no name: fill `file_name`".into());
        }
        if let Some(first) = seen.insert(&record.path, *line) {
            return failed(*line, format!("the picture {:?} is in line {first} already", record.name));
        }
        if !record.path.is_file() {
            let path = record.path.display();
            return failed(
                *line,
                format!("the picture {path} is not there: `file_name` is relative to the table"),
            );
        }
    }
    Ok(())
}

fn filled(cell: &str) -> Option<&str> {
    Some(cell.trim()).filter(|cell| !cell.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(pictures: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        pictures.iter().for_each(|name| std::fs::write(folder.path().join(name), "").unwrap());
        folder
    }

    fn labels(names: &[&str]) -> Option<BTreeSet<String>> {
        Some(names.iter().map(|n| n.to_string()).collect())
    }

    #[test]
    fn what_the_programs_write_is_read() {
        let folder = folder(&["00000.png", "00001.png"]);
        assert_eq!(read_records(folder.path()).unwrap(), None);
        // `prepare`: names of the collection, places of the pictures.
        let elsewhere = folder.path().join("00001.png");
        let csv = format!(
            "file_name,image_path,text,group,view,labels,side,Age\na.png,{},\"Effusion, small.\",7,PA,Effusion;Mass,train,57\n00000.png,,,,,,test,\n",
            elsewhere.display()
        );
        std::fs::write(folder.path().join("pairs.csv"), csv).unwrap();
        let records = read_records(folder.path()).unwrap().unwrap();
        let expected = ImageRecord {
            name: "a.png".into(),
            path: elsewhere,
            prompt: Some("Effusion, small.".into()),
            group: Some("7".into()),
            view: Some("PA".into()),
            labels: labels(&["Effusion", "Mass"]),
            side: Some("train".into()),
        };
        assert_eq!(records[0], expected);
        assert_eq!((&records[1].prompt, &records[1].labels, &records[1].group), (&None, &None, &None));
        // `synthesize`: goes before.
        let row = MetadataRow {
            file_name: "00001.png".into(),
            text: "Cardiomegaly.".into(),
            labels: vec!["Cardiomegaly".into()],
            group: Some("study 3".into()),
            seed: Some(1),
            ..MetadataRow::default()
        };
        let plain = MetadataRow { file_name: "00000.png".into(), ..MetadataRow::default() };
        cxr_core::metadata::write_jsonl(folder.path().join("metadata.jsonl"), &[row, plain]).unwrap();
        let records = read_records(folder.path()).unwrap().unwrap();
        assert_eq!(records[0].labels, labels(&["Cardiomegaly"]));
        assert_eq!((records[0].group.as_deref(), &records[1].labels), (Some("study 3"), &None));
        assert_eq!(records[0].path, folder.path().join("00001.png"));
        // In another order, by where they are.
        let listed = [folder.path().join("00000.png"), folder.path().join("./00001.png")];
        let sorted = records_of(&listed, &records).unwrap();
        assert_eq!(sorted.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["00000.png", "00001.png"]);
        let error = records_of(&[folder.path().join("pairs.csv")], &records).unwrap_err();
        assert!(matches!(error, MetricsError::WithoutRecord { count: 1, total: 1, .. }), "{error}");
    }

    #[test]
    fn nihs_own_columns_are_read() {
        let folder = folder(&["1.png"]);
        let table = folder.path().join("labels.csv");
        std::fs::write(
            &table,
            "\u{feff}Image Index,Finding Labels,Patient ID,View Position\n1.png,Mass|Nodule,12,AP\n",
        )
        .unwrap();
        let records = read_records(&table).unwrap().unwrap();
        assert_eq!(records[0].labels, labels(&["Mass", "Nodule"]));
        assert_eq!((records[0].group.as_deref(), records[0].view.as_deref()), (Some("12"), Some("AP")));
    }

    #[test]
    fn errors_name_the_line_and_what_to_do() {
        let folder = folder(&["a.png", "b.png"]);
        let table = folder.path().join("metadata.csv");
        let error = |content: &[u8]| {
            std::fs::write(&table, content).unwrap();
            read_records(folder.path()).unwrap_err().to_string()
        };
        for (content, words) in [
            (&b"name,text\na.png,x\n"[..], &["line 1", "file_name", "name, text"][..]),
            (b"file_name,text,text\n", &["line 1", "twice"]),
            (b"file_name,text\n", &["no row"]),
            (b"file_name,text\na.png,x\n ,y\n", &["line 3", "no name"]),
            (b"file_name,text\na.png,x\nb.png\n", &["line 3", "2 cells", "found 1"]),
            (b"file_name,text\na.png,x\nb.png,y\na.png,z\n", &["line 4", "line 2 already"]),
            (b"file_name,text\na.png,x\nc.png,y\n", &["line 3", "c.png is not there"]),
            (b"file_name,text\na.png,\xff\n", &["line 2", "UTF-8"]),
        ] {
            let message = error(content);
            assert!(words.iter().all(|word| message.contains(word)), "{words:?} in {message}");
            assert!(message.contains("metadata.csv"), "{message}");
        }
        std::fs::write(folder.path().join("metadata.jsonl"), "{\"file_name\": \"a.png\", \"text\": 3}\n")
            .unwrap();
        let message = read_records(folder.path()).unwrap_err().to_string();
        assert!(message.contains("line 1") && message.contains("metadata.jsonl"), "{message}");
        assert!(matches!(read_records(&folder.path().join("none.csv")), Err(MetricsError::File { .. })));
    }
}
