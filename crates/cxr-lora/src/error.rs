//! What can go wrong, with the object it went wrong with.

use std::path::PathBuf;

use cxr_core::tensor_file::TensorFileError;

/// The result of this crate's functions.
pub type Result<T, E = LoraError> = std::result::Result<T, E>;

/// What can go wrong with an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A setting that no adapter can have.
    #[error("{setting} of a LoRA adapter is {found}, expected {expected}")]
    Setting {
        /// The setting's name.
        setting: String,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: String,
    },

    /// A pattern, or a set of targets, that no layer of the model matches.
    #[error("target `{pattern}` matches none of the model's {layers} adaptable layers{}", example(.first))]
    NoTarget {
        /// The pattern or the set.
        pattern: String,
        /// How many layers the model has.
        layers: usize,
        /// The first of them.
        first: Option<String>,
    },

    /// Two layers of a model that cannot be told apart.
    #[error("the model lists two layers as `{path}`: an adapter needs names that are unique")]
    AmbiguousLayer {
        /// The name they share.
        path: String,
    },

    /// A second adapter of the same name.
    #[error(
        "an adapter named `{name}` is already attached to `{path}`: detach it first or choose another name"
    )]
    AlreadyAttached {
        /// The adapter's name.
        name: String,
        /// The first layer that has it.
        path: String,
    },

    /// No adapter of that name.
    #[error("no adapter named `{name}` is attached; attached: [{}]", .attached.join(", "))]
    NotAttached {
        /// The name asked for.
        name: String,
        /// The names that are there.
        attached: Vec<String>,
    },

    /// A change of adapters while some are merged into the weights.
    #[error("`{path}` has adapters merged into its weight: unmerge them first")]
    Merged {
        /// The first merged layer.
        path: String,
    },

    /// Unmerging what was not merged, or was merged in another model.
    #[error("`{path}` has no merged adapters to take back, or is not the layer that they were merged into")]
    NotMerged {
        /// The layer.
        path: String,
    },

    /// Merging without an enabled adapter.
    #[error("no enabled adapter to merge")]
    NothingToMerge,

    /// NaN or infinity.
    #[error("`{what}` holds a value that is not finite")]
    NotFinite {
        /// The tensor or the layer.
        what: String,
    },

    /// A tensor file that cannot be read or written.
    #[error(transparent)]
    TensorFile(#[from] TensorFileError),

    /// Another file that cannot be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// JSON that is not what it should be.
    #[error("{what}: {source}")]
    Json {
        /// The file or the header entry.
        what: String,
        /// What the parser said.
        source: serde_json::Error,
    },

    /// A file of a kind that is known and not supported.
    #[error("{}: this is a file of {kind}, which is not supported: {advice}", .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
        /// What to do.
        advice: &'static str,
    },

    /// A file whose keys are of no known scheme.
    #[error("{}: none of the {total} keys is that of a LoRA adapter, the first are: {}", .path.display(), .keys.join(", "))]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// How many keys there are.
        total: usize,
        /// The first of them.
        keys: Vec<String>,
    },

    /// Some keys that do not belong to the scheme of the others.
    #[error(
        "{}: {recognized} keys are of {format}, but not these {}: {}",
        .path.display(), .keys.len(), .keys.join(", ")
    )]
    UnknownKeys {
        /// The file.
        path: PathBuf,
        /// The scheme of the others.
        format: crate::Format,
        /// How many keys are of that scheme.
        recognized: usize,
        /// The keys that are not.
        keys: Vec<String>,
    },

    /// A module of the file without one of its two factors.
    #[error("`{module}` has no {missing} factor in the file")]
    MissingFactor {
        /// The module.
        module: String,
        /// `A (down)` or `B (up)`.
        missing: &'static str,
    },

    /// A tensor of the file with a shape it cannot have.
    #[error("`{key}` has shape {found:?}, expected {expected}")]
    FactorShape {
        /// The key.
        key: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: Vec<usize>,
    },

    /// Modules of an adapter that the model does not have.
    #[error(
        "{matched} of {total} modules of the adapter match layers of the model, these do not: {}",
        .modules.join(", ")
    )]
    Unmatched {
        /// How many match.
        matched: usize,
        /// How many there are.
        total: usize,
        /// Those that do not match.
        modules: Vec<String>,
    },

    /// Factors that do not fit the layer they are meant for.
    #[error(
        "adapter for `{module}` is for a layer of weight {}, the model's is {}",
        shape(.found), shape(.expected)
    )]
    LayerShape {
        /// The module as the file names it.
        module: String,
        /// `[out, in, kh, kw]` of the model's layer, the kernel of a linear layer being 1 x 1.
        expected: [usize; 4],
        /// The same of the factors.
        found: [usize; 4],
    },

    /// A module that a format has no name for.
    #[error("`{module}` cannot be written as {format}: {reason}")]
    CannotWrite {
        /// The module, or the adapter as a whole.
        module: String,
        /// The format.
        format: crate::Format,
        /// Why not.
        reason: &'static str,
    },
}

/// A weight's shape, without the kernel where it is one pixel.
fn shape(full: &[usize; 4]) -> String {
    match full {
        [out, input, 1, 1] => format!("[{out}, {input}]"),
        _ => format!("{full:?}"),
    }
}

fn example(first: &Option<String>) -> String {
    first.as_ref().map(|path| format!(" (the first is `{path}`)")).unwrap_or_default()
}
