use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig};
use cxr_lora::{Adaptable, LayerMut, LayerRef};

use super::ClipTextConfig;
use super::layer::EncoderLayer;

/// CLIP's text encoder (Radford et al. 2021) up to its last hidden state: transformers' `CLIPTextModel`.
///
/// Made by [`ClipTextConfig::init`]. The path of a parameter is its key in the published file.
#[derive(Module, Debug)]
pub struct ClipTextModel<B: Backend> {
    text_model: TextTransformer<B>,
}

#[derive(Module, Debug)]
struct TextTransformer<B: Backend> {
    embeddings: Embeddings<B>,
    encoder: Encoder<B>,
    final_layer_norm: LayerNorm<B>,
}

#[derive(Module, Debug)]
struct Embeddings<B: Backend> {
    token_embedding: Embedding<B>,
    position_embedding: Embedding<B>,
}

#[derive(Module, Debug)]
struct Encoder<B: Backend> {
    layers: Vec<EncoderLayer<B>>,
}

impl<B: Backend> ClipTextModel<B> {
    pub(crate) fn new(config: &ClipTextConfig, device: &B::Device) -> Self {
        let width = config.hidden_size;
        let embedding = |count| EmbeddingConfig::new(count, width).init(device);
        let layers = (0..config.num_hidden_layers).map(|_| EncoderLayer::new(config, device)).collect();
        Self {
            text_model: TextTransformer {
                embeddings: Embeddings {
                    token_embedding: embedding(config.vocab_size),
                    position_embedding: embedding(config.max_position_embeddings),
                },
                encoder: Encoder { layers },
                final_layer_norm: LayerNormConfig::new(width).with_eps(config.layer_norm_eps).init(device),
            },
        }
    }
}

impl<B: DiffusionBackend> ClipTextModel<B> {
    /// The last hidden state after the final norm, `[n, tokens, hidden_size]`, of token ids `[n, tokens]`.
    ///
    /// Padding is not masked: Stable Diffusion was trained with it.
    ///
    /// # Panics
    /// If there are more tokens than positions. An id beyond the vocabulary panics or not, as the backend has it.
    pub fn forward(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let model = &self.text_model;
        let [_, tokens] = ids.dims();
        let positions = model.embeddings.position_embedding.weight.val();
        let [longest, _] = positions.dims();
        assert!(tokens <= longest, "{tokens} tokens, the text encoder has {longest} positions");
        let x = model.embeddings.token_embedding.forward(ids) + positions.slice(0..tokens).unsqueeze();
        let x = model.encoder.layers.iter().fold(x, |x, layer| layer.forward(x));
        model.final_layer_norm.forward(x)
    }
}

/// The projections of all attentions and the layers of the MLPs.
impl<B: Backend> Adaptable<B> for ClipTextModel<B> {
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        for (i, layer) in self.text_model.encoder.layers.iter().enumerate() {
            layer.visit_layers(&format!("text_model.encoder.layers.{i}"), visit);
        }
    }

    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        for (i, layer) in self.text_model.encoder.layers.iter_mut().enumerate() {
            layer.visit_layers_mut(&format!("text_model.encoder.layers.{i}"), visit);
        }
    }
}
