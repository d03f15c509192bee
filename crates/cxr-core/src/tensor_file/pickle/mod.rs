//! PyTorch's files, without Python: a pickle that names tensors, and their storages.
//!
//! `torch.save` writes a ZIP archive of uncompressed files, so that each storage has a position in the whole; before
//! version 1.6 it wrote pickles and storages one after the other. Nothing of a pickle is run (see [`machine`]).
//! Checksums of the archive are not verified: that would read every storage whole.

mod machine;
mod tensors;
mod value;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::{Entry, Result, TensorFileError, byte_length, read_exact_at};
use machine::Problem;
use tensors::{Span, collect, dtype_of};
use value::{Loaded, Node, Storage, Value};

/// The pickle of a model with a hundred thousand tensors has about this size; elements are not in it.
const MAX_PICKLE: u64 = 16 << 20;

/// What a file of before PyTorch 1.6 begins with: the number 0x1950a86a20f9469cfc6c as a pickle.
const LEGACY_MAGIC: [u8; 15] =
    [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// The tensors of an archive as `torch.save` writes it.
pub(super) fn entries(path: &Path, file: &File, length: u64) -> Result<BTreeMap<String, Entry>> {
    let mut archive = Archive::open(path, file, length)?;
    let pickle =
        archive.record("data.pkl")?.ok_or_else(|| archive.error("it has no data.pkl".to_string()))?;
    if pickle.length > MAX_PICKLE {
        let problem = format!("expected a data.pkl of at most {MAX_PICKLE} bytes, found {}", pickle.length);
        return Err(archive.error(problem));
    }
    if archive.record("constants.pkl")?.is_some() {
        let found = "a TorchScript program".to_string();
        return Err(TensorFileError::NotTensors { path: path.to_path_buf(), found });
    }
    if let Some(order) = archive.record("byteorder")?
        && archive.bytes(Span { length: order.length.min(8), ..order })? != b"little"
    {
        return Err(archive.error("expected the byte order little, found another".to_string()));
    }
    let bytes = archive.bytes(pickle)?;
    let loaded = load(path, &bytes, 0)?;
    let mut known: HashMap<String, Option<Span>> = HashMap::new();
    collect(path, &loaded, &mut |key| match known.get(key) {
        Some(span) => Ok(*span),
        None => {
            let span = archive.record(&format!("data/{key}"))?;
            known.insert(key.to_string(), span);
            Ok(span)
        }
    })
}

struct Archive<'f> {
    path: &'f Path,
    file: &'f File,
    length: u64,
    zip: ZipArchive<BufReader<&'f File>>,
    /// The folder within the archive that everything is in, with a slash at its end.
    folder: String,
}

impl<'f> Archive<'f> {
    fn open(path: &'f Path, file: &'f File, length: u64) -> Result<Self> {
        let error = |problem| TensorFileError::Archive { path: path.to_path_buf(), problem };
        let zip = ZipArchive::new(BufReader::new(file))
            .map_err(|problem| error(format!("{problem}; is the download complete?")))?;
        if zip.has_duplicate_names() {
            return Err(error("two files of the archive have the same name".to_string()));
        }
        let folders: Vec<String> = zip
            .file_names()
            .flatten()
            .filter_map(|name| name.strip_suffix("data.pkl").map(str::to_string))
            .filter(|folder| folder.is_empty() || folder.ends_with('/'))
            .collect();
        match <[String; 1]>::try_from(folders) {
            Ok([folder]) => Ok(Self { path, file, length, zip, folder }),
            Err(folders) => Err(error(format!(
                "expected one data.pkl, as torch.save writes it, found {} of {} files",
                folders.len(),
                zip.len()
            ))),
        }
    }

    /// Where a file of the archive is.
    fn record(&mut self, name: &str) -> Result<Option<Span>> {
        let name = format!("{}{name}", self.folder);
        let Some(index) = self.zip.index_for_name(&name) else { return Ok(None) };
        let record = self.zip.by_index_raw(index).map(|entry| {
            let stored = entry.compression() == CompressionMethod::Stored && !entry.encrypted();
            (stored && entry.size() == entry.compressed_size(), entry.data_start(), entry.size())
        });
        let (stored, start, length) = record.map_err(|problem| self.error(format!("{name}: {problem}")))?;
        if !stored {
            let problem = format!("{name} is compressed; expected it stored, as torch.save does");
            return Err(self.error(problem));
        }
        match start.and_then(|start| start.checked_add(length).map(|end| (start, end))) {
            Some((start, end)) if end <= self.length => Ok(Some(Span { start, length })),
            _ => Err(self.error(format!("{name}: its {length} bytes end past the file's {}", self.length))),
        }
    }

