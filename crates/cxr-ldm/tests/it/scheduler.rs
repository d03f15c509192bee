//! The samplers against diffusers: `fixtures/scheduler_generate.py` wrote the reference.

use std::ops::ControlFlow;

use burn::tensor::{Tensor, TensorData};
use cxr_kernels::Flex;
use cxr_ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, PredictionType, Sampler, Steps, sample};
use serde::Deserialize;

type Latents = Tensor<Flex, 4>;

#[derive(Deserialize)]
struct Fixture {
    shape: [usize; 4],
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    sampler: String,
    config: serde_json::Value,
    steps: usize,
    eta: f64,
    start: usize,
    timesteps: Vec<i64>,
    result: Vec<f32>,
}

fn tensor(values: Vec<f32>, shape: [usize; 4]) -> Latents {
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

fn formula(shape: [usize; 4], of: impl Fn(f64) -> f64) -> Latents {
    let count = shape.iter().product::<usize>();
    tensor((0..count).map(|i| of(i as f64) as f32).collect(), shape)
}

fn values(x: Latents) -> Vec<f32> {
    x.into_data().to_vec().unwrap()
}

/// The norm of the difference over the norm of the reference.
fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| (a - b) as f64))
        / norm(&mut expected.iter().map(|&b| b as f64))
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../fixtures/scheduler.json")).unwrap()
}

fn run(case: &Case, shape: [usize; 4]) -> Vec<f32> {
    let config = NoiseScheduleConfig::from_json(&case.config.to_string()).unwrap();
    let schedule = NoiseSchedule::new(config).unwrap();
    let sampler = match case.sampler.parse().unwrap() {
        Sampler::Ddim { .. } => Sampler::Ddim { eta: case.eta },
        other => other,
    };
    assert_eq!(sampler.timesteps(&schedule, case.steps).unwrap(), case.timesteps, "{}", describe(case));
    let sampled = sample(
        &sampler,
        &schedule,
        Steps::new(case.steps).starting_at(case.start),
        formula(shape, |i| 1.4 * (i * 0.7 + 0.3).sin()),
        |x, t| x.clone().tanh() * 0.8 + x * 0.1 + 0.2 * (t as f64 / 200.0).cos(),
        |step, shape| formula(shape, |i| 1.4 * (i * 1.3 + step as f64).cos()),
        |_| ControlFlow::Continue(()),
    )
    .unwrap();
    assert!(sampled.finished);
    values(sampled.latents)
}

fn describe(case: &Case) -> String {
    format!("{} {} steps, eta {}, start {}, {}", case.sampler, case.steps, case.eta, case.start, case.config)
}

#[test]
fn every_case_of_diffusers() {
    let fixture = fixture();
    assert!(fixture.cases.len() > 100);
    for case in &fixture.cases {
        let error = relative(&run(case, fixture.shape), &case.result);
        assert!(error < 1e-5, "{}: {error:e}", describe(case));
    }
}

#[test]
fn the_bar_tells_spacings_and_predictions_apart() {
    let fixture = fixture();
    let case = |spacing: &str, prediction: &str, sampler: &str| {
        let matches = |c: &&Case| {
            c.sampler == sampler
                && c.steps == 7
                && c.config["timestep_spacing"] == spacing
                && c.config["prediction_type"] == prediction
        };
        &fixture.cases.iter().find(matches).unwrap().result
    };
    let reference = case("leading", "epsilon", "ddim");
    for other in [
        case("trailing", "epsilon", "ddim"),
        case("leading", "v_prediction", "ddim"),
        case("leading", "epsilon", "dpmpp-2m"),
    ] {
        assert!(relative(other, reference) > 1e-3);
    }
}

#[test]
fn ddim_gives_the_reference_sums() {
    // diffusers' own test: arange(768) / 768 as (3, 8, 8, 4), moved to NCHW; the model is x t / (t + 1)
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::from_json("{}").unwrap()).unwrap();
    let start = formula([3, 8, 8, 4], |i| i / 768.0).permute([3, 0, 1, 2]);
    let sampled = sample(
        &Sampler::ddim(),
        &schedule,
        Steps::new(10),
        start,
        |x, t| x * (t as f64 / (t + 1) as f64),
        |_, _| unreachable!("eta is 0"),
        |_| ControlFlow::Continue(()),
    )
    .unwrap();
    let result = values(sampled.latents);
    let sum: f64 = result.iter().map(|v| v.abs() as f64).sum();
    assert!((sum - 172.0067).abs() < 1e-2, "{sum}");
    assert!((sum / 768.0 - 0.223967).abs() < 1e-3 / 100.0, "{}", sum / 768.0);
}

