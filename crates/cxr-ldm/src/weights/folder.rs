//! A diffusers folder: which files, read how.

use std::path::{Path, PathBuf};

use burn::tensor::{FloatDType, backend::Backend};
use cxr_tokenizer::ClipTokenizer;

use super::load::{WeightsHash, load_module};
use super::names::Component;
use crate::Error;
use crate::scheduler::{NoiseSchedule, NoiseScheduleConfig};
use crate::text::{ClipTextConfig, ClipTextModel};
use crate::unet::{UNet2dCondition, UNetConfig};
use crate::vae::{AutoencoderKl, AutoencoderKlConfig};

/// How a model is loaded.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LoadOptions {
    /// The dtype in which weights are kept, and with it that of the activations. Default: f32.
    pub dtype: FloatDType,
    /// The variant in the names of the weight files, e.g. `fp16`. Default: the files without one, or, where a
    /// component has none, its `fp16` files.
    pub variant: Option<String>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { dtype: FloatDType::F32, variant: None }
    }
}

impl LoadOptions {
    /// Sets the dtype of the weights.
    pub fn with_dtype(self, dtype: FloatDType) -> Self {
        Self { dtype, ..self }
    }

    /// Takes the weight files of a variant and no others.
    pub fn with_variant(self, variant: impl Into<String>) -> Self {
        Self { variant: Some(variant.into()), ..self }
    }
}

/// The configurations of a model's parts.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// `text_encoder/config.json`.
    pub text: ClipTextConfig,
    /// `unet/config.json`.
    pub unet: UNetConfig,
    /// `vae/config.json`.
    pub vae: AutoencoderKlConfig,
    /// `scheduler/scheduler_config.json`.
    pub schedule: NoiseScheduleConfig,
}

impl ModelConfig {
    /// The parts as they are before any weights: zeros, made when first used.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if two parts do not fit together, [`Error::SchedulerConfig`] if the schedule is out of
    /// range.
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<ModelParts<B>, Error> {
        self.validate()?;
        Ok(ModelParts {
            text: self.text.init(device),
            unet: self.unet.init(device),
            vae: self.vae.init(device),
            tokenizer: ClipTokenizer::embedded(),
            schedule: NoiseSchedule::new(self.schedule.clone())?,
            config: self.clone(),
            dtype: FloatDType::F32,
            hash: String::new(),
        })
    }

    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// [`Error::Mismatch`], naming both keys.
    pub fn validate(&self) -> Result<(), Error> {
        let same = |left: &str, a: usize, right: &str, b: usize| match a == b {
            true => Ok(()),
            false => {
                Err(Error::Mismatch { left: left.into(), left_value: a, right: right.into(), right_value: b })
            }
        };
        let latents = self.vae.latent_channels;
        same("unet in_channels", self.unet.in_channels, "vae latent_channels", latents)?;
        same("unet out_channels", self.unet.out_channels, "vae latent_channels", latents)?;
        let width = self.text.hidden_size;
        same("unet cross_attention_dim", self.unet.cross_attention_dim, "text_encoder hidden_size", width)
    }
}

/// Everything that a pipeline is made of.
#[derive(Debug)]
pub struct ModelParts<B: Backend> {
    /// The text encoder.
    pub text: ClipTextModel<B>,
    /// The denoiser.
    pub unet: UNet2dCondition<B>,
    /// The autoencoder.
    pub vae: AutoencoderKl<B>,
    /// The tokenizer.
    pub tokenizer: ClipTokenizer,
    /// The noise schedule.
    pub schedule: NoiseSchedule,
    /// What they were made from.
    pub config: ModelConfig,
    /// The dtype of the weights of all three networks.
    pub dtype: FloatDType,
    /// SHA-256 over all weights in hex; empty for a model that was not loaded.
    pub hash: String,
}

/// A folder in diffusers' layout: `vae/`, `unet/`, `text_encoder/` and `scheduler/`, each with its configuration,
/// and maybe `model_index.json` and `tokenizer/`.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    root: PathBuf,
}

