//! A model whose backend was chosen at run time, behind one type without parameters.

use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;

use cxr_core::progress::{Progress, Silent};
use cxr_kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr_ldm::pipeline::{Image, LoadOptions, LoraUse, ModelConfig, Request, SaveDtype, StableDiffusion};

use crate::device::{DeviceError, DeviceSpec, Program, dispatch};

/// Why a model cannot be opened or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model, an adapter or the request is wrong.
    #[error(transparent)]
    Model(#[from] cxr_ldm::Error),
}

/// Loads a model folder in diffusers' layout on a device.
///
/// The backend is chosen here and forgotten: what comes back has no type parameter. Code that trains, or that
/// wants tensors, goes through [`dispatch`] with a generic [`Program`] instead.
///
/// # Errors
/// - [`Error::Device`] if this build has no such backend, or this machine no such device;
/// - [`Error::Model`] if the folder is no model, or a weight file does not fit it (every tensor that is missing,
///   unexpected or of another shape is named).
pub fn open(path: impl AsRef<Path>, options: LoadOptions, device: DeviceSpec) -> Result<Model, Error> {
    Ok(dispatch(device, Open { path: path.as_ref(), options })??)
}

/// A model on its device, made by [`open`]; several threads may use one at once.
pub struct Model {
    pipeline: Box<dyn Pipeline>,
    device: String,
}

impl Model {
    /// The device it is on, for people, e.g. `flex (CPU)` or `cuda:0`.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Adds a LoRA adapter from a file; several add up. `weight` is how much of it is added, 1 being what it was
    /// trained for.
    ///
    /// # Errors
    /// As [`StableDiffusion::with_lora`].
    pub fn with_lora(self, path: impl AsRef<Path>, weight: f64) -> Result<Self, Error> {
        let pipeline = self.pipeline.with_lora(path.as_ref(), weight)?;
        Ok(Self { pipeline, ..self })
    }

    /// The adapters, in the order in which they were loaded.
    pub fn lora(&self) -> &[LoraUse] {
        self.pipeline.lora()
    }

    /// Makes the pictures.
    ///
    /// # Errors
    /// As [`StableDiffusion::generate_with`].
    pub fn generate(&self, request: &Request) -> Result<Vec<Image>, Error> {
        self.generate_with(request, &Silent)
    }

    /// Makes the pictures, telling how far it is; when `progress` answers `Break`, it ends within one step and
    /// returns the pictures that are finished.
    ///
    /// # Errors
    /// As [`StableDiffusion::generate_with`].
    pub fn generate_with(&self, request: &Request, progress: &dyn Progress) -> Result<Vec<Image>, Error> {
        Ok(self.pipeline.generate(request, progress)?)
    }

    /// The configurations of its parts.
    pub fn config(&self) -> &ModelConfig {
        self.pipeline.config()
    }

    /// The side of the pictures that it was made for, in pixels.
    pub fn default_side(&self) -> usize {
        self.pipeline.default_side()
    }

    /// Width and height of a picture must be multiples of this, in pixels.
    pub fn size_unit(&self) -> usize {
        self.pipeline.size_unit()
    }

    /// Writes the model, without adapters, as a folder in diffusers' layout.
    ///
    /// # Errors
    /// As [`StableDiffusion::save`].
    pub fn save(&self, path: impl AsRef<Path>, dtype: SaveDtype) -> Result<(), Error> {
        Ok(self.pipeline.save(path.as_ref(), dtype)?)
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("device", &self.device)
            .field("lora", &self.lora())
            .finish_non_exhaustive()
    }
}

/// [`StableDiffusion`] without its backend.
trait Pipeline: Send + Sync {
    fn with_lora(self: Box<Self>, path: &Path, weight: f64) -> Result<Box<dyn Pipeline>, cxr_ldm::Error>;
    fn lora(&self) -> &[LoraUse];
    fn generate(&self, request: &Request, progress: &dyn Progress) -> Result<Vec<Image>, cxr_ldm::Error>;
    fn config(&self) -> &ModelConfig;
    fn default_side(&self) -> usize;
    fn size_unit(&self) -> usize;
    fn save(&self, path: &Path, dtype: SaveDtype) -> Result<(), cxr_ldm::Error>;
}

impl<B: DiffusionBackend> Pipeline for StableDiffusion<B> {
    fn with_lora(self: Box<Self>, path: &Path, weight: f64) -> Result<Box<dyn Pipeline>, cxr_ldm::Error> {
        Ok(Box::new(Self::with_lora(*self, path, weight)?))
    }

    fn lora(&self) -> &[LoraUse] {
        self.lora()
    }

    fn generate(&self, request: &Request, progress: &dyn Progress) -> Result<Vec<Image>, cxr_ldm::Error> {
        self.generate_with(request, progress, &mut |_| ControlFlow::Continue(()))
    }

    fn config(&self) -> &ModelConfig {
        &self.parts().config
    }

    fn default_side(&self) -> usize {
        self.default_side()
    }

    fn size_unit(&self) -> usize {
        self.size_unit()
    }

    fn save(&self, path: &Path, dtype: SaveDtype) -> Result<(), cxr_ldm::Error> {
        self.save(path, dtype)
    }
}

struct Open<'a> {
    path: &'a Path,
    options: LoadOptions,
}

impl Program for Open<'_> {
    type Output = Result<Model, cxr_ldm::Error>;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) -> Self::Output {
        // pictures need no gradients
        let pipeline = StableDiffusion::<B::InnerBackend>::load(self.path, self.options, &device)?;
        Ok(Model { pipeline: Box::new(pipeline), device: name.to_string() })
    }
}
