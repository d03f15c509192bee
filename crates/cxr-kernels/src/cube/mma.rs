//! NVIDIA's matrix units, product by product (PTX's `mma`).

use burn::tensor::DType;
use burn_cubecl::cubecl::ir::StorageType;
use burn_cubecl::cubecl::ir::features::MmaConfig;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};

/// Lanes of a warp.
pub(super) const LANES: u32 = 32;

/// Whether the device of `x` multiplies 16 rows by 8 columns of `k` such numbers and adds up in f32.
pub(super) fn is_there<R: CubeRuntime>(x: &CubeTensor<R>, number: StorageType, k: u32) -> bool {
    let properties = x.client.properties();
    let config = MmaConfig { a_type: number, b_type: number, cd_type: DType::F32.into(), m: 16, n: 8, k };
    let hardware = &properties.hardware;
    hardware.plane_size_min == LANES
        && hardware.plane_size_max == LANES
        && properties.features.matmul.mma.contains(&config)
}
