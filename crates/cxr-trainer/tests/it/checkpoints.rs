//! Checkpoints: whose they are, and what is wrong with them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::module::ParamId;
use burn::optim::{AdamW, Optimizer, adaptor::OptimizerAdaptor};
use burn::record::{BinFileRecorder, FullPrecisionSettings, Recorder};
use cxr_core::progress::Silent;
use cxr_kernels::nn::parameters;
use cxr_ldm::unet::UNet2dCondition;
use cxr_trainer::{LearningRate, TrainConfig, TrainError, checkpoint, train};

use crate::common::{B, adapted_unet, diffusion};
use crate::toy::{Targets, toy};

fn config() -> TrainConfig {
    TrainConfig { steps: 4, checkpoint_every: 2, seed: 1, ..TrainConfig::default() }
}

/// Trains the small model in `folder`.
fn run(data: &Targets, config: &TrainConfig, folder: &Path) -> Result<u64, TrainError> {
    train(toy(), data, config, folder, &Silent).map(|trained| trained.step)
}

fn newest(folder: &Path) -> PathBuf {
    checkpoint::list(folder).unwrap().pop().unwrap().1
}

#[test]
fn a_folder_of_another_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let data = Targets::new(8);
    run(&data, &config(), folder.path()).unwrap();
    let other = Targets { fingerprint: "other targets".into(), ..Targets::new(8) };
    let others = [
        TrainConfig { seed: 2, ..config() },
        TrainConfig { batch_size: 3, ..config() },
        TrainConfig { accumulation: 2, ..config() },
        TrainConfig { learning_rate: LearningRate::constant(1e-3), ..config() },
        TrainConfig { learning_rate: LearningRate::cosine(5e-5, 0), ..config() },
        TrainConfig { clip_norm: Some(1.0), ..config() },
        TrainConfig { ema: Some(0.5), ..config() },
    ];
    let refused = others.iter().map(|config| run(&data, config, folder.path())).chain([run(
        &other,
        &config(),
        folder.path(),
    )]);
    for result in refused {
        let error = result.expect_err("another run");
        assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
        assert!(error.to_string().contains(&folder.path().display().to_string()), "{error}");
    }
    // the same run, longer, with other habits of saving
    let longer = TrainConfig { steps: 7, checkpoint_every: 3, keep_checkpoints: 3, ..config() };
    assert_eq!(run(&data, &longer, folder.path()).unwrap(), 7);
    let steps: Vec<u64> =
        checkpoint::list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [4, 6, 7]);
}

#[test]
fn a_longer_cosine_is_another_run() {
    let folder = tempfile::tempdir().unwrap();
    let data = Targets::new(8);
    let cosine = TrainConfig { learning_rate: LearningRate::cosine(1e-3, 1), ..config() };
    run(&data, &cosine, folder.path()).unwrap();
    let error = run(&data, &TrainConfig { steps: 9, ..cosine }, folder.path()).unwrap_err();
    assert!(matches!(error, TrainError::OtherRun { .. }), "{error}");
}

#[test]
fn the_optimizer_has_state_for_every_trainable_parameter() {
    type Adam = OptimizerAdaptor<AdamW, UNet2dCondition<B>, B>;
    type Record = <Adam as Optimizer<UNet2dCondition<B>, B>>::Record;
    let folder = tempfile::tempdir().unwrap();
    let go = |steps| {
        let config = TrainConfig { steps, ..config() };
        train(adapted_unet(), &diffusion(4), &config, folder.path(), &Silent)
    };
    let model = go(2).unwrap().model;
    let file = newest(folder.path()).join(checkpoint::OPTIMIZER);
    let recorder = BinFileRecorder::<FullPrecisionSettings>::new();
    let mut record: Record = recorder.load(file.clone(), &Default::default()).unwrap();
    let trainable: HashMap<ParamId, String> = parameters::list::<B, _>(&model)
        .into_iter()
        .filter(|info| info.trainable)
        .map(|info| (ParamId::from(info.id), info.path))
        .collect();
    assert_eq!(record.len(), trainable.len());
    assert!(record.keys().all(|id| trainable.contains_key(id)));

    let (id, path) = trainable.iter().next().unwrap();
    record.remove(id).unwrap();
    recorder.record(record, file).unwrap();
    let error = go(3).err().expect("a parameter without moments").to_string();
    assert!(error.contains(path) && error.contains("no state"), "{error}");
}

#[test]
fn checkpoints_that_lack_something_are_named() {
    let data = Targets::new(8);
    for (file, word) in [
        (checkpoint::PARAMETERS, checkpoint::PARAMETERS),
        ("optimizer.bin", "optimizer"),
        (checkpoint::STATE, checkpoint::STATE),
        (checkpoint::EMA, checkpoint::EMA),
    ] {
        for broken in [None, Some("{")] {
            let folder = tempfile::tempdir().unwrap();
            let config = TrainConfig { ema: Some(0.9), ..config() };
            run(&data, &config, folder.path()).unwrap();
            let path = newest(folder.path()).join(file);
            assert!(path.is_file(), "{file}");
            match broken {
                None => std::fs::remove_file(&path).unwrap(),
                Some(text) => std::fs::write(&path, text).unwrap(),
            }
            let error = run(&data, &config, folder.path()).unwrap_err().to_string();
            assert!(error.contains("checkpoint-4") && error.contains(word), "{file}: {error}");
        }
    }
}

#[test]
fn parameters_of_another_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(checkpoint::PARAMETERS);
    checkpoint::save_trainable::<B, _>(&adapted_unet(), &path).unwrap();
    let error = checkpoint::load_trainable::<B, _>(toy(), &path).unwrap_err().to_string();
    assert!(error.contains("lora_") && error.contains("no trainable parameter"), "{error}");
    checkpoint::load_trainable::<B, _>(adapted_unet(), &path).unwrap();

    let write = |name: &str, width: usize| {
        let tensor = cxr_core::tensor_file::RawTensor::from_f32(vec![width], vec![0.5; width]);
        let tensors = if width == 0 { Vec::new() } else { vec![(name.to_string(), tensor)] };
        cxr_core::tensor_file::write_safetensors(&path, &tensors, &Default::default()).unwrap();
        checkpoint::load_trainable::<B, _>(toy(), &path)
    };
    assert!(write("w", 5).unwrap_err().to_string().contains("[5]"));
    assert!(write("", 0).unwrap_err().to_string().contains('w'));
    assert_eq!(crate::toy::values(&write("w", 6).unwrap()), [0.5; 6]);
}

#[test]
fn what_cannot_be_trained_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let none = run(&Targets::new(0), &config(), folder.path()).unwrap_err();
    assert!(matches!(none, TrainError::NoSamples), "{none}");
    let frozen = parameters::set_trainable::<B, _>(toy(), |_| false);
    let error = train(frozen, &Targets::new(8), &config(), folder.path(), &Silent).err().unwrap();
    assert!(matches!(error, TrainError::NothingTrainable), "{error}");
    let error = run(&Targets::new(8), &TrainConfig { steps: 0, ..config() }, folder.path()).unwrap_err();
    assert!(error.to_string().contains("steps is 0"), "{error}");
}
