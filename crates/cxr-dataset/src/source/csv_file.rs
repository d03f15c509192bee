use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use csv::{Position, StringRecord};

use crate::DatasetError;

/// A CSV file with a header line; cells are found by the names of their columns.
pub(super) struct CsvFile {
    path: PathBuf,
    header: Vec<String>,
    reader: csv::Reader<Cursor<Arc<[u8]>>>,
    lines: Lines,
}

/// Which line a byte stands on. The parser's own count is one short in files whose lines end in CR LF, and blank
/// lines count for the row behind them.
struct Lines {
    bytes: Arc<[u8]>,
    at: usize,
    line: u64,
}

impl Lines {
    /// The line of the first byte from `offset` on that ends no line; offsets come in rising order.
    fn at(&mut self, offset: u64) -> u64 {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(self.bytes.len());
        let blank = self.bytes[offset..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        let passed = self.bytes.get(self.at..offset + blank).unwrap_or_default();
        self.line += passed.iter().filter(|&&byte| byte == b'\n').count() as u64;
        self.at = self.at.max(offset + blank);
        self.line
    }
}

/// One row, and the line it starts on.
pub(super) struct Row {
    pub(super) line: u64,
    record: StringRecord,
}

impl Row {
    /// The cell of a column that [`CsvFile::column`] found.
    pub(super) fn cell(&self, column: usize) -> &str {
        self.record.get(column).unwrap_or_default()
    }
}

impl CsvFile {
    pub(super) fn open(path: &Path) -> Result<Self, DatasetError> {
        let bytes: Arc<[u8]> =
            std::fs::read(path).map_err(|source| DatasetError::Read { path: path.into(), source })?.into();
        let mut reader = csv::Reader::from_reader(Cursor::new(bytes.clone()));
        let mut lines = Lines { bytes, at: 0, line: 1 };
        let header = reader.headers().map_err(|error| describe(path, &mut lines, 0, error))?;
        let header = header.iter().map(|name| name.trim().to_owned()).collect();
        Ok(Self { path: path.into(), header, reader, lines })
    }

    pub(super) fn header(&self) -> &[String] {
        &self.header
    }

    /// The position of a column, by its name.
    pub(super) fn column(&self, name: &str) -> Option<usize> {
        self.header.iter().position(|own| own == name)
    }

    /// The positions of columns that must be there; all that are missing are named at once.
    pub(super) fn columns<const N: usize>(&self, names: [&str; N]) -> Result<[usize; N], DatasetError> {
        let missing: Vec<&str> = names.iter().copied().filter(|name| self.column(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(DatasetError::MissingColumns {
                path: self.path.clone(),
                missing: missing.join(", "),
                found: self.header.join(", "),
            });
        }
        Ok(names.map(|name| self.column(name).unwrap_or_default()))
    }

    /// The next row; `None` at the end. After an error about one row the next call goes on behind it.
    pub(super) fn next(&mut self) -> Option<Result<Row, DatasetError>> {
        let mut record = StringRecord::new();
        let start = self.reader.position().byte();
        match self.reader.read_record(&mut record) {
            Ok(false) => None,
            Ok(true) => {
                let line = self.lines.at(record.position().map_or(start, Position::byte));
                Some(Ok(Row { line, record }))
            }
            Err(error) => Some(Err(describe(&self.path, &mut self.lines, start, error))),
        }
    }
}

/// Turns the parser's error into one that names the row; `start` is used where the parser does not say.
fn describe(path: &Path, lines: &mut Lines, start: u64, error: csv::Error) -> DatasetError {
    let row = lines.at(error.position().map_or(start, Position::byte));
    let broken = |reason: String| DatasetError::BrokenRow { path: path.into(), row, reason };
    match error.into_kind() {
        csv::ErrorKind::Io(source) => DatasetError::Read { path: path.into(), source },
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            broken(format!("it has {len} cells, the header {expected_len} (is a quote missing?)"))
        }
        csv::ErrorKind::Utf8 { err, .. } => broken(format!("it is not UTF-8: {err}")),
        other => broken(format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_numbered_by_line_and_reading_goes_on_behind_a_broken_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        // A byte-order mark, blanks in the header, a cell of two lines, a short row, a row that is not UTF-8.
        let text = b"\xef\xbb\xbf a , b\n1,\"two\nlines\"\n2\n\xff,3\n\n4,5\n".to_vec();
        // Lines that end in CR LF are numbered alike.
        let windows = String::from_utf8_lossy(&text).replace('\n', "\r\n").replace('\u{fffd}', "?");
        std::fs::write(&path, windows).unwrap();
        let mut file = CsvFile::open(&path).unwrap();
        let lines: Vec<u64> =
            std::iter::from_fn(|| file.next()).filter_map(|row| Some(row.ok()?.line)).collect();
        assert_eq!(lines, [2, 5, 7]);

        std::fs::write(&path, text).unwrap();
        let mut file = CsvFile::open(&path).unwrap();
        assert_eq!(file.header(), ["a", "b"]);
        let [a, b] = file.columns(["a", "b"]).unwrap();
        let row = file.next().unwrap().unwrap();
        assert_eq!((row.line, row.cell(a), row.cell(b)), (2, "1", "two\nlines"));
        let short = file.next().unwrap().err().unwrap().to_string();
        assert!(short.contains("row 4 of") && short.contains("it has 1 cells, the header 2"), "{short}");
        let bytes = file.next().unwrap().err().unwrap().to_string();
        assert!(bytes.contains("row 5 of") && bytes.contains("UTF-8"), "{bytes}");
        let last = file.next().unwrap().unwrap();
        assert_eq!((last.line, last.cell(b)), (7, "5"));
        assert!(file.next().is_none());

        let error = file.columns(["a", "c", "d"]).unwrap_err().to_string();
        assert!(error.contains("lacks the column(s) c, d; it has a, b"), "{error}");
    }
}
