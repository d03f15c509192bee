//! The loop.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::module::{Module, ParamId};
use burn::optim::{AdamW, AdamWConfig, GradientsParams, Optimizer, adaptor::OptimizerAdaptor};
use burn::record::{BinFileRecorder, FullPrecisionSettings, Recorder};
use burn::tensor::backend::AutodiffBackend;
use cxr_core::atomic::AtomicDir;
use cxr_core::hash::{sha256_hex, stable_hash};
use cxr_core::progress::Progress;
use cxr_dataset::epoch_order;
use cxr_kernels::nn::parameters;

use crate::books::Books;
use crate::checkpoint::{self, Best, State};
use crate::distributed::{Alone, Ranks, expect_same};
use crate::ema::Ema;
use crate::watch::Record;
use crate::{Objective, Sample, TimestepLoss, TrainConfig, TrainError, gradients};

/// Steps whose loss is not finite that a run puts up with.
const NOT_FINITE_LIMIT: usize = 20;
/// Weight of the newest loss in the smoothed one.
const SMOOTHING: f64 = 0.02;

/// What a run ends with.
pub struct Trained<M> {
    /// The model after the last step.
    pub model: M,
    /// The model with averaged parameters, where [`TrainConfig::ema`] asks for it.
    pub averaged: Option<M>,
    /// Optimizer steps done.
    pub step: u64,
    /// Whether the run was stopped before its last step.
    pub stopped: bool,
    /// The step with the lowest validation loss, whose checkpoint is kept.
    pub best: Option<Best>,
}

/// Trains what is marked trainable in `model` until [`TrainConfig::steps`]: [`Training`] without anything besides.
///
/// # Errors
/// As [`Training::run`].
pub fn train<B, O>(
    model: O::Model,
    objective: &O,
    config: &TrainConfig,
    folder: &Path,
    progress: &dyn Progress,
) -> Result<Trained<O::Model>, TrainError>
where
    B: AutodiffBackend,
    O: Objective<B>,
{
    Training::new(objective, config, folder).run(model, progress)
}

type Validate<'a, M> = Box<dyn Fn(&M) -> Result<Vec<TimestepLoss>, TrainError> + 'a>;
type Show<'a, M> = Box<dyn Fn(u64, &M) -> Result<(), TrainError> + 'a>;

