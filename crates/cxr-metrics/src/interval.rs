//! How far a figure would move with other images: bootstrap intervals and the real-versus-real floor.
//!
//! Both take the statistic as a function of two lists of image positions, so every two-sample figure of this
//! crate (and of others) gets them from the same lines. Replicate b draws from the stream (seed, purpose, b):
//! results depend neither on the number of threads nor on how many replicates follow.

use cxr_core::progress::Progress;
use cxr_core::random::Stream;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::expect_samples;
use crate::progress::advance;
use crate::resample::{choose, with_replacement};

/// How replicates become an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IntervalMethod {
    /// The quantiles of the replicates: for statistics that are unbiased under resampling, as the kernel
    /// distance with repeated images left out, or the area under a ROC curve.
    Percentile,
    /// The quantiles, moved so that the mean replicate falls on the estimate: for the Fréchet distance,
    /// whose bias falls with the number of different images. A replicate holds 63 % of them, so its
    /// distance is too large and the plain interval may lie wholly above the estimate. The bias of the
    /// estimate itself remains: compare with the floor at the same N. On the safe side where images are
    /// few: for normal features of width 128 it is 2 to 3 times too wide at N = 200, 1.5 to 2.5 times at
    /// N = 1000; right for width 8 and N = 200.
    ShiftedPercentile,
}

/// What a bootstrap does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootstrapConfig {
    /// Number of resamples. The ends of a 95 % interval want about 1000; 200 give one significant figure.
    pub replicates: usize,
    /// Coverage aimed at, in (0, 1).
    pub level: f64,
    /// How replicates become an interval.
    pub method: IntervalMethod,
    /// Seed of the named streams.
    pub seed: u64,
}

impl Default for BootstrapConfig {
    /// 1000 replicates, 95 %, percentile, seed 0.
    fn default() -> Self {
        Self { replicates: 1000, level: 0.95, method: IntervalMethod::Percentile, seed: 0 }
    }
}

/// A confidence interval and how it came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Coverage aimed at.
    pub level: f64,
    /// `bootstrap percentile`, `bootstrap shifted percentile`, `hanley-mcneil`, ...
    pub method: String,
    /// Number of resamples; none for a closed form.
    pub replicates: Option<usize>,
}

/// A two-sample figure between disjoint parts of the real set: what perfect pictures would score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// Mean over splits.
    pub mean: f64,
    /// Sample standard deviation over splits (which share images); zero for one split.
    pub standard_deviation: f64,
    /// Images in each of the two parts. Where it is below the N of the figure, the floor of a biased
    /// figure (Fréchet) is too high by comparison.
    pub n: usize,
    /// Number of random splits.
    pub splits: usize,
}

/// Bootstrap interval of a two-sample statistic: both sets are resampled with replacement, image by image.
///
/// `statistic(real, fake)` gets positions below `n_real` and `n_fake`, repetitions included. Images of one
/// patient are resampled as if they were independent, which makes intervals of sets with several images per
/// patient too narrow.
///
/// # Errors
/// Fewer than two images in a set, no replicates, a level outside (0, 1), an error or a non-finite value of
/// the statistic, cancellation.
pub fn bootstrap(
    purpose: &str,
    estimate: f64,
    (n_real, n_fake): (usize, usize),
    config: &BootstrapConfig,
    progress: &dyn Progress,
    statistic: impl Fn(&[usize], &[usize]) -> Result<f64> + Sync,
) -> Result<Interval> {
    expect_samples("the real set of a bootstrap", 2, n_real)?;
    expect_samples("the fake set of a bootstrap", 2, n_fake)?;
    config.check()?;
    let stage = format!("bootstrap of {purpose}");
    let values = repeat(&stage, config.replicates, progress, |b| {
        let mut stream = Stream::new(config.seed, &format!("bootstrap/{purpose}"), b as u64);
        // A draw of one image n times has no spread to measure: vanishing chance, but for two or three images.
        let real = varied(&mut stream, n_real);
        let fake = varied(&mut stream, n_fake);
        statistic(&real, &fake)
    })?;
    Ok(config.interval(estimate, values))
}

/// Bootstrap interval of the mean of `values`, resampled one by one.
///
/// # Errors
/// Fewer than two values, no replicates, a level outside (0, 1), a value that is not finite, cancellation.
pub fn bootstrap_mean(
    purpose: &str,
    values: &[f64],
    config: &BootstrapConfig,
    progress: &dyn Progress,
) -> Result<Interval> {
    expect_samples("the values of a bootstrap", 2, values.len())?;
    config.check()?;
    let mean =
        |positions: &[usize]| positions.iter().map(|&i| values[i]).sum::<f64>() / positions.len() as f64;
    let replicates = repeat(&format!("bootstrap of {purpose}"), config.replicates, progress, |b| {
        let mut stream = Stream::new(config.seed, &format!("bootstrap/{purpose}"), b as u64);
        Ok(mean(&with_replacement(&mut stream, values.len())))
    })?;
    let estimate = values.iter().sum::<f64>() / values.len() as f64;
    Ok(config.interval(estimate, replicates))
}

