//! Writing a diffusers folder.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::backend::Backend;
use cxr_core::atomic::AtomicDir;
use cxr_core::tensor_file::{RawTensor, write_safetensors};
use cxr_kernels::nn::parameters;
use cxr_tokenizer::ClipTokenizer;

use super::load::F16_MAX;
use super::names::{Component, published};
use super::parts::ModelConfig;
use crate::Error;
use crate::text::ClipTextModel;
use crate::unet::UNet2dCondition;
use crate::vae::AutoencoderKl;

/// How weights are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SaveDtype {
    /// Half precision: half the size.
    F16,
    /// Half precision with the range of f32 and fewer digits: half the size.
    BF16,
    /// Single precision: what was loaded in f32 comes back bit for bit.
    #[default]
    F32,
}

/// Writes a diffusers folder, which this crate and diffusers load.
///
/// Only base weights are written: adapters are not, they have files of their own. Without `tokenizer` the vocabulary is
/// not written either: this crate has CLIP's, and diffusers has to be given it. The folder appears whole or not at
/// all, in the place of an older model.
///
/// # Errors
/// [`Error::NotFinite`] naming a tensor with a NaN or an infinity, or one that the dtype cannot hold; [`Error::Folder`]
/// if something other than a model is in that place; [`Error::Io`], [`Error::TensorFile`] and [`Error::Tokenizer`] if
/// writing fails.
pub fn save_folder<B: Backend>(
    path: &Path,
    config: &ModelConfig,
    text: &ClipTextModel<B>,
    unet: &UNet2dCondition<B>,
    vae: &AutoencoderKl<B>,
    tokenizer: Option<&ClipTokenizer>,
    dtype: SaveDtype,
) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    if path.exists() && !is_replaceable(path) {
        let problem = "exists and is no model in diffusers' layout; remove it or choose another path".into();
        return Err(Error::Folder { path: path.to_path_buf(), problem });
    }
    let folder = AtomicDir::new(path).map_err(io)?;
    let root = folder.path();
    let write = |name: &str, text: String| {
        let file = root.join(name);
        let parent = file.parent().unwrap_or(root);
        std::fs::create_dir_all(parent).and_then(|()| std::fs::write(&file, text)).map_err(io)
    };
    write("text_encoder/config.json", config.text.to_json())?;
    write("unet/config.json", config.unet.to_json())?;
    write("vae/config.json", config.vae.to_json())?;
    write("scheduler/scheduler_config.json", pretty(&config.schedule))?;
    write("model_index.json", pretty(&model_index(&config.schedule.class_name, tokenizer.is_some())))?;
    if let Some(tokenizer) = tokenizer {
        let folder = root.join("tokenizer");
        std::fs::create_dir(&folder).map_err(io)?;
        tokenizer.save(&folder)?;
    }
    save_module(root, Component::TextEncoder, text, dtype)?;
    save_module(root, Component::Unet, unet, dtype)?;
    save_module(root, Component::Vae, vae, dtype)?;
    folder.commit().map_err(io)?;
    Ok(())
}

fn save_module<B: Backend, M: Module<B>>(
    root: &Path,
    component: Component,
    module: &M,
    dtype: SaveDtype,
) -> Result<(), Error> {
    let mut tensors: Vec<(String, RawTensor)> = Vec::new();
    let mut wrong = None;
    parameters::read::<B, M>(module, |path, data| {
        if is_adapter(path) {
            return;
        }
        let shape = data.shape.to_vec();
        let values: Vec<f32> = data.iter::<f32>().collect();
        let limit = if dtype == SaveDtype::F16 { F16_MAX } else { f32::MAX };
        if !values.iter().all(|value| value.abs() <= limit) {
            wrong.get_or_insert_with(|| format!("{component}: parameter {path} as {dtype:?}"));
        }
        let tensor = RawTensor::from_f32(shape, values);
        let tensor = match dtype {
            SaveDtype::F16 => tensor.to_f16_raw(),
            SaveDtype::BF16 => tensor.to_bf16_raw(),
            SaveDtype::F32 => tensor,
        };
        tensors.push((published(component, path), tensor));
    });
    if let Some(what) = wrong {
        return Err(Error::NotFinite { what });
    }
    // transformers refuses a file that does not say so
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let file = root.join(component.folder()).join(format!("{}.safetensors", component.file_stem()));
    write_safetensors(&file, &tensors, &metadata)?;
    Ok(())
}

/// An older model, or an empty folder: what is neither may be somebody's work.
fn is_replaceable(path: &Path) -> bool {
    let is_empty = || path.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    path.is_dir() && (path.join("model_index.json").is_file() || is_empty())
}

/// Whether a path leads into a LoRA branch of a layer.
fn is_adapter(path: &str) -> bool {
    path.split('.').any(|part| part == "adapters")
}

fn model_index(scheduler: &str, tokenizer: bool) -> serde_json::Value {
    serde_json::json!({
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [null, null],
        "requires_safety_checker": false,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": if tokenizer { ["transformers", "CLIPTokenizer"].map(Some) } else { [None; 2] },
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

fn pretty(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).expect("a struct of numbers and strings is JSON") + "\n"
}