/// A run that is about to start: what is done besides the steps, and by how many processes.
pub struct Training<'a, B: AutodiffBackend, O: Objective<B>> {
    objective: &'a O,
    config: &'a TrainConfig,
    folder: &'a Path,
    title: &'a str,
    validate: Option<(u64, Validate<'a, O::Model>)>,
    show: Option<(u64, Show<'a, O::Model>)>,
    ranks: &'a dyn Ranks,
}

impl<'a, B: AutodiffBackend, O: Objective<B>> Training<'a, B, O> {
    /// A run in `folder`, of this process alone.
    pub fn new(objective: &'a O, config: &'a TrainConfig, folder: &'a Path) -> Self {
        Self { objective, config, folder, title: "Loss", validate: None, show: None, ranks: &Alone }
    }

    /// The title of the loss curve.
    pub fn title(self, title: &'a str) -> Self {
        Self { title, ..self }
    }

    /// Measures the validation loss every `every` steps and at the end, of the averaged parameters where there are any;
    /// the checkpoint with the lowest mean is kept.
    pub fn validate(
        self,
        every: u64,
        loss: impl Fn(&O::Model) -> Result<Vec<TimestepLoss>, TrainError> + 'a,
    ) -> Self {
        Self { validate: Some((every.max(1), Box::new(loss))), ..self }
    }

    /// Calls `show` every `every` steps and at the end, with the step and the model, of the averaged parameters where
    /// there are any: for pictures.
    pub fn show(self, every: u64, show: impl Fn(u64, &O::Model) -> Result<(), TrainError> + 'a) -> Self {
        Self { show: Some((every.max(1), Box::new(show))), ..self }
    }

    /// Shares the work with other processes, which run the same on the same data.
    ///
    /// Rank 0 writes all files, validates and shows; the others read checkpoints from the same folder when a run goes on.
    /// A step has [`TrainConfig::batch_size`] samples for each rank and each accumulated pass.
    pub fn ranks(self, ranks: &'a dyn Ranks) -> Self {
        Self { ranks, ..self }
    }

    /// Trains what is marked trainable in `model` until [`TrainConfig::steps`].
    ///
    /// The folder receives `metrics.jsonl`, `loss.png`, which is drawn again as it goes, the checkpoints, and
    /// `validation.jsonl` where there is a validation. If it holds checkpoints of the same run (settings, data and
    /// parameters), training goes on from the newest; a run that was killed and started again ends with the same weights
    /// as one that was not, bit for bit on the CPU with the same processor and number of threads. When `progress` answers
    /// `Break`, a checkpoint is written and what is there so far is returned.
    ///
    /// Parameter ids are set to a hash of their path, so that moments find their parameters again.
    ///
    /// # Errors
    /// A setting out of range, nothing to train or to train on, a folder of another run, files that cannot be read or
    /// written, a loss that is not finite too often (the last good checkpoint stays), ranks that differ, or what a
    /// validation or `show` says.
    pub fn run(&self, model: O::Model, progress: &dyn Progress) -> Result<Trained<O::Model>, TrainError> {
        let Self { objective, config, folder, ranks, .. } = *self;
        config.validate()?;
        if objective.is_empty() {
            return Err(TrainError::NoSamples);
        }
        let writes = ranks.rank() == 0;
        if writes {
            std::fs::create_dir_all(folder).map_err(TrainError::file(folder))?;
            checkpoint::clean(folder)?;
        }
        let mut run = Run::<B, O>::start(model, objective, config, folder, ranks)?;
        let open = || Books::open(folder, self.title, self.validate.is_some(), run.state.step);
        let mut books = writes.then(open).transpose()?;
        progress.begin("training", Some(config.steps));
        let (first, begun) = (run.state.step, Instant::now());
        let mut stopped = false;
        while run.state.step < config.steps {
            let step = run.step()?;
            let done = run.state.step;
            let last = done == config.steps;
            if let Some(books) = &mut books {
                books.note(step.samples, step.line, last)?;
            }
            let loss = run.state.smoothed_loss.unwrap_or(f64::NAN);
            let rate = (done - first) as f64 / begun.elapsed().as_secs_f64().max(1e-9);
            let flow = progress.advance(done, &format!("loss {loss:.4}, {rate:.2} steps/s"));
            run.asked_to_stop |= flow == ControlFlow::Break(());
            // Several ranks agree on the step: what was asked for is known to all after the next one. After the last
            // step there is nothing left to stop.
            stopped = !last && if ranks.size() == 1 { run.asked_to_stop } else { step.stop };
            let Some(books) = &mut books else {
                if stopped {
                    break;
                }
                continue;
            };
            let due = |every: u64| done.is_multiple_of(every) || last;
            let mut improved = false;
            if let Some((every, validate)) = &self.validate
                && due(*every)
            {
                let bins = validate(&run.averaged())?;
                improved = books.validate(&mut run.state, bins)?;
            }
            if due(config.checkpoint_every) || stopped || improved {
                run.save(folder)?;
            }
            if let Some((every, show)) = &self.show
                && due(*every)
            {
                show(done, &run.averaged())?;
            }
            if last || stopped {
                books.draw();
            }
            if stopped {
                break;
            }
        }
        progress.end(&format!(
            "{} steps, loss {:.4}",
            run.state.step,
            run.state.smoothed_loss.unwrap_or(f64::NAN)
        ));
        // Until rank 0 has written its last checkpoint, nobody tells the user that it is there.
        ranks.wait();
        let averaged = run.ema.as_ref().map(|ema| ema.apply(run.model.clone()));
        Ok(Trained { model: run.model, averaged, step: run.state.step, stopped, best: run.state.best })
    }
}

type Adam<B, M> = OptimizerAdaptor<AdamW, M, B>;

/// A run under way.
struct Run<'a, B: AutodiffBackend, O: Objective<B>> {
    model: O::Model,
    optimizer: Adam<B, O::Model>,
    ema: Option<Ema<B>>,
    state: State,
    objective: &'a O,
    config: &'a TrainConfig,
    /// The order of the epoch that was asked for last.
    order: Option<(u64, Vec<usize>)>,
    ranks: &'a dyn Ranks,
    /// Whether this process was asked to stop.
    asked_to_stop: bool,
}

/// What one step did.
struct Step {
    /// Samples of all ranks.
    samples: usize,
    line: Option<Record>,
    /// Whether a rank was asked to stop before the step.
    stop: bool,
}

