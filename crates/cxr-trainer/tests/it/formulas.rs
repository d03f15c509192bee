//! The loop against the same training in plain f64.

use cxr_core::progress::Silent;
use cxr_trainer::{
    LearningRate, OptimizerConfig, Schedule, TrainConfig, TrainError, checkpoint, train, watch,
};

use crate::common::relative;
use crate::toy::{Targets, expected, toy, values};

/// The bar: training is in f32.
const BAR: f64 = 1e-5;

fn config() -> TrainConfig {
    TrainConfig {
        steps: 30,
        batch_size: 2,
        learning_rate: LearningRate::constant(0.03),
        seed: 4,
        ..TrainConfig::default()
    }
}

/// Runs it and checks weights, averages and the lines about it.
fn check(data: &Targets, config: &TrainConfig) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let trained = train(toy(), data, config, folder.path(), &Silent).unwrap();
    let expected = expected(data, config);
    let found = values(&trained.model);
    let error = relative(&found, &expected.weights);
    assert!(error < BAR, "{config:?}: {error:e}");
    assert_eq!(trained.averaged.is_some(), config.ema.is_some());
    if let Some(averaged) = &trained.averaged {
        let error = relative(&values(averaged), &expected.averaged);
        assert!(error < BAR, "average: {error:e}");
    }
    let lines: Vec<watch::Record> = watch::read(&folder.path().join("metrics.jsonl")).unwrap();
    assert_eq!(lines.iter().map(|line| line.step).collect::<Vec<_>>(), [10, 20, 30]);
    for line in lines {
        let at = line.step as usize - 1;
        assert!((line.gradient_norm / expected.norms[at] - 1.0).abs() < 1e-4, "step {at}");
        assert!((line.loss / expected.losses[at] - 1.0).abs() < 1e-4, "step {at}");
        // JSON's numbers are read to within their last bit
        let rate = config.learning_rate.at(line.step - 1, config.steps);
        assert!((line.learning_rate / rate - 1.0).abs() < 1e-12, "step {at}");
    }
    found
}

#[test]
fn adam() {
    check(&Targets::new(8), &config());
}

#[test]
fn every_setting_of_the_optimizer_counts() {
    let data = Targets::new(8);
    let optimizer = OptimizerConfig { beta_1: 0.8, beta_2: 0.95, epsilon: 1e-2, weight_decay: 0.1 };
    let base = TrainConfig { optimizer, ..config() };
    check(&data, &base);
    let weights = expected(&data, &base).weights;
    let plain = OptimizerConfig::default();
    for other in [
        OptimizerConfig { beta_1: plain.beta_1, ..optimizer },
        OptimizerConfig { beta_2: plain.beta_2, ..optimizer },
        OptimizerConfig { epsilon: plain.epsilon, ..optimizer },
        OptimizerConfig { weight_decay: plain.weight_decay, ..optimizer },
    ] {
        let other = expected(&data, &TrainConfig { optimizer: other, ..base.clone() }).weights;
        assert!(relative(&other, &weights) > 10.0 * BAR, "a setting that the test would not see");
    }
}

#[test]
fn clipping_scales_all_gradients_to_the_limit() {
    let data = Targets::new(8);
    // the norms are 0.5 to 3: some of the steps are clipped, and the norms in the lines are those before
    let clipped = TrainConfig { clip_norm: Some(2.0), ..config() };
    check(&data, &clipped);
    let reference = expected(&data, &clipped);
    let larger = reference.norms.iter().filter(|norm| **norm > 2.0).count();
    assert!((5..=25).contains(&larger), "{larger} of 30 steps are clipped: {:?}", reference.norms);
    let free = expected(&data, &config()).weights;
    assert!(relative(&free, &reference.weights) > 10.0 * BAR, "clipping has to matter");
}

#[test]
fn the_rest_of_an_epoch_counts_by_its_samples() {
    // 7 pictures in steps of 2 x 2: the second step of an epoch has batches of 2 and 1
    let data = Targets::new(7);
    let config = TrainConfig { accumulation: 2, ..config() };
    let accumulated = check(&data, &config);
    let whole = TrainConfig { batch_size: 4, accumulation: 1, ..config };
    let error = relative(&check(&data, &whole), &accumulated);
    assert!(error < BAR, "{error:e}");
    // seen by the test: the last batch as heavy as the others
    let small = TrainConfig { batch_size: 2, accumulation: 1, ..whole };
    assert!(relative(&expected(&data, &small).weights, &accumulated) > 10.0 * BAR);
}

#[test]
fn learning_rates_follow_their_schedule() {
    let data = Targets::new(8);
    let constant = expected(&data, &config()).weights;
    for schedule in [Schedule::Constant, Schedule::Cosine, Schedule::Linear] {
        let learning_rate = LearningRate { peak: 0.03, warmup: 6, schedule };
        let found = check(&data, &TrainConfig { learning_rate, ..config() });
        assert!(relative(&found, &constant) > 10.0 * BAR, "{schedule:?}");
    }
}

#[test]
fn the_average_follows_the_weights() {
    let data = Targets::new(8);
    for decay in [0.3, 0.9] {
        let config = TrainConfig { ema: Some(decay), ..config() };
        check(&data, &config);
        let reference = expected(&data, &config);
        assert!(relative(&reference.averaged, &reference.weights) > 10.0 * BAR, "the average has to differ");
    }
}

#[test]
fn steps_that_are_not_finite_are_left_out() {
    let mut data = Targets::new(8);
    data.poisoned.extend([6, 7, 21, 50]);
    let found = check(&data, &TrainConfig { ema: Some(0.9), ..config() });
    assert!(found.iter().all(|value| value.is_finite()));
    let all = expected(&Targets::new(8), &config()).weights;
    assert!(relative(&found, &all) > 10.0 * BAR, "steps that are left out have to matter");
}

#[test]
fn a_run_that_is_not_finite_any_more_ends_with_its_last_good_weights() {
    let folder = tempfile::tempdir().unwrap();
    let mut data = Targets::new(8);
    data.poisoned.extend(24..1000); // from step 12 on
    let config = TrainConfig { steps: 100, checkpoint_every: 5, ..config() };
    let error = train(toy(), &data, &config, folder.path(), &Silent).err().expect("it cannot go on");
    assert!(matches!(error, TrainError::NotFinite { count: 20, step: 31 }), "{error}");
    let good = expected(&data, &TrainConfig { steps: 12, ..config }).weights;
    for (step, path) in checkpoint::list(folder.path()).unwrap() {
        assert!([25, 30].contains(&step));
        let kept = checkpoint::load_trainable(toy(), &path.join(checkpoint::PARAMETERS)).unwrap();
        assert!(relative(&values(&kept), &good) < BAR);
        assert_eq!(checkpoint::read_state(&path).unwrap().not_finite, step as usize - 12);
    }
}
