//! The samplers against diffusers: `fixtures/scheduler_generate.py` wrote the reference.

use std::ops::ControlFlow;

use burn::tensor::{Tensor, TensorData};
use cxr_core::random::TorchGenerator;
use cxr_kernels::Flex;
use cxr_ldm::scheduler::{
    NoiseSchedule, NoiseScheduleConfig, PredictionType, Sampler, Steps, TimestepSpacing, sample,
};
use serde::Deserialize;

type Latents = Tensor<Flex, 4>;

#[derive(Deserialize)]
struct Fixture {
    shape: [usize; 4],
    /// What every case's configuration has beside its own.
    base: serde_json::Map<String, serde_json::Value>,
    sums: Vec<Sum>,
    /// Steps, strength, and the first step that is made.
    strengths: Vec<(usize, f64, usize)>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Sum {
    sampler: String,
    config: serde_json::Value,
    sum: f64,
}

#[derive(Deserialize)]
struct Case {
    sampler: String,
    config: serde_json::Map<String, serde_json::Value>,
    steps: usize,
    eta: f64,
    start: Option<usize>,
    timesteps: Vec<f64>,
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

fn run(case: &Case, fixture: &Fixture) -> Vec<f32> {
    let shape = fixture.shape;
    let config: serde_json::Map<_, _> = fixture.base.clone().into_iter().chain(case.config.clone()).collect();
    let config = NoiseScheduleConfig::from_json(&serde_json::Value::from(config).to_string()).unwrap();
    let schedule = NoiseSchedule::new(config).unwrap();
    let sampler = match case.sampler.parse().unwrap() {
        Sampler::Ddim { .. } => Sampler::Ddim { eta: case.eta },
        other => other,
    };
    let timesteps = sampler.timesteps(&schedule, case.steps).unwrap();
    assert_eq!(timesteps.len(), case.timesteps.len(), "{}", describe(case));
    for (found, expected) in timesteps.iter().zip(&case.timesteps) {
        let near = (found - expected).abs() < 2e-3;
        assert!(near, "{}: {timesteps:?}, {:?}", describe(case), case.timesteps);
    }
    let start = formula(shape, |i| 1.4 * (i * 0.7 + 0.3).sin());
    let steps = Steps::new(case.steps);
    let (steps, start) = match case.start {
        None => (steps, start),
        Some(first) => {
            let steps = steps.starting_at(first);
            let noise = formula(shape, |i| 1.4 * (i * 1.3 - 1.0).cos());
            (steps, sampler.add_noise(&schedule, steps, start, noise).unwrap())
        }
    };
    let sampled = sample(
        &sampler,
        &schedule,
        steps,
        start,
        |x, t| x.clone().tanh() * 0.8 + x * 0.1 + 0.2 * (t / 200.0).cos(),
        |step, shape| formula(shape, |i| 1.4 * (i * 1.3 + step as f64).cos()),
        |_| ControlFlow::Continue(()),
    )
    .unwrap();
    assert!(sampled.finished);
    values(sampled.latents)
}

fn describe(case: &Case) -> String {
    format!(
        "{} {} steps, eta {}, start {:?}, {:?}",
        case.sampler, case.steps, case.eta, case.start, case.config
    )
}

/// diffusers keeps its schedule in f32, where `1 - alpha_bar` has few digits left at the first timesteps: its lowest
/// noise level is off by 1.3e-5, and what Euler makes in a few steps of `linspace` spacing, which go down to there, by up
/// to 1.4e-5. diffusers differs as much from itself with an f64 schedule.
fn bar(case: &Case) -> f64 {
    let is_linspace = case.config.get("timestep_spacing").is_none_or(|spacing| spacing == "linspace");
    if case.steps <= 4 && case.sampler.starts_with("euler") && is_linspace { 2e-5 } else { 1e-5 }
}

#[test]
fn every_case_of_diffusers() {
    let fixture = fixture();
    assert_eq!(fixture.cases.len(), 696);
    let mut worst = std::collections::BTreeMap::new();
    let mut failed = Vec::new();
    for case in &fixture.cases {
        let error = relative(&run(case, &fixture), &case.result);
        let worst: &mut f64 = worst.entry(case.sampler.as_str()).or_default();
        *worst = worst.max(error);
        if error.is_nan() || error >= bar(case) {
            failed.push(format!("{}: {error:e}", describe(case)));
        }
    }
    println!("largest relative errors: {worst:?}");
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), fixture.cases.len(), failed.join("\n"));
}

