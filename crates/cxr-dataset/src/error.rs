use std::path::PathBuf;

/// What can go wrong between a folder and a batch; each variant names the file, the row (the line of the table, the
/// header being line 1) and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder holds none of the tables a source knows.
    #[error("{} holds no table: expected one of {expected}; give the folder that directly contains it", folder.display())]
    NoTable {
        /// The folder that was searched.
        folder: PathBuf,
        /// The file names that were looked for.
        expected: String,
    },
    /// A CSV table, and a build without the feature that reads them.
    #[error(
        "{}: this program was built without CSV tables: build it with the feature `csv`, or bring a .jsonl table",
        path.display()
    )]
    NoCsv {
        /// The table.
        path: PathBuf,
    },
    /// A table lacks columns.
    #[error("{} lacks the column(s) {missing}; it has {found}: rename them in the table, or name yours in the options", path.display())]
    MissingColumns {
        /// The table.
        path: PathBuf,
        /// The columns that are missing.
        missing: String,
        /// The columns that are there.
        found: String,
    },
    /// A table cannot be parsed as a whole.
    #[error("{} is no table that can be read: {reason}; write it again as CSV with a header", path.display())]
    Table {
        /// The table.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A row cannot be parsed.
    #[error("row {row} of {} is broken: {reason}; repair the row, or skip and count such rows (--skip of prepare and reproduce, OnProblem::Skip)", path.display())]
    BrokenRow {
        /// The table.
        path: PathBuf,
        /// The line the row starts on.
        row: u64,
        /// What the parser said.
        reason: String,
    },
    /// A cell that must hold something holds nothing.
    #[error("row {row} of {}, column {column:?}: the cell is empty; fill it, or skip and count such rows (--skip of prepare and reproduce, OnProblem::Skip)", path.display())]
    EmptyCell {
        /// The table.
        path: PathBuf,
        /// The line the row starts on.
        row: u64,
        /// The column.
        column: String,
    },
    /// A finding that no wording exists for, or a contradictory set of findings.
    #[error("row {row} of {}, column {column:?}: {reason}", path.display())]
    Finding {
        /// The table.
        path: PathBuf,
        /// The line the row starts on.
        row: u64,
        /// The column.
        column: String,
        /// The finding and what was expected.
        reason: String,
    },
    /// Two rows name the same image.
    #[error("row {row} of {}: image {name:?} already stands in row {first_row}; remove one of them, or skip and count such rows (--skip of prepare and reproduce, OnProblem::Skip)", path.display())]
    DuplicateName {
        /// The table.
        path: PathBuf,
        /// The line the second row starts on.
        row: u64,
        /// The line the first row starts on.
        first_row: u64,
        /// The file name.
        name: String,
    },
    /// Two reports have the same identifier.
    #[error("row {row} of {}: report {uid:?} already stands in row {first_row}; remove one of them, or skip and count such rows (--skip of prepare and reproduce, OnProblem::Skip)", path.display())]
    DuplicateReport {
        /// The table.
        path: PathBuf,
        /// The line the second row starts on.
        row: u64,
        /// The line the first row starts on.
        first_row: u64,
        /// The identifier.
        uid: String,
    },
    /// An image refers to a report that is not there.
    #[error("row {row} of {}: no report {uid:?} in {}; add the report, or skip and count such rows (--skip of prepare and reproduce, OnProblem::Skip)", path.display(), reports.display())]
    NoReport {
        /// The table of images.
        path: PathBuf,
        /// The line the row starts on.
        row: u64,
        /// The identifier that was looked for.
        uid: String,
        /// The table of reports.
        reports: PathBuf,
    },
    /// The image of a row cannot be used.
    #[error("row {row} of {}: {source}; replace the file, or skip and count such rows (--skip of prepare and reproduce, OnProblem::Skip)", table.display())]
    Image {
        /// The table that names the image.
        table: PathBuf,
        /// The line the row starts on.
        row: u64,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The cache of resized images cannot be written.
    #[error("{source}")]
    Cache {
        /// What is wrong with it.
        source: ImageError,
    },
    /// Somebody asked to stop.
    #[error("stopped after {done} of {total} images; what is in a cache on disk stays there")]
    Stopped {
        /// Images that are done.
        done: usize,
        /// Images that there are.
        total: usize,
    },
    /// A table without a usable row.
    #[error("{} yields no pair: {rows} row(s) read, {skipped} skipped; check the table and the images folder", path.display())]
    NoPairs {
        /// The table.
        path: PathBuf,
        /// How many rows were read.
        rows: usize,
        /// How many of them were skipped.
        skipped: usize,
    },
    /// A prompt template that means nothing.
    #[error("prompt template {template:?}: {reason}; the placeholders are {{impression}} and {{view}}")]
    Template {
        /// The template.
        template: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A setting outside its range.
    #[error("{field} is {value}: expected {expected}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A split with nothing on one side.
    #[error(
        "the split ({rule}, train fraction {train_fraction}) leaves its {side} side empty: {pairs} pair(s) in {units} unit(s) that stay whole; use more data, another fraction or another rule"
    )]
    EmptySide {
        /// The rule's name.
        rule: String,
        /// The fraction asked for.
        train_fraction: f64,
        /// `train` or `test`.
        side: &'static str,
        /// How many pairs there are.
        pairs: usize,
        /// How many units (pairs, groups or impressions) there are to divide.
        units: usize,
    },
    /// A split file that cannot be parsed.
    #[error("{} is not a split file: {reason}; write it again", path.display())]
    SplitFile {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A split file that belongs to another collection.
    #[error("{} does not fit this collection: {reason}; prepare the data again with the settings that wrote it", path.display())]
    SplitMismatch {
        /// The file.
        path: PathBuf,
        /// Counts and an example.
        reason: String,
    },
}

impl DatasetError {
    /// Whether leaving out one row would not help: a table that cannot be read on, a cache that cannot be written.
    pub(crate) fn concerns_more_than_a_row(&self) -> bool {
        matches!(
            self,
            Self::Read { .. } | Self::Table { .. } | Self::Image { source: ImageError::Cache { .. }, .. }
        )
    }

    /// A short stable name of the kind of problem, under which a report counts it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Read { .. } => "unreadable file",
            Self::Write { .. } => "unwritable file",
            Self::NoTable { .. } => "no table",
            Self::NoCsv { .. } => "no reader for tables",
            Self::MissingColumns { .. } => "missing columns",
            Self::Table { .. } => "unreadable table",
            Self::BrokenRow { .. } => "broken row",
            Self::EmptyCell { .. } => "empty cell",
            Self::Finding { .. } => "unusable finding",
            Self::DuplicateName { .. } => "duplicate file name",
            Self::DuplicateReport { .. } => "duplicate report",
            Self::NoReport { .. } => "no report",
            Self::Image { source, .. } => source.kind(),
            Self::Cache { source } => source.kind(),
            Self::Stopped { .. } => "stopped",
            Self::NoPairs { .. } => "no pairs",
            Self::Template { .. } => "prompt template",
            Self::Setting { .. } => "setting",
            Self::EmptySide { .. } => "empty side",
            Self::SplitFile { .. } => "split file",
            Self::SplitMismatch { .. } => "split mismatch",
        }
    }
}

/// What can be wrong with one image file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file is not there.
    #[error("image {} is missing", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The file has no bytes.
    #[error("image {} is empty (0 bytes)", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read image {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A picture cannot be read from or written to a cache on disk.
    #[error("cannot use cached picture {}: {source}; free space, repair the folder, or name another one", path.display())]
    Cache {
        /// The file in the cache.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no image that can be decoded.
    #[error("cannot decode image {}: {reason}", path.display())]
    Undecodable {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        reason: String,
    },
}

impl ImageError {
    /// A short stable name of the kind of problem.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "missing image",
            Self::Empty { .. } => "empty image",
            Self::Read { .. } => "unreadable image",
            Self::Cache { .. } => "unusable cache",
            Self::Undecodable { .. } => "undecodable image",
        }
    }
}
