//! What burn's Cube backends find out by timing, kept for the next run.

use std::path::Path;
use std::sync::Arc;

use burn_cubecl::cubecl::config::cache::CacheConfig;
use burn_cubecl::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

/// Keeps the kernels that a Cube backend chooses by timing, and those that it compiles, in `folder`, where the next run
/// of any program finds them. Left to itself burn keeps the former in `target` beside the nearest `Cargo.toml` above the
/// working directory, and the latter nowhere.
///
/// `folder` is of one device with one driver: compiled kernels are for these. Call it before the device is first used;
/// later it does nothing, and it changes nothing that a `cubecl.toml` or `burn.toml` above the working directory says.
pub fn keep_tuning(folder: &Path) {
    let mut state = CubeClRuntimeConfig::storage().lock();
    if state.is_some() {
        return;
    }
    let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
    if matches!(config.autotune.cache, CacheConfig::Target) {
        config.autotune.cache = CacheConfig::File(folder.to_path_buf());
    }
    config.compilation.cache.get_or_insert_with(|| CacheConfig::File(folder.to_path_buf()));
    *state = Some(Arc::new(config));
}
