//! Writing safetensors.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use super::safetensors::MAX_HEADER;
use super::{RawTensor, Result, TensorFileError, byte_length};

/// Writes tensors as a safetensors file, whole or not at all.
///
/// The same tensors and metadata make the same bytes, whatever their order: large elements first, as the format's own
/// library does for alignment, then by name.
///
/// # Errors
/// If a name is there twice or reserved, bytes do not fit a shape, or the file cannot be written.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &[(String, RawTensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let mut sorted: Vec<&(String, RawTensor)> = tensors.iter().collect();
    sorted.sort_by(|(name_a, a), (name_b, b)| {
        (b.dtype.size(), a.dtype.name(), name_a).cmp(&(a.dtype.size(), b.dtype.name(), name_b))
    });
    check(path, &sorted)?;
    let failed = |source| TensorFileError::Io { path: path.to_path_buf(), source };
    let mut json = serde_json::to_vec(&Header { tensors: &sorted, metadata })
        .map_err(|problem| failed(problem.into()))?;
    // with spaces to a multiple of 8, so that elements are aligned in memory that a file is mapped to
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > MAX_HEADER {
        let problem = format!("expected at most {MAX_HEADER} bytes, found {}", json.len());
        return Err(TensorFileError::Header { path: path.to_path_buf(), problem });
    }
    crate::atomic::write(path, |writer: &mut dyn Write| {
        writer.write_all(&(json.len() as u64).to_le_bytes())?;
        writer.write_all(&json)?;
        sorted.iter().try_for_each(|(_, tensor)| writer.write_all(&tensor.bytes))
    })
    .map_err(failed)
}

fn check(path: &Path, tensors: &[&(String, RawTensor)]) -> Result<()> {
    let mut names = std::collections::BTreeSet::new();
    for (name, tensor) in tensors {
        let wrong =
            |problem| TensorFileError::Write { path: path.to_path_buf(), tensor: name.clone(), problem };
        if name == "__metadata__" {
            return Err(wrong("the name is reserved by the format".into()));
        }
        if !names.insert(name) {
            return Err(wrong("the name is there twice".into()));
        }
        if byte_length(&tensor.shape, tensor.dtype) != Some(tensor.bytes.len()) {
            let RawTensor { dtype, shape, bytes } = tensor;
            return Err(wrong(format!("shape {shape:?} of {dtype} does not have {} bytes", bytes.len())));
        }
    }
    Ok(())
}

struct Header<'a> {
    tensors: &'a [&'a (String, RawTensor)],
    metadata: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Description<'a> {
    dtype: &'static str,
    shape: &'a [usize],
    data_offsets: [usize; 2],
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", self.metadata)?;
        }
        let mut start = 0;
        for (name, RawTensor { dtype, shape, bytes }) in self.tensors {
            let end = start + bytes.len();
            let description = Description { dtype: dtype.name(), shape, data_offsets: [start, end] };
            map.serialize_entry(name, &description)?;
            start = end;
        }
        map.end()
    }
}