impl<'a, B: AutodiffBackend, O: Objective<B>> Run<'a, B, O> {
    fn start(
        model: O::Model,
        objective: &'a O,
        config: &'a TrainConfig,
        folder: &Path,
        ranks: &'a dyn Ranks,
    ) -> Result<Self, TrainError> {
        let model = parameters::assign_ids(model, |path| stable_hash(path.as_bytes()));
        if parameters::count(&model).1 == 0 {
            return Err(TrainError::NothingTrainable);
        }
        let fingerprint = fingerprint(&model, objective, config, ranks.size());
        expect_same(ranks, &fingerprint, "settings and data")?;
        let optimizer = AdamWConfig::new()
            .with_beta_1(config.optimizer.beta_1)
            .with_beta_2(config.optimizer.beta_2)
            .with_epsilon(config.optimizer.epsilon)
            .with_weight_decay(config.optimizer.weight_decay)
            .init();
        let state = State { step: 0, smoothed_loss: None, not_finite: 0, fingerprint, best: None };
        let ema = config.ema.map(|decay| Ema::new(decay, &model));
        let mut run = Self {
            model,
            optimizer,
            ema,
            state,
            objective,
            config,
            order: None,
            ranks,
            asked_to_stop: false,
        };
        let newest = checkpoint::list(folder)?.pop();
        let step = newest.as_ref().map_or(0, |(step, _)| *step);
        expect_same(ranks, &format!("{step:x}"), "checkpoints in their folder")?;
        if let Some((_, newest)) = newest {
            run.load(folder, &newest)?;
            log::info!("going on from {}", newest.display());
        }
        Ok(run)
    }

    /// The model with averaged parameters, or, without averages, as it is.
    fn averaged(&self) -> O::Model {
        match &self.ema {
            Some(ema) => ema.apply(self.model.clone()),
            None => self.model.clone(),
        }
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<Step, TrainError> {
        let step = self.state.step;
        let batches = self.batches(step);
        let samples: usize = batches.iter().map(Vec::len).sum();
        let (rank, ranks) = (self.ranks.rank(), self.ranks.size());
        let mut loss = 0.0;
        let mut grads = GradientsParams::new();
        for batch in batches.iter().skip(rank).step_by(ranks) {
            let alone = cxr_kernels::graph_guard();
            let position = batch.first().map_or(0, |sample| sample.position);
            self.objective.prepare(&mut self.model, position, self.config.seed);
            let (batch_loss, passed) = self.objective.gradients(&self.model, batch, self.config.seed);
            drop(alone);
            let weight = batch.len() as f64 / samples as f64;
            loss += batch_loss * weight;
            if batches.len() == 1 {
                grads = passed;
            } else {
                gradients::accumulate::<B, _>(&self.model, &mut grads, passed, weight);
            }
        }
        let mut stop = self.asked_to_stop;
        if ranks > 1 {
            // One message for everything that all have to know.
            let mut sums = gradients::flatten::<B, _>(&self.model, &grads);
            let count = sums.len();
            sums.extend([loss as f32, f32::from(u8::from(stop))]);
            self.ranks.sum(&mut sums)?;
            (loss, stop) = (f64::from(sums[count]), sums[count + 1] > 0.0);
            grads = gradients::unflatten::<B, _>(&self.model, &sums[..count]);
        }
        let norm = gradients::global_norm::<B, _>(&self.model, &grads);
        self.state.step += 1;
        if !(loss.is_finite() && norm.is_finite()) {
            self.state.not_finite += 1;
            log::warn!("step {step}: loss {loss}, gradient norm {norm}; the step is left out");
            if self.state.not_finite >= NOT_FINITE_LIMIT {
                return Err(TrainError::NotFinite { count: self.state.not_finite, step });
            }
            return Ok(Step { samples, line: None, stop });
        }
        if let Some(limit) = self.config.clip_norm.filter(|limit| norm > *limit) {
            grads = gradients::scale::<B, _>(&self.model, grads, limit / norm);
        }
        let learning_rate = self.config.learning_rate.at(step, self.config.steps);
        self.model = self.optimizer.step(learning_rate, self.model.clone(), grads);
        if let Some(ema) = &mut self.ema {
            ema.update(&self.model, step);
        }
        let smoothed = self.state.smoothed_loss.map_or(loss, |old| old + SMOOTHING * (loss - old));
        self.state.smoothed_loss = Some(smoothed);
        let epoch = batches[0][0].position / self.objective.len() as u64;
        let line = Record {
            step: step + 1,
            epoch,
            loss,
            smoothed,
            learning_rate,
            gradient_norm: norm,
            samples_per_second: 0.0,
            peak_memory: None,
        };
        Ok(Step { samples, line: Some(line), stop })
    }

    /// The samples of one optimizer step: the next `accumulation` batches of its epoch for each rank, or those that are
    /// left. Ranks take one after the other in turn.
    fn batches(&mut self, step: u64) -> Vec<Vec<Sample>> {
        let n = self.objective.len();
        let (batch, accumulation) = (self.config.batch_size, self.config.accumulation * self.ranks.size());
        let steps_per_epoch = n.div_ceil(batch * accumulation) as u64;
        let (epoch, place) = (step / steps_per_epoch, (step % steps_per_epoch) as usize);
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = Some((epoch, epoch_order(n, self.config.seed, epoch)));
        }
        let order = self.order.as_ref().map(|(_, order)| order.as_slice()).unwrap_or_default();
        let first = place * batch * accumulation;
        let last = (first + batch * accumulation).min(n);
        let samples: Vec<Sample> = (first..last)
            .map(|place| Sample { index: order[place], position: epoch * n as u64 + place as u64 })
            .collect();
        samples.chunks(batch).map(<[Sample]>::to_vec).collect()
    }

