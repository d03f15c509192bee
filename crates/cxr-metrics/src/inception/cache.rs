//! Where a fetched weight file is kept.

use std::env;
use std::path::PathBuf;

use crate::error::{MetricsError, Result};

/// Name of the weight file in the cache folder.
const FILE: &str = "pt_inception-2015-12-05-6726825d.pth";

/// The weight file's place: in `CXR_CACHE`, or in `cxr` within the user's cache folder.
///
/// # Errors
/// If neither is known.
pub(super) fn file() -> Result<PathBuf> {
    folder().map(|folder| folder.join(FILE)).ok_or(MetricsError::InvalidParameter {
        name: "CXR_CACHE",
        value: "unset, and there is no home folder".into(),
        expected: "a folder for weight files".into(),
    })
}

fn folder() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("CXR_CACHE").or_else(|| {
        let user = set("XDG_CACHE_HOME").or_else(|| set("LOCALAPPDATA"));
        user.or_else(|| set("HOME").map(|home| home.join(".cache"))).map(|folder| folder.join("cxr"))
    })
}
