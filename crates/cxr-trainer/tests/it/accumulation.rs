//! Accumulated passes against one large batch, on a UNet.

use cxr_core::progress::Silent;
use cxr_trainer::{LearningRate, OptimizerConfig, TrainConfig, train};

use crate::common::{adapted_unet, diffusion, relative, trainable_values};

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
