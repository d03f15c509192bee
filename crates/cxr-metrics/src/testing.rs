//! What the unit tests share.

use std::ops::ControlFlow;

use cxr_core::progress::Progress;
use cxr_core::random::Stream;

use crate::features::FeatureSet;

/// Independent normal features of standard deviation `scale`, from the stream named `name`.
pub(crate) fn random_set(name: &str, n: usize, width: usize, scale: f32) -> FeatureSet {
    let mut stream = Stream::new(7, name, 0);
    let values = (0..n * width).map(|_| stream.normal() * scale).collect();
    FeatureSet::new(values, width).expect("normal numbers are finite")
}

/// Asks to stop once this many units are done.
pub(crate) struct StopAfter(pub(crate) u64);

impl Progress for StopAfter {
    fn advance(&self, done: u64, _: &str) -> ControlFlow<()> {
        if done >= self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