    fn save(&self, folder: &Path) -> Result<(), TrainError> {
        let target = checkpoint::path(folder, self.state.step);
        if target.exists() {
            return Ok(());
        }
        let files = TrainError::file;
        let temporary = AtomicDir::new(&target).map_err(files(&target))?;
        checkpoint::save_trainable(&self.model, &temporary.path().join(checkpoint::PARAMETERS))?;
        if let Some(ema) = &self.ema {
            checkpoint::save_trainable(
                &ema.apply(self.model.clone()),
                &temporary.path().join(checkpoint::EMA),
            )?;
        }
        BinFileRecorder::<FullPrecisionSettings>::new()
            .record(self.optimizer.to_record(), temporary.path().join(checkpoint::OPTIMIZER))
            .map_err(|problem| TrainError::Checkpoint {
                path: target.clone(),
                problem: problem.to_string(),
            })?;
        let state = serde_json::to_vec_pretty(&self.state).map_err(|problem| TrainError::Checkpoint {
            path: target.clone(),
            problem: problem.to_string(),
        })?;
        std::fs::write(temporary.path().join(checkpoint::STATE), state).map_err(files(&target))?;
        temporary.commit().map_err(files(&target))?;
        checkpoint::prune(folder, self.config.keep_checkpoints, self.state.best)
    }

    fn load(&mut self, folder: &Path, path: &Path) -> Result<(), TrainError> {
        let state = checkpoint::read_state(path)?;
        if state.fingerprint != self.state.fingerprint {
            return Err(TrainError::OtherRun {
                folder: folder.to_path_buf(),
                found: state.fingerprint,
                expected: self.state.fingerprint.clone(),
            });
        }
        let wrong = |problem: String| TrainError::Checkpoint { path: path.to_path_buf(), problem };
        if self.ema.is_some() {
            let averaged = checkpoint::load_trainable(self.model.clone(), &path.join(checkpoint::EMA))?;
            self.ema = self.config.ema.map(|decay| Ema::new(decay, &averaged));
        }
        self.model = checkpoint::load_trainable(self.model.clone(), &path.join(checkpoint::PARAMETERS))?;
        let device = self.model.devices().into_iter().next().unwrap_or_default();
        let record: <Adam<B, O::Model> as Optimizer<O::Model, B>>::Record =
            BinFileRecorder::<FullPrecisionSettings>::new()
                .load(path.join(checkpoint::OPTIMIZER), &device)
                .map_err(|problem| wrong(format!("optimizer: {problem}")))?;
        // A parameter without moments would start anew in silence.
        let missing = parameters::list(&self.model)
            .into_iter()
            .find(|info| info.trainable && !record.contains_key(&ParamId::from(info.id)));
        if let Some(info) = missing.filter(|_| state.step > state.not_finite as u64) {
            return Err(wrong(format!("the optimizer has no state for {}", info.path)));
        }
        self.optimizer = self.optimizer.clone().load_record(record);
        self.state = state;
        Ok(())
    }
}

/// Settings, data and trainable parameters, hashed; the number of steps and what concerns files alone are left
/// out, so that a run can be made longer.
fn fingerprint<B: AutodiffBackend, O: Objective<B>>(
    model: &O::Model,
    objective: &O,
    config: &TrainConfig,
    ranks: usize,
) -> String {
    let constant = config.learning_rate.schedule == crate::Schedule::Constant;
    let config = TrainConfig {
        steps: if constant { 1 } else { config.steps },
        checkpoint_every: 1,
        keep_checkpoints: 1,
        ..config.clone()
    };
    let trainable: Vec<_> = parameters::list(model)
        .into_iter()
        .filter(|info| info.trainable)
        .map(|info| (info.path, info.shape))
        .collect();
    let mut text = format!("{config:?}\n{}\n{trainable:?}", objective.fingerprint());
    if ranks > 1 {
        text += &format!("\n{ranks} ranks");
    }
    sha256_hex(text.as_bytes())[..16].to_string()
}
