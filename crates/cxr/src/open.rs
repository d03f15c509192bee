//! A model whose backend was chosen at run time, behind one trait without parameters.

use std::fmt;
use std::ops::{ControlFlow, Range};
use std::path::Path;

use cxr_core::progress::{Progress, Silent};
use cxr_kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr_ldm::pipeline::{
    Image, ImageSettings, LoadOptions, LoraUse, ModelConfig, ModelSource, Request, SaveDtype, StableDiffusion,
};

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

/// Makes pictures: a model on its device, whichever that is. Several threads may use one at once.
pub trait Synthesizer: fmt::Debug + Send + Sync {
    /// The device it is on, for people, e.g. `flex (CPU)` or `cuda:0`.
    fn device(&self) -> &str;

    /// Adds a LoRA adapter from a file; several add up. `weight` is how much of it is added, 1 being what it was
    /// trained for.
    ///
    /// # Errors
    /// As [`StableDiffusion::with_lora`].
    fn add_lora(&mut self, path: &Path, weight: f64) -> Result<(), Error>;

    /// The adapters, in the order in which they were loaded.
    fn lora(&self) -> &[LoraUse];

    /// Adds the adapters into the weights for good; returns how many layers changed.
    ///
    /// # Errors
    /// As [`StableDiffusion::fuse_lora`].
    fn fuse_lora(&mut self) -> Result<usize, Error>;

    /// Makes the pictures.
    ///
    /// # Errors
    /// As [`StableDiffusion::generate_with`].
    fn generate(&self, request: &Request) -> Result<Vec<Image>, Error> {
        self.generate_with(request, &Silent, &mut |_| ControlFlow::Continue(()))
    }

    /// Makes the pictures, telling how far it is; when `progress` or `on_step` answers `Break`, it ends within one
    /// step and returns the pictures that are finished.
    ///
    /// # Errors
    /// As [`StableDiffusion::generate_with`].
    fn generate_with(
        &self,
        request: &Request,
        progress: &dyn Progress,
        on_step: &mut dyn FnMut(StepView<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Image>, Error>;

    /// What the pictures of a request will have been made from, one for each, without making them.
    ///
    /// # Errors
    /// As [`StableDiffusion::settings`].
    fn settings(&self, request: &Request) -> Result<Vec<ImageSettings>, Error>;

    /// How often the UNet is called for a batch of the request: what progress counts in.
    ///
    /// # Errors
    /// As [`StableDiffusion::steps_per_batch`].
    fn steps_per_batch(&self, request: &Request) -> Result<usize, Error>;

    /// The configurations of its parts.
    fn config(&self) -> &ModelConfig;

    /// The side of the pictures that it was made for, in pixels.
    fn default_side(&self) -> usize;

    /// Width and height of a picture must be multiples of this, in pixels.
    fn size_unit(&self) -> usize;

    /// Writes the model, without adapters, as a folder in diffusers' layout.
    ///
    /// # Errors
    /// As [`StableDiffusion::save`].
    fn save(&self, path: &Path, dtype: SaveDtype) -> Result<(), Error>;
}

/// A step of [`Synthesizer::generate_with`].
pub struct StepView<'a> {
    /// The pictures of the batch, by index in the request.
    pub images: Range<usize>,
    /// The index of the step, from 0.
    pub index: usize,
    /// The number of steps.
    pub total: usize,
    /// The training timestep at which it was made.
    pub timestep: f64,
    decode: &'a dyn Fn() -> Result<Vec<Image>, cxr_ldm::Error>,
}

impl StepView<'_> {
    /// The pictures as this step predicts them. Takes a run of the decoder: ask for it now and then.
    ///
    /// # Errors
    /// If a picture is not finite.
    pub fn preview(&self) -> Result<Vec<Image>, Error> {
        Ok((self.decode)()?)
    }
}

impl fmt::Debug for StepView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { images, index, total, timestep, .. } = self;
        f.debug_struct("StepView")
            .field("images", images)
            .field("index", index)
            .field("total", total)
            .field("timestep", timestep)
            .finish_non_exhaustive()
    }
}

/// Loads a model on a device: `auto`, or any name that [`DeviceSpec`] reads.
///
/// `source` is a folder in diffusers' layout, a single-file checkpoint, or a repository's name. The backend is
/// chosen here and forgotten: what comes back has no type parameter. Code that trains, or that wants tensors, goes
/// through [`dispatch`] with a generic [`Program`] instead.
///
/// # Errors
/// - [`Error::Device`] if there is no such device, this build has no such backend, or this machine no such device;
/// - [`Error::Model`] if the source is no model, or a weight file does not fit it (every tensor that is missing,
///   unexpected or of another shape is named).
pub fn open(
    device: &str,
    source: impl Into<ModelSource>,
    options: LoadOptions,
) -> Result<Box<dyn Synthesizer + Send + Sync>, Error> {
    let spec: DeviceSpec = device.parse()?;
    Ok(dispatch(spec, Open { source: source.into(), options })??)
}

struct Open {
    source: ModelSource,
    options: LoadOptions,
}

impl Program for Open {
    type Output = Result<Box<dyn Synthesizer + Send + Sync>, cxr_ldm::Error>;

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) -> Self::Output {
        // pictures need no gradients
        let pipeline = StableDiffusion::<B::InnerBackend>::load(self.source, self.options, &device)?;
        Ok(Box::new(OnDevice { pipeline, device: name.to_string() }))
    }
}

/// A pipeline with the name of its device.
#[derive(Debug)]
struct OnDevice<B: DiffusionBackend> {
    pipeline: StableDiffusion<B>,
    device: String,
}

impl<B: DiffusionBackend> Synthesizer for OnDevice<B> {
    fn device(&self) -> &str {
        &self.device
    }

    fn add_lora(&mut self, path: &Path, weight: f64) -> Result<(), Error> {
        Ok(self.pipeline.add_lora(path, weight)?)
    }

    fn lora(&self) -> &[LoraUse] {
        self.pipeline.lora()
    }

    fn fuse_lora(&mut self) -> Result<usize, Error> {
        Ok(self.pipeline.fuse_lora()?)
    }

    fn generate_with(
        &self,
        request: &Request,
        progress: &dyn Progress,
        on_step: &mut dyn FnMut(StepView<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Image>, Error> {
        let images = self.pipeline.generate_with(request, progress, &mut |preview| {
            let decode = || self.pipeline.preview(request, &preview);
            let step = &preview.step;
            on_step(StepView {
                images: preview.images.clone(),
                index: step.index,
                total: step.total,
                timestep: step.timestep,
                decode: &decode,
            })
        })?;
        Ok(images)
    }

    fn settings(&self, request: &Request) -> Result<Vec<ImageSettings>, Error> {
        Ok(self.pipeline.settings(request)?)
    }

    fn steps_per_batch(&self, request: &Request) -> Result<usize, Error> {
        Ok(self.pipeline.steps_per_batch(request)?)
    }

    fn config(&self) -> &ModelConfig {
        &self.pipeline.parts().config
    }

    fn default_side(&self) -> usize {
        self.pipeline.default_side()
    }

    fn size_unit(&self) -> usize {
        self.pipeline.size_unit()
    }

    fn save(&self, path: &Path, dtype: SaveDtype) -> Result<(), Error> {
        Ok(self.pipeline.save(path, dtype)?)
    }
}
