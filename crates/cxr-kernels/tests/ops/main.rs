//! The operations against f64 references: values, gradients, layouts, dtypes, and the promises beside them.
//!
//! Both roads are checked: `ops` under `Autodiff<Flex>`, which runs the CPU kernels, and the bodies of `plain`,
//! which every backend without kernels of its own runs.
#![cfg(feature = "flex")]

mod contract;
mod gradients;
mod layouts;
mod reference;
mod values;

use burn::backend::Autodiff;
use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive, backend::Backend, ops::FloatTensor};
use cxr_kernels::Flex;

type Ad = Autodiff<Flex>;

/// Numbers of `[-2, 2)`, different for each seed, that f32 holds exactly.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((state >> 40) as f64) / (1_u64 << 22) as f64 - 2.0) as f32 as f64
    };
    (0..count).map(|_| next()).collect()
}

fn tensor<B: Backend, const D: usize>(data: &[f64], shape: [usize; D]) -> Tensor<B, D> {
    let data: Vec<f32> = data.iter().map(|x| *x as f32).collect();
    Tensor::from_data(TensorData::new(data, shape), (&Default::default(), DType::F32))
}

fn read<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
    x.into_data().to_vec().expect("f32")
}

fn raw<B: Backend, const D: usize>(x: Tensor<B, D>) -> FloatTensor<B> {
    x.into_primitive().tensor()
}

fn cooked<B: Backend, const D: usize>(x: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// Asserts that `found` is within `tolerance`, relative to the largest of `expected` (and to one at least).
#[track_caller]
fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let scale = expected.iter().fold(1.0_f64, |m, x| m.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (*found as f64 - expected).abs() / scale;
        assert!(error <= tolerance, "{what}, element {i}: {found}, expected {expected}, error {error:e}");
    }
}
