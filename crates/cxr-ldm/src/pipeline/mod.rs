//! From a prompt to pictures.
//!
//! ```
//! use cxr_ldm::pipeline::{LoadOptions, Request, StableDiffusion};
//! # type Flex = cxr_kernels::Flex;
//! # use cxr_ldm::{pipeline::{ModelConfig, SaveDtype}, scheduler::NoiseScheduleConfig, text::ClipTextConfig};
//! # use cxr_ldm::{unet::UNetConfig, vae::AutoencoderKlConfig};
//! # let folder = tempfile::tempdir().unwrap();
//! # std::env::set_current_dir(&folder).unwrap();
//! # let (text, unet, vae) = (ClipTextConfig::tiny(), UNetConfig::tiny(), AutoencoderKlConfig::tiny());
//! # let parts = ModelConfig { text, unet, vae, schedule: NoiseScheduleConfig::sd15() }.init(&Default::default())?;
//! # StableDiffusion::<Flex>::new(parts, &Default::default())?.save("stable-diffusion-v1-5", SaveDtype::F32)?;
//!
//! let device = Default::default();
//! // a folder, a single-file checkpoint, or a repository's name
//! let sd = StableDiffusion::<Flex>::load("stable-diffusion-v1-5", LoadOptions::default(), &device)?;
//! for image in sd.generate(&Request::new("Small left pleural effusion.").seed(7))? {
//!     image.save_png("out.png")?; // carries prompt, seed, sampler and model hash
//! }
//! # assert!(std::path::Path::new("out.png").is_file());
//! # Ok::<(), cxr_ldm::Error>(())
//! ```

mod generate;
mod guidance;
mod image;
mod noise;
mod request;

use std::path::Path;

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_lora::{TEXT_ENCODER, UNET};
use cxr_tokenizer::Tokens;

pub use generate::Preview;
pub use image::{Image, ImageSettings, InitialUse, LoraUse, PngColor, read_settings_hash};
pub use noise::ImageNoise;
pub use request::{InitialImage, Request};

pub use crate::weights::{
    DEFAULT_REPO, LoadOptions, ModelConfig, ModelFiles, ModelFolder, ModelParts, ModelSource, SaveDtype,
};

use crate::Error;
use crate::layers::as_f32;
use crate::vae::{AutoencoderKl, Tiling};
use crate::weights::save_folder;

/// A latent diffusion model, whole: text in, pictures out.
///
/// Generating takes `&self`: several threads may use one model at once.
#[derive(Debug)]
pub struct StableDiffusion<B: Backend> {
    parts: ModelParts<B>,
    device: B::Device,
    lora: Vec<LoraUse>,
    commit: Option<String>,
}

impl<B: DiffusionBackend> StableDiffusion<B> {
    /// A pipeline of parts that are in memory already, for instance while they are being trained.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if two parts do not fit together.
    pub fn new(parts: ModelParts<B>, device: &B::Device) -> Result<Self, Error> {
        parts.config.validate()?;
        Ok(Self { parts, device: device.clone(), lora: Vec::new(), commit: None })
    }

    /// Loads a model: a folder in diffusers' layout, a single-file checkpoint (`.safetensors`, `.ckpt`), or a
    /// repository by name; see [`ModelFiles::locate`].
    ///
    /// # Errors
    /// As [`ModelFiles::locate`] and [`ModelFiles::load`].
    pub fn load(
        source: impl Into<ModelSource>,
        options: LoadOptions,
        device: &B::Device,
    ) -> Result<Self, Error> {
        let files = ModelFiles::locate(&source.into(), &options)?;
        let commit = files.commit().map(str::to_string);
        Ok(Self { commit, ..Self::new(files.load(&options, device)?, device)? })
    }

    /// Adds a LoRA adapter from a file (of any format that `cxr-lora` reads); several add up.
    ///
    /// `weight` is how much of it is added, 1 being what it was trained for.
    ///
    /// # Errors
    /// [`Error::Lora`] if the file cannot be read or a module of it does not fit the model.
    pub fn with_lora(mut self, path: impl AsRef<Path>, weight: f64) -> Result<Self, Error> {
        self.add_lora(path, weight)?;
        Ok(self)
    }

