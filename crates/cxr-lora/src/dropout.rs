//! LoRA dropout: its masks are a function of a seed and a step, so that a run can be stopped and go on.

use cxr_core::random::Stream;

/// Where the masks of one training step come from.
///
/// The same seed, step, layer and shape give the same masks, on every machine, in every order of the layers, and as
/// often as the forward pass is computed (a checkpointed block computes it twice).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DropoutStep {
    /// The run's seed.
    pub seed: u64,
    /// The number of the forward pass; of the micro-batch where gradients are accumulated.
    pub step: u64,
}

impl DropoutStep {
    /// `n` values of the stream of the factor `id`: 0 with probability `p`, otherwise `1 / (1 - p)`.
    pub(crate) fn mask(self, id: u64, p: f64, n: usize) -> Vec<f32> {
        let mut stream = Stream::new(self.seed, &format!("lora-dropout.{id:016x}"), self.step);
        let kept = (1.0 / (1.0 - p)) as f32;
        let p = p as f32;
        (0..n).map(|_| if stream.uniform() < p { 0.0 } else { kept }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_by_name() {
        let step = |seed, step| DropoutStep { seed, step };
        let mask = step(1, 2).mask(3, 0.3, 100_000);
        assert_eq!(mask, step(1, 2).mask(3, 0.3, 100_000));
        for other in [step(2, 2).mask(3, 0.3, 100_000), step(1, 3).mask(3, 0.3, 100_000)] {
            assert_ne!(mask, other);
        }
        assert_ne!(mask, step(1, 2).mask(4, 0.3, 100_000));
        // A smaller batch is the beginning of a larger one.
        assert_eq!(mask[..10], step(1, 2).mask(3, 0.3, 10));

        let dropped = mask.iter().filter(|value| **value == 0.0).count() as f64;
        // The standard error is sqrt(0.3 * 0.7 / 1e5) = 0.00145; the bar is four of them.
        assert!((dropped / 1e5 - 0.3).abs() < 0.0058, "{dropped}");
        assert!(mask.iter().all(|value| *value == 0.0 || (value * 0.7 - 1.0).abs() < 1e-6));
    }
}
