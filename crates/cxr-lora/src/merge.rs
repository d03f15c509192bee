//! Adapters added into the weights, and taken out again.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::Param;
use burn::tensor::{Tensor, backend::Backend};

use crate::adapter::check_unmerged;
use crate::branch::{Branch, to_f32};
use crate::target::{Adaptable, LayerMut, LayerRef};
use crate::{LoraError, Result};

/// The original weights of the layers that adapters were merged into.
///
/// They are the very tensors that the layers had, so that [`unmerge`] is exact in every dtype. While this is
/// alive, each of these layers takes the memory of two weights: 128 attention projections of Stable Diffusion 1.5
/// hold 0.6 GB in f32 once more. Drop it to make the merge permanent.
#[derive(Debug, Clone)]
pub struct Merged<B: Backend> {
    originals: BTreeMap<String, Weight<B>>,
}

/// A layer's weight.
#[derive(Debug, Clone)]
enum Weight<B: Backend> {
    Linear(Tensor<B, 2>),
    Conv2d(Tensor<B, 4>),
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
        let Some(weight) = Weight::merged(&layer) else { return };
        if broken.is_none() && !weight.is_finite() {
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
        if let Some(weight) = changed.remove(path) {
            originals.insert(path.to_owned(), weight.swap(layer, true));
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
    let mut missing: BTreeSet<String> = originals.keys().cloned().collect();
    model.visit_layers(&mut |path, layer| {
        let fits = originals.get(path).is_some_and(|weight| weight.fits(&layer));
        if fits && layer.is_merged() {
            missing.remove(path);
        }
    });
    if let Some(path) = missing.pop_first() {
        return Err(LoraError::NotMerged { path });
    }
    model.visit_layers_mut(&mut |path, layer| {
        if let Some(weight) = originals.remove(path) {
            weight.swap(layer, false);
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
    detach_merged(model);
    Ok(merged.layers())
}

/// Takes every adapter off and leaves the weights as they are, so that what was merged stays in them.
pub fn detach_merged<B: Backend, M: Adaptable<B> + ?Sized>(model: &mut M) {
    model.visit_layers_mut(&mut |_, layer| layer.set_merged(false));
    model.visit_layers_mut(&mut |_, layer| layer.adapters().clear());
}

impl<B: Backend> Weight<B> {
    /// The weight with the active adapters added, in the weight's dtype; none without active adapters.
    fn merged(layer: &LayerRef<'_, B>) -> Option<Self> {
        let mut active = layer.active().peekable();
        active.peek()?;
        Some(match layer {
            LayerRef::Linear(layer) => Self::Linear(add(&layer.weight, active)),
            LayerRef::Conv2d(layer) => Self::Conv2d(add(&layer.weight, active)),
        })
    }

    fn is_finite(&self) -> bool {
        fn check<B: Backend, const D: usize>(x: &Tensor<B, D>) -> bool {
            to_f32(x.clone()).is_finite().all().into_data().iter::<bool>().all(|finite| finite)
        }
        match self {
            Self::Linear(weight) => check(weight),
            Self::Conv2d(weight) => check(weight),
        }
    }

    fn fits(&self, layer: &LayerRef<'_, B>) -> bool {
        match (self, layer) {
            (Self::Linear(weight), LayerRef::Linear(_)) => weight.dims() == layer.shape(),
            (Self::Conv2d(weight), LayerRef::Conv2d(layer)) => {
                weight.dims() == [layer.out_channels(), layer.in_channels(), layer.kernel(), layer.kernel()]
            }
            _ => false,
        }
    }

    /// Swaps it with the layer's and returns the old one.
    ///
    /// # Panics
    /// If the layer is of the other kind, which [`fits`](Self::fits) tells.
    fn swap(self, mut layer: LayerMut<'_, B>, merged: bool) -> Self {
        let old = match (self, &mut layer) {
            (Self::Linear(weight), LayerMut::Linear(layer)) => {
                Self::Linear(replace(&mut layer.weight, weight))
            }
            (Self::Conv2d(weight), LayerMut::Conv2d(layer)) => {
                Self::Conv2d(replace(&mut layer.weight, weight))
            }
            _ => panic!("the weight of a convolution and that of a linear layer"),
        };
        layer.set_merged(merged);
        old
    }
}

/// The sum, in f32, of a weight and what the branches add to it, in the weight's dtype.
fn add<'a, B: Backend, const D: usize>(
    weight: &Param<Tensor<B, D>>,
    branches: impl Iterator<Item = &'a Branch<B>>,
) -> Tensor<B, D> {
    let weight = weight.val().detach();
    let (dtype, shape) = (weight.dtype(), weight.dims());
    let sum = branches.fold(to_f32(weight), |sum, branch| sum + branch.delta().reshape(shape));
    if dtype == sum.dtype() { sum } else { sum.cast(dtype) }
}

/// Swaps the tensor, under the id and the trainable flag that the parameter has; returns the old one.
fn replace<B: Backend, const D: usize>(
    param: &mut Param<Tensor<B, D>>,
    tensor: Tensor<B, D>,
) -> Tensor<B, D> {
    let old = param.val();
    *param = Param::initialized(param.id, tensor.set_require_grad(old.is_require_grad()));
    old.detach()
}
