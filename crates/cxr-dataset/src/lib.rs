//! Chest radiographs with their reports: from a folder of pictures and a table to training batches.
//!
//! Data flows one way: a source ([`source`]) reads a folder into a [`Collection`] of [`Pair`]s; the token filter
//! ([`TokenFilter`]) keeps what the text encoder can read; a [`Split`] divides the collection so that no patient (or
//! study) stands on both sides; a [`LeakageReport`] measures what the split lets through all the same; [`Batches`]
//! decodes and resizes the pictures in parallel.
//!
//! ```no_run
//! use cxr_dataset::{Batches, Collection, ImageOptions, ReadOptions, Split, SplitConfig};
//!
//! # fn main() -> Result<(), cxr_dataset::DatasetError> {
//! let collection = Collection::open("nih-chest-64".as_ref(), &ReadOptions::default())?;
//! let split = Split::new(&collection, &SplitConfig::default())?;
//! let batches = Batches::new(&collection, &split.train, ImageOptions::new(64), 4, 7)?;
//! for batch in batches.epoch(0, 0) {
//!     let batch = batch?;
//!     assert_eq!(batch.shape[1..], [3, 64, 64]);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The same folder, settings and seed give the same pairs, split and order on every machine. Nothing is flipped or
//! cropped at random: left and right carry meaning in a radiograph.

mod batch;
mod cache;
mod check;
mod collection;
mod error;
pub mod image;
pub mod impression;
pub mod labels;
mod leakage;
mod loader;
pub mod source;
mod split;
#[doc(hidden)]
#[cfg(feature = "csv")]
pub mod synthetic;
mod token_filter;

pub use self::image::{Filter, Fit, ImageOptions, Pixels, contact_sheet};
pub use batch::{Batch, Batches, ImageLoader, epoch_order};
pub use cache::{CacheCounts, ImageCache};
pub use collection::{Collection, Pair, PreparationReport, Skipped, SplitSummary};
pub use error::{DatasetError, ImageError};
pub use impression::{Deidentified, PromptTemplate, Wording};
pub use labels::LabelSet;
pub use leakage::LeakageReport;
pub use loader::{BatchResult, EpochView, ImageBatcher, Sample, SampleResult, TensorBatch};
pub use source::{Columns, ImageCheck, OnProblem, ReadOptions};
pub use split::{Split, SplitConfig, SplitRule};
pub use token_filter::{TokenFilter, TokenFilterReport};
