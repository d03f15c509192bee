//! How long it will take, said before it begins.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context, Result};
use cxr::core::progress::Silent;
use cxr::kernels::DiffusionBackend;
use cxr::ldm::pipeline::{Request, StableDiffusion};
use cxr::ldm::scheduler::Sampler;
use cxr_examples::progress::seconds_text;

use crate::Base;
use crate::args::Settings;

/// A step of the fine-tuning over a denoising step of as many rows: forward, and backward without the gradients of the
/// frozen weights (docs/performance.md has both at full size: 1.7).
const TRAINING: f64 = 2.0;

/// Says how long both sets of pictures and the fine-tuning will take, by the first steps of some pictures.
///
/// `pairs` are the radiographs that the fine-tuning has.
pub(crate) fn tell<B: DiffusionBackend>(
    base: &Base,
    settings: &Settings,
    pairs: usize,
    device: &B::Device,
) -> Result<()> {
    let parts = base.files.load::<B>(&base.loading(), device).context("--model")?;
    let pipeline = StableDiffusion::new(parts, device)?;
    let batch = settings.batch.min(settings.pictures);
    let side = settings.finetune.image_size as usize;
    let timed = |steps: usize| -> Result<f64> {
        let started = Instant::now();
        let request = Request::each(std::iter::repeat_n("No acute cardiopulmonary abnormality.", batch))
            .steps(steps)
            .guidance(settings.guidance)
            .size(side, side)
            .sampler(Sampler::DpmPp2m)
            .batch(batch);
        pipeline.generate_with(&request, &Silent, &mut |_| ControlFlow::Continue(()))?;
        Ok(started.elapsed().as_secs_f64())
    };
    timed(1)?; // a first call brings memory, threads and, on a GPU, kernels into being
    let (one, three) = (timed(1)?, timed(3)?);
    let step = ((three - one) / 2.0).max(0.0);
    let pictures = settings.pictures as f64 / batch as f64
        * ((one - step).max(0.0) + step * settings.sampling_steps as f64);

    let rows = batch as f64 * if settings.guidance == 1.0 { 1.0 } else { 2.0 };
    let config = &settings.finetune;
    let steps = config.train_config(pairs, 1).steps;
    let per_step = TRAINING * step / rows * (config.batch_size * config.accumulation) as f64;
    eprintln!(
        "time: about {} for each of two sets of pictures and {} for {steps} steps of fine-tuning, by the first steps of a \
         picture; looking at the pictures comes after",
        seconds_text(pictures),
        seconds_text(steps as f64 * per_step),
    );
    Ok(())
}