    fn bytes(&self, span: Span) -> Result<Vec<u8>> {
        read(self.path, self.file, span)
    }

    fn error(&self, problem: String) -> TensorFileError {
        TensorFileError::Archive { path: self.path.to_path_buf(), problem }
    }
}

/// The tensors of a file of before PyTorch 1.6: five pickles (magic number, version, system, tensors, keys of
/// storages), then the storages.
pub(super) fn legacy_entries(path: &Path, file: &File, length: u64) -> Result<BTreeMap<String, Entry>> {
    let error =
        |problem: &str| TensorFileError::Archive { path: path.to_path_buf(), problem: problem.to_string() };
    let bytes = read(path, file, Span { start: 0, length: length.min(MAX_PICKLE) })?;
    if !bytes.starts_with(&LEGACY_MAGIC) {
        return Err(error("expected what torch.save writes, found another pickle"));
    }
    let version = load(path, &bytes, LEGACY_MAGIC.len())?;
    if version.root != Value::Int(1001) {
        return Err(error("expected version 1001 of PyTorch's old format, found another"));
    }
    let system = load(path, &bytes, version.end)?;
    if system.get(system.root, "little_endian") != Some(Value::Bool(true)) {
        return Err(error("expected little-endian numbers"));
    }
    let loaded = load(path, &bytes, system.end)?;
    let keys = load(path, &bytes, loaded.end)?;
    let spans = legacy_spans(path, file, length, &loaded, &keys)?;
    collect(path, &loaded, &mut |key| Ok(spans.get(key).copied()))
}

/// Where storages are: in the order of `keys`, each after eight bytes with the number of its elements.
fn legacy_spans<'a>(
    path: &Path,
    file: &File,
    length: u64,
    loaded: &Loaded<'a>,
    keys: &Loaded<'a>,
) -> Result<HashMap<&'a str, Span>> {
    let error = |problem| TensorFileError::Archive { path: path.to_path_buf(), problem };
    let storages: HashMap<&str, &Storage<'_>> = loaded
        .nodes
        .iter()
        .filter_map(|node| match node {
            Node::Storage(storage) => Some((storage.key, storage)),
            _ => None,
        })
        .collect();
    let Some(Node::List(order)) = keys.node(keys.root) else {
        return Err(error("expected the list of storages".to_string()));
    };
    let mut position = keys.end as u64;
    let mut spans = HashMap::new();
    for key in order {
        let key = keys.text(*key).ok_or_else(|| error("expected the key of a storage".to_string()))?;
        let Some(dtype) = storages.get(key).and_then(|storage| dtype_of(storage.class)) else {
            return Err(error(format!("storage {key:?} is of no tensor, or its type is not supported")));
        };
        let mut elements = [0; 8];
        read_exact_at(file, &mut elements, position).map_err(|source| io_error(path, source))?;
        let elements = u64::from_le_bytes(elements);
        let start = position + 8;
        let bytes = usize::try_from(elements).ok().and_then(|elements| byte_length(&[elements], dtype));
        position = match bytes.and_then(|bytes| start.checked_add(bytes as u64)) {
            Some(end) if end <= length => end,
            _ => {
                return Err(error(format!(
                    "storage {key:?} of {elements} elements ends past the file's {length}"
                )));
            }
        };
        if spans.insert(key, Span { start, length: position - start }).is_some() {
            return Err(error(format!("storage {key:?} is there twice")));
        }
    }
    Ok(spans)
}

fn load<'a>(path: &Path, bytes: &'a [u8], start: usize) -> Result<Loaded<'a>> {
    machine::load(bytes, start).map_err(|Problem { position, problem }| TensorFileError::Pickle {
        path: path.to_path_buf(),
        position,
        problem,
    })
}

fn read(path: &Path, file: &File, span: Span) -> Result<Vec<u8>> {
    let mut bytes = vec![0; span.length as usize];
    read_exact_at(file, &mut bytes, span.start).map_err(|source| io_error(path, source))?;
    Ok(bytes)
}

fn io_error(path: &Path, source: io::Error) -> TensorFileError {
    TensorFileError::Io { path: path.to_path_buf(), source }
}
