//! The names under which published files keep a model's tensors, and the paths of the same tensors here.

use std::fmt;

/// One of the three networks of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// The CLIP text encoder.
    TextEncoder,
    /// The denoiser.
    Unet,
    /// The autoencoder.
    Vae,
}

impl Component {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::TextEncoder, Self::Unet, Self::Vae];

    /// The subfolder of a diffusers folder.
    pub fn folder(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::Unet => "unet",
            Self::Vae => "vae",
        }
    }

    /// The stem of its weight file there.
    pub fn file_stem(self) -> &'static str {
        match self {
            Self::TextEncoder => "model",
            Self::Unet | Self::Vae => "diffusion_pytorch_model",
        }
    }

    /// The names of weight files that would do, the best first: safetensors before `.bin`, and, where no variant is
    /// asked for, none before `fp16`.
    pub(super) fn file_names(self, variant: Option<&str>) -> Vec<String> {
        let safe = self.file_stem();
        let pickled = if self == Self::TextEncoder { "pytorch_model" } else { safe };
        let variants = match variant {
            Some(variant) => vec![format!(".{variant}")],
            None => vec![String::new(), ".fp16".into()],
        };
        let names =
            |variant: &String| [format!("{safe}{variant}.safetensors"), format!("{pickled}{variant}.bin")];
        variants.iter().flat_map(names).collect()
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.folder())
    }
}

/// The text encoder's outer module in transformers, which newer exports leave out.
const TEXT_PREFIX: &str = "text_model.";

/// The projections of the VAE's attention: as published with SD 1.x, and as diffusers calls them since.
const VAE_ATTENTION: [(&str, &str); 4] =
    [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];

/// One spelling for all spellings of a tensor's name; `None` for a buffer that holds no weights.
///
/// It goes over the names in files and over the parameters' paths alike, so that the two can be compared.
pub fn canonical(component: Component, name: &str) -> Option<String> {
    match component {
        Component::TextEncoder => {
            let name = name.strip_prefix(TEXT_PREFIX).unwrap_or(name);
            // an int64 buffer 0..77 in older checkpoints
            (name != "embeddings.position_ids").then(|| name.to_string())
        }
        Component::Unet => Some(name.to_string()),
        Component::Vae => Some(modern_attention(name)),
    }
}

/// The name under which diffusers and transformers write the tensor.
pub fn published(component: Component, path: &str) -> String {
    match component {
        Component::TextEncoder if !path.starts_with(TEXT_PREFIX) => format!("{TEXT_PREFIX}{path}"),
        _ => path.to_string(),
    }
}

/// `x.attentions.0.query.weight` as `x.attentions.0.to_q.weight`; other names as they are.
fn modern_attention(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    if let [head @ .., "attentions", index, old, tensor] = &parts[..]
        && let Some((_, new)) = VAE_ATTENTION.iter().find(|(published, _)| published == old)
    {
        let head: String = head.iter().flat_map(|part| [part, "."]).collect();
        return format!("{head}attentions.{index}.{new}.{tensor}");
    }
    name.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_attention_names_of_the_vae() {
        for (old, new) in [
            ("encoder.mid_block.attentions.0.query.weight", "encoder.mid_block.attentions.0.to_q.weight"),
            ("decoder.mid_block.attentions.0.key.bias", "decoder.mid_block.attentions.0.to_k.bias"),
            ("decoder.mid_block.attentions.0.value.bias", "decoder.mid_block.attentions.0.to_v.bias"),
            (
                "decoder.mid_block.attentions.0.proj_attn.weight",
                "decoder.mid_block.attentions.0.to_out.0.weight",
            ),
        ] {
            assert_eq!(canonical(Component::Vae, old).unwrap(), new);
            assert_eq!(canonical(Component::Vae, new).unwrap(), new);
        }
        // not in attention, not the VAE
        assert_eq!(canonical(Component::Vae, "key.weight").unwrap(), "key.weight");
        let unet = "mid_block.attentions.0.query.weight";
        assert_eq!(canonical(Component::Unet, unet).unwrap(), unet);
    }

    #[test]
    fn text_encoders_with_and_without_prefix_and_buffer() {
        let long = "text_model.encoder.layers.0.mlp.fc1.weight";
        let short = "encoder.layers.0.mlp.fc1.weight";
        assert_eq!(canonical(Component::TextEncoder, long), canonical(Component::TextEncoder, short));
        assert_eq!(canonical(Component::TextEncoder, "text_model.embeddings.position_ids"), None);
        assert_eq!(canonical(Component::TextEncoder, "embeddings.position_ids"), None);
        assert!(canonical(Component::TextEncoder, "embeddings.position_embedding.weight").is_some());
        assert_eq!(published(Component::TextEncoder, short), long);
        assert_eq!(published(Component::TextEncoder, long), long);
    }
}
