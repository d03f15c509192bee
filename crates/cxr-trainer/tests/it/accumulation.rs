//! Accumulated passes against one large batch, on a UNet.

use cxr_core::progress::Silent;
use cxr_trainer::{LearningRate, OptimizerConfig, TrainConfig, train};

use crate::common::{adapted_unet, bits, diffusion, relative, trainable_values};

#[test]
fn two_batches_of_two_are_one_of_four() {
    let run = |batch_size, accumulation, n| {
        let config = TrainConfig {
            steps: 4,
            batch_size,
            accumulation,
            learning_rate: LearningRate::constant(1e-2),
            // Adam divides a gradient by its size; where it is but rounding, that would be all one sees
            optimizer: OptimizerConfig { epsilon: 1e-3, ..OptimizerConfig::default() },
            ..TrainConfig::default()
        };
        let folder = tempfile::tempdir().unwrap();
        trainable_values(
            &train(adapted_unet(), &diffusion(n), &config, folder.path(), &Silent).unwrap().model,
        )
    };
    // 7: the second step of an epoch is of 2 and 1
    let whole = run(4, 1, 7);
    let error = relative(&run(2, 2, 7), &whole);
    assert!(error < 1e-5, "{error:e}");
    let start = trainable_values(&adapted_unet());
    assert!(relative(&start, &whole) > 1e-3, "the steps have to matter");
}

#[test]
fn runs_of_several_threads_do_not_disturb_each_other() {
    let run = || {
        let config = TrainConfig {
            steps: 6,
            batch_size: 1,
            // parameters that went through a `backward` and are used again are what burn can lose
            accumulation: 4,
            learning_rate: LearningRate::constant(1e-2),
            ..TrainConfig::default()
        };
        let folder = tempfile::tempdir().unwrap();
        bits(
            &train(adapted_unet(), &diffusion(7), &config, folder.path(), &Silent).unwrap().model,
            Some(true),
        )
    };
    let alone = run();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (thread, found) in together.iter().enumerate() {
        assert!(*found == alone, "thread {thread} came to other parameters");
    }
}
