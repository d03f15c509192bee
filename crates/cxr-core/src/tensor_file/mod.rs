//! Files of named tensors, read one tensor at a time and by position: safetensors, and PyTorch's own files without
//! running anything that is in them.

mod dtype;
mod error;
mod pickle;
mod raw;
mod safetensors;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use dtype::Dtype;
pub use error::TensorFileError;
pub use raw::RawTensor;
pub use write::write_safetensors;

type Result<T> = std::result::Result<T, TensorFileError>;

/// What a file says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape; empty for a single value.
    pub shape: Vec<usize>,
}

/// Where the elements of a tensor are in the file.
#[derive(Debug)]
struct Entry {
    info: TensorInfo,
    /// The position of the first element.
    start: u64,
    /// How many elements to go on by, per dimension; `None` where they follow each other or there are none.
    strides: Option<Vec<usize>>,
}

/// An open file of named tensors.
///
/// Opening reads and checks what the file says of its tensors: that each lies within the file and is as long as its
/// shape and dtype say. [`read`](Self::read) then reads one tensor, so that a file of several gigabytes takes no more
/// memory than its largest tensor. Reading works from several threads at a time.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens a file: safetensors, or what `torch.save` writes (`.bin`, `.pt`, `.pth`, `.ckpt`).
    ///
    /// Its beginning decides of which kind it is, not its name. Of a PyTorch file the dictionaries within
    /// dictionaries become names with dots, `state_dict` at the top (Lightning) is gone into, and whatever is no
    /// tensor is left out; no code in it is run.
    ///
    /// # Errors
    /// If the file cannot be read, is of no such kind, or does not hold what it says; the error names the file and
    /// the tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let failed = |source| TensorFileError::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut beginning = Vec::new();
        (&file).take(9).read_to_end(&mut beginning).map_err(failed)?;
        let named_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
        let (entries, metadata) = match beginning[..] {
            [_, _, _, _, _, _, _, _, b'{'] => safetensors::entries(&path, &file, length)?,
            [b'P', b'K', 3, 4, ..] => (pickle::entries(&path, &file, length)?, BTreeMap::new()),
            [0x80, ..] if !named_safetensors => {
                (pickle::legacy_entries(&path, &file, length)?, BTreeMap::new())
            }
            _ if named_safetensors => safetensors::entries(&path, &file, length)?,
            _ => return Err(TensorFileError::Unrecognized { path }),
        };
        Ok(Self { path, file, entries, metadata })
    }

    /// The names of the tensors, in alphabetical order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// What the file says of a tensor; `None` if there is none of that name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|entry| &entry.info)
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// If there is none of that name, or the file cannot be read.
    pub fn read(&self, name: &str) -> Result<RawTensor> {
        let Entry { info, start, strides } = self
            .entries
            .get(name)
            .ok_or_else(|| TensorFileError::Missing { path: self.path.clone(), tensor: name.to_string() })?;
        let TensorInfo { dtype, shape, .. } = info;
        let read = |elements: usize| {
            let mut bytes = vec![0; elements * dtype.size()];
            read_exact_at(&self.file, &mut bytes, *start).map_err(|source| TensorFileError::Read {
                path: self.path.clone(),
                tensor: name.to_string(),
                source,
            })?;
            Ok(bytes)
        };
        let elements = shape.iter().product();
        let bytes = match strides {
            Some(strides) => {
                // opening has checked that this does not overflow and lies within the file
                let last: usize = shape.iter().zip(strides).map(|(dim, stride)| (dim - 1) * stride).sum();
                raw::gather(&read(last + 1)?, dtype.size(), shape, strides)
            }
            None => read(elements)?,
        };
        Ok(RawTensor { dtype: *dtype, shape: shape.clone(), bytes })
    }

    /// The entries of a safetensors header's `__metadata__`; empty for other files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The number of elements of a shape and their bytes; `None` where that is more than a machine can count.
fn byte_length(shape: &[usize], dtype: Dtype) -> Option<usize> {
    // A dimension of 0 makes 0, whatever the others are: they are counted all the same.
    let elements = shape.iter().try_fold(1_usize, |product, dim| product.checked_mul(*dim))?;
    elements.checked_mul(dtype.size())
}

/// Reads by position, without a cursor that threads would have to share.
#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], start: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, start)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut start: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, start) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                bytes = &mut bytes[count..];
                start += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
