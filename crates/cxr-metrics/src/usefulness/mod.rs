//! What synthetic pictures are worth for training: a linear head on an extractor's features, trained on real
//! pictures, on synthetic ones and on both, measured on held-out real ones.
//!
//! Features may be of any extractor of this crate. The same heads give an extractor without findings of its own
//! scores for [`findings`](crate::findings).

mod heads;
mod logistic;
mod measure;
mod report;

pub use heads::{Labelled, LinearHeads};
pub use logistic::{LinearHead, LogisticConfig};
pub use measure::{Usefulness, UsefulnessConfig};
pub use report::{Trained, UsefulnessReport, UsefulnessRow};
