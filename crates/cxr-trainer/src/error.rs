use std::path::PathBuf;

/// What can go wrong while training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A setting that cannot be meant.
    #[error("{setting} is {value}, expected {expected}")]
    Setting {
        /// Its name in the configuration.
        setting: &'static str,
        /// What was given.
        value: String,
        /// What is possible.
        expected: &'static str,
    },
    /// No preset of that name.
    #[error("there is no preset `{name}`; there are {known}")]
    Preset {
        /// What was asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// Settings that cannot be read.
    #[error("{place}: {problem}")]
    Config {
        /// The file or the assignment.
        place: String,
        /// What is wrong.
        problem: String,
    },
    /// An adapter's settings.
    #[error(transparent)]
    Lora(#[from] cxr_lora::LoraError),
    /// A picture that cannot be used.
    #[error(transparent)]
    Data(#[from] cxr_dataset::DatasetError),
    /// A part of the model cannot be read.
    #[error(transparent)]
    Model(#[from] cxr_ldm::Error),
    /// The processes of a run that do not go together.
    #[error("{problem}: all of them have to be started with the same command, on the same data")]
    Ranks {
        /// What is wrong.
        problem: String,
    },
    /// Something that a caller does along the way went wrong.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
    /// A picture of which the autoencoder made something that is no number.
    #[error("{}: its latents are not finite: is the autoencoder in a dtype that it does not fit?", .image.display())]
    Latents {
        /// The picture.
        image: PathBuf,
    },
    /// Asked to stop before there was anything to keep.
    #[error("stopped while {stage}; the same command starts again")]
    Stopped {
        /// What it was doing.
        stage: &'static str,
    },
    /// Nothing to train on.
    #[error("there are no samples to train on")]
    NoSamples,
    /// Nothing to train.
    #[error("no parameter of the model is trainable: attach an adapter, or mark parameters as trainable")]
    NothingTrainable,
    /// The folder holds another run.
    #[error("{} holds a run with other settings or data ({found}, this run is {expected}): choose another folder, or remove it", .folder.display())]
    OtherRun {
        /// The folder.
        folder: PathBuf,
        /// Fingerprint of the run in it.
        found: String,
        /// Fingerprint of this run.
        expected: String,
    },
    /// A checkpoint that lacks something, or has something else.
    #[error("checkpoint {}: {problem}", .path.display())]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The loss was not finite too often.
    #[error(
        "the loss was not finite {count} times, last at step {step}: lower the learning rate; the last checkpoint is kept"
    )]
    NotFinite {
        /// How often.
        count: usize,
        /// The last time.
        step: u64,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of a run's file that cannot be understood.
    #[error("{}, line {number}: {problem}; remove the line, or the file", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor file could not be read or written.
    #[error(transparent)]
    TensorFile(#[from] cxr_core::tensor_file::TensorFileError),
    /// The loss curve could not be drawn.
    #[error("{}: cannot draw the loss curve: {problem}", .path.display())]
    Plot {
        /// The picture.
        path: PathBuf,
        /// What the plotting library said.
        problem: String,
    },
}

impl TrainError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