    /// [`with_lora`](Self::with_lora) in place; the model is as it was if it fails.
    ///
    /// # Errors
    /// As [`with_lora`](Self::with_lora).
    pub fn add_lora(&mut self, path: impl AsRef<Path>, weight: f64) -> Result<(), Error> {
        let path = path.as_ref();
        let (adapter, _format) = cxr_lora::read(path)?;
        let file = cxr_lora::weights_file(path);
        let sha256 = cxr_core::hash::sha256_file(&file).map_err(|source| Error::Io { path: file, source })?;
        let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        // the same file may be loaded twice, an adapter's name in the model may not
        let unique = format!("{}-{}", self.lora.len(), name.replace('.', "-"));
        let models: &mut [(&str, &mut dyn cxr_lora::Adaptable<B>)] =
            &mut [(UNET, &mut self.parts.unet), (TEXT_ENCODER, &mut self.parts.text)];
        cxr_lora::load_named(models, &adapter, &unique, weight)?;
        self.lora.push(LoraUse { name, sha256, weight });
        Ok(())
    }

    /// Adds the adapters into the weights for good, in f32, and takes them off: a step then costs what it costs
    /// without them, and [`save`](Self::save) writes what they made of the model. [`lora`](Self::lora) still lists
    /// them. Returns how many layers changed; diffusers calls this `fuse_lora`.
    ///
    /// # Errors
    /// [`Error::Lora`] without an adapter, and if a weight would not be finite; the model is unchanged then.
    pub fn fuse_lora(&mut self) -> Result<usize, Error> {
        let (unet, text) = (&mut self.parts.unet, &mut self.parts.text);
        let merged = match cxr_lora::merge(unet) {
            Ok(merged) => Some(merged),
            Err(cxr_lora::LoraError::NothingToMerge) => None,
            Err(error) => return Err(error.into()),
        };
        let of_text = match (cxr_lora::merge_and_detach(text), &merged) {
            (Ok(layers), _) => layers,
            (Err(cxr_lora::LoraError::NothingToMerge), Some(_)) => 0,
            (Err(error), _) => {
                if let Some(merged) = merged {
                    cxr_lora::unmerge(unet, merged)?;
                }
                return Err(error.into());
            }
        };
        if merged.is_some() {
            cxr_lora::detach_merged(unet);
        }
        Ok(merged.map_or(0, |merged| merged.layers()) + of_text)
    }

    /// Writes the model, without adapters and with its vocabulary, as a diffusers folder.
    ///
    /// # Errors
    /// As [`save_folder`].
    pub fn save(&self, path: impl AsRef<Path>, dtype: SaveDtype) -> Result<(), Error> {
        let parts = &self.parts;
        let (path, tokenizer) = (path.as_ref(), Some(&parts.tokenizer));
        save_folder(path, &parts.config, &parts.text, &parts.unet, &parts.vae, tokenizer, dtype)
    }

    /// The parts.
    pub fn parts(&self) -> &ModelParts<B> {
        &self.parts
    }

    /// The parts, to be used for something else.
    pub fn into_parts(self) -> ModelParts<B> {
        self.parts
    }

    /// The commit of the repository that it was loaded from; `None` for a local file or folder.
    pub fn commit(&self) -> Option<&str> {
        self.commit.as_deref()
    }

    /// The adapters, in the order in which they were loaded.
    pub fn lora(&self) -> &[LoraUse] {
        &self.lora
    }

    /// Pixels per latent, along each side: 8 for Stable Diffusion.
    pub fn vae_factor(&self) -> usize {
        1 << self.parts.config.vae.block_out_channels.len().saturating_sub(1)
    }

    /// Width and height must be multiples of this: the autoencoder's factor, 8 for Stable Diffusion.
    ///
    /// Multiples of 64 are best: between them the UNet's coarser levels round, as they do in diffusers.
    pub fn size_unit(&self) -> usize {
        self.vae_factor()
    }

