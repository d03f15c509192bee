//! One real and one synthetic set, compared: every figure with its interval and floor.

use cxr_core::progress::Progress;
use serde::{Deserialize, Serialize};

use crate::card::{Card, Figure};
use crate::error::Result;
use crate::extractor::{Extraction, ExtractorId};
use crate::features::{FeatureSet, expect_size};
use crate::frechet::{frechet_distance_of_sets, frechet_distance_on};
use crate::inception;
use crate::interval::{BootstrapConfig, Interval, IntervalMethod, bootstrap, real_floor};
use crate::kernel_distance::{
    KernelMatrices, SubsetConfig, kernel_distance, kernel_distance_on, kernel_distance_subsets,
};

/// Images of both sets up to which kernel matrices are kept for the bootstrap (at most 0.8 GB).
const MATRIX_IMAGES: usize = 10_000;

/// How two sets are compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Resamples of each interval; 0 leaves intervals out. Each costs one distance: about 2 ms of one core for
    /// the Fréchet distance of 200 to 800 images in 128 dimensions, seconds for thousands in 2048.
    pub replicates: usize,
    /// Random splits of the real set for the floor; 0 leaves it out.
    pub floor_splits: usize,
    /// Coverage of the intervals.
    pub level: f64,
    /// Seed of every random choice.
    pub seed: u64,
}

impl Default for Evaluation {
    /// 1000 replicates, 20 splits, 95 %, seed 0.
    fn default() -> Self {
        Self { replicates: 1000, floor_splits: 20, level: 0.95, seed: 0 }
    }
}

impl Evaluation {
    /// Fréchet and kernel distance between `real` and `fake`, both taken with `extractor`.
    ///
    /// # Errors
    /// Fewer than four real or two synthetic images, features of different widths, cancellation.
    pub fn compare(
        &self,
        real: &Extraction,
        fake: &Extraction,
        extractor: &ExtractorId,
        progress: &dyn Progress,
    ) -> Result<Card> {
        expect_size(|| "width of the real features".into(), extractor.feature_dim, real.features.width())?;
        expect_size(
            || "width of the synthetic features".into(),
            extractor.feature_dim,
            fake.features.width(),
        )?;
        let mut notes = Vec::new();
        if real.resolution != fake.resolution {
            notes.push(format!(
                "real pictures are {}, synthetic ones {}: a part of every distance is the resize",
                real.resolution, fake.resolution
            ));
        }
        let blank = Figure {
            name: String::new(),
            value: 0.0,
            standard_deviation: None,
            interval: None,
            floor: None,
            n_real: real.features.len(),
            n_fake: fake.features.len(),
            resolution: fake.resolution,
            extractor: Some(extractor.clone()),
            seed: self.seed,
            notes,
        };
        let (real, fake) = (&real.features, &fake.features);
        let frechet = self.frechet(real, fake, blank.clone(), progress)?;
        let kernel = self.kernel(real, fake, blank, progress)?;
        Ok(Card { figures: vec![frechet, kernel] })
    }

    fn frechet(
        &self,
        real: &FeatureSet,
        fake: &FeatureSet,
        mut figure: Figure,
        progress: &dyn Progress,
    ) -> Result<Figure> {
        let name = "frechet_distance";
        let smaller = real.len().min(fake.len());
        figure.notes.extend(small_n_note(smaller, real.width()));
        figure.name = named(name, &figure);
        figure.value = frechet_distance_of_sets(real, fake)?;
        let config = self.bootstrap(IntervalMethod::ShiftedPercentile);
        figure.interval =
            self.interval(name, &figure, &config, progress, |r, f| frechet_distance_on(real, r, fake, f))?;
        self.add_floor(name, &mut figure, progress, |a, b| frechet_distance_on(real, a, real, b))?;
        Ok(figure)
    }

    fn kernel(
        &self,
        real: &FeatureSet,
        fake: &FeatureSet,
        mut figure: Figure,
        progress: &dyn Progress,
    ) -> Result<Figure> {
        let name = "kernel_distance";
        let subsets = SubsetConfig::for_sets(real.len(), fake.len(), self.seed);
        figure.name = named(name, &figure);
        figure.value = kernel_distance(real, fake)?;
        let spread = kernel_distance_subsets(real, fake, &subsets)?;
        figure.standard_deviation = Some(spread.standard_deviation);
        figure.notes.push(format!(
            "kernel distance is of the whole sets; its deviation is over {} subsets of {} images (mean {:.6})",
            spread.subsets, spread.size, spread.mean
        ));
        if self.replicates > 0 && real.len() + fake.len() > MATRIX_IMAGES {
            figure.notes.push(format!("no interval of the kernel distance above {MATRIX_IMAGES} images"));
        } else if self.replicates > 0 {
            let matrices = KernelMatrices::new(real, fake)?;
            let config = self.bootstrap(IntervalMethod::Percentile);
            figure.interval =
                self.interval(name, &figure, &config, progress, |r, f| matrices.distance_on(r, f))?;
        }
        self.add_floor(name, &mut figure, progress, |a, b| {
            Ok(kernel_distance_on(real, real, &[(a.to_vec(), b.to_vec())])?.mean)
        })?;
        Ok(figure)
    }

