//! Runs that are killed, or stopped, and go on.

use std::path::Path;
use std::process::{Command, Stdio};

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use cxr_core::random::Stream;
use cxr_kernels::nn::parameters;
use cxr_ldm::vae::{AutoencoderKl, AutoencoderKlConfig};
use cxr_trainer::{
    LearningRate, Objective, Reconstruction, ReconstructionImages, Sample, TrainConfig, Trained, checkpoint,
    initialize, train, watch,
};

use crate::common::{B, Steps, adapted_unet, bits, diffusion};
use crate::toy::Toy;

const STEPS: u64 = 14;
const FOLDER: &str = "CXR_TRAINER_TEST_FOLDER";

fn config() -> TrainConfig {
    TrainConfig {
        steps: STEPS,
        batch_size: 2,
        accumulation: 2,
        learning_rate: LearningRate::cosine(1e-2, 3),
        clip_norm: Some(0.5),
        ema: Some(0.8),
        checkpoint_every: 5,
        ..TrainConfig::default()
    }
}

/// 7 pictures: an epoch of two steps, the second of 2 and 1.
fn adapter(
    folder: &Path,
    progress: &Steps,
) -> Trained<<cxr_trainer::Diffusion<B, cxr_ldm::unet::UNet2dCondition<B>> as Objective<B>>::Model> {
    train(adapted_unet(), &diffusion(7), &config(), folder, progress).unwrap()
}

struct Noise;

impl ReconstructionImages for Noise {
    fn len(&self) -> usize {
        5
    }
    fn shape(&self) -> [usize; 3] {
        [3, 16, 16]
    }
    fn pixels(&self, sample: Sample, seed: u64) -> Vec<f32> {
        let mut stream = Stream::new(seed, "pixels", sample.position);
        (0..3 * 16 * 16).map(|_| stream.range(-1.0, 1.0)).collect()
    }
    fn fingerprint(&self) -> String {
        "noise".into()
    }
}

fn autoencoder(folder: &Path, progress: &Steps) -> Trained<AutoencoderKl<B>> {
    let model = initialize(AutoencoderKlConfig::tiny().init::<B>(&Default::default()), 1);
    let model = parameters::set_trainable(model, |_| true);
    let objective = Reconstruction { images: Noise, edges: 0.5, kl: 1e-3, device: Default::default() };
    train(model, &objective, &config(), folder, progress).unwrap()
}

/// That both runs ended with the same bits.
fn assert_same<M: Module<B>>(found: &Trained<M>, expected: &Trained<M>) {
    assert_eq!((found.step, found.stopped), (STEPS, false));
    assert_eq!(bits::<B, _>(&found.model, None), bits::<B, _>(&expected.model, None));
    let averaged = |trained: &Trained<M>| bits::<B, _>(trained.averaged.as_ref().unwrap(), None);
    assert_eq!(averaged(found), averaged(expected));
    assert_ne!(averaged(found), bits::<B, _>(&found.model, None));
}

/// That the lines about both are the same, but for how long it took.
fn assert_same_lines(found: &Path, expected: &Path) {
    let lines = |folder: &Path| {
        let lines: Vec<watch::Record> = watch::read(&folder.join("metrics.jsonl")).unwrap();
        lines
            .into_iter()
            .map(|line| (line.step, line.epoch, line.loss, line.gradient_norm))
            .collect::<Vec<_>>()
    };
    assert_eq!(lines(found), lines(expected));
    assert_eq!(lines(found).iter().map(|line| line.0).collect::<Vec<_>>(), [10, STEPS]);
}

/// Starts one of the two tests below in a process of its own, which dies after step 12.
fn kill(test: &str, folder: &Path) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success(), "{test} should have been killed");
    let steps: Vec<u64> = checkpoint::list(folder).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [5, 10]);
}

fn run_to_be_killed(run: impl FnOnce(&Path, &Steps)) {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    run(folder.as_ref(), &Steps { kill_after: Some(12), ..Steps::default() });
}

#[test]
#[ignore = "a_killed_adapter_run_ends_with_the_same_bits starts it, to be killed"]
fn adapter_run_to_be_killed() {
    run_to_be_killed(|folder, progress| drop(adapter(folder, progress)));
}

#[test]
#[ignore = "a_killed_autoencoder_run_ends_with_the_same_bits starts it, to be killed"]
fn autoencoder_run_to_be_killed() {
    run_to_be_killed(|folder, progress| drop(autoencoder(folder, progress)));
}