    /// The side of the pictures that the model was made for, in pixels.
    pub fn default_side(&self) -> usize {
        self.parts.config.unet.sample_size * self.vae_factor()
    }

    fn dtype(&self) -> DType {
        self.parts.dtype.into()
    }
}

impl<B: DiffusionBackend> StableDiffusion<B> {
    /// The text encoder's last hidden state for some prompts, `[n, 77, d]`.
    ///
    /// A prompt that is too long is cut, with a warning, as diffusers does; an error if `strict`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Mismatch`] if the text encoder has fewer tokens than the tokenizer.
    pub fn encode_prompts(&self, prompts: &[&str], strict: bool) -> Result<Tensor<B, 3>, Error> {
        let mut ids: Vec<i64> = Vec::new();
        for prompt in prompts {
            ids.extend(self.tokens(prompt, strict)?.ids.iter().map(|&id| i64::from(id)));
        }
        let (known, needed) =
            (self.parts.config.text.vocab_size, ids.iter().max().map_or(0, |id| *id as usize + 1));
        if needed > known {
            return Err(Error::Mismatch {
                left: "text_encoder vocab_size".into(),
                left_value: known,
                right: "tokens of the prompt, the highest id and one,".into(),
                right_value: needed,
            });
        }
        let width = ids.len() / prompts.len().max(1);
        let ids = TensorData::new(ids, [prompts.len(), width]);
        Ok(self.parts.text.forward(Tensor::<B, 2, Int>::from_data(ids, &self.device)))
    }

    /// A prompt's tokens; one that is not read whole is a warning, an error if `strict`.
    fn tokens(&self, prompt: &str, strict: bool) -> Result<Tokens, Error> {
        let tokens = self.parts.tokenizer.encode(prompt);
        if !tokens.truncated {
            return Ok(tokens);
        }
        let (limit, found) = (tokens.ids.len(), self.parts.tokenizer.length(prompt));
        if strict {
            return Err(Error::PromptTooLong { prompt: prompt.into(), found, limit });
        }
        log::warn!("prompt of {found} tokens cut to {limit}: {prompt:?}");
        Ok(tokens)
    }

    /// Pixels `[n, 3, h, w]`, in [-1, 1] but for overshoot, f32, of scaled latents `[n, c, h / f, w / f]`.
    ///
    /// A half-precision decoder can overflow: a result that is not finite is made again in f32.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if it is not finite in f32 either.
    pub fn decode(&self, latents: Tensor<B, 4>) -> Result<TensorData, Error> {
        self.decode_with(latents, false)
    }

    /// [`decode`](Self::decode), in tiles if `tiling`.
    fn decode_with(&self, latents: Tensor<B, 4>, tiling: bool) -> Result<TensorData, Error> {
        let decode = |vae: &AutoencoderKl<B>, latents| match tiling {
            true => Tiling::new(&self.parts.config.vae).decode(vae, latents),
            false => vae.decode(latents),
        };
        let unscaled = latents / self.parts.config.vae.scaling_factor;
        let pixels = to_f32(decode(&self.parts.vae, unscaled.clone().cast(self.parts.dtype)));
        if is_finite(&pixels) {
            return Ok(pixels);
        }
        if self.dtype() != DType::F32 && is_finite(&to_f32(unscaled.clone())) {
            log::warn!("the decoded picture is not finite in {:?}: decoding again in f32", self.parts.dtype);
            let pixels = to_f32(decode(&as_f32(self.parts.vae.clone()), unscaled.cast(DType::F32)));
            if is_finite(&pixels) {
                return Ok(pixels);
            }
        }
        Err(Error::NotFinite { what: "the decoded picture".into() })
    }
}

fn to_f32<B: Backend>(tensor: Tensor<B, 4>) -> TensorData {
    tensor.into_data().convert::<f32>()
}

fn is_finite(data: &TensorData) -> bool {
    data.iter::<f32>().all(f32::is_finite)
}
