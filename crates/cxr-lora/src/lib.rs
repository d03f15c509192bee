//! LoRA for any burn model: the layer, its targets, adapter files.

mod linear;
mod target;
mod weights;

pub use linear::{Branch, LoraLinear, LoraLinearConfig};
pub use target::{Adaptable, LayerInfo, LayerMut, LayerRef, TargetSet, layers};
pub use weights::{Adapter, LoraWeights, ModuleKey, ModuleName, Provenance, TEXT_ENCODER, UNET};
/// Placeholder until the error module lands.
#[derive(Debug)] pub enum LoraError { #[allow(missing_docs)] NoTarget { pattern: String, layers: usize, first: Option<String> }, #[allow(missing_docs)] AmbiguousLayer { path: String }, #[allow(missing_docs)] FactorShape { key: String, expected: String, found: Vec<usize> }, #[allow(missing_docs)] NotFinite { what: String }, #[allow(missing_docs)] Unmatched { matched: usize, total: usize, modules: Vec<String> } }
/// Result.
pub type Result<T, E = LoraError> = std::result::Result<T, E>;
