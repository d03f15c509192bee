//! The caller's wish to stop, as an error of this crate.

use cxr_core::progress::Progress;

use crate::error::{MetricsError, Result};

/// Reports `done` of `total` units.
pub(crate) fn advance(progress: &dyn Progress, stage: &str, done: usize, total: usize) -> Result<()> {
    if progress.advance(done as u64, "").is_break() && done < total {
        return Err(MetricsError::Cancelled { stage: stage.into(), done: done as u64, total: total as u64 });
    }
    Ok(())
}
