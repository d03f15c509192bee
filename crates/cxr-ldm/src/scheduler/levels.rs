//! Noise levels `sigma = sqrt((1 - alpha_bar) / alpha_bar)`, which Euler and DPM-Solver++ step over.

use super::schedule::NoiseSchedule;

/// The exponent of Karras et al. 2022, equation (5).
const RHO: f64 = 7.0;

/// Timesteps at which the denoiser is called, and the noise levels between which the sampler steps.
#[derive(Debug, Clone)]
pub(super) struct Levels {
    /// Falling; fractions of a training timestep are possible.
    pub(super) timesteps: Vec<f64>,
    /// One more than there are timesteps: the last is 0.
    pub(super) sigmas: Vec<f64>,
}

impl Levels {
    /// The levels of timesteps.
    pub(super) fn of(schedule: &NoiseSchedule, timesteps: Vec<f64>) -> Self {
        let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| schedule.sigma_at(t)).collect();
        sigmas.push(0.0);
        Self { timesteps, sigmas }
    }

    /// `count` levels from `largest` down to `smallest`, evenly in their seventh root, and their timesteps.
    pub(super) fn karras(schedule: &NoiseSchedule, largest: f64, smallest: f64, count: usize) -> Self {
        let (from, to) = (largest.powf(RHO.recip()), smallest.powf(RHO.recip()));
        let ramp = |i: usize| if count > 1 { i as f64 / (count - 1) as f64 } else { 0.0 };
        let mut sigmas: Vec<f64> = (0..count).map(|i| (from + ramp(i) * (to - from)).powf(RHO)).collect();
        let timesteps = sigmas.iter().map(|&sigma| timestep_of(schedule, sigma)).collect();
        sigmas.push(0.0);
        Self { timesteps, sigmas }
    }
}

/// The timestep of a level, by linear interpolation of the logarithms; the first or last for one out of range.
fn timestep_of(schedule: &NoiseSchedule, sigma: f64) -> f64 {
    let last = schedule.train_timesteps() - 1;
    if last == 0 {
        return 0.0;
    }
    let log = |t: usize| schedule.sigma(t as i64).ln();
    let wanted = sigma.max(1e-10).ln();
    // levels grow with the timestep: the last one that is not above the wanted
    let above = partition(last + 1, |t| log(t) <= wanted);
    let low = above.saturating_sub(1).min(last - 1);
    let share = ((log(low) - wanted) / (log(low) - log(low + 1))).clamp(0.0, 1.0);
    low as f64 + share
}

/// The first index in `0..count` for which `test` does not hold; it holds for those before.
fn partition(count: usize, test: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = (low + high) / 2;
        if test(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::NoiseScheduleConfig;

    #[test]
    fn timesteps_and_levels_are_inverse() {
        let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
        for t in [0, 1, 500, 998, 999] {
            assert!((timestep_of(&schedule, schedule.sigma(t)) - t as f64).abs() < 1e-9, "{t}");
        }
        assert_eq!((timestep_of(&schedule, 1e-9), timestep_of(&schedule, 1e9)), (0.0, 999.0));
        assert_eq!(partition(5, |i| i < 3), 3);
    }

    #[test]
    fn karras_levels_have_their_ends() {
        let schedule = NoiseSchedule::new(NoiseScheduleConfig::sd15()).unwrap();
        let levels = Levels::karras(&schedule, 14.6, 0.03, 5);
        assert!((levels.sigmas[0] - 14.6).abs() < 1e-9 && (levels.sigmas[4] - 0.03).abs() < 1e-9);
        assert_eq!((levels.sigmas.len(), levels.sigmas[5], levels.timesteps.len()), (6, 0.0, 5));
        assert_eq!(
            Levels::karras(&schedule, 14.6, 0.03, 1).sigmas,
            [14.6_f64.powf(1.0 / 7.0).powf(7.0), 0.0]
        );
    }
}
