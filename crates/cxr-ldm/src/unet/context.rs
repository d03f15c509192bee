use std::ops::Range;

use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;

use super::attention::Attention;

/// What the UNet is conditioned on: the text encoder's last hidden state `[n, tokens, width]`, one row per latent.
///
/// Made by [`Context::new`], keys and values are computed in every forward pass and are part of its graph: for
/// training. Made by [`UNet2dCondition::prepare`](super::UNet2dCondition::prepare) they have been computed, once
/// for all steps of sampling. The output is the same.
#[derive(Debug, Clone)]
pub struct Context<B: Backend> {
    source: Source<B>,
}

#[derive(Debug, Clone)]
enum Source<B: Backend> {
    Hidden(Tensor<B, 3>),
    /// Keys and values of every cross-attention, in the order of the forward pass.
    Prepared(Vec<KeysValues<B>>),
}

/// Keys and values, `[n, heads, tokens, d]` each.
#[derive(Debug, Clone)]
pub(crate) struct KeysValues<B: Backend> {
    pub(crate) keys: Tensor<B, 4>,
    pub(crate) values: Tensor<B, 4>,
}

impl<B: Backend> Context<B> {
    /// A context of `hidden` `[n, tokens, width]`.
    pub fn new(hidden: Tensor<B, 3>) -> Self {
        Self { source: Source::Hidden(hidden) }
    }

    pub(crate) fn prepared(layers: Vec<KeysValues<B>>) -> Self {
        Self { source: Source::Prepared(layers) }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn rows_of(&self, rows: Range<usize>) -> Self {
        let source = match &self.source {
            Source::Hidden(hidden) => Source::Hidden(hidden.clone().slice(rows)),
            Source::Prepared(layers) => {
                let part = |x: &Tensor<B, 4>| x.clone().slice(rows.clone());
                let layer =
                    |kv: &KeysValues<B>| KeysValues { keys: part(&kv.keys), values: part(&kv.values) };
                Source::Prepared(layers.iter().map(layer).collect())
            }
        };
        Self { source }
    }

    /// The number of rows; `None` for a UNet without cross-attention.
    pub(crate) fn rows(&self) -> Option<usize> {
        match &self.source {
            Source::Hidden(hidden) => Some(hidden.dims()[0]),
            Source::Prepared(layers) => layers.first().map(|layer| layer.keys.dims()[0]),
        }
    }

    /// For one forward pass.
    pub(crate) fn reader(&self) -> ContextReader<'_, B> {
        ContextReader { source: &self.source, next: 0 }
    }
}

/// Hands keys and values to one cross-attention after the other.
#[derive(Debug)]
pub(crate) struct ContextReader<'a, B: Backend> {
    source: &'a Source<B>,
    next: usize,
}

impl<B: DiffusionBackend> ContextReader<'_, B> {
    /// Those of the next cross-attention, which is `layer`.
    pub(crate) fn next(&mut self, layer: &Attention<B>) -> KeysValues<B> {
        match self.source {
            Source::Hidden(hidden) => layer.keys_values(hidden.clone()),
            Source::Prepared(layers) => {
                self.next += 1;
                let layers_count = layers.len();
                layers.get(self.next - 1).cloned().unwrap_or_else(|| {
                    panic!(
                        "a context prepared by a UNet with {layers_count} cross-attentions, this one has more"
                    )
                })
            }
        }
    }
}
