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
    #[error("no sampler {found:?}; expected one of: ddim, dpmpp-2m")]
    Sampler {
        /// The name.
        found: String,
    },

    /// A number of denoising steps that the schedule cannot have.
    #[error("steps: {found}, expected 1 to {limit}")]
    Steps {
        /// What was asked for.
        found: usize,
        /// The number of training timesteps.
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
