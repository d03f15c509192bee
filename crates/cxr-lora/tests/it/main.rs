//! Adapters on small models: against PEFT, through files, mixed, merged, and refused.

mod adapters;
mod convolutions;
mod dropout;
mod files;
mod merging;
mod peft;
mod published;
mod refused;
mod round_trips;
mod toy;

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Tensor, backend::Backend};

/// Data that is not part of the project; says so and returns `None` when it is absent.
fn shared(path: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let found = std::env::var_os("CXR_TEST_DATA").map_or_else(beside, PathBuf::from).join(path);
    if !found.exists() {
        println!("skipped: {} not found", found.display());
        return None;
    }
    Some(found)
}

fn values<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
    x.into_data().convert_dtype(DType::F32).to_vec().unwrap()
}

fn bits<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

/// The norm of the difference over the norm of the reference.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(f, e)| f64::from(*f) - f64::from(*e)));
    difference / norm(&mut expected.iter().map(|e| f64::from(*e)))
}

#[track_caller]
fn assert_close(what: &str, found: &[f32], expected: &[f32], bar: f64) {
    let error = relative(found, expected);
    println!("{what}: relative error {error:.1e}");
    assert!(error <= bar, "{what}: relative error {error:e} above {bar:e}");
}
