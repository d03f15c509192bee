//! What the crates of cxr share, without burn: tensor files, named random streams, progress, files that are whole or
//! not there, hashes, and the row of a metadata file.
//!
//! ```
//! use std::collections::BTreeMap;
//! use cxr_core::random::Stream;
//! use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("noise.safetensors");
//! let noise = RawTensor::from_f32(vec![2, 3], Stream::new(7, "noise", 0).normals(6));
//! write_safetensors(&path, &[("noise".to_string(), noise.clone())], &BTreeMap::new())?;
//!
//! let file = TensorFile::open(&path)?;
//! assert_eq!(file.info("noise").unwrap().shape, [2, 3]);
//! assert_eq!(file.read("noise")?, noise);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod atomic;
pub mod hash;
pub mod metadata;
pub mod progress;
pub mod random;
pub mod tensor_file;
