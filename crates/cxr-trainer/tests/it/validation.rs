//! The loss on what is held out, the best checkpoint, and pictures along the way.

use std::cell::RefCell;
use std::path::Path;

use burn::module::AutodiffModule;
use burn::tensor::backend::AutodiffBackend;
use cxr_core::progress::Silent;
use cxr_ldm::unet::UNet2dCondition;
use cxr_trainer::checkpoint::Best;
use cxr_trainer::{
    Diffusion, DrawnSample, LearningRate, TimestepLoss, TrainConfig, Trained, Training, checkpoint, watch,
};

use crate::common::{B, Steps, adapted_unet, bits, diffusion};
use crate::toy::{Targets, Toy, toy, values};

type Inner = <B as AutodiffBackend>::InnerBackend;

/// The same pictures without gradients.
fn held_out(n: usize) -> Diffusion<Inner, UNet2dCondition<Inner>> {
    let Diffusion { samples, shape, unconditional, .. } = diffusion(n);
    let schedule =
        cxr_ldm::scheduler::NoiseSchedule::new(cxr_ldm::scheduler::NoiseScheduleConfig::sd15()).unwrap();
    Diffusion::new(&schedule, samples, shape, unconditional, String::new(), &Default::default())
}

#[test]
fn the_validation_loss_is_fixed_and_by_timesteps() {
    let (model, data) = (adapted_unet().valid(), held_out(3));
    let bins = data.validation_loss(&model, 4, 2, 1);
    let ends: Vec<(usize, usize)> = bins.iter().map(|bin| (bin.from, bin.to)).collect();
    assert_eq!(ends, [(0, 250), (250, 500), (500, 750), (750, 1000)]);
    assert!(bins.iter().all(|bin| bin.loss.is_finite() && bin.loss > 0.0));
    assert_eq!(data.validation_loss(&model, 4, 2, 1), bins, "the same again");
    for (found, expected) in data.validation_loss(&model, 4, 3, 1).iter().zip(&bins) {
        assert!((found.loss / expected.loss - 1.0).abs() < 1e-5, "batches change nothing");
    }
    assert_ne!(data.validation_loss(&model, 4, 2, 2), bins, "another seed");
    // neither weights nor dropped captions nor offset noise take part
    let weighted = Diffusion {
        weight: cxr_trainer::SnrWeight::MinSnr(5.0),
        dropout: 0.9,
        noise_offset: 0.5,
        ..held_out(3)
    };
    assert_eq!(weighted.validation_loss(&model, 4, 2, 1), bins);
    // seven bins of a thousand timesteps: none is left out
    let seven = data.validation_loss(&model, 7, 2, 1);
    assert!(seven[0].from == 0 && seven[6].to == 1000 && seven.windows(2).all(|w| w[0].to == w[1].from));
    let one = &data.samples[0];
    let drawn = DrawnSample {
        latents: one.mean.clone(),
        noise: one.mean.clone(),
        timestep: 3,
        condition: &one.condition,
    };
    assert!(data.loss_of(&model, &[drawn]).into_data().iter::<f64>().sum::<f64>() > 0.0);
}

fn config() -> TrainConfig {
    TrainConfig {
        steps: 12,
        learning_rate: LearningRate::constant(0.05),
        checkpoint_every: 5,
        keep_checkpoints: 1,
        ema: Some(0.5),
        ..TrainConfig::default()
    }
}

fn bin(loss: f64) -> Vec<TimestepLoss> {
    vec![
        TimestepLoss { from: 0, to: 500, loss: loss - 0.25 },
        TimestepLoss { from: 500, to: 1000, loss: loss + 0.25 },
    ]
}

/// A run whose validation says, at step 2, 4, 6, ..., what is in `losses`.
fn run(folder: &Path, losses: &[f64], progress: &Steps) -> (Trained<Toy<B>>, Vec<Vec<f64>>) {
    let (data, config) = (Targets::new(8), config());
    let seen = RefCell::new(Vec::new());
    let start = checkpoint::list(folder).unwrap().last().map_or(0, |(step, _)| *step as usize / 2);
    let trained = Training::<B, _>::new(&data, &config, folder)
        .validate(2, |model: &Toy<B>| {
            seen.borrow_mut().push(values(model));
            Ok(bin(losses[start + seen.borrow().len() - 1]))
        })
        .run(toy(), progress)
        .unwrap();
    (trained, seen.into_inner())
}

