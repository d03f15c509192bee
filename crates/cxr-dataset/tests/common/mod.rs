//! What lies outside of this crate.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::{Path, PathBuf};

/// A file or folder of the workspace.
pub(crate) fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Data that is not part of the project; says so and returns `None` when it is absent.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("CXR_TEST_DATA").map_or_else(|| workspace("../shared/data"), PathBuf::from);
    let found = root.join(path);
    if !found.exists() {
        println!("skipped: {} not found", found.display());
        return None;
    }
    Some(found)
}
