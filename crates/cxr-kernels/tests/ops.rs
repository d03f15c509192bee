//! Timings for a first look.
#[cfg(feature = "flex")]
mod timing;
