use std::path::{Path, PathBuf};

use polars::prelude::{
    Column, CsvParseOptions, CsvReadOptions, DataFrame, NamedFrom, PolarsError, SerReader, Series,
    StringChunked,
};

use super::csv_rows::Rows;
use crate::DatasetError;

/// A CSV file with a header line, read whole; every cell is text, and cells are found by the names of their columns.
pub(super) struct CsvFile {
    path: PathBuf,
    header: Vec<String>,
    columns: Vec<StringChunked>,
    /// The line on which each row starts.
    lines: Vec<u64>,
    broken: Vec<(u64, String)>,
}

/// One row, and the line it starts on.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    file: &'a CsvFile,
    /// Its place among the rows that are whole, which is its place in [`CsvFile::frame`].
    pub(super) index: usize,
    pub(super) line: u64,
}

impl<'a> Row<'a> {
    /// The cell of a column that [`CsvFile::column`] found.
    pub(super) fn cell(&self, column: usize) -> &'a str {
        self.file.columns[column].get(self.index).unwrap_or_default()
    }
}

impl CsvFile {
    pub(super) fn open(path: &Path) -> Result<Self, DatasetError> {
        let bytes = std::fs::read(path).map_err(|source| DatasetError::Read { path: path.into(), source })?;
        let Rows { whole, mut lines, broken, width } = Rows::find(&bytes);
        let first = lines.first().copied();
        if let Some((row, reason)) =
            broken.first().filter(|(line, _)| first.is_none_or(|first| *line < first))
        {
            // Without a header no row can be judged.
            let reason = format!("this is the header, and {reason}");
            return Err(DatasetError::BrokenRow { path: path.into(), row: *row, reason });
        }
        if first.is_none() {
            return Ok(Self { path: path.into(), header: Vec::new(), columns: Vec::new(), lines, broken });
        }
        let unreadable = |error: PolarsError| table_error(path, &error);
        // The header is read as a row among the others, so that two columns of one name do not stop the rest.
        let parsing = CsvParseOptions::default().with_missing_is_null(false);
        let reader = CsvReadOptions::default().with_has_header(false).with_infer_schema_length(Some(0));
        let mut frame = reader
            .with_parse_options(parsing)
            .into_reader_with_file_handle(std::io::Cursor::new(whole))
            .finish()
            .map_err(unreadable)?;
        frame.rechunk_mut();
        let text = |column: &Column| column.str().cloned();
        let columns: Vec<StringChunked> =
            frame.columns().iter().map(text).collect::<Result<_, _>>().map_err(unreadable)?;
        if (frame.height(), columns.len()) != (lines.len(), width) {
            let reason = format!(
                "{} rows of {width} cells became {} of {}",
                lines.len(),
                frame.height(),
                columns.len()
            );
            return Err(DatasetError::Table { path: path.into(), reason });
        }
        let header =
            columns.iter().map(|column| column.get(0).unwrap_or_default().trim().to_owned()).collect();
        let columns = columns
            .iter()
            .map(|column| polars::prelude::ChunkedArray::slice(column, 1, usize::MAX))
            .collect();
        lines.remove(0);
        Ok(Self { path: path.into(), header, columns, lines, broken })
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

    /// All rows in the order of the file, the broken ones as errors.
    pub(super) fn rows(&self) -> impl Iterator<Item = Result<Row<'_>, DatasetError>> {
        let whole = self.lines.iter().enumerate().map(|(index, &line)| (line, Ok(index)));
        let broken = self.broken.iter().map(|(line, reason)| (*line, Err(reason)));
        let mut all: Vec<_> = whole.chain(broken).collect();
        all.sort_by_key(|(line, _)| *line);
        all.into_iter().map(|(line, row)| match row {
            Ok(index) => Ok(Row { file: self, index, line }),
            Err(reason) => {
                Err(DatasetError::BrokenRow { path: self.path.clone(), row: line, reason: reason.clone() })
            }
        })
    }

