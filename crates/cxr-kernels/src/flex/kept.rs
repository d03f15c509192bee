//! What is derived from a weight and kept beside it.

use std::sync::Arc;

use burn::tensor::TensorMetadata;
use burn_flex::FlexTensor;

use crate::WeightCache;
use crate::cache::Packing;

/// What `pack` derives from `weight`, `bytes` of it, if `cache` has it or it is worth keeping.
///
/// A weight that does not lie as it should is copied for each call: what was derived from a copy is of no use in the next.
pub(super) fn kept<V: Send + Sync + 'static>(
    cache: &WeightCache,
    weight: &FlexTensor,
    bytes: usize,
    uses: usize,
    pack: impl FnOnce() -> V,
) -> Option<Arc<V>> {
    if !weight.is_contiguous() {
        return None;
    }
    let packing = Packing { address: address(weight), bytes, uses };
    cache.get_or_pack(weight.clone(), is_same, packing, pack)
}

/// Where the first element lies.
fn address(x: &FlexTensor) -> usize {
    x.bytes().as_ptr().addr() + x.layout().start_offset() * x.dtype().size()
}

/// Whether two tensors that exist are one.
fn is_same(a: &FlexTensor, b: &FlexTensor) -> bool {
    (a.dtype(), a.shape(), address(a)) == (b.dtype(), b.shape(), address(b))
}
