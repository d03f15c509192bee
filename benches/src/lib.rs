//! What the benches share: the backend, and numbers to feed.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr::core::random::Stream;

/// Fresh pages cost convolutions more than their arithmetic: this allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Standard normal numbers, the same in every run.
pub fn normal<B: Backend, const D: usize>(shape: [usize; D], device: &B::Device) -> Tensor<B, D> {
    let values = Stream::new(0, "bench", 0).normals(shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), device)
}