#[test]
fn the_fixture_has_every_combination() {
    let fixture = fixture();
    for sampler in Sampler::ALL.map(|sampler| sampler.name()) {
        for spacing in [Some("leading"), Some("linspace"), Some("trailing"), None] {
            for prediction in ["epsilon", "v_prediction"] {
                let of = |case: &&Case| {
                    case.sampler == sampler
                        && case.config.get("timestep_spacing").and_then(|value| value.as_str()) == spacing
                        && case.config["prediction_type"] == prediction
                };
                let cases: Vec<&Case> = fixture.cases.iter().filter(of).collect();
                let name = format!("{sampler} {spacing:?} {prediction}");
                for steps in [1, 2, 3, 4, 7, 10, 30] {
                    let whole = |case: &&Case| case.steps == steps && case.start.is_none();
                    assert!(cases.iter().copied().any(|case| whole(&case)), "{name}, {steps} steps");
                    let karras = |case: &&Case| whole(case) && case.config.get("use_karras_sigmas").is_some();
                    let heeds_karras = matches!(sampler, "euler" | "dpmpp-2m");
                    assert!(
                        !heeds_karras || cases.iter().copied().any(|case| karras(&case)),
                        "{name}, {steps} steps"
                    );
                }
                assert!(cases.iter().any(|case| case.start > Some(0)), "{name}");
            }
        }
    }
}

#[test]
fn the_bar_tells_settings_apart() {
    let fixture = fixture();
    let case = |sampler: &str, config: &[(&str, serde_json::Value)]| {
        let matches = |c: &&Case| {
            c.sampler == sampler
                && (c.steps, c.eta, c.start) == (10, 0.0, None)
                && config
                    .iter()
                    .all(|(key, value)| c.config.get(*key).unwrap_or(&serde_json::Value::Null) == value)
        };
        let found = fixture.cases.iter().find(matches);
        &found.unwrap_or_else(|| panic!("{sampler} {config:?} is not there")).result
    };
    let [spacing, prediction, karras, skip] =
        ["timestep_spacing", "prediction_type", "use_karras_sigmas", "skip_prk_steps"];
    let mut all = Vec::new();
    for sampler in Sampler::ALL.map(|sampler| sampler.name()) {
        for (s, p) in [
            ("leading", "epsilon"),
            ("trailing", "epsilon"),
            ("linspace", "epsilon"),
            ("leading", "v_prediction"),
        ] {
            let base = [(spacing, s.into()), (prediction, p.into())];
            let mut kinds = vec![serde_json::Value::Null];
            let key = if sampler == "pndm" { skip } else { karras };
            if matches!(sampler, "pndm" | "euler" | "dpmpp-2m") {
                kinds.push(true.into());
            }
            for kind in kinds {
                // LCM has timesteps of its own
                if sampler == "lcm" && s != "leading" {
                    continue;
                }
                // DPM-Solver++ takes Karras' levels from the training ones, whatever the spacing, and without them
                // its linspace timesteps are those of trailing
                let repeats = if kind.is_null() { s == "linspace" } else { s != "leading" };
                if sampler == "dpmpp-2m" && repeats {
                    continue;
                }
                let config = [base[0].clone(), base[1].clone(), (key, kind.clone())];
                all.push((format!("{sampler} {s} {p} {key} {kind}"), case(sampler, &config)));
            }
        }
    }
    assert_eq!(all.len(), 31);
    for (i, (name, result)) in all.iter().enumerate() {
        for (other, reference) in &all[..i] {
            assert!(relative(result, reference) > 1e-4, "{name} against {other}");
        }
    }
}