#[test]
fn the_best_checkpoint_stays() {
    let folder = tempfile::tempdir().unwrap();
    let losses = [3.0, 1.0, 2.0, f64::NAN, 1.5, 1.25];
    let (trained, seen) = run(folder.path(), &losses, &Steps::default());
    assert_eq!(trained.best, Some(Best { step: 4, loss: 1.0 }));
    let steps: Vec<u64> =
        checkpoint::list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [4, 12], "the best and the last, of 2, 4, 5, 10 and 12");
    // what was looked at is the average, and it is what the best checkpoint gives back
    let best = trained.best.unwrap().checkpoint(folder.path());
    let weights = checkpoint::load_weights::<B, _>(toy(), &best).unwrap();
    assert_eq!(values(&weights), seen[1]);
    assert_eq!(values(&trained.averaged.unwrap()), seen[5]);
    assert_ne!(values(&trained.model), seen[5]);
    let lines: Vec<watch::Validation> = watch::read(&folder.path().join("validation.jsonl")).unwrap();
    assert_eq!(lines.iter().map(|line| line.step).collect::<Vec<_>>(), [2, 4, 6, 8, 10, 12]);
    assert!(lines[3].loss.is_nan() && lines[3].bins[0].loss.is_nan());
    assert_eq!((lines[1].step, lines[1].loss, lines[1].bins[1].loss), (4, 1.0, 1.25));
    assert!(folder.path().join("loss.png").is_file());
}

#[test]
fn a_run_that_goes_on_knows_the_best() {
    let folder = tempfile::tempdir().unwrap();
    let losses = [3.0, 1.0, 2.0, 1.75, 1.5, 1.25];
    let (stopped, _) = run(folder.path(), &losses, &Steps { stop_after: Some(7), ..Steps::default() });
    assert_eq!((stopped.step, stopped.best), (7, Some(Best { step: 4, loss: 1.0 })));
    let (trained, seen) = run(folder.path(), &losses, &Steps::default());
    assert_eq!((seen.len(), trained.best), (3, Some(Best { step: 4, loss: 1.0 })));
    let steps: Vec<u64> =
        checkpoint::list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [4, 12]);
    let lines: Vec<watch::Validation> = watch::read(&folder.path().join("validation.jsonl")).unwrap();
    assert_eq!(lines.iter().map(|line| line.step).collect::<Vec<_>>(), [2, 4, 6, 8, 10, 12]);
}

#[test]
fn pictures_are_made_along_the_way_and_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let (data, config) = (Targets::new(8), config());
    let seen = RefCell::new(Vec::new());
    let training = || {
        Training::<B, _>::new(&data, &config, folder.path()).show(5, |step, model: &Toy<B>| {
            seen.borrow_mut().push((step, values(model)));
            Ok(())
        })
    };
    let trained = training().run(toy(), &Silent).unwrap();
    let seen = seen.borrow();
    assert_eq!(seen.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [5, 10, 12]);
    assert_eq!(seen[2].1, values(&trained.averaged.unwrap()));
    let fails = Training::<B, _>::new(&data, &TrainConfig { steps: 15, ..config.clone() }, folder.path())
        .show(1, |_, _: &Toy<B>| Err(cxr_trainer::TrainError::Other("no paint".into())))
        .run(toy(), &Silent);
    assert_eq!(fails.err().unwrap().to_string(), "no paint");
}

/// The loss of a fixed small set falls by half, and that of its validation with it.
#[test]
fn a_small_set_is_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let objective = Diffusion { weight: cxr_trainer::SnrWeight::Uniform, dropout: 0.0, ..diffusion(4) };
    let data = held_out(4);
    let model = cxr_kernels::nn::parameters::set_trainable(adapted_unet(), |_| true);
    let config = TrainConfig {
        steps: 150,
        learning_rate: LearningRate::constant(2e-3),
        checkpoint_every: 1000,
        ..TrainConfig::default()
    };
    let before = bits::<B, _>(&model, None);
    let trained = Training::<B, _>::new(&objective, &config, folder.path())
        .validate(50, |model: &UNet2dCondition<B>| Ok(data.validation_loss(&model.valid(), 2, 4, 0)))
        .run(model, &Silent)
        .unwrap();
    assert_ne!(bits::<B, _>(&trained.model, None), before);
    let lines: Vec<watch::Record> = watch::read(&folder.path().join("metrics.jsonl")).unwrap();
    let (first, last) = (lines[0].smoothed, lines.last().unwrap().smoothed);
    println!("smoothed loss {first:.3} at step 10, {last:.3} at step 150");
    assert!(last < 0.5 * first, "{first} {last}");
}
