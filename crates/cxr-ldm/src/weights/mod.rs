//! A model's files: the diffusers folder, read strictly and written whole.
//!
//! A tensor that is missing, unexpected or of another shape is an error that lists all of them; nothing is ever
//! left at its initial value in silence.

mod folder;
mod load;
mod names;
mod save;

pub use folder::{LoadOptions, ModelConfig, ModelFolder, ModelParts};
pub use load::TensorProblem;
pub(crate) use load::list_problems;
pub use names::{Component, canonical, published};
pub use save::{SaveDtype, save_folder};