/// `sum |x|` of diffusers' own tests: arange(768) / 768 as (3, 8, 8, 4), moved to NCHW; the model is `x t / (t + 1)`.
fn sum(sampler: Sampler, config: &serde_json::Value) -> f64 {
    let config = NoiseScheduleConfig::from_json(&config.to_string()).unwrap();
    let mut generator = TorchGenerator::new(0);
    let sampled = sample(
        &sampler,
        &NoiseSchedule::new(config).unwrap(),
        Steps::new(10),
        formula([3, 8, 8, 4], |i| i / 768.0).permute([3, 0, 1, 2]),
        |x, t| x * (t / (t + 1.0)),
        |_, shape| {
            assert!(matches!(sampler, Sampler::EulerAncestral | Sampler::Lcm), "no other asks for noise");
            tensor(generator.randn(768), shape)
        },
        |_| ControlFlow::Continue(()),
    )
    .unwrap();
    values(sampled.latents).iter().map(|v| f64::from(v.abs())).sum()
}

#[test]
fn the_sums_of_diffusers() {
    let fixture = fixture();
    assert_eq!(fixture.sums.len(), 18);
    for Sum { sampler, config, sum: expected } in &fixture.sums {
        let found = sum(sampler.parse().unwrap(), config);
        assert!((found - expected).abs() < 1e-5 * expected, "{sampler} {config}: {found}, {expected}");
    }
    // what diffusers' tests say, to their digits
    for (sampler, expected, mean) in
        [(Sampler::ddim(), 172.0067, 0.223967), (Sampler::Pndm, 198.1318, 0.2580)]
    {
        let found = sum(sampler, &serde_json::json!({}));
        assert!((found - expected).abs() < 1e-3, "{sampler:?}: {found}");
        assert!((found / 768.0 - mean).abs() < 1e-4, "{sampler:?}: {}", found / 768.0);
    }
}

