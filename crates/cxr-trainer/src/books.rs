//! The files in which a run can be watched, while it goes on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::checkpoint::{Best, State};
use crate::memory::peak_memory;
use crate::watch::{Journal, Record, Validation, plot_loss};
use crate::{TimestepLoss, TrainError};

/// Steps between two lines of `metrics.jsonl`, as in the paper's Figure 2.
const STEPS_PER_LINE: u64 = 10;
/// Seconds between two drawings of the loss curve.
const SECONDS_PER_PICTURE: u64 = 20;

/// `metrics.jsonl`, `validation.jsonl` and the loss curve.
pub(crate) struct Books<'a> {
    metrics: Journal<Record>,
    validations: Option<Journal<Validation>>,
    curve: PathBuf,
    title: &'a str,
    /// Since the last line.
    since: Instant,
    /// Samples since then.
    samples: usize,
    drawn: Instant,
}

impl<'a> Books<'a> {
    /// Opens those of a run that has done `step` steps; lines of later ones are dropped.
    pub(crate) fn open(
        folder: &Path,
        title: &'a str,
        has_validation: bool,
        step: u64,
    ) -> Result<Self, TrainError> {
        let validations = || Journal::open(&folder.join("validation.jsonl"), step);
        Ok(Self {
            metrics: Journal::open(&folder.join("metrics.jsonl"), step)?,
            validations: has_validation.then(validations).transpose()?,
            curve: folder.join("loss.png"),
            title,
            since: Instant::now(),
            samples: 0,
            drawn: Instant::now(),
        })
    }

    /// Takes in a step; every tenth gets a line.
    pub(crate) fn note(
        &mut self,
        samples: usize,
        line: Option<Record>,
        last: bool,
    ) -> Result<(), TrainError> {
        self.samples += samples;
        let Some(line) = line.filter(|line| line.step.is_multiple_of(STEPS_PER_LINE) || last) else {
            return Ok(());
        };
        let samples_per_second = self.samples as f64 / self.since.elapsed().as_secs_f64().max(1e-9);
        (self.since, self.samples) = (Instant::now(), 0);
        self.metrics.append(Record { samples_per_second, peak_memory: peak_memory(), ..line })?;
        if self.drawn.elapsed().as_secs() >= SECONDS_PER_PICTURE {
            self.draw();
        }
        Ok(())
    }

    /// Takes in a validation; whether it is the best so far.
    pub(crate) fn validate(
        &mut self,
        state: &mut State,
        bins: Vec<TimestepLoss>,
    ) -> Result<bool, TrainError> {
        let (step, loss) = (state.step, bins.iter().map(|bin| bin.loss).sum::<f64>() / bins.len() as f64);
        let improved = loss.is_finite() && state.best.is_none_or(|best| loss < best.loss);
        if improved {
            state.best = Some(Best { step, loss });
        }
        if let Some(validations) = &mut self.validations {
            validations.append(Validation { step, loss, bins })?;
        }
        Ok(improved)
    }

    /// Draws the loss curve. A run does not end because a picture of it cannot be drawn.
    pub(crate) fn draw(&mut self) {
        self.drawn = Instant::now();
        let validations = self.validations.as_ref().map_or(&[][..], Journal::lines);
        if self.metrics.lines().is_empty() {
            return;
        }
        if let Err(problem) = plot_loss(self.metrics.lines(), validations, self.title, &self.curve) {
            log::warn!("{problem}");
        }
    }
}
