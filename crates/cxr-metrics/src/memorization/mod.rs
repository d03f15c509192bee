//! Is a synthetic picture a copy of a training picture?
//!
//! Every synthetic picture is held against the whole training set, in pixels and in features. Distances are
//! blind to what a copy may differ by ([`AuditConfig`]: brightness and contrast, a flip, a small shift), and what
//! counts as near is calibrated on real pictures of other patients ([`Calibration`]), never chosen by eye.
//!
//! ```
//! use cxr_core::progress::Silent;
//! use cxr_core::random::Stream;
//! use cxr_metrics::memorization::{AuditConfig, AuditSide, MemorizationAudit};
//! use cxr_metrics::{ImageSize, Picture};
//!
//! # fn main() -> Result<(), cxr_metrics::MetricsError> {
//! // Pictures without anything in common, to have some.
//! let pictures = |name: &str, n: u64| -> Vec<Picture> {
//!     let pixels = |i| (0..256).scan(Stream::new(0, name, i), |s, _| Some(s.below(256) as u8)).collect();
//!     (0..n).filter_map(|i| Picture::new(ImageSize::square(16), 1, pixels(i)).ok()).collect()
//! };
//! let (train, held_out, mut made) = (pictures("train", 50), pictures("held out", 120), pictures("made", 5));
//! made[3] = train[17].clone();
//! let config = AuditConfig { side: 16, ..AuditConfig::default() };
//! let report = MemorizationAudit::new(config.clone())?.run(
//!     &AuditSide::query(&made, None, &config, &Silent)?,
//!     &AuditSide::reference(&train, None, &config, &Silent)?,
//!     &AuditSide::query(&held_out, None, &config, &Silent)?,
//!     &Silent,
//! )?;
//! let flagged: Vec<(usize, usize)> = report.flagged().map(|e| (e.image, e.pixels.nearest)).collect();
//! assert_eq!(flagged, [(3, 17)]);
//! # Ok(())
//! # }
//! ```

mod audit;
mod calibration;
mod glyphs;
mod nearest;
mod prompts;
mod sheet;
mod side;
mod table;
mod views;

pub use audit::{AuditEntry, AuditReport, MemorizationAudit};
pub use calibration::{Calibration, Evidence, Scale};
pub use nearest::{Neighbour, nearest_neighbours};
pub use prompts::{PromptMatch, PromptSummary, normalized_prompt};
pub use sheet::write_png;
pub use side::{AuditConfig, AuditSide, Mirrored};
pub use table::COLUMNS;
pub use views::PictureView;
