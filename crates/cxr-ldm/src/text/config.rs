use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use super::model::ClipTextModel;
use crate::Error;
use crate::config::{ConfigFile, to_json, wrong};

const FILE: &str = "text_encoder/config.json";

/// What transformers writes beside the sizes: where the file comes from, how weights were initialized, and settings
/// of models that generate text, which its base class has for all. The marks' ids follow from the vocabulary, and the
/// projection belongs to CLIP's two towers together.
#[rustfmt::skip]
const WITHOUT_EFFECT: [&str; 57] = [
    "architectures", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_factor", "initializer_range", "label2id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "projection_dim",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache", "num_labels",
];

/// The activation between the two layers of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`: OpenAI's models.
    QuickGelu,
    /// Exact: OpenCLIP's.
    Gelu,
}

/// Sizes of a [`ClipTextModel`], as `text_encoder/config.json` has them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClipTextConfig {
    /// The number of tokens.
    pub vocab_size: usize,
    /// Width of embeddings and output.
    pub hidden_size: usize,
    /// Width inside an MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of attention.
    pub num_attention_heads: usize,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Activation of the MLPs.
    pub hidden_act: Activation,
    /// Added to the variance in every norm.
    pub layer_norm_eps: f64,
}

impl ClipTextConfig {
    /// As Stable Diffusion 1.5 publishes it, CLIP ViT-L/14: 123,060,480 parameters.
    pub fn sd15() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }

    /// As Stable Diffusion 1.4 publishes it: the same.
    pub fn sd14() -> Self {
        Self::sd15()
    }

    /// Small enough for tests, with CLIP's whole vocabulary.
    pub fn tiny() -> Self {
        Self {
            hidden_size: 32,
            intermediate_size: 64,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            ..Self::sd15()
        }
    }

    /// Reads `text_encoder/config.json`; a key that is absent has transformers' default.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key that is wrong, or whose value is not implemented.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let mut file = ConfigFile::parse(FILE, text)?;
        file.fixed("model_type", "clip_text_model")?;
        let config = Self {
            vocab_size: file.take("vocab_size", 49408)?,
            hidden_size: file.take("hidden_size", 512)?,
            intermediate_size: file.take("intermediate_size", 2048)?,
            num_hidden_layers: file.take("num_hidden_layers", 12)?,
            num_attention_heads: file.take("num_attention_heads", 8)?,
            max_position_embeddings: file.take("max_position_embeddings", 77)?,
            hidden_act: file.take("hidden_act", Activation::QuickGelu)?,
            layer_norm_eps: file.take("layer_norm_eps", 1e-5)?,
        };
        for key in ["attention_dropout", "dropout"] {
            file.fixed(key, 0)?;
        }
        file.fixed("pruned_heads", serde_json::json!({}))?;
        file.ignore(&WITHOUT_EFFECT);
        file.finish()?;
        config.validate()?;
        Ok(config)
    }

    /// The file that [`from_json`](Self::from_json) and transformers read.
    pub fn to_json(&self) -> String {
        to_json(
            self,
            &[
                ("architectures", vec!["CLIPTextModel"].into()),
                ("model_type", "clip_text_model".into()),
                ("projection_dim", self.hidden_size.into()),
                ("bos_token_id", 49406.into()),
                ("eos_token_id", 49407.into()),
            ],
        )
    }

    /// Checks that a network can be made of it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn validate(&self) -> Result<(), Error> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (key, size) in sizes {
            if size == 0 {
                return wrong(FILE, key, size, "at least 1");
            }
        }
        let (heads, width) = (self.num_attention_heads, self.hidden_size);
        if !width.is_multiple_of(heads) {
            return wrong(FILE, "num_attention_heads", heads, format!("a divisor of hidden_size, {width}"));
        }
        if !(self.layer_norm_eps.is_finite() && self.layer_norm_eps > 0.0) {
            return wrong(FILE, "layer_norm_eps", self.layer_norm_eps, "above 0");
        }
        Ok(())
    }

    /// The network: zeros (norm weights: ones), made when first used.
    ///
    /// # Panics
    /// If the configuration is not [valid](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> ClipTextModel<B> {
        if let Err(error) = self.validate() {
            panic!("{error}");
        }
        ClipTextModel::new(self, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: &str = r#"{
        "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu",
        "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
        "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408 }"#;

    #[test]
    fn the_published_file_is_the_preset() {
        assert_eq!(ClipTextConfig::from_json(PUBLISHED).unwrap(), ClipTextConfig::sd15());
    }

    #[test]
    fn what_is_written_is_read() {
        let config = ClipTextConfig { hidden_act: Activation::Gelu, ..ClipTextConfig::tiny() };
        assert_eq!(ClipTextConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (json, key) in [
            (r#"{"hidden_act": "relu"}"#, "hidden_act"),
            (r#"{"model_type": "t5"}"#, "model_type"),
            (r#"{"num_attention_heads": 7}"#, "num_attention_heads"),
            (r#"{"vocab_size": 0}"#, "vocab_size"),
            (r#"{"layer_norm_eps": -1}"#, "layer_norm_eps"),
            (r#"{"attention_dropout": 0.1}"#, "attention_dropout"),
            (r#"{"pruned_heads": {"0": [1]}}"#, "pruned_heads"),
            (r#"{"is_decoder": true}"#, "is_decoder"),
            (r#"{"add_cross_attention": true}"#, "add_cross_attention"),
            (r#"{"rope_theta": 10000}"#, "rope_theta"),
            (r#"{"quantization_config": {"bits": 8}}"#, "quantization_config"),
        ] {
            let error = ClipTextConfig::from_json(json).unwrap_err().to_string();
            assert!(error.contains(&format!("{FILE}: {key}")), "{json}: {error}");
        }
    }
}
