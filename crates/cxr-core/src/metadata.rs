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
    /// Everything else, by name.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
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

/// Reads a `metadata.jsonl`; empty lines are left out.
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
        if line.trim().is_empty() {
            continue;
        }
        let row = serde_json::from_str(&line).map_err(|problem| MetadataError::Line {
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
/// If it cannot be written.
pub fn write_jsonl(path: impl AsRef<Path>, rows: &[MetadataRow]) -> Result<(), MetadataError> {
    let path = path.as_ref();
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
    }
}