    /// Some columns as a table for polars, and the line of each row as `line`. Cells of the first column lose the
    /// blanks around them: it is what tables are joined on.
    pub(super) fn frame(&self, names: &[&str]) -> Result<DataFrame, DatasetError> {
        let mut columns = vec![Column::from(Series::new("line".into(), &self.lines))];
        for (place, name) in names.iter().enumerate() {
            let position = self.column(name).unwrap_or_default();
            let cells = self.columns[position].iter().map(Option::unwrap_or_default);
            let cells: Vec<&str> = if place == 0 { cells.map(str::trim).collect() } else { cells.collect() };
            columns.push(Column::from(Series::new((*name).into(), cells)));
        }
        DataFrame::new(self.lines.len(), columns).map_err(|error| table_error(&self.path, &error))
    }
}

/// An error of polars that concerns a whole table.
pub(super) fn table_error(path: &Path, error: &PolarsError) -> DatasetError {
    DatasetError::Table { path: path.into(), reason: error.to_string() }
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
        let file = CsvFile::open(&path).unwrap();
        let lines: Vec<u64> = file.rows().filter_map(|row| Some(row.ok()?.line)).collect();
        assert_eq!(lines, [2, 5, 7]);

        std::fs::write(&path, text).unwrap();
        let file = CsvFile::open(&path).unwrap();
        assert_eq!(file.header(), ["a", "b"]);
        let [a, b] = file.columns(["a", "b"]).unwrap();
        let mut rows = file.rows();
        let row = rows.next().unwrap().unwrap();
        assert_eq!((row.line, row.cell(a), row.cell(b)), (2, "1", "two\nlines"));
        let short = rows.next().unwrap().err().unwrap().to_string();
        assert!(short.contains("row 4 of") && short.contains("it has 1 cells, the header 2"), "{short}");
        let bytes = rows.next().unwrap().err().unwrap().to_string();
        assert!(bytes.contains("row 5 of") && bytes.contains("UTF-8"), "{bytes}");
        let last = rows.next().unwrap().unwrap();
        assert_eq!((last.line, last.cell(b)), (7, "5"));
        assert!(rows.next().is_none());

        let error = file.columns(["a", "c", "d"]).unwrap_err().to_string();
        assert!(error.contains("lacks the column(s) c, d; it has a, b"), "{error}");
    }

    #[test]
    fn cells_come_back_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        let cells = [
            "007",
            "1e3",
            "true",
            "",
            "null",
            " x ",
            "a 14\" plate",
            "2020-01-01",
            "line\nbreak",
            "\"q\", r",
            "#",
            "é",
        ];
        // Once quoted, once plain where that is possible; enough rows that polars reads them in pieces.
        let mut text = "number,cell\n".to_string();
        for round in 0..4000 {
            for cell in cells {
                let plain = round % 2 == 0 && !cell.contains(['\n', ',']);
                let cell = if plain { cell.to_owned() } else { format!("\"{}\"", cell.replace('"', "\"\"")) };
                text += &format!("{round},{cell}\n");
            }
        }
        std::fs::write(&path, text).unwrap();
        let file = CsvFile::open(&path).unwrap();
        let found: Vec<_> = file.rows().map(|row| row.unwrap().cell(1).to_owned()).collect();
        assert_eq!(found.len(), 4000 * cells.len());
        for (i, cell) in found.iter().enumerate() {
            assert_eq!(cell, cells[i % cells.len()], "row {i}");
        }
    }

    #[test]
    fn two_columns_of_one_name_and_a_header_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        std::fs::write(&path, "a,b,a\n1,2,3\n").unwrap();
        let file = CsvFile::open(&path).unwrap();
        let row = file.rows().next().unwrap().unwrap();
        assert_eq!((file.column("a"), row.cell(0), row.cell(2)), (Some(0), "1", "3"));
        std::fs::write(&path, "a,b").unwrap();
        assert_eq!(CsvFile::open(&path).unwrap().rows().count(), 0);
        std::fs::write(&path, "a,\"b\n1,2\n").unwrap();
        let error = CsvFile::open(&path).err().unwrap().to_string();
        assert!(error.contains("row 1 of") && error.contains("this is the header"), "{error}");
    }
}
