//! A model of one vector, whose training can be written down: the loss of a sample is `|w - target|^2 / 2`.

use std::collections::BTreeSet;

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use cxr_core::random::Stream;
use cxr_dataset::epoch_order;
use cxr_trainer::{Objective, Sample, TrainConfig};

use crate::common::B;

pub(crate) const WIDTH: usize = 6;

#[derive(Module, Debug)]
pub(crate) struct Toy<B: Backend> {
    pub(crate) w: Param<Tensor<B, 1>>,
}

pub(crate) fn start() -> Vec<f32> {
    (0..WIDTH).map(|i| 0.3 * i as f32 - 1.0).collect()
}

pub(crate) fn toy() -> Toy<B> {
    Toy { w: Param::from_tensor(Tensor::from_data(TensorData::new(start(), [WIDTH]), &Default::default())) }
}

pub(crate) fn values(model: &Toy<B>) -> Vec<f64> {
    model.w.val().into_data().iter::<f64>().collect()
}

/// The data.
pub(crate) struct Targets {
    pub(crate) targets: Vec<Vec<f32>>,
    /// Positions of samples whose loss is no number.
    pub(crate) poisoned: BTreeSet<u64>,
    pub(crate) fingerprint: String,
}

impl Targets {
    pub(crate) fn new(n: usize) -> Self {
        Self {
            targets: (0..n as u64).map(|i| Stream::new(3, "target", i).normals(WIDTH)).collect(),
            poisoned: BTreeSet::new(),
            fingerprint: format!("{n} targets"),
        }
    }
}

impl Objective<B> for Targets {
    type Model = Toy<B>;

    fn len(&self) -> usize {
        self.targets.len()
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn loss(&self, model: &Toy<B>, samples: &[Sample], _seed: u64) -> Tensor<B, 1> {
        let rows = samples.iter().flat_map(|sample| self.targets[sample.index].clone()).collect::<Vec<_>>();
        let targets =
            Tensor::<B, 2>::from_data(TensorData::new(rows, [samples.len(), WIDTH]), &Default::default());
        let error = model.w.val().unsqueeze::<2>() - targets;
        let loss = error.powi_scalar(2).sum() / (2 * samples.len()) as f64;
        let is_poisoned = samples.iter().any(|sample| self.poisoned.contains(&sample.position));
        if is_poisoned { loss * f64::NAN } else { loss }
    }
}

/// What training ends with.
pub(crate) struct Expected {
    pub(crate) weights: Vec<f64>,
    pub(crate) averaged: Vec<f64>,
    /// Of each step, before clipping.
    pub(crate) norms: Vec<f64>,
    pub(crate) losses: Vec<f64>,
}

/// The same training in plain f64: AdamW (Loshchilov and Hutter, 2019, algorithm 2) on the mean over all samples of a
/// step.
pub(crate) fn expected(data: &Targets, config: &TrainConfig) -> Expected {
    let mut w: Vec<f64> = start().iter().map(|v| f64::from(*v)).collect();
    let (mut averaged, mut norms, mut losses) = (w.clone(), Vec::new(), Vec::new());
    let (mut first, mut second, mut updates) = (vec![0.0; WIDTH], vec![0.0; WIDTH], 0);
    let o = config.optimizer;
    let [beta_1, beta_2, epsilon, decay] = [o.beta_1, o.beta_2, o.epsilon, o.weight_decay].map(f64::from);
    let n = data.targets.len();
    let per_step = config.batch_size * config.accumulation;
    let steps_per_epoch = n.div_ceil(per_step) as u64;
    for step in 0..config.steps {
        let (epoch, place) = (step / steps_per_epoch, (step % steps_per_epoch) as usize * per_step);
        let places = place..n.min(place + per_step);
        let order = epoch_order(n, config.seed, epoch);
        let samples: Vec<&Vec<f32>> = places.clone().map(|place| &data.targets[order[place]]).collect();
        let mean = |i: usize| samples.iter().map(|t| f64::from(t[i])).sum::<f64>() / samples.len() as f64;
        let mut gradient: Vec<f64> = (0..WIDTH).map(|i| w[i] - mean(i)).collect();
        let squares = |t: &&Vec<f32>| w.iter().zip(*t).map(|(w, t)| (w - f64::from(*t)).powi(2)).sum::<f64>();
        losses.push(samples.iter().map(squares).sum::<f64>() / (2 * samples.len()) as f64);
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        norms.push(norm);
        if places.clone().any(|place| data.poisoned.contains(&(epoch * n as u64 + place as u64))) {
            continue;
        }
        if let Some(limit) = config.clip_norm.filter(|limit| norm > *limit) {
            gradient.iter_mut().for_each(|g| *g *= limit / norm);
        }
        updates += 1;
        let rate = config.learning_rate.at(step, config.steps);
        for i in 0..WIDTH {
            first[i] = beta_1 * first[i] + (1.0 - beta_1) * gradient[i];
            second[i] = beta_2 * second[i] + (1.0 - beta_2) * gradient[i].powi(2);
            let corrected = first[i] / (1.0 - beta_1.powi(updates));
            let root = (second[i] / (1.0 - beta_2.powi(updates))).sqrt();
            w[i] -= rate * (corrected / (root + epsilon) + decay * w[i]);
        }
        if let Some(decay) = config.ema {
            let decay = decay.min((1.0 + step as f64) / (10.0 + step as f64));
            averaged.iter_mut().zip(&w).for_each(|(a, w)| *a = decay * *a + (1.0 - decay) * w);
        }
    }
    Expected { weights: w, averaged, norms, losses }
}
