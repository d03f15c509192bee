//! A model's files: found, read strictly, and written whole.
//!
//! [`ModelFiles`] are those of a [`ModelSource`]: a folder in diffusers' layout, a single-file checkpoint, or a
//! repository by name, from the cache or, with the feature `hub`, fetched.
//!
//! A tensor that is missing, unexpected or of another shape is an error that lists all of them; nothing is ever
//! left at its initial value in silence.

mod cache;
mod files;
mod folder;
#[cfg(feature = "hub")]
mod hub;
mod ldm;
mod load;
mod names;
mod options;
mod parts;
mod save;
mod sums;

pub use files::{DEFAULT_REPO, ModelFiles, ModelSource};
pub use folder::ModelFolder;
pub use load::TensorProblem;
pub(crate) use load::list_problems;
pub use names::{Component, canonical, published};
pub use options::LoadOptions;
pub use parts::{ModelConfig, ModelParts};
pub use save::{SaveDtype, save_folder};