    fn bootstrap(&self, method: IntervalMethod) -> BootstrapConfig {
        BootstrapConfig { replicates: self.replicates, level: self.level, method, seed: self.seed }
    }

    fn interval(
        &self,
        name: &str,
        figure: &Figure,
        config: &BootstrapConfig,
        progress: &dyn Progress,
        statistic: impl Fn(&[usize], &[usize]) -> Result<f64> + Sync,
    ) -> Result<Option<Interval>> {
        if self.replicates == 0 {
            return Ok(None);
        }
        let sizes = (figure.n_real, figure.n_fake);
        bootstrap(name, figure.value, sizes, config, progress, statistic).map(Some)
    }

    fn add_floor(
        &self,
        name: &str,
        figure: &mut Figure,
        progress: &dyn Progress,
        statistic: impl Fn(&[usize], &[usize]) -> Result<f64> + Sync,
    ) -> Result<()> {
        if self.floor_splits == 0 {
            return Ok(());
        }
        let n = figure.n_real.min(figure.n_fake);
        let floor = real_floor(name, figure.n_real, n, self.floor_splits, self.seed, progress, statistic)?;
        if floor.n < n {
            figure.notes.push(format!(
                "the floors have {} images in each part, not {n}: the real set cannot be split into more",
                floor.n
            ));
        }
        figure.floor = Some(floor);
        Ok(())
    }
}

/// The metric's name with its extractor: FID and KID are the names of two distances with one network and its
/// published weights, and nothing else bears them.
pub(crate) fn named(metric: &str, figure: &Figure) -> String {
    let Some(extractor) = &figure.extractor else { return metric.into() };
    let metric = match metric {
        "frechet_distance" if extractor.name == inception::NAME => "fid",
        "kernel_distance" if extractor.name == inception::NAME => "kid",
        other => other,
    };
    format!("{metric}/{}", extractor.name)
}

/// What a reader of a Fréchet distance has to know where the smaller set has no more images than features.
pub(crate) fn small_n_note(n: usize, features: usize) -> Option<String> {
    (n <= features).then(|| {
        format!(
            "warning: N = {n} for {features} features: the covariance is singular, and the Fréchet distance biased \
             upwards; compare it with its floor, not with figures at other N"
        )
    })
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;

    use super::*;
    use crate::error::MetricsError;
    use crate::image::ImageSize;
    use crate::testing::random_set;

    fn extraction(name: &str, n: usize, scale: f32) -> Extraction {
        Extraction {
            features: random_set(name, n, 6, scale),
            logits: None,
            resolution: ImageSize::square(64),
        }
    }

    fn id() -> ExtractorId {
        ExtractorId {
            name: "toy".into(),
            hash: "00".into(),
            feature_dim: 6,
            input_size: ImageSize::square(64),
            resize: None,
        }
    }

    #[test]
    fn a_comparison_carries_everything_and_tells_good_from_bad() {
        let evaluation = Evaluation { replicates: 100, ..Default::default() };
        let real = extraction("real", 120, 1.0);
        let good = evaluation.compare(&real, &extraction("good", 60, 1.0), &id(), &Silent).unwrap();
        let bad = evaluation.compare(&real, &extraction("bad", 60, 2.0), &id(), &Silent).unwrap();
        for (good, bad) in good.figures.iter().zip(&bad.figures) {
            assert_eq!((good.n_real, good.n_fake, good.seed), (120, 60, 0));
            assert_eq!((good.resolution, good.extractor.as_ref()), (ImageSize::square(64), Some(&id())));
            assert!(good.name.ends_with("/toy"), "{}", good.name);
            let [inside, outside] = [good, bad].map(|f| f.interval.as_ref().unwrap());
            assert!(inside.high < outside.low, "{good:?}\n{bad:?}");
            let floor = bad.floor.as_ref().unwrap();
            assert_eq!(floor.n, 60);
            assert!(bad.value > floor.mean + 5.0 * floor.standard_deviation);
            assert!((good.value - floor.mean).abs() < 5.0 * floor.standard_deviation, "{good:?}");
        }
        let again = evaluation.compare(&real, &extraction("good", 60, 1.0), &id(), &Silent).unwrap();
        assert_eq!(good, again);
    }

    #[test]
    fn small_sets_and_other_resolutions_are_noted_and_wrong_widths_refused() {
        let evaluation = Evaluation { replicates: 0, ..Default::default() };
        let real = extraction("real", 8, 1.0);
        let fake = Extraction { resolution: ImageSize::square(32), ..extraction("fake", 5, 1.0) };
        let card = evaluation.compare(&real, &fake, &id(), &Silent).unwrap();
        let frechet = card.figure("frechet_distance").unwrap();
        assert_eq!((&frechet.interval, frechet.floor.as_ref().unwrap().n), (&None, 4));
        for word in ["singular", "resize", "not 5"] {
            assert!(frechet.notes.iter().any(|n| n.contains(word)), "{word} in {:?}", frechet.notes);
        }
        let other = ExtractorId { feature_dim: 7, ..id() };
        assert!(matches!(
            evaluation.compare(&real, &fake, &other, &Silent),
            Err(MetricsError::SizeMismatch { .. })
        ));
    }
}