#[test]
fn a_perfect_denoiser_finds_the_original() {
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    let shape = [2, 4, 4, 4];
    let original = formula(shape, |i| (i * 0.37).sin());
    let noise = formula(shape, |i| 1.4 * (i * 1.91).cos());
    for sampler in [Sampler::ddim(), Sampler::Ddim { eta: 0.5 }, Sampler::DpmPp2m] {
        let timesteps = sampler.timesteps(&schedule, 10).unwrap();
        for start in [0, 4, 9] {
            let t = timesteps[start];
            let latents = schedule.add_noise(original.clone(), noise.clone(), &[t, t]);
            let mut visited = Vec::new();
            let sampled = sample(
                &sampler,
                &schedule,
                Steps::new(10).starting_at(start),
                latents,
                |x, t| {
                    let bar = schedule.alpha_bar(t);
                    (x - original.clone() * bar.sqrt()) / (1.0 - bar).sqrt()
                },
                |step, shape| formula(shape, |i| (i * 0.9 + step as f64).sin()),
                |step| {
                    visited.push((step.index, step.timestep));
                    let previewed = values(step.predicted_original.clone());
                    assert!(relative(&previewed, &values(original.clone())) < 1e-4);
                    ControlFlow::Continue(())
                },
            )
            .unwrap();
            let expected: Vec<_> = timesteps.iter().copied().enumerate().skip(start).collect();
            assert_eq!(visited, expected);
            // SD 1.x's DDIM ends at the noise of timestep 0, a deviation of 0.03
            let bar = if sampler == Sampler::DpmPp2m { 1e-4 } else { 0.06 };
            let error = relative(&values(sampled.latents), &values(original.clone()));
            assert!(error < bar, "{sampler:?} from {start}: {error}");
        }
    }
}

#[test]
fn noise_and_velocity_are_the_two_axes() {
    for prediction in [PredictionType::Epsilon, PredictionType::VPrediction] {
        let config = NoiseScheduleConfig { prediction_type: prediction, ..NoiseScheduleConfig::sd15() };
        let schedule = NoiseSchedule::new(config).unwrap();
        let shape = [3, 2, 2, 2];
        let (x, noise) = (formula(shape, f64::sin), formula(shape, f64::cos));
        let timesteps = [0, 500, 999];
        let noisy = values(schedule.add_noise(x.clone(), noise.clone(), &timesteps));
        let velocity = values(schedule.velocity(x.clone(), noise.clone(), &timesteps));
        let target = values(schedule.target(x.clone(), noise.clone(), &timesteps));
        let (x, noise) = (values(x), values(noise));
        for i in 0..x.len() {
            let bar = schedule.alpha_bar(timesteps[i / 8]);
            let (a, s) = (bar.sqrt() as f32, (1.0 - bar).sqrt() as f32);
            assert!((noisy[i] - (a * x[i] + s * noise[i])).abs() < 1e-6);
            assert!((velocity[i] - (a * noise[i] - s * x[i])).abs() < 1e-6);
            // the two axes are a rotation of original and noise
            assert!((a * noisy[i] - s * velocity[i] - x[i]).abs() < 1e-5);
            assert_eq!(target[i], if prediction == PredictionType::Epsilon { noise[i] } else { velocity[i] });
        }
    }
}

#[test]
fn stopping_ends_within_the_step() {
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    for sampler in [Sampler::ddim(), Sampler::DpmPp2m] {
        for (stop, finished) in [(0, false), (3, false), (9, true)] {
            let mut calls = 0;
            let sampled = sample(
                &sampler,
                &schedule,
                Steps::new(10),
                formula([1, 1, 2, 2], f64::sin),
                |x, _| {
                    calls += 1;
                    x
                },
                |_, _| unreachable!(),
                |step| if step.index == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) },
            )
            .unwrap();
            assert_eq!((calls, sampled.finished), (stop + 1, finished));
        }
    }
}

#[test]
fn steps_out_of_range_are_errors() {
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    for sampler in [Sampler::ddim(), Sampler::DpmPp2m] {
        for steps in [0, 1001] {
            let error = sampler.timesteps(&schedule, steps).unwrap_err().to_string();
            assert!(error.contains(&steps.to_string()) && error.contains("1000"), "{error}");
        }
        let error = sample(
            &sampler,
            &schedule,
            Steps::new(5).starting_at(5),
            formula([1, 1, 1, 1], f64::sin),
            |x, _| x,
            |_, _| unreachable!(),
            |_| ControlFlow::Continue(()),
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("start step: 5"), "{error}");
    }
    assert!("pndm2".parse::<Sampler>().unwrap_err().to_string().contains("ddim, dpmpp-2m"));
}
