//! Pictures of the same prompts and seeds along the way.

use std::path::{Path, PathBuf};

use burn::module::AutodiffModule;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::Error;
use cxr::ldm::pipeline::{LoadOptions, ModelParts, Request, StableDiffusion};
use cxr::ldm::scheduler::NoiseSchedule;
use cxr::ldm::unet::UNet2dCondition;
use cxr::ldm::weights::ModelFiles;
use cxr::trainer::{FinetuneConfig, SampleConfig};

use super::data::float;
use crate::sheet::Sheet;

/// What makes the pictures; the autoencoder and the text encoder are in memory only while it does.
pub(super) struct Pictures<'a> {
    pub(super) config: &'a FinetuneConfig,
    pub(super) files: &'a ModelFiles,
    /// As the model is loaded, without its progress: the run's own is under way.
    pub(super) options: LoadOptions,
    pub(super) hash: &'a str,
    pub(super) out: &'a Path,
}

impl Pictures<'_> {
    /// The grid of a step.
    pub(super) fn path(out: &Path, step: u64) -> PathBuf {
        out.join("samples").join(format!("step-{step:07}.png"))
    }

    /// Makes the grid of a step: one picture of each prompt, in one row or more.
    pub(super) fn make<B: DiffusionAutodiff>(
        &self,
        step: u64,
        unet: &UNet2dCondition<B>,
        device: &B::Device,
    ) -> Result<(), Error> {
        self.draw::<B::InnerBackend>(step, unet.valid(), device)
    }

    fn draw<B: DiffusionBackend>(
        &self,
        step: u64,
        unet: UNet2dCondition<B>,
        device: &B::Device,
    ) -> Result<(), Error> {
        let config = self.files.config()?;
        let parts = ModelParts {
            text: self.files.load_text(&self.options, device)?,
            unet,
            vae: self.files.load_vae(&self.options, device)?,
            tokenizer: self.files.tokenizer()?,
            schedule: NoiseSchedule::new(config.schedule.clone())?,
            dtype: float(self.config.base_dtype),
            hash: self.hash.to_owned(),
            config,
        };
        let SampleConfig { prompts, steps, guidance, seed, .. } = &self.config.samples;
        let side = self.config.image_size as usize;
        let request = Request::each(prompts.iter().map(String::as_str))
            .seeds((0..prompts.len() as u64).map(|place| seed.wrapping_add(place)))
            .steps(*steps)
            .guidance(*guidance)
            .size(side, side);
        let mut sheet = Sheet::default();
        for image in StableDiffusion::new(parts, device)?.generate(&request)? {
            sheet.add(&image);
        }
        let path = Self::path(self.out, step);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|source| Error::Io { path: folder.to_path_buf(), source })?;
        }
        sheet.save_with(prompts.len().min(8), &path)
    }
}
