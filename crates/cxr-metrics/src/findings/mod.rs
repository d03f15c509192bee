//! Does the picture show the finding? A classifier's scores against what the prompts ask for, beside the same
//! classifier on held-out real pictures.
//!
//! The real side is the measure: a classifier that tells effusions from others with an area of 0.80 on real
//! radiographs cannot say more of synthetic ones. A synthetic figure above the real one means that findings are
//! drawn more plainly than they are; one of 0.5 that the prompt makes no difference.

mod measure;
mod report;

pub use measure::{Findings, FindingsConfig, Scored, ThresholdRule};
pub use report::{FindingRow, FindingsReport, Measure, Measured, Slice};
