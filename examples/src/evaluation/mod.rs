//! What `evaluate` and `reproduce` measure alike: sets of images, copies, findings, and where the weights of the
//! Inception network are.

pub mod copies;
pub mod labels;
mod set;
mod weights;

pub use self::set::Set;
pub use self::weights::InceptionArgs;