#[test]
fn a_perfect_denoiser_finds_the_original() {
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    let shape = [2, 4, 4, 4];
    let original = formula(shape, |i| (i * 0.37).sin());
    let noise = formula(shape, |i| 1.4 * (i * 1.91).cos());
    let every = Sampler::ALL.into_iter().chain([Sampler::Ddim { eta: 0.5 }]);
    for sampler in every {
        let timesteps = sampler.timesteps(&schedule, 10).unwrap();
        // PNDM makes its second step twice, wherever it starts: from the middle it is a step behind, as in diffusers
        let starts = if sampler == Sampler::Pndm { vec![0] } else { vec![0, 4, 9] };
        for start in starts {
            let steps = Steps::new(10).starting_at(start);
            let latents = sampler.add_noise(&schedule, steps, original.clone(), noise.clone()).unwrap();
            let mut visited = Vec::new();
            let sampled = sample(
                &sampler,
                &schedule,
                steps,
                latents,
                |x, t| {
                    let bar = 1.0 / (1.0 + schedule.sigma_at(t).powi(2));
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
            // SD 1.x's DDIM and PNDM end at the noise of timestep 0, a deviation of 0.03
            let ends_in_noise = matches!(sampler, Sampler::Ddim { .. } | Sampler::Pndm);
            let bar = if ends_in_noise { 0.06 } else { 1e-4 };
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
    for sampler in Sampler::ALL {
        let calls_of_all = sampler.timesteps(&schedule, 10).unwrap().len();
        for (stop, finished) in [(0, false), (3, false), (calls_of_all - 1, true)] {
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
                |_, shape| formula(shape, f64::cos),
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
    for sampler in Sampler::ALL {
        for steps in [0, 1001] {
            let error = sampler.timesteps(&schedule, steps).unwrap_err().to_string();
            let most = if sampler == Sampler::Lcm { "1 to 50" } else { "1 to 1000" };
            assert!(error.contains(&steps.to_string()) && error.contains(most), "{error}");
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
    let names = "pndm2".parse::<Sampler>().unwrap_err().to_string();
    for sampler in Sampler::ALL {
        assert!(names.contains(sampler.name()), "{names}");
        assert_eq!(sampler.name().parse::<Sampler>().unwrap(), sampler);
    }
    // what would leave the trained range, or stand still
    let config = NoiseScheduleConfig {
        timestep_spacing: Some(TimestepSpacing::Leading),
        ..NoiseScheduleConfig::sd15()
    };
    let schedule = NoiseSchedule::new(config).unwrap();
    for sampler in Sampler::ALL {
        let error = sampler.timesteps(&schedule, 1000).unwrap_err().to_string();
        let most = if sampler == Sampler::Lcm { 50 } else { 999 };
        assert!(error.contains(&format!("steps: 1000, expected 1 to {most}")), "{sampler:?}: {error}");
    }
    // a distillation over more steps than there are
    let config = NoiseScheduleConfig { num_train_timesteps: 40, ..NoiseScheduleConfig::sd15() };
    let error = Sampler::Lcm.timesteps(&NoiseSchedule::new(config).unwrap(), 4).unwrap_err().to_string();
    assert!(
        error.contains("original_inference_steps") && error.contains("50") && error.contains("40"),
        "{error}"
    );
    // the warm-up looks at four timesteps
    let config = NoiseScheduleConfig { skip_prk_steps: None, ..NoiseScheduleConfig::sd15() };
    let error = Sampler::Pndm.timesteps(&NoiseSchedule::new(config).unwrap(), 3).unwrap_err().to_string();
    assert!(error.contains("steps: 3, expected 4 to 1000"), "{error}");
}

#[test]
fn strength_is_the_part_of_the_steps() {
    let strengths = fixture().strengths;
    assert_eq!(strengths.len(), 50);
    for (count, strength, start) in strengths {
        let expected = Steps::new(count).starting_at(start);
        assert_eq!(Steps::with_strength(count, strength).unwrap(), expected, "{strength} of {count}");
    }
    assert_ne!(
        Steps::with_strength(10, 1.0).unwrap(),
        Steps::new(10),
        "a picture's latents are not noise alone"
    );
    for strength in [-0.1, 1.1, f64::NAN] {
        let error = Steps::with_strength(10, strength).unwrap_err().to_string();
        assert!(error.contains("strength is") && error.contains("0 to 1"), "{error}");
    }
    let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
    let x = formula([1, 1, 1, 1], f64::sin);
    for sampler in Sampler::ALL {
        let steps = Steps::with_strength(10, 0.0).unwrap();
        let error = sampler.add_noise(&schedule, steps, x.clone(), x.clone()).unwrap_err();
        assert!(error.to_string().contains("start step: 10"), "{error}");
    }
}

#[test]
fn stable_diffusion_as_it_is_published() {
    let config = NoiseScheduleConfig::sd15();
    assert_eq!(config.sampler(), Some(Sampler::Pndm));
    let schedule = NoiseSchedule::new(config).unwrap();
    let timesteps = Sampler::Pndm.timesteps(&schedule, 50).unwrap();
    assert_eq!(timesteps.len(), 51);
    let expected: Vec<f64> =
        [981.0, 961.0].into_iter().chain((0..49).map(|i| f64::from(961 - 20 * i))).collect();
    assert_eq!(timesteps, expected);
    let mut called = Vec::new();
    let x = formula([1, 1, 2, 2], f64::sin);
    let denoiser = |x: Latents, t| {
        called.push(t);
        x
    };
    let none = |_, _| unreachable!("PNDM asks for no noise");
    let go_on = |_: cxr_ldm::scheduler::StepInfo<'_, Flex>| ControlFlow::Continue(());
    sample(&Sampler::Pndm, &schedule, Steps::new(50), x, denoiser, none, go_on).unwrap();
    assert_eq!(called, expected);
    for (class, sampler) in [
        ("DDIMScheduler", Some(Sampler::ddim())),
        ("EulerDiscreteScheduler", Some(Sampler::Euler)),
        ("EulerAncestralDiscreteScheduler", Some(Sampler::EulerAncestral)),
        ("DPMSolverMultistepScheduler", Some(Sampler::DpmPp2m)),
        ("LCMScheduler", Some(Sampler::Lcm)),
        ("LMSDiscreteScheduler", None),
    ] {
        let config = NoiseScheduleConfig::from_json(&format!(r#"{{"_class_name": "{class}"}}"#)).unwrap();
        assert_eq!(config.sampler(), sampler, "{class}");
    }
}
