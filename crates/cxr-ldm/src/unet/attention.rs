use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::ops::{self, AttentionOptions};
use cxr_lora::{LayerMut, LayerRef, LoraLinear, LoraLinearConfig};

use super::context::KeysValues;

/// Multi-head attention between tokens and a context: diffusers' `Attention`.
///
/// Queries, keys and values have no bias, the output has one. The scale is `d^-0.5`, `d` the width of a head.
#[derive(Module, Debug)]
pub(crate) struct Attention<B: Backend> {
    to_q: LoraLinear<B>,
    to_k: LoraLinear<B>,
    to_v: LoraLinear<B>,
    // a list in the published files, whose second part is a dropout
    to_out: Vec<LoraLinear<B>>,
    heads: usize,
}

impl<B: Backend> Attention<B> {
    /// `width` of the tokens, `context` that of what they attend to.
    pub(crate) fn new(width: usize, context: usize, heads: usize, device: &B::Device) -> Self {
        let plain = |input| LoraLinearConfig::new(input, width).with_bias(false).init(device);
        Self {
            to_q: plain(width),
            to_k: plain(context),
            to_v: plain(context),
            to_out: vec![LoraLinearConfig::new(width, width).init(device)],
            heads,
        }
    }

    pub(crate) fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        for (name, layer) in [("to_q", &self.to_q), ("to_k", &self.to_k), ("to_v", &self.to_v)] {
            visit(&format!("{path}.{name}"), LayerRef::Linear(layer));
        }
        for (i, layer) in self.to_out.iter().enumerate() {
            visit(&format!("{path}.to_out.{i}"), LayerRef::Linear(layer));
        }
    }

    pub(crate) fn visit_layers_mut(&mut self, path: &str, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        for (name, layer) in [("to_q", &mut self.to_q), ("to_k", &mut self.to_k), ("to_v", &mut self.to_v)] {
            visit(&format!("{path}.{name}"), LayerMut::Linear(layer));
        }
        for (i, layer) in self.to_out.iter_mut().enumerate() {
            visit(&format!("{path}.to_out.{i}"), LayerMut::Linear(layer));
        }
    }
}

impl<B: DiffusionBackend> Attention<B> {
    /// `x` `[n, tokens, width]` to the same shape.
    pub(crate) fn forward(&self, x: Tensor<B, 3>, context: KeysValues<B>) -> Tensor<B, 3> {
        let [n, tokens, width] = x.dims();
        let queries = self.split(self.to_q.forward(x));
        let mixed = ops::attention(queries, context.keys, context.values, AttentionOptions::default());
        let joined = mixed.swap_dims(1, 2).reshape([n, tokens, width]);
        self.to_out.iter().fold(joined, |y, layer| layer.forward(y))
    }

    /// Of `context` `[n, tokens, width]`.
    pub(crate) fn keys_values(&self, context: Tensor<B, 3>) -> KeysValues<B> {
        let keys = self.split(self.to_k.forward(context.clone()));
        KeysValues { keys, values: self.split(self.to_v.forward(context)) }
    }

    /// `[n, tokens, heads * d] -> [n, heads, tokens, d]`.
    fn split(&self, x: Tensor<B, 3>) -> Tensor<B, 4> {
        let [n, tokens, width] = x.dims();
        x.reshape([n, tokens, self.heads, width / self.heads]).swap_dims(1, 2)
    }
}
