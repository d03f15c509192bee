//! The diffusion loss against its formula.

use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use cxr_core::random::Stream;
use cxr_ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, PredictionType};
use cxr_trainer::{Denoise, Diffusion, LatentSample, Objective, Sample, SnrWeight};

use crate::common::B;

const SHAPE: [usize; 3] = [2, 3, 2];
const ELEMENTS: usize = 12;

/// `w * latents + timestep / 1000 + condition`.
#[derive(Module, Debug)]
struct Plain<B: Backend> {
    w: Param<Tensor<B, 1>>,
}

impl<B: Backend> Denoise<B> for Plain<B> {
    type Condition = f32;

    fn denoise(&self, latents: Tensor<B, 4>, timesteps: Tensor<B, 1>, conditions: &[&f32]) -> Tensor<B, 4> {
        let n = conditions.len();
        let conditions = TensorData::new(conditions.iter().map(|c| **c).collect::<Vec<f32>>(), [n, 1, 1, 1]);
        let conditions = Tensor::<B, 4>::from_data(conditions, &latents.device());
        let times = timesteps.reshape([n, 1, 1, 1]) / 1000.0;
        latents * self.w.val().reshape([1, 1, 1, 1]) + times + conditions
    }
}

fn objective(
    weight: SnrWeight,
    dropout: f32,
    prediction: PredictionType,
    noise_offset: f32,
) -> Diffusion<B, Plain<B>> {
    let sample = |index: u64| LatentSample {
        mean: Stream::new(2, "mean", index).normals(ELEMENTS),
        // the last one has no deviation
        std: if index == 3 { Vec::new() } else { vec![0.2 + 0.1 * index as f32; ELEMENTS] },
        condition: index as f32,
    };
    let config = NoiseScheduleConfig { prediction_type: prediction, ..NoiseScheduleConfig::sd15() };
    let schedule = NoiseSchedule::new(config).unwrap();
    let samples = (0..4).map(sample).collect();
    let plain = Diffusion::new(&schedule, samples, SHAPE, -1.0, String::new(), &Default::default());
    Diffusion { weight, dropout, noise_offset, ..plain }
}

/// Ho et al., 2020, equation 14 (times the weight of Hang et al., 2023): the mean over all elements.
fn formula(objective: &Diffusion<B, Plain<B>>, samples: &[Sample], w: f64, seed: u64) -> f64 {
    let mut sum = 0.0;
    for sample in samples {
        let item = &objective.samples[sample.index];
        let stream = |purpose: &str| Stream::new(seed, purpose, sample.position);
        let t = stream("timestep").below(1000);
        let (noise, posterior) = (stream("noise").normals(ELEMENTS), stream("posterior").normals(ELEMENTS));
        let offsets = stream("noise offset").normals(SHAPE[0]);
        let is_dropped = stream("caption dropout").uniform() < objective.dropout;
        let condition = if is_dropped { objective.unconditional } else { item.condition };
        let alpha_bar = objective.alphas_cumprod[t as usize];
        let weight = match objective.weight {
            SnrWeight::Uniform => 1.0,
            SnrWeight::MinSnr(gamma) => {
                let snr = alpha_bar / (1.0 - alpha_bar);
                match objective.prediction {
                    PredictionType::Epsilon => snr.min(gamma) / snr,
                    PredictionType::VPrediction => snr.min(gamma) / (snr + 1.0),
                }
            }
        };
        for i in 0..ELEMENTS {
            let std = item.std.get(i).copied().unwrap_or(0.0);
            let latent = f64::from(item.mean[i]) + f64::from(std) * f64::from(posterior[i]);
            let offset = offsets[i / (ELEMENTS / SHAPE[0])];
            let eps = f64::from(noise[i]) + f64::from(objective.noise_offset) * f64::from(offset);
            let noised = alpha_bar.sqrt() * latent + (1.0 - alpha_bar).sqrt() * eps;
            let predicted = w * noised + t as f64 / 1000.0 + f64::from(condition);
            let target = match objective.prediction {
                PredictionType::Epsilon => eps,
                PredictionType::VPrediction => alpha_bar.sqrt() * eps - (1.0 - alpha_bar).sqrt() * latent,
            };
            sum += weight * (predicted - target).powi(2);
        }
    }
    sum / (samples.len() * ELEMENTS) as f64
}

#[test]
fn every_option_is_its_formula() {
    let (w, seed) = (0.7, 9);
    let model = Plain {
        w: Param::from_tensor(Tensor::from_data(TensorData::new(vec![w], [1]), &Default::default())),
    };
    // many positions: timesteps on both sides of the bend, captions kept and dropped
    let samples: Vec<Sample> =
        (0..32).map(|i| Sample { index: i % 4, position: 100 + 3 * i as u64 }).collect();
    let mut losses = Vec::new();
    let (epsilon, velocity) = (PredictionType::Epsilon, PredictionType::VPrediction);
    for (weight, dropout, prediction, offset) in [
        (SnrWeight::Uniform, 0.0, epsilon, 0.0),
        (SnrWeight::Uniform, 0.5, epsilon, 0.0),
        (SnrWeight::Uniform, 0.0, epsilon, 0.5),
        (SnrWeight::Uniform, 0.0, velocity, 0.0),
        (SnrWeight::MinSnr(5.0), 0.0, epsilon, 0.0),
        (SnrWeight::MinSnr(1.0), 0.5, epsilon, 0.0),
        (SnrWeight::MinSnr(1.0), 0.0, velocity, 0.2),
    ] {
        let objective = objective(weight, dropout, prediction, offset);
        let found = objective.loss(&model, &samples, seed);
        assert_eq!(found.dims(), [1]);
        let found: f64 = found.into_data().iter::<f64>().sum();
        let expected = formula(&objective, &samples, w, seed);
        let what = format!("{weight:?}, dropout {dropout}, {prediction:?}, offset {offset}");
        assert!((found / expected - 1.0).abs() < 1e-5, "{what}: {found} {expected}");
        losses.push(found);
    }
    for (i, a) in losses.iter().enumerate() {
        assert!(losses[..i].iter().all(|b| (a / b - 1.0).abs() > 1e-2), "{losses:?}");
    }
    // another seed or position, another loss
    let objective = objective(SnrWeight::Uniform, 0.0, epsilon, 0.0);
    let loss = |samples: &[Sample], seed| {
        objective.loss(&model, samples, seed).into_data().iter::<f64>().sum::<f64>()
    };
    assert_ne!(loss(&samples, seed), loss(&samples, seed + 1));
    assert_ne!(loss(&samples[..1], seed), loss(&[Sample { position: 101, ..samples[0] }], seed));
}

#[test]
fn timesteps_are_uniform() {
    let draws: Vec<u64> = (0..4000).map(|i| Stream::new(0, "timestep", i).below(1000)).collect();
    let mean = draws.iter().sum::<u64>() as f64 / 4000.0;
    // the deviation of the mean is 289 / sqrt(4000) = 4.6
    assert!((mean - 499.5).abs() < 20.0, "{mean}");
    assert!(draws.iter().any(|t| *t < 5) && draws.iter().any(|t| *t > 994));
}
