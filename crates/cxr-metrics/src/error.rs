//! Everything that can go wrong while measuring.

use std::path::PathBuf;

/// Why a figure could not be given. Every message names the object, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// A set is too small for the statistic.
    #[error(
        "{what} holds {found} samples, at least {needed} are needed: add images or leave this figure out"
    )]
    TooFewSamples {
        /// The set or statistic.
        what: String,
        /// How many samples it needs.
        needed: usize,
        /// How many there are.
        found: usize,
    },
    /// A feature, score or figure is NaN or infinite.
    #[error(
        "{what}: value {column} of row {row} is {value}: a non-finite value measures nothing, look for a broken image or an extractor that overflows"
    )]
    NonFinite {
        /// The set.
        what: String,
        /// Row, that is image.
        row: usize,
        /// Column, that is feature.
        column: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// Two things that must agree in length or dimension do not.
    #[error("{what}: expected {expected}, found {found}")]
    SizeMismatch {
        /// What was compared.
        what: String,
        /// The size that was asked for.
        expected: usize,
        /// The size that was found.
        found: usize,
    },
    /// A parameter is outside its range.
    #[error("`{name}` is {value}, expected {expected}")]
    InvalidParameter {
        /// Name of the parameter, as in the configuration.
        name: &'static str,
        /// The value that was given.
        value: String,
        /// The range that is allowed.
        expected: String,
    },
    /// An eigenvalue or singular value decomposition did not converge.
    #[error("the decomposition of {what} did not converge: look for extreme values among the features")]
    Decomposition {
        /// The matrix.
        what: &'static str,
    },
    /// An image of a set has another size than the first.
    #[error(
        "image {name} is {found}, the images before it are {expected}: a figure belongs to one resolution, resize the set first"
    )]
    MixedSizes {
        /// Position of the image in its set.
        index: usize,
        /// Its file, or its position again.
        name: String,
        /// Size of the first image.
        expected: String,
        /// Size of this image.
        found: String,
    },
    /// An image could not be read by its source.
    #[error("image `{name}` cannot be read")]
    UnreadableImage {
        /// File name or position.
        name: String,
        /// What the decoder said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The caller asked to stop.
    #[error("{stage} was stopped after {done} of {total}")]
    Cancelled {
        /// What was going on.
        stage: String,
        /// Units that were finished.
        done: u64,
        /// Units that there are.
        total: u64,
    },
    /// A file could not be read or written.
    #[error("`{}`: cannot {action}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// `read` or `write`.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration file is not what it should be.
    #[error("`{}` is not a configuration of an extractor", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A file could not be fetched.
    #[error("{address} cannot be fetched: {problem}")]
    Download {
        /// Where it was to come from.
        address: String,
        /// What went wrong, and what to do.
        problem: String,
    },
    /// A file of statistics is not what it should be, or not of the network in use.
    #[error("statistics `{}` cannot be used: {problem}", path.display())]
    Statistics {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A tensor file could not be read or written.
    #[error("`{}` is not a usable tensor file", path.display())]
    TensorFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; boxed, since it alone would make every result of this crate large.
        source: Box<cxr_core::tensor_file::TensorFileError>,
    },
    /// The tensors of a file are not exactly those of the network.
    #[error(
        "`{}` does not fit the network: missing {missing:?}, unused {unused:?}: use the config.json that was saved with it",
        path.display()
    )]
    TensorNames {
        /// The file.
        path: PathBuf,
        /// Parameters without a tensor.
        missing: Vec<String>,
        /// Tensors without a parameter.
        unused: Vec<String>,
    },
    /// A weight file of another network, or not a whole one.
    #[error(
        "`{}` does not hold the weights of {network}: missing {}, unexpected {}: {advice}",
        path.display(), shortened(missing), shortened(unexpected)
    )]
    WeightNames {
        /// The file.
        path: PathBuf,
        /// The network.
        network: &'static str,
        /// Names that have to be there.
        missing: Vec<String>,
        /// Names that the network does not have.
        unexpected: Vec<String>,
        /// What to do.
        advice: String,
    },
    /// There are no weights for a network that needs a file of them.
    #[error(
        "no weights of {network}: download {address} (SHA-256 {sha256}), and give its path or set {variable} to it; a build with the feature `hub` fetches it when asked to"
    )]
    NoWeights {
        /// The network.
        network: &'static str,
        /// The environment variable that may name the file.
        variable: &'static str,
        /// Where it is to be had.
        address: &'static str,
        /// Its sum.
        sha256: &'static str,
    },
    /// A tensor has another shape than its parameter.
    #[error("`{}`: tensor `{tensor}` has shape {found:?}, expected {expected:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The key.
        tensor: String,
        /// Shape of the parameter.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A row of a table of pictures cannot be used.
    #[error("`{}`, line {line}: {problem}", path.display())]
    TableRow {
        /// The table.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it, and what was expected.
        problem: String,
    },
    /// Pictures of a folder stand in no row of its table.
    #[error(
        "{count} of {total} pictures have no row in the table of their folder, the first is `{}`: add rows, or take the pictures out",
        picture.display()
    )]
    WithoutRecord {
        /// The first.
        picture: PathBuf,
        /// How many.
        count: usize,
        /// How many pictures there are.
        total: usize,
    },
    /// A head cannot learn from pictures that all have the finding, or all lack it.
    #[error(
        "{positives} of {pictures} training pictures have the finding: a head needs pictures with and without it, add some or leave the finding out"
    )]
    OneClass {
        /// Pictures.
        pictures: usize,
        /// Of these, with the finding.
        positives: usize,
    },
    /// A head did not come to its minimum.
    #[error(
        "a head on {pictures} pictures did not converge (gradient {gradient:.1e}): lower `c`, raise `max_steps`, or look for extreme values among the features"
    )]
    NotConverged {
        /// Pictures.
        pictures: usize,
        /// Length of the gradient that was left.
        gradient: f64,
    },
    /// Nothing says which findings the pictures show.
    #[error(
        "no {what} picture has a label, or a text that speaks of one, for any of {findings}: put a `metadata.jsonl` or `metadata.csv` with `labels` or `text` beside the pictures"
    )]
    NoLabels {
        /// Which pictures.
        what: String,
        /// The findings that were looked for.
        findings: String,
    },
    /// A file holds a pickled Python object instead of tensors.
    #[error(
        "`{}` holds {found} instead of tensors, as the files that torchxrayvision downloads do: in Python, `torch.save(xrv.models.DenseNet(weights=\"densenet121-res224-all\").state_dict(), \"weights.pt\")` makes one that can be read",
        path.display()
    )]
    PickledModel {
        /// The file.
        path: PathBuf,
        /// What is in it.
        found: String,
    },
    /// Held-out pictures are of patients (or studies) that the training set has.
    #[error(
        "{pictures} held-out pictures are of groups that the training set has, the first of {group:?}: what is measured on them says nothing of other patients, so take pictures of others (`prepare --split by-group` makes such a split)"
    )]
    SharedGroups {
        /// How many.
        pictures: usize,
        /// The group of the first.
        group: String,
    },
    /// A tensor of the backend could not be read as f32.
    #[error("{what} cannot be read back as f32: {reason}")]
    Readback {
        /// The tensor.
        what: String,
        /// What the backend said.
        reason: String,
    },
}

/// The first names of a list, and how many more there are.
fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 8;
    match names.len() {
        0 => "nothing".into(),
        n if n <= SHOWN => names.join(", "),
        n => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
    }
}

/// `Result` with this crate's error.
pub type Result<T, E = MetricsError> = std::result::Result<T, E>;
