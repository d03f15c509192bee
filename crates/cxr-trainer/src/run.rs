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

use crate::checkpoint::{self, State};
use crate::ema::Ema;
use crate::watch::{Metrics, Record};
use crate::{Objective, Sample, TrainConfig, TrainError, gradients};

/// Steps whose loss is not finite that a run puts up with.
const NOT_FINITE_LIMIT: usize = 20;
/// Steps between two lines of `metrics.jsonl`, as in the paper's Figure 2.
const STEPS_PER_LINE: u64 = 10;
/// Weight of the newest loss in the smoothed one.
const SMOOTHING: f64 = 0.02;

/// What [`train`] ends with.
pub struct Trained<M> {
    /// The model after the last step.
    pub model: M,
    /// The model with averaged parameters, where [`TrainConfig::ema`] asks for it.
    pub averaged: Option<M>,
    /// Optimizer steps done.
    pub step: u64,
    /// Whether the run was stopped before its last step.
    pub stopped: bool,
}

/// Trains what is marked trainable in `model` until [`TrainConfig::steps`].
///
/// `folder` receives `metrics.jsonl` and the checkpoints. If it holds checkpoints of the same run (settings, data
/// and parameters), training goes on from the newest; a run that was killed and started again ends with the same
/// weights as one that was not, bit for bit on the CPU with the same processor and number of threads. When
/// `progress` answers `Break`, a checkpoint is written and what is there so far is returned.
///
/// Parameter ids are set to a hash of their path, so that moments find their parameters again.
///
/// # Errors
/// A setting out of range, nothing to train or to train on, a folder of another run, files that cannot be read or
/// written, or a loss that is not finite too often (the last good checkpoint stays).
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
    config.validate()?;
    if objective.is_empty() {
        return Err(TrainError::NoSamples);
    }
    std::fs::create_dir_all(folder).map_err(TrainError::file(folder))?;
    let mut run = Run::<B, O>::start(model, objective, config, folder)?;
    let metrics_path = folder.join("metrics.jsonl");
    let mut metrics = Metrics::open(&metrics_path, run.state.step)?;
    progress.begin("training", Some(config.steps));
    let mut since = (Instant::now(), 0_usize);
    let mut stopped = false;
    while run.state.step < config.steps {
        let step = run.step()?;
        since.1 += step.samples;
        let done = run.state.step;
        if let Some(step) = step.line.filter(|_| done.is_multiple_of(STEPS_PER_LINE) || done == config.steps)
        {
            let samples_per_second = since.1 as f64 / since.0.elapsed().as_secs_f64().max(1e-9);
            since = (Instant::now(), 0);
            metrics.append(&Record { samples_per_second, ..step })?;
        }
        let loss = run.state.smoothed_loss.unwrap_or(f64::NAN);
        let flow = progress.advance(done, &format!("loss {loss:.4}"));
        // after the last step there is nothing left to stop
        stopped = flow == ControlFlow::Break(()) && done < config.steps;
        if done.is_multiple_of(config.checkpoint_every) || done == config.steps || stopped {
            run.save(folder)?;
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
    let averaged = run.ema.as_ref().map(|ema| ema.apply(run.model.clone()));
    Ok(Trained { model: run.model, averaged, step: run.state.step, stopped })
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
}

/// What one step did.
struct Step {
    samples: usize,
    line: Option<Record>,
}

impl<'a, B: AutodiffBackend, O: Objective<B>> Run<'a, B, O> {
    fn start(
        model: O::Model,
        objective: &'a O,
        config: &'a TrainConfig,
        folder: &Path,
    ) -> Result<Self, TrainError> {
        let model = parameters::assign_ids(model, |path| stable_hash(path.as_bytes()));
        if parameters::count(&model).1 == 0 {
            return Err(TrainError::NothingTrainable);
        }
        let fingerprint = fingerprint(&model, objective, config);
        let optimizer = AdamWConfig::new()
            .with_beta_1(config.optimizer.beta_1)
            .with_beta_2(config.optimizer.beta_2)
            .with_epsilon(config.optimizer.epsilon)
            .with_weight_decay(config.optimizer.weight_decay)
            .init();
        let state = State { step: 0, smoothed_loss: None, not_finite: 0, fingerprint };
        let ema = config.ema.map(|decay| Ema::new(decay, &model));
        let mut run = Self { model, optimizer, ema, state, objective, config, order: None };
        if let Some((_, newest)) = checkpoint::list(folder)?.pop() {
            run.load(folder, &newest)?;
        }
        Ok(run)
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<Step, TrainError> {
        let step = self.state.step;
        let batches = self.batches(step);
        let samples: usize = batches.iter().map(Vec::len).sum();
        let mut loss = 0.0;
        let mut grads = GradientsParams::new();
        for batch in &batches {
            let alone = cxr_kernels::graph_guard();
            let position = batch.first().map_or(0, |sample| sample.position);
            self.objective.prepare(&mut self.model, position, self.config.seed);
            let batch_loss = self.objective.loss(&self.model, batch, self.config.seed);
            loss += batch_loss.clone().into_data().iter::<f64>().sum::<f64>() * batch.len() as f64
                / samples as f64;
            let passed = GradientsParams::from_grads(batch_loss.backward(), &self.model);
            drop(alone);
            if batches.len() == 1 {
                grads = passed;
            } else {
                let weight = batch.len() as f64 / samples as f64;
                gradients::accumulate::<B, _>(&self.model, &mut grads, passed, weight);
            }
        }
        let norm = gradients::global_norm::<B, _>(&self.model, &grads);
        self.state.step += 1;
        if !(loss.is_finite() && norm.is_finite()) {
            self.state.not_finite += 1;
            log::warn!("step {step}: loss {loss}, gradient norm {norm}; the step is left out");
            if self.state.not_finite >= NOT_FINITE_LIMIT {
                return Err(TrainError::NotFinite { count: self.state.not_finite, step });
            }
            return Ok(Step { samples, line: None });
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
        };
        Ok(Step { samples, line: Some(line) })
    }

    /// The samples of one optimizer step: the next `accumulation` batches of its epoch, or those that are left.
    fn batches(&mut self, step: u64) -> Vec<Vec<Sample>> {
        let n = self.objective.len();
        let (batch, accumulation) = (self.config.batch_size, self.config.accumulation);
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
        let target = folder.join(format!("checkpoint-{}", self.state.step));
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
        checkpoint::prune(folder, self.config.keep_checkpoints)
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
    sha256_hex(format!("{config:?}\n{}\n{trainable:?}", objective.fingerprint()).as_bytes())[..16].to_string()
}
