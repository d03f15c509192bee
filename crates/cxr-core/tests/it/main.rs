//! Tensor files and random numbers against their references.

mod pytorch;
mod random;
mod safetensors;

/// A file of `tests/fixtures`; `generate.py` there has made it.
fn fixture(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}
