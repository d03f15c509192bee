//! The hot operations of latent diffusion as a [burn] backend extension.
//!
//! [`DiffusionBackend`] is a trait over burn's backends with a default body in plain burn operations for
//! every method, so that it holds for all of them: the pure-Rust CPU backend `Flex`, the Cube backends (CUDA,
//! wgpu), LibTorch, burn's fusion layer, and [`Autodiff`](burn::backend::Autodiff) over any of them, where each
//! operation has one backward step of its own. `Flex` and the Cube backends have hand-written kernels on top.
//!
//! Three floors, from the user's side down:
//!
//! | Module | Works on | For |
//! |---|---|---|
//! | [`nn`] | modules that hold weights | models |
//! | [`ops`] | burn tensors; shapes and dtypes are checked here | anything else |
//! | [`DiffusionBackend`] | backend primitives | new kernels; [`plain`] has the default bodies |
//!
//! ```
//! # #[cfg(feature = "flex")] {
//! use burn::tensor::Tensor;
//! use cxr_kernels::{Flex, ops};
//!
//! let device = Default::default();
//! let x = Tensor::<Flex, 2>::from_floats([[0.0, 1.0]], &device);
//! let y = ops::silu(x);
//! assert!((y.into_data().to_vec::<f32>().unwrap()[1] - 0.731_058_6).abs() < 1e-6);
//! # }
//! ```
//!
//! # Features
//!
//! `flex`, `cuda`, `wgpu` (or `vulkan`, `metal`: one type in burn, so one of the three), `tch`: the backends
//! for which the trait is implemented. None is on by default; programs choose. `autotune`: burn times its kernels on
//! `cuda` and `wgpu`.

mod autodiff;
mod backend;
mod cache;
#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
pub mod nn;
pub mod ops;
pub mod plain;
#[cfg(feature = "tch")]
mod tch;

pub use backend::{DiffusionAutodiff, DiffusionBackend};
#[cfg(feature = "flex")]
pub use burn_flex::Flex;
pub use cache::{DEFAULT_PACK_MEMORY, Packing, WeightCache, packed_memory, set_pack_memory};
#[cfg(feature = "cube")]
pub use cube::keep_tuning;
pub use ops::Pool;

/// One thread at a time builds a graph and goes back through it.
static GRAPH: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Keeps other threads from going backward while this one builds a graph: hold it from the first tracked operation
/// until `backward` has returned.
///
/// burn 0.21 keeps the graphs of all threads in one place, and what `backward` frees in one thread can be a step that
/// another has just registered: a gradient is then wrong without a word
/// (<https://github.com/tracel-ai/burn/issues/5573>). Training in this workspace holds it; code of your own that trains
/// in several threads of one process should too. Do not train from within a rayon pool while holding it.
pub fn graph_guard() -> std::sync::MutexGuard<'static, ()> {
    // it guards no data that a panic could have left half-made
    GRAPH.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
