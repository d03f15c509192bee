//! What can be wrong with a tensor file.

use std::io;
use std::path::PathBuf;

use super::Dtype;

/// What can be wrong with a tensor file; each says which file and, where it is about one, which tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorFileError {
    /// The system cannot read or write it.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It begins like no format that is read here.
    #[error(
        "{}: expected a safetensors file or what torch.save writes, found neither; is the download complete?",
        .path.display()
    )]
    Unrecognized {
        /// The file.
        path: PathBuf,
    },
    /// The header of a safetensors file is broken.
    #[error("{}: safetensors header: {problem}", .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        problem: String,
    },
    /// Elements of a type that is not read here.
    #[error("{}: tensor {tensor}: dtype {found} is not supported", .path.display())]
    UnknownDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type as the file names it.
        found: String,
    },
    /// The place of a tensor in the file is not as long as its shape and dtype say.
    #[error("{}: tensor {tensor}: expected {expected} bytes by its shape {shape:?} and dtype {dtype}, found {found}", .path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape that the file says.
        shape: Vec<usize>,
        /// The dtype that the file says.
        dtype: Dtype,
        /// Bytes by shape and dtype.
        expected: String,
        /// Bytes that the file has for it.
        found: u64,
    },
    /// What the file says of a tensor cannot be, or is not read here.
    #[error("{}: tensor {tensor}: {problem}", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What was expected and found.
        problem: String,
    },
    /// A tensor was asked for that the file does not have.
    #[error("{}: there is no tensor {tensor}", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor cannot be read; the file may have changed since it was opened.
    #[error("{}: tensor {tensor}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the system said.
        source: io::Error,
    },
    /// The archive of a PyTorch file is broken, or is not what `torch.save` writes.
    #[error("{}: {problem}", .path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        problem: String,
    },
    /// The pickle of a PyTorch file is broken or has something that is not read here.
    #[error("{}: pickle, byte {position}: {problem}", .path.display())]
    Pickle {
        /// The file.
        path: PathBuf,
        /// The position within the pickle.
        position: usize,
        /// What was expected and found.
        problem: String,
    },
    /// A PyTorch file holds something other than a dictionary of tensors.
    #[error(
        "{}: expected a dictionary of tensors, found {found}; in Python, save `model.state_dict()`",
        .path.display()
    )]
    NotTensors {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
    /// A tensor to be written has bytes that do not fit its shape and dtype, or a name that cannot be written.
    #[error("{}: cannot write tensor {tensor}: {problem}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Elements cannot become what was asked for.
    #[error("a tensor of shape {shape:?} and dtype {dtype} cannot become {wanted}")]
    Conversion {
        /// The shape of the tensor.
        shape: Vec<usize>,
        /// The type of its elements.
        dtype: Dtype,
        /// What was asked for.
        wanted: &'static str,
    },
}
