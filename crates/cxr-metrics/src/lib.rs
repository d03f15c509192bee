//! Honest metrics for synthetic radiographs: distances between sets of pictures, with intervals and floors, and
//! an audit of what was copied from the training set.
//!
//! A figure is taken in three steps: a [`FeatureExtractor`] turns the pictures of an [`ImageSource`] into a
//! [`FeatureSet`]; a metric compares two of those; a [`Card`] carries the number with what it depends on (N,
//! interval, real-versus-real floor, resolution, extractor and its hash, seed). [`Evaluation`] does the last two.
//!
//! ```
//! use cxr_core::progress::Silent;
//! use cxr_metrics::{Evaluation, Extraction, ExtractorId, FeatureSet, ImageSize};
//!
//! # fn main() -> Result<(), cxr_metrics::MetricsError> {
//! // What an extractor gives; here eight images with two features each.
//! let take = |shift: f32| -> Result<Extraction, cxr_metrics::MetricsError> {
//!     let values = (0..16).map(|i| (i * 7 % 16) as f32 + shift).collect();
//!     Ok(Extraction { features: FeatureSet::new(values, 2)?, logits: None, resolution: ImageSize::square(64) })
//! };
//! let extractor = ExtractorId {
//!     name: "toy".into(),
//!     hash: "00".into(),
//!     feature_dim: 2,
//!     input_size: ImageSize::square(64),
//!     resize: None,
//! };
//! let evaluation = Evaluation { replicates: 50, ..Evaluation::default() };
//! let card = evaluation.compare(&take(0.0)?, &take(3.0)?, &extractor, &Silent)?;
//! // A pure shift of 3 in two features: |mu1 - mu2|^2 = 18.
//! assert!((card.figures[0].value - 18.0).abs() < 1e-6);
//! assert_eq!(card.figures[0].name, "frechet_distance/toy");
//! # Ok(())
//! # }
//! ```
//!
//! A distance is named after its extractor. It is FID or KID only with the Inception network of 2015; with
//! [`SmallExtractor`](small::SmallExtractor) it is a distance in that network's features, for comparing runs.

mod auroc;
mod card;
pub mod densenet;
mod error;
mod evaluation;
mod extractor;
mod features;
pub mod findings;
mod frechet;
mod image;
pub mod inception;
mod inception_score;
mod interval;
mod kernel_distance;
pub mod labels;
pub mod memorization;
mod moments;
mod ms_ssim;
mod npy;
mod prdc;
mod progress;
mod ranked;
mod resample;
mod scores;
pub mod small;
#[cfg(test)]
mod testing;
pub mod usefulness;

pub use auroc::{Auroc, FindingAuroc, auroc, auroc_table};
pub use card::{Card, Figure};
pub use error::{MetricsError, Result};
pub use evaluation::Evaluation;
pub use extractor::{BatchOutput, Extraction, ExtractorId, FeatureExtractor, Staged};
pub use features::FeatureSet;
pub use frechet::{
    FeatureStatistics, frechet_distance, frechet_distance_of_moments, frechet_distance_of_sets,
    frechet_distance_on, frechet_distance_to_set,
};
pub use image::{ImageSize, ImageSource, Picture, grey_pixels, resize_antialiased, resize_bicubic};
pub use inception_score::{INCEPTION_SCORE_SPLITS, InceptionScore, inception_score};
pub use interval::{BootstrapConfig, Floor, Interval, IntervalMethod, bootstrap, bootstrap_mean, real_floor};
pub use kernel_distance::{
    KernelMatrices, SubsetConfig, SubsetDistance, kernel_distance, kernel_distance_on,
    kernel_distance_subsets,
};
pub use memorization::{Neighbour, nearest_neighbours};
pub use moments::Moments;
pub use ms_ssim::{PromptSimilarity, ms_ssim, ms_ssim_scales, prompt_similarity};
pub use prdc::{NEAREST_K, Prdc, PrdcParts, prdc};
