//! Which layers an adapter goes on, and how a model lists those it has.

use burn::tensor::backend::Backend;

use crate::linear::LoraLinear;

/// A model's layer that an adapter can be attached to, by reference.
#[derive(Debug)]
#[non_exhaustive]
pub enum LayerRef<'a, B: Backend> {
    /// A linear layer.
    Linear(&'a LoraLinear<B>),
}

/// A model's layer that an adapter can be attached to, by mutable reference.
#[derive(Debug)]
#[non_exhaustive]
pub enum LayerMut<'a, B: Backend> {
    /// A linear layer.
    Linear(&'a mut LoraLinear<B>),
}

/// A model that lists the layers which an adapter can be attached to.
///
/// The path of a layer is its path as a module (`down_blocks.0.attentions.0. ... .attn1.to_q`), which is the stem
/// of its weight's key in the model's file. Both visits list the same layers in the same order.
pub trait Adaptable<B: Backend> {
    /// Calls `visit` with the path of every layer and the layer.
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>));

    /// Calls `visit` with the path of every layer and the layer.
    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>));
}
