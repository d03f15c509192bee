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

/// A step of the fine-tuning over a denoising step of as many rows: forward, backward without the gradients of the
/// frozen weights, and what comes between. Measured: 2.9 at full size and 128 pixels, 3.2 with the embedded model.
const TRAINING: f64 = 3.0;

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
    let timed = |pictures: usize, guidance: f64, steps: usize| -> Result<f64> {
        let started = Instant::now();
        let request = Request::each(std::iter::repeat_n("No acute cardiopulmonary abnormality.", pictures))
            .steps(steps)
            .guidance(guidance)
            .size(side, side)
            .sampler(Sampler::DpmPp2m)
            .batch(pictures);
        pipeline.generate_with(&request, &Silent, &mut |_| ControlFlow::Continue(()))?;
        Ok(started.elapsed().as_secs_f64())
    };
    // seconds of a step, and of what there is besides
    let step_and_rest = |pictures: usize, guidance: f64| -> Result<(f64, f64)> {
        timed(pictures, guidance, 1)?; // a first call brings memory, threads and, on a GPU, kernels into being
        let (one, three) = (timed(pictures, guidance, 1)?, timed(pictures, guidance, 3)?);
        let step = ((three - one) / 2.0).max(0.0);
        Ok((step, (one - step).max(0.0)))
    };
    let (step, rest) = step_and_rest(batch, settings.guidance)?;
    let pictures = settings.pictures as f64 / batch as f64 * (rest + step * settings.sampling_steps as f64);

    // as many rows as a step of the fine-tuning has, since a row among many costs less
    let config = &settings.finetune;
    let steps = config.train_config(pairs, 1).steps;
    let (step, _) = step_and_rest(config.batch_size, 1.0)?;
    let per_step = TRAINING * step * config.accumulation as f64;
    eprintln!(
        "time: about {} for each of two sets of pictures and {} for {steps} steps of fine-tuning, by the first steps of a \
         picture; looking at the pictures comes after",
        seconds_text(pictures),
        seconds_text(steps as f64 * per_step),
    );
    Ok(())
}
