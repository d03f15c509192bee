//! Reading the header of a safetensors file: eight bytes of length, JSON, then the elements.
//!
//! Stricter than a JSON library alone: no name twice, no field unknown, no byte outside of a tensor. The format is
//! described at <https://github.com/huggingface/safetensors#format>.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{Dtype, Entry, Result, TensorFileError, TensorInfo, byte_length, read_exact_at};

/// The format's own limit of a header.
pub(super) const MAX_HEADER: u64 = 100_000_000;

type Contents = (BTreeMap<String, Entry>, BTreeMap<String, String>);

/// Reads and checks the header of a file of `length` bytes.
pub(super) fn entries(path: &Path, file: &File, length: u64) -> Result<Contents> {
    let header = |problem: String| TensorFileError::Header { path: path.to_path_buf(), problem };
    let failed = |source| TensorFileError::Io { path: path.to_path_buf(), source };
    if length < 8 {
        return Err(header(format!("expected at least 8 bytes, found a file of {length}")));
    }
    let mut size = [0; 8];
    read_exact_at(file, &mut size, 0).map_err(failed)?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER {
        return Err(header(format!("expected at most {MAX_HEADER} bytes, found a length of {size}")));
    }
    if size > length - 8 {
        return Err(header(format!("its length is {size}, but the file has {} bytes after it", length - 8)));
    }
    let mut json = vec![0; size as usize];
    read_exact_at(file, &mut json, 8).map_err(failed)?;
    let fields: Header = serde_json::from_slice(&json).map_err(|problem| header(problem.to_string()))?;
    let entries = place_all(path, fields.tensors, 8 + size, length)?;
    Ok((entries, fields.metadata))
}

/// Checks the places of all tensors: one after the other from `start` to `end` of the file.
fn place_all(
    path: &Path,
    tensors: BTreeMap<String, Description>,
    start: u64,
    end: u64,
) -> Result<BTreeMap<String, Entry>> {
    let mut tensors: Vec<(String, Description)> = tensors.into_iter().collect();
    tensors.sort_by_key(|(_, description)| description.data_offsets);
    let available = end - start;
    let mut expected = 0;
    let mut entries = BTreeMap::new();
    for (name, Description { dtype, shape, data_offsets: [from, to] }) in tensors {
        let wrong =
            |problem| TensorFileError::Invalid { path: path.to_path_buf(), tensor: name.clone(), problem };
        let Some(known) = Dtype::from_name(&dtype) else {
            return Err(TensorFileError::UnknownDtype {
                path: path.to_path_buf(),
                tensor: name,
                found: dtype,
            });
        };
        if to < from {
            return Err(wrong(format!("its end {to} is before its start {from}")));
        }
        if to > available {
            return Err(wrong(format!(
                "expected to end within the file's {available} bytes of data, found {to}"
            )));
        }
        if from != expected {
            let relation = if from < expected { "overlaps the tensor before it" } else { "leaves a gap" };
            return Err(wrong(format!("{relation}: expected to start at {expected}, found {from}")));
        }
        let bytes = byte_length(&shape, known);
        if bytes.is_none_or(|bytes| bytes as u64 != to - from) {
            let expected = bytes.map_or("too many".to_string(), |bytes| bytes.to_string());
            let (path, tensor, found) = (path.to_path_buf(), name, to - from);
            return Err(TensorFileError::Length { path, tensor, shape, dtype: known, expected, found });
        }
        expected = to;
        let info = TensorInfo { name: name.clone(), dtype: known, shape };
        entries.insert(name, Entry { info, start: start + from, strides: None });
    }
    if expected != available {
        let problem = format!("its tensors take {expected} bytes, but {available} follow it");
        return Err(TensorFileError::Header { path: path.to_path_buf(), problem });
    }
    Ok(entries)
}

#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Description>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let mut header = Header::default();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            let twice = if name == "__metadata__" {
                header.metadata = map.next_value::<Unique>()?.0;
                std::mem::replace(&mut has_metadata, true)
            } else {
                let description = map
                    .next_value()
                    .map_err(|problem| A::Error::custom(format!("tensor {name}: {problem}")))?;
                header.tensors.insert(name.clone(), description).is_some()
            };
            if twice {
                return Err(A::Error::custom(format!("{name} is there twice")));
            }
        }
        Ok(header)
    }
}

/// Texts by name, no name twice.
struct Unique(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TextsVisitor;
        impl<'de> Visitor<'de> for TextsVisitor {
            type Value = Unique;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Unique, A::Error> {
                let mut texts = BTreeMap::new();
                while let Some((name, text)) = map.next_entry::<String, String>()? {
                    if texts.insert(name.clone(), text).is_some() {
                        return Err(A::Error::custom(format!("__metadata__: {name} is there twice")));
                    }
                }
                Ok(Unique(texts))
            }
        }
        deserializer.deserialize_map(TextsVisitor)
    }
}