impl BootstrapConfig {
    pub(crate) fn check(&self) -> Result<()> {
        if self.replicates == 0 {
            return Err(MetricsError::InvalidParameter {
                name: "replicates",
                value: "0".into(),
                expected: "at least one".into(),
            });
        }
        if !(self.level > 0.0 && self.level < 1.0) {
            return Err(MetricsError::InvalidParameter {
                name: "level",
                value: self.level.to_string(),
                expected: "a coverage between 0 and 1, as 0.95".into(),
            });
        }
        Ok(())
    }

    pub(crate) fn interval(&self, estimate: f64, mut values: Vec<f64>) -> Interval {
        let shift = match self.method {
            IntervalMethod::Percentile => 0.0,
            IntervalMethod::ShiftedPercentile => estimate - values.iter().sum::<f64>() / values.len() as f64,
        };
        values.sort_by(f64::total_cmp);
        let tail = (1.0 - self.level) / 2.0;
        Interval {
            low: quantile(&values, tail) + shift,
            high: quantile(&values, 1.0 - tail) + shift,
            level: self.level,
            method: match self.method {
                IntervalMethod::Percentile => "bootstrap percentile".into(),
                IntervalMethod::ShiftedPercentile => "bootstrap shifted percentile".into(),
            },
            replicates: Some(self.replicates),
        }
    }
}

/// The statistic between `splits` random pairs of disjoint parts of the real set, `n_each` images in each,
/// or half of the set where it is smaller than twice `n_each`.
///
/// # Errors
/// Fewer than four real images, `n_each` below two, no splits, an error or a non-finite value of the
/// statistic, cancellation.
pub fn real_floor(
    purpose: &str,
    n_real: usize,
    n_each: usize,
    splits: usize,
    seed: u64,
    progress: &dyn Progress,
    statistic: impl Fn(&[usize], &[usize]) -> Result<f64> + Sync,
) -> Result<Floor> {
    expect_samples("the real set of a floor", 4, n_real)?;
    expect_samples("each part of a floor", 2, n_each)?;
    expect_samples("the splits of a floor", 1, splits)?;
    let n = n_each.min(n_real / 2);
    let values = repeat(&format!("floor of {purpose}"), splits, progress, |i| {
        let drawn = choose(&mut Stream::new(seed, &format!("floor/{purpose}"), i as u64), n_real, 2 * n);
        statistic(&drawn[..n], &drawn[n..])
    })?;
    let mean = values.iter().sum::<f64>() / splits as f64;
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    let standard_deviation = if splits > 1 { (squares / (splits - 1) as f64).sqrt() } else { 0.0 };
    Ok(Floor { mean, standard_deviation, n, splits })
}

/// Quantile of sorted values with linear interpolation (numpy's default).
pub(crate) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (position - below as f64) * (sorted[above] - sorted[below])
}

fn varied(stream: &mut Stream, n: usize) -> Vec<usize> {
    loop {
        let drawn = with_replacement(stream, n);
        if drawn.iter().any(|i| *i != drawn[0]) {
            return drawn;
        }
    }
}