impl ModelFolder {
    /// Looks at the folder without reading weights.
    ///
    /// # Errors
    /// [`Error::Folder`] if it is not there, lacks a part, or is another kind of pipeline.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let root = path.into();
        let wrong = |problem: String| Err(Error::Folder { path: root.clone(), problem });
        if !root.is_dir() {
            return wrong("not a folder".into());
        }
        for part in ["text_encoder", "unet", "vae", "scheduler"] {
            if !root.join(part).is_dir() {
                return wrong(format!(
                    "no subfolder {part}; expected diffusers' layout with text_encoder, unet, vae, scheduler"
                ));
            }
        }
        let index = root.join("model_index.json");
        if index.exists() {
            let text = read_text(&index)?;
            let json: serde_json::Value = serde_json::from_str(&text)
                .map_err(|e| Error::Folder { path: index.clone(), problem: format!("not JSON: {e}") })?;
            let class = json.get("_class_name").and_then(|name| name.as_str()).unwrap_or("none");
            // its siblings for image to image and the like have the same parts
            if !class.starts_with("StableDiffusion") || class.contains("XL") || class.contains('3') {
                return wrong(format!(
                    "model_index.json is of class {class}, expected StableDiffusionPipeline (Stable Diffusion 1.x)"
                ));
            }
        }
        Ok(Self { root })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Reads the four configuration files.
    ///
    /// # Errors
    /// [`Error::Io`] naming a file that cannot be read; an error that names the key and the value for a
    /// configuration that is not supported; [`Error::Mismatch`] if two parts do not fit together.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        let read = |part: &str, file: &str| read_text(&self.root.join(part).join(file));
        let config = ModelConfig {
            text: ClipTextConfig::from_json(&read("text_encoder", "config.json")?)?,
            unet: UNetConfig::from_json(&read("unet", "config.json")?)?,
            vae: AutoencoderKlConfig::from_json(&read("vae", "config.json")?)?,
            schedule: NoiseScheduleConfig::from_json(&read("scheduler", "scheduler_config.json")?)?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Loads everything to `device`, tensor by tensor.
    ///
    /// # Errors
    /// As [`config`](Self::config), and [`Error::Weights`], [`Error::NotFinite`] and [`Error::TensorFile`] for what
    /// is wrong with a weight file, [`Error::Tokenizer`] for what is wrong with the vocabulary.
    pub fn load<B: Backend>(
        &self,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<ModelParts<B>, Error> {
        let parts = self.config()?.init::<B>(device)?;
        let file = |component| self.weight_file(component, options.variant.as_deref());
        // all are found before the first is read, which may take a while
        let [text, unet, vae] = [Component::TextEncoder, Component::Unet, Component::Vae].map(file);
        let (text, unet, vae) = (text?, unet?, vae?);
        let (dtype, mut hash) = (options.dtype, WeightsHash::default());
        Ok(ModelParts {
            text: load_module(parts.text, Component::TextEncoder, &text, dtype, &mut hash)?,
            unet: load_module(parts.unet, Component::Unet, &unet, dtype, &mut hash)?,
            vae: load_module(parts.vae, Component::Vae, &vae, dtype, &mut hash)?,
            tokenizer: self.tokenizer()?,
            dtype,
            hash: hash.finish(),
            ..parts
        })
    }

    /// The weight file of a component: safetensors before `.bin`, without a variant before `fp16`.
    ///
    /// # Errors
    /// [`Error::Folder`] naming the files that would do.
    pub fn weight_file(&self, component: Component, variant: Option<&str>) -> Result<PathBuf, Error> {
        let folder = self.root.join(component.folder());
        let safe = component.file_stem();
        let pickled = if component == Component::TextEncoder { "pytorch_model" } else { safe };
        let variants = match variant {
            Some(variant) => vec![format!(".{variant}")],
            None => vec![String::new(), ".fp16".into()],
        };
        let names: Vec<String> = variants
            .iter()
            .flat_map(|variant| [format!("{safe}{variant}.safetensors"), format!("{pickled}{variant}.bin")])
            .collect();
        names.iter().map(|name| folder.join(name)).find(|path| path.is_file()).ok_or_else(|| Error::Folder {
            path: folder.clone(),
            problem: format!("no weights; expected one of {}", names.join(", ")),
        })
    }

    /// The folder's own vocabulary (`tokenizer/vocab.json`, `tokenizer/merges.txt`) if it has one, else the embedded
    /// one of CLIP, which is the same in all published models.
    fn tokenizer(&self) -> Result<ClipTokenizer, Error> {
        let folder = self.root.join("tokenizer");
        let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
        if !vocab.exists() && !merges.exists() {
            return Ok(ClipTokenizer::embedded());
        }
        // one without the other is a copy that broke off: the error names the file that is missing
        Ok(ClipTokenizer::from_files(vocab, merges)?)
    }
}

pub(super) fn read_text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })
}
