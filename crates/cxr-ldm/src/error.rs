use std::path::PathBuf;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A network's configuration has a value that is wrong or not implemented.
    #[error("{file}: {key} is {found}, expected {expected}")]
    Config {
        /// The configuration file's usual name.
        file: String,
        /// The key.
        key: String,
        /// What is there.
        found: String,
        /// What is accepted.
        expected: String,
    },

    /// The noise schedule's configuration has a value that is wrong or not implemented.
    #[error("scheduler_config.json: {key} is {found}, expected {expected}")]
    SchedulerConfig {
        /// The key.
        key: String,
        /// What is there.
        found: String,
        /// What is accepted.
        expected: String,
    },

    /// Two parts of a model do not fit together.
    #[error("{left} is {left_value}, but {right} is {right_value}: the parts are not of one model")]
    Mismatch {
        /// A key of one part.
        left: String,
        /// Its value.
        left_value: usize,
        /// The key of another part that must be equal.
        right: String,
        /// Its value.
        right_value: usize,
    },

    /// A folder is no model that can be loaded, or must not be written to.
    #[error("{path}: {problem}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// A model is nowhere that was looked.
    #[error("{name}: {problem}")]
    Source {
        /// What was asked for: a path, or the name of a repository.
        name: String,
        /// Where was looked, and what to do.
        problem: String,
    },

    /// A single file is no checkpoint of Stable Diffusion 1.x.
    #[error("{path}: {problem}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        problem: String,
    },

    /// A file of a repository cannot be fetched.
    #[error("{repository}: {file}: {problem}")]
    Download {
        /// The repository.
        repository: String,
        /// The file, or what else was asked for.
        file: String,
        /// Why, and what to do.
        problem: String,
    },

    /// A file is not the one that was published under its name.
    #[error("{path}: expected {expected}, found {found}; delete the file and download it again")]
    Checksum {
        /// The file.
        path: PathBuf,
        /// The published size or SHA-256.
        expected: String,
        /// The file's.
        found: String,
    },

    /// A file was to be verified, and no sum of it is known.
    #[error(
        "{path}: no SHA-256 of {name:?} was published for Stable Diffusion 1.4 or 1.5; load without verifying"
    )]
    NoChecksum {
        /// The file.
        path: PathBuf,
        /// Its name in the repository.
        name: String,
    },

    /// Progress asked to stop before the model was loaded.
    #[error("stopped before the model was loaded")]
    Stopped,

    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },

    /// A weight file does not fit the model: every tensor that is missing, unexpected or of another shape.
    #[error("{file}: {} problems: {}", .problems.len(), crate::weights::list_problems(.problems))]
    Weights {
        /// The weight file.
        file: PathBuf,
        /// All that is wrong with it.
        problems: Vec<crate::weights::TensorProblem>,
    },

    /// A tensor file cannot be read or written; the message names it.
    #[error(transparent)]
    TensorFile(#[from] cxr_core::tensor_file::TensorFileError),

    /// A vocabulary cannot be read; the message names the file.
    #[error(transparent)]
    Tokenizer(#[from] cxr_tokenizer::TokenizerError),

    /// An adapter cannot be read, or does not fit the model.
    #[error(transparent)]
    Lora(#[from] cxr_lora::LoraError),

    /// A value is infinite or no number.
    #[error("{what} is not finite")]
    NotFinite {
        /// What it was.
        what: String,
    },

    /// A setting of a request is out of range.
    #[error("{setting} is {found}, expected {expected}")]
    Request {
        /// The setting.
        setting: String,
        /// What was asked for.
        found: String,
        /// What is accepted.
        expected: String,
    },

    /// A picture's size is no multiple of what the model works in.
    #[error("size {width}x{height}: both must be multiples of {unit}, and not 0")]
    Size {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// What they must be multiples of.
        unit: usize,
    },

    /// A prompt has more tokens than the text encoder takes.
    #[error("prompt of {found} tokens, the text encoder takes {limit}: {prompt:?}; shorten it")]
    PromptTooLong {
        /// The prompt.
        prompt: String,
        /// Its tokens, those at its start and end included.
        found: usize,
        /// The most that are taken.
        limit: usize,
    },

    /// No sampler of that name.
    #[error("no sampler {found:?}; expected one of: ddim, pndm, euler, euler-a, dpmpp-2m, lcm")]
    Sampler {
        /// The name.
        found: String,
    },

    /// A number of denoising steps that the schedule cannot have.
    #[error("steps: {found}, expected {fewest} to {limit}")]
    Steps {
        /// What was asked for.
        found: usize,
        /// The fewest that the sampler takes.
        fewest: usize,
        /// The most: the number of training timesteps, or what the sampler takes of them.
        limit: usize,
    },

    /// A first step past the last.
    #[error("start step: {found}, expected 0 to {}", .steps - 1)]
    StartStep {
        /// What was asked for.
        found: usize,
        /// How many steps there are.
        steps: usize,
    },
}

impl Error {
    pub(crate) fn scheduler_json(error: serde_json::Error) -> Self {
        Self::SchedulerConfig {
            key: "the file".into(),
            found: format!("unreadable ({error})"),
            expected: "diffusers' keys".into(),
        }
    }
}