/// `count` values in parallel, in chunks so that the caller is heard between them.
pub(crate) fn repeat(
    stage: &str,
    count: usize,
    progress: &dyn Progress,
    value: impl Fn(usize) -> Result<f64> + Sync,
) -> Result<Vec<f64>> {
    const CHUNK: usize = 32;
    progress.begin(stage, Some(count as u64));
    let mut values = Vec::with_capacity(count);
    for start in (0..count).step_by(CHUNK) {
        let end = (start + CHUNK).min(count);
        let chunk = (start..end).into_par_iter().map(&value).collect::<Result<Vec<f64>>>()?;
        values.extend(chunk);
        advance(progress, stage, end, count)?;
    }
    progress.end("");
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(row) => Err(MetricsError::NonFinite { what: stage.into(), row, column: 0, value: values[row] }),
    }
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;

    use super::*;
    use crate::frechet::frechet_distance_of_sets;
    use crate::testing::{StopAfter, random_set};

    fn mean_difference<'a>(
        x: &'a [f64],
        y: &'a [f64],
    ) -> impl Fn(&[usize], &[usize]) -> Result<f64> + Sync + 'a {
        let mean = |v: &[f64], i: &[usize]| i.iter().map(|&i| v[i]).sum::<f64>() / i.len() as f64;
        move |a, b| Ok(mean(x, a) - mean(y, b))
    }

    #[test]
    fn interval_of_a_mean_has_the_normal_width() {
        let values = |name| -> Vec<f64> {
            random_set(name, 400, 1, 1.0).values().iter().map(|v| f64::from(*v)).collect()
        };
        let (x, y) = (values("x"), values("y"));
        let all: Vec<usize> = (0..400).collect();
        let statistic = mean_difference(&x, &y);
        let estimate = statistic(&all, &all).unwrap();
        let config = BootstrapConfig { replicates: 2000, ..Default::default() };
        let interval = bootstrap("mean", estimate, (400, 400), &config, &Silent, &statistic).unwrap();
        let expected = 2.0 * 1.96 * (2.0f64 / 400.0).sqrt();
        let width = interval.high - interval.low;
        assert!((width / expected - 1.0).abs() < 0.15, "{width} against {expected}");
        assert!(interval.low < estimate && estimate < interval.high);
        let again = bootstrap("mean", estimate, (400, 400), &config, &Silent, &statistic).unwrap();
        assert_eq!(interval, again);
        let other = BootstrapConfig { seed: 1, ..config };
        assert_ne!(interval, bootstrap("mean", estimate, (400, 400), &other, &Silent, &statistic).unwrap());
    }

    #[test]
    fn shifted_interval_holds_a_frechet_distance_that_the_plain_one_misses() {
        let (x, y) = (random_set("x", 30, 12, 1.0), random_set("y", 30, 12, 1.0));
        let estimate = frechet_distance_of_sets(&x, &y).unwrap();
        let run = |method| {
            let config = BootstrapConfig { replicates: 200, method, ..Default::default() };
            bootstrap("frechet", estimate, (30, 30), &config, &Silent, |a, b| {
                frechet_distance_of_sets(&x.select(a), &y.select(b))
            })
            .unwrap()
        };
        let plain = run(IntervalMethod::Percentile);
        assert!(plain.low > estimate, "{plain:?} around {estimate}");
        let shifted = run(IntervalMethod::ShiftedPercentile);
        assert!(shifted.low < estimate && estimate < shifted.high, "{shifted:?} around {estimate}");
    }

    #[test]
    fn floor_uses_disjoint_parts_of_the_size_that_was_asked_for() {
        let seen = |n_real, n_each| {
            real_floor("count", n_real, n_each, 5, 0, &Silent, |a, b| {
                let mut all = [a, b].concat();
                all.sort_unstable();
                all.dedup();
                assert_eq!(all.len(), a.len() + b.len());
                assert!(all.iter().all(|i| *i < n_real));
                Ok(a.len() as f64)
            })
            .unwrap()
        };
        assert_eq!((seen(100, 30).mean, seen(100, 30).n), (30.0, 30));
        assert_eq!((seen(41, 30).mean, seen(41, 30).n), (20.0, 20));
        assert_eq!(seen(41, 30).standard_deviation, 0.0);
    }

    #[test]
    fn a_mean_of_ones_and_zeros_has_the_binomial_width() {
        let values: Vec<f64> = (0..400).map(|i| f64::from(u8::from(i % 4 == 0))).collect();
        let config = BootstrapConfig { replicates: 2000, ..Default::default() };
        let interval = bootstrap_mean("share", &values, &config, &Silent).unwrap();
        let expected = 2.0 * 1.96 * (0.25f64 * 0.75 / 400.0).sqrt();
        assert!(((interval.high - interval.low) / expected - 1.0).abs() < 0.15, "{interval:?}");
        assert!(interval.low < 0.25 && 0.25 < interval.high);
        assert!(bootstrap_mean("share", &values[..1], &config, &Silent).is_err());
    }

    #[test]
    fn quantiles_interpolate() {
        let values = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&values, 1.0), 8.0);
        assert_eq!(quantile(&values, 0.5), 3.0);
    }

    #[test]
    fn bad_input_and_a_stop_are_errors() {
        let one = |_: &[usize], _: &[usize]| Ok(1.0);
        let run = |sizes, config: &BootstrapConfig| bootstrap("x", 1.0, sizes, config, &Silent, one);
        let config = BootstrapConfig::default();
        assert!(matches!(run((1, 5), &config), Err(MetricsError::TooFewSamples { .. })));
        assert!(run((5, 5), &BootstrapConfig { replicates: 0, ..config.clone() }).is_err());
        assert!(run((5, 5), &BootstrapConfig { level: 95.0, ..config.clone() }).is_err());
        let broken = bootstrap("x", 1.0, (5, 5), &config, &Silent, |_, _| Ok(f64::NAN));
        assert!(matches!(broken, Err(MetricsError::NonFinite { .. })));
        let stopped = bootstrap("x", 1.0, (5, 5), &config, &StopAfter(40), one);
        assert!(matches!(stopped, Err(MetricsError::Cancelled { done: 64, .. })), "{stopped:?}");
        assert!(real_floor("x", 3, 2, 1, 0, &Silent, one).is_err());
    }
}