#[test]
fn a_killed_adapter_run_ends_with_the_same_bits() {
    let [whole, killed] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let expected = adapter(whole.path(), &Steps::default());
    kill("resume::adapter_run_to_be_killed", killed.path());
    // what a kill in the middle of writing leaves
    std::fs::create_dir(killed.path().join(".tmp-checkpoint")).unwrap();
    let metrics = killed.path().join("metrics.jsonl");
    let text = std::fs::read_to_string(&metrics).unwrap();
    std::fs::write(&metrics, format!("{text}{}", &text[..text.len() / 2])).unwrap();
    let progress = Steps::default();
    let found = adapter(killed.path(), &progress);
    assert_eq!(*progress.seen.lock().unwrap(), [11, 12, 13, 14], "it goes on from the newest checkpoint");
    assert_same(&found, &expected);
    assert_same_lines(killed.path(), whole.path());
    let again = adapter(killed.path(), &Steps { kill_after: Some(STEPS), ..Steps::default() });
    assert_same(&again, &expected);
}

#[test]
fn a_killed_autoencoder_run_ends_with_the_same_bits() {
    let [whole, killed] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let expected = autoencoder(whole.path(), &Steps::default());
    kill("resume::autoencoder_run_to_be_killed", killed.path());
    assert_same(&autoencoder(killed.path(), &Steps::default()), &expected);
    assert_same_lines(killed.path(), whole.path());
}

/// A model whose checkpoints take longer to write than its steps to make.
struct Wide;

const WIDE: usize = 600_000;

impl Objective<B> for Wide {
    type Model = Toy<B>;

    fn len(&self) -> usize {
        7
    }
    fn fingerprint(&self) -> String {
        "wide".into()
    }
    fn loss(&self, model: &Toy<B>, samples: &[Sample], _seed: u64) -> Tensor<B, 1> {
        let target = samples.iter().map(|sample| sample.position as f32 % 5.0).sum::<f32>();
        (model.w.val() - target).powi_scalar(2).mean()
    }
}

fn wide(folder: &Path) -> Vec<u64> {
    let start = Tensor::from_data(TensorData::new(vec![0.5_f32; WIDE], [WIDE]), &Default::default());
    let model = Toy { w: Param::from_tensor(start) };
    let config = TrainConfig { steps: 30, checkpoint_every: 1, ema: Some(0.9), ..config() };
    let trained = train(model, &Wide, &config, folder, &Steps::default()).unwrap();
    let weights: Vec<f32> = trained.model.w.val().into_data().iter::<f32>().collect();
    let averaged: Vec<f32> = trained.averaged.unwrap().w.val().into_data().iter::<f32>().collect();
    vec![trained.step, weights[0].to_bits().into(), averaged[WIDE - 1].to_bits().into()]
}

#[test]
#[ignore = "a_run_killed_in_the_middle_of_a_write_ends_with_the_same_bits starts it, to be killed"]
fn wide_run_to_be_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    wide(folder.as_ref());
}

/// Kills a process that is nearly always writing a checkpoint, again and again, until it is through.
#[test]
fn a_run_killed_in_the_middle_of_a_write_ends_with_the_same_bits() {
    let [whole, killed] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let expected = wide(whole.path());
    let half_written = || {
        let names = std::fs::read_dir(killed.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(".tmp-")).count()
    };
    let (mut kills, mut in_the_middle) = (0, 0);
    for round in 0..400_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "resume::wide_run_to_be_killed"])
            .env(FOLDER, killed.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Long enough for a step or two; longer and longer, so that it comes to an end on a slow machine too.
        std::thread::sleep(std::time::Duration::from_millis(40 + 13 * (round % 7) + 4 * round));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        in_the_middle += usize::from(half_written() > 0);
        // what there is under its own name is whole
        for (step, path) in checkpoint::list(killed.path()).unwrap() {
            assert_eq!(checkpoint::read_state(&path).unwrap().step, step);
            assert_eq!(std::fs::read_dir(path).unwrap().count(), 4);
        }
    }
    println!("{kills} kills, {in_the_middle} of them in the middle of a write");
    assert!(in_the_middle > 0, "none of {kills} kills came while a checkpoint was written");
    assert_eq!(wide(killed.path()), expected);
    assert_eq!(half_written(), 0, "what was left half written is cleared away");
}

#[test]
fn a_stopped_run_keeps_its_last_step() {
    let [whole, stopped] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let expected = adapter(whole.path(), &Steps::default());
    let first = adapter(stopped.path(), &Steps { stop_after: Some(7), ..Steps::default() });
    assert_eq!((first.step, first.stopped), (7, true));
    let progress = Steps { stop_after: Some(STEPS), ..Steps::default() };
    let found = adapter(stopped.path(), &progress);
    assert_eq!(progress.seen.lock().unwrap()[0], 8);
    // stopping after the last step stops nothing
    assert_same(&found, &expected);
}
