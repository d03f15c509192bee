//! Adapters added into the weights, and taken out again.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, backend::Backend};

use crate::adapter::check_unmerged;
use crate::linear::{LoraLinear, to_f32};
use crate::target::{Adaptable, LayerMut, LayerRef};
use crate::{LoraError, Result};

/// The original weights of the layers that adapters were merged into.
///
/// They are the very tensors that the layers had, so that [`unmerge`] is exact in every dtype. While this is
/// alive, each of these layers takes the memory of two weights: 128 attention projections of Stable Diffusion 1.5
/// hold 0.6 GB in f32 once more. Drop it to make the merge permanent.
#[derive(Debug, Clone)]
pub struct Merged<B: Backend> {
    originals: BTreeMap<String, Tensor<B, 2>>,
}

impl<B: Backend> Merged<B> {
    /// How many layers were changed.
    pub fn layers(&self) -> usize {
        self.originals.len()
    }
}

/// Adds every enabled adapter into the weights, `W + sum_i weight_i * scale_i * B_i A_i`, so that a layer costs what
/// it cost without adapters.
///
/// The sum is taken in f32 and cast to the dtype of the weight. The adapters stay attached and take no part until
/// [`unmerge`]; until then they cannot be changed.
///
/// # Errors
/// [`LoraError::NothingToMerge`], [`LoraError::Merged`], and [`LoraError::NotFinite`] naming the layer whose new
/// weight is not finite in its dtype. The model is unchanged then.
pub fn merge<B: Backend, M: Adaptable<B> + ?Sized>(model: &mut M) -> Result<Merged<B>> {
    check_unmerged(model)?;
    let mut changed = BTreeMap::new();
    let mut broken = None;
    model.visit_layers(&mut |path, layer| {
        let LayerRef::Linear(layer) = layer;
        let Some(weight) = merged_weight(layer) else { return };
        if broken.is_none() && !is_finite(weight.clone()) {
            broken = Some(path.to_owned());
        }
        changed.insert(path.to_owned(), weight);
    });
    if let Some(path) = broken {
        return Err(LoraError::NotFinite { what: format!("{path}.weight with its adapters merged") });
    }
    if changed.is_empty() {
        return Err(LoraError::NothingToMerge);
    }
    let mut originals = BTreeMap::new();
    model.visit_layers_mut(&mut |path, layer| {
        let LayerMut::Linear(layer) = layer;
        if let Some(weight) = changed.remove(path) {
            originals.insert(path.to_owned(), replace_weight(layer, weight));
            layer.merged = true;
        }
    });
    Ok(Merged { originals })
}

/// Puts the original weights back, to the bit.
///
/// # Errors
/// [`LoraError::NotMerged`] if a layer is missing or not merged. The model is unchanged then.
pub fn unmerge<B: Backend, M: Adaptable<B> + ?Sized>(model: &mut M, merged: Merged<B>) -> Result<()> {
    let mut originals = merged.originals;
    let mut missing: std::collections::BTreeSet<String> = originals.keys().cloned().collect();
    model.visit_layers(&mut |path, layer| {
        let fits = originals.get(path).is_some_and(|weight| weight.dims() == layer.shape());
        if fits && layer.is_merged() {
            missing.remove(path);
        }
    });
    if let Some(path) = missing.pop_first() {
        return Err(LoraError::NotMerged { path });
    }
    model.visit_layers_mut(&mut |path, layer| {
        let LayerMut::Linear(layer) = layer;
        if let Some(weight) = originals.remove(path) {
            replace_weight(layer, weight);
            layer.merged = false;
        }
    });
    Ok(())
}

/// Merges every enabled adapter for good and takes all adapters off; returns how many layers changed.
///
/// # Errors
/// As [`merge`].
pub fn merge_and_detach<B: Backend, M: Adaptable<B> + ?Sized>(model: &mut M) -> Result<usize> {
    let merged = merge(model)?;
    model.visit_layers_mut(&mut |_, layer| {
        let LayerMut::Linear(layer) = layer;
        layer.adapters.clear();
        layer.merged = false;
    });
    Ok(merged.layers())
}

/// The weight with the active adapters added, in the weight's dtype; none without active adapters.
fn merged_weight<B: Backend>(layer: &LoraLinear<B>) -> Option<Tensor<B, 2>> {
    let mut active = layer.active().peekable();
    active.peek()?;
    let weight = layer.weight.val().detach();
    let dtype = weight.dtype();
    let sum = active.fold(to_f32(weight), |sum, branch| {
        let (a, b) = (branch.lora_a.val().detach(), branch.lora_b.val().detach());
        sum + b.matmul(a).mul_scalar(branch.scale())
    });
    Some(if dtype == sum.dtype() { sum } else { sum.cast(dtype) })
}

/// Swaps the weight, under the id and the trainable flag that it has; returns the old one.
fn replace_weight<B: Backend>(layer: &mut LoraLinear<B>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
    let old = layer.weight.val();
    let trainable = old.is_require_grad();
    let id = layer.weight.id;
    layer.weight = burn::module::Param::initialized(id, weight.set_require_grad(trainable));
    old.detach()
}

fn is_finite<B: Backend>(x: Tensor<B, 2>) -> bool {
    to_f32(x).is_finite().all().into_data().iter::<bool>().all(|finite| finite)
}
