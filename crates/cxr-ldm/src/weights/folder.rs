//! A diffusers folder: which files.

use std::path::{Path, PathBuf};

use cxr_kernels::DiffusionBackend;
use cxr_tokenizer::ClipTokenizer;

use super::files::ModelFiles;
use super::names::Component;
use super::options::LoadOptions;
use super::parts::{ModelConfig, ModelParts};
use crate::Error;
use crate::scheduler::NoiseScheduleConfig;
use crate::text::ClipTextConfig;
use crate::unet::UNetConfig;
use crate::vae::AutoencoderKlConfig;

/// A folder in diffusers' layout: `vae/`, `unet/`, `text_encoder/` and `scheduler/`, each with its configuration,
/// and maybe `model_index.json` and `tokenizer/`. Others, as `safety_checker/`, are left alone.
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
    /// As [`ModelFiles::load`].
    pub fn load<B: DiffusionBackend>(
        &self,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<ModelParts<B>, Error> {
        ModelFiles::from_folder(self.clone(), options).load(options, device)
    }

    /// The weight file of a component: safetensors before `.bin`, without a variant before `fp16`.
    ///
    /// # Errors
    /// [`Error::Folder`] naming the files that would do.
    pub fn weight_file(&self, component: Component, variant: Option<&str>) -> Result<PathBuf, Error> {
        let folder = self.root.join(component.folder());
        let names = component.file_names(variant);
        names.iter().map(|name| folder.join(name)).find(|path| path.is_file()).ok_or_else(|| Error::Folder {
            path: folder.clone(),
            problem: format!("no weights; expected one of {}", names.join(", ")),
        })
    }

    /// The folder's own vocabulary (`tokenizer/vocab.json` and `tokenizer/merges.txt`, or `tokenizer/tokenizer.json`)
    /// if it has one, else the embedded one of CLIP, which is the same in all published models.
    pub(super) fn tokenizer(&self) -> Result<ClipTokenizer, Error> {
        let folder = self.root.join("tokenizer");
        let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
        let whole = folder.join("tokenizer.json");
        match (vocab.exists() || merges.exists(), whole.exists()) {
            // one without the other is a copy that broke off: the error names the file that is missing
            (true, _) => Ok(ClipTokenizer::from_files(vocab, merges)?),
            (false, true) => Ok(ClipTokenizer::from_tokenizer_json(whole)?),
            (false, false) => Ok(ClipTokenizer::embedded()),
        }
    }
}

fn read_text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })
}
