//! How a model is loaded.

use std::fmt;
use std::sync::Arc;

use burn::tensor::FloatDType;
use cxr_core::progress::{Progress, Silent};

use super::parts::ModelConfig;

/// How a model is loaded.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LoadOptions {
    /// The dtype in which weights are kept, and with it that of the activations. Default: f32.
    pub dtype: FloatDType,
    /// The variant in the names of the weight files, e.g. `fp16`. Default: the files without one, or, where a
    /// component has none, its `fp16` files. Single files have no variants.
    pub variant: Option<String>,
    /// Which version of a repository, for a model by name: a branch, a tag or a commit. Default: `main`.
    pub revision: String,
    /// The configurations, in place of a folder's own, or, for a single file, of Stable Diffusion 1.5's.
    pub config: Option<ModelConfig>,
    /// Whether every weight file must have the SHA-256 that was published for Stable Diffusion 1.4 or 1.5. Default:
    /// false.
    pub verify: bool,
    /// Who is told of the progress.
    progress: Arc<dyn Teller>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: FloatDType::F32,
            variant: None,
            revision: "main".into(),
            config: None,
            verify: false,
            progress: Arc::new(Tells(Silent)),
        }
    }
}

impl LoadOptions {
    /// Sets the dtype of the weights.
    pub fn with_dtype(self, dtype: FloatDType) -> Self {
        Self { dtype, ..self }
    }

    /// Takes the weight files of a variant and no others.
    pub fn with_variant(self, variant: impl Into<String>) -> Self {
        Self { variant: Some(variant.into()), ..self }
    }

    /// Takes another version of a repository than its branch `main`.
    pub fn with_revision(self, revision: impl Into<String>) -> Self {
        Self { revision: revision.into(), ..self }
    }

    /// Loads with these configurations, whatever stands beside the weights.
    pub fn with_config(self, config: ModelConfig) -> Self {
        Self { config: Some(config), ..self }
    }

    /// Checks every weight file against the published sums, or does not.
    pub fn with_verify(self, verify: bool) -> Self {
        Self { verify, ..self }
    }

    /// Tells of downloading, checking and loading, a stage after the other, in bytes; a `Break` ends with
    /// [`Error::Stopped`](crate::Error::Stopped), a download after the file that is under way.
    pub fn with_progress(self, progress: impl Progress + 'static) -> Self {
        Self { progress: Arc::new(Tells(progress)), ..self }
    }

    /// Who is told of the progress.
    pub fn progress(&self) -> &dyn Progress {
        self.progress.progress()
    }
}

/// [`Progress`] with a name for `Debug`, which the trait does not ask for.
trait Teller: fmt::Debug + Send + Sync {
    fn progress(&self) -> &dyn Progress;
}

struct Tells<P>(P);

impl<P> fmt::Debug for Tells<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::any::type_name::<P>())
    }
}

impl<P: Progress> Teller for Tells<P> {
    fn progress(&self) -> &dyn Progress {
        &self.0
    }
}
