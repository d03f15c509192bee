//! The Cube backends (CUDA, wgpu) and burn's fusion layer: the default bodies.

use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_fusion::{Fusion, FusionBackend};

use crate::DiffusionBackend;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, T: BoolElement> DiffusionBackend
    for CubeBackend<R, F, I, T>
{
}

impl<B: FusionBackend> DiffusionBackend for Fusion<B> {}
