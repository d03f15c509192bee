//! LibTorch: the default bodies.

use burn::backend::{LibTorch, libtorch::TchElement};

use crate::DiffusionBackend;

impl<E: TchElement> DiffusionBackend for LibTorch<E> {}
