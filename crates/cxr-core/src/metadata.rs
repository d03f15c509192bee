//! The row that data sets, pictures and metrics share: `metadata.jsonl`, as Hugging Face's image folders have it.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What is known of one picture.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MetadataRow {
    /// The picture, relative to the folder of the metadata file.
    pub file_name: String,
    /// Its prompt or impression.
    pub text: String,
    /// Findings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Projection, e.g. `PA`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<String>,
    /// The unit that a split keeps whole: patient or study.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The seed that it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Everything else, by name; none of [`MetadataRow::FIELDS`].
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl MetadataRow {
    /// The names of the fields, which no entry of [`Self::extra`] may have: it would stand in the line twice.
    pub const FIELDS: [&str; 6] = ["file_name", "text", "labels", "view", "group", "seed"];
}

/// What can be wrong with a metadata file.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// It cannot be read or written.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is no row.
    #[error("{}, line {line}: {problem}", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// Reads a `metadata.jsonl`; empty lines, and a byte-order mark at its beginning, are left out.
///
/// # Errors
/// If the file cannot be read or a line is no row.
pub fn read_jsonl(path: impl AsRef<Path>) -> Result<Vec<MetadataRow>, MetadataError> {
    let path = path.as_ref();
    let failed = |source| MetadataError::File { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut rows = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(failed)?;
        let line = if index == 0 { line.strip_prefix('\u{feff}').unwrap_or(&line) } else { &line };
        if line.trim().is_empty() {
            continue;
        }
        let row = serde_json::from_str(line).map_err(|problem| MetadataError::Line {
            path: path.to_path_buf(),
            line: index + 1,
            problem: problem.to_string(),
        })?;
        rows.push(row);
    }
    Ok(rows)
}

/// Writes a `metadata.jsonl`, whole or not at all.
///
/// # Errors
/// If it cannot be written, or a row could not be read back: an extra has the name of a field.
pub fn write_jsonl(path: impl AsRef<Path>, rows: &[MetadataRow]) -> Result<(), MetadataError> {
    let path = path.as_ref();
    for (index, row) in rows.iter().enumerate() {
        if let Some(name) = MetadataRow::FIELDS.into_iter().find(|name| row.extra.contains_key(*name)) {
            let problem = format!("{name} is there twice: as a field and as an extra");
            return Err(MetadataError::Line { path: path.to_path_buf(), line: index + 1, problem });
        }
    }
    crate::atomic::write(path, |writer: &mut dyn Write| {
        for row in rows {
            serde_json::to_writer(&mut *writer, row)?;
            writer.write_all(b"\n")?;
        }
        Ok(())
    })
    .map_err(|source| MetadataError::File { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_back_with_their_extras() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.jsonl");
        let mut row =
            MetadataRow { file_name: "a.png".into(), text: "No \"finding\".".into(), ..Default::default() };
        row.seed = Some(u64::MAX);
        row.extra.insert("steps".into(), 30.into());
        write_jsonl(&path, &[row.clone(), MetadataRow::default()]).unwrap();
        assert_eq!(read_jsonl(&path).unwrap(), [row, MetadataRow::default()]);
        std::fs::write(&path, "{\"file_name\": \"a\", \"text\": \"b\"}\n\n{\"text\": 3}\n").unwrap();
        assert!(read_jsonl(&path).unwrap_err().to_string().contains("line 3"));
        std::fs::write(&path, "\u{feff}{\"file_name\": \"a\", \"text\": \"b\"}\n").unwrap();
        assert_eq!(read_jsonl(&path).unwrap()[0].file_name, "a");
    }

    #[test]
    fn what_cannot_be_read_back_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.jsonl");
        for name in MetadataRow::FIELDS {
            let mut row = MetadataRow::default();
            row.extra.insert(name.into(), 1.into());
            let error = write_jsonl(&path, &[MetadataRow::default(), row]).unwrap_err().to_string();
            assert!(error.contains("line 2") && error.contains(name), "{error}");
            assert!(!path.exists());
        }
        // the list is that of the struct
        let whole = MetadataRow {
            labels: vec!["a".into()],
            view: Some("PA".into()),
            group: Some("1".into()),
            seed: Some(1),
            ..MetadataRow::default()
        };
        let json = serde_json::to_value(&whole).unwrap();
        let mut fields: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = MetadataRow::FIELDS;
        fields.sort_unstable();
        expected.sort_unstable();
        assert_eq!(fields, expected);
    }

    #[test]
    fn hostile_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.jsonl");
        let deep = format!("{{\"file_name\": \"a\", \"text\": \"b\", \"x\": {}", "[".repeat(100_000));
        for content in [
            &b"{\"file_name\": \"a\", \"te"[..],
            b"{\"file_name\": \"a\", \"text\": \"\xff\"}\n",
            b"{\"file_name\": \"a\", \"text\": \"b\", \"text\": \"c\"}\n",
            b"{\"file_name\": \"a\", \"text\": \"b\", \"seed\": -1}\n",
            b"[]\n",
            deep.as_bytes(),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = read_jsonl(&path).unwrap_err().to_string();
            assert!(error.contains("metadata.jsonl"), "{error}");
        }
        assert!(read_jsonl(folder.path().join("none")).is_err());
    }
}
