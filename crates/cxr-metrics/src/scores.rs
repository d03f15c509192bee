//! The other figures of one comparison: Inception Score, precision and its kin, similarity within prompts, and
//! distances to statistics from a file. Each carries what the distances of [`Evaluation::compare`] carry.

use cxr_core::progress::Progress;
use cxr_core::random::Stream;

use crate::card::Figure;
use crate::error::Result;
use crate::evaluation::{Evaluation, named, small_n_note};
use crate::extractor::{Extraction, ExtractorId};
use crate::features::{FeatureSet, expect_size};
use crate::frechet::frechet_distance_to_set;
use crate::image::{ImageSize, ImageSource};
use crate::inception_score::inception_score;
use crate::interval::{
    BootstrapConfig, Floor, Interval, IntervalMethod, bootstrap, bootstrap_mean, real_floor,
};
use crate::moments::Moments;
use crate::ms_ssim::prompt_similarity;
use crate::prdc::prdc;

impl Evaluation {
    /// Inception Score of synthetic logits, shuffled by the stream (`seed`, `inception-score`, 0) before they are
    /// split. `real` logits, where there are some, give what real pictures of the same N score: in the place of the
    /// floor, as a score has nothing to be compared with otherwise. `extractor` is that of the logits.
    ///
    /// # Errors
    /// Those of [`inception_score`]; no logits; cancellation.
    pub fn inception_score(
        &self,
        real: Option<&Extraction>,
        fake: &Extraction,
        splits: usize,
        extractor: &ExtractorId,
        progress: &dyn Progress,
    ) -> Result<Figure> {
        let empty = FeatureSet::new(Vec::new(), extractor.feature_dim.max(1))?;
        let logits = fake.logits.as_ref().unwrap_or(&empty);
        expect_size(|| "width of the logits".into(), extractor.feature_dim, logits.width())?;
        let name = "inception_score";
        let score = |logits: &FeatureSet, positions: &[usize]| {
            let mut order = positions.to_vec();
            Stream::new(self.seed, "inception-score", 0).shuffle(&mut order);
            inception_score(logits, &order, splits)
        };
        let all: Vec<usize> = (0..logits.len()).collect();
        let found = score(logits, &all)?;
        let mut figure = self.blank(0, logits.len(), fake.resolution, Some(extractor));
        figure.name = named(name, &figure);
        figure.value = found.mean;
        figure.standard_deviation = Some(found.standard_deviation);
        figure.notes.push(format!(
            "the Inception Score's deviation is over {splits} splits of {} images; it grows with N, and its classes \
             are no radiographs",
            logits.len() / splits
        ));
        if self.replicates > 0 {
            let config = BootstrapConfig { method: IntervalMethod::ShiftedPercentile, ..self.config() };
            let sizes = (logits.len(), logits.len());
            figure.interval = Some(bootstrap(name, figure.value, sizes, &config, progress, |_, f| {
                Ok(score(logits, f)?.mean)
            })?);
        }
        if let Some(real) = real.and_then(|real| real.logits.as_ref()) {
            figure.n_real = real.len();
            let n = logits.len().min(real.len());
            // Half of the real set is all that a floor takes where it is small: here all of it may serve.
            if self.floor_splits > 0 && n >= 2 * splits {
                let values = (0..self.floor_splits)
                    .map(|i| {
                        let mut stream = Stream::new(self.seed, "floor/inception_score", i as u64);
                        let drawn = crate::resample::choose(&mut stream, real.len(), n);
                        Ok(inception_score(real, &drawn, splits)?.mean)
                    })
                    .collect::<Result<Vec<f64>>>()?;
                figure.floor = Some(floor_of(&values, n));
            }
        }
        Ok(figure)
    }

    /// Precision, recall, density and coverage, with balls over `k` neighbours.
    ///
    /// Intervals are over the images that a figure is a mean of (synthetic ones for precision and density, real ones
    /// for recall and coverage), the other set held fixed: resampling it would put copies into the balls.
    ///
    /// # Errors
    /// Those of [`prdc`], cancellation.
    pub fn prdc(
        &self,
        real: &Extraction,
        fake: &Extraction,
        k: usize,
        extractor: &ExtractorId,
        progress: &dyn Progress,
    ) -> Result<Vec<Figure>> {
        let (real_set, fake_set) = (&real.features, &fake.features);
        let found = prdc(real_set, fake_set, k)?;
        let n = real_set.len().min(fake_set.len());
        let halves = n.min(real_set.len() / 2);
        let floors = if self.floor_splits > 0 && halves > k {
            let parts = |a: &[usize], b: &[usize]| prdc(&real_set.select(a), &real_set.select(b), k);
            let mut all = Vec::new();
            for take in [
                |p: &crate::prdc::Prdc| p.precision,
                |p: &crate::prdc::Prdc| p.recall,
                |p: &crate::prdc::Prdc| p.density,
                |p: &crate::prdc::Prdc| p.coverage,
            ] {
                let splits = self.floor_splits;
                all.push(Some(real_floor(
                    "prdc",
                    real_set.len(),
                    n,
                    splits,
                    self.seed,
                    progress,
                    |a, b| Ok(take(&parts(a, b)?)),
                )?));
            }
            all
        } else {
            vec![None; 4]
        };
        let parts = &found.parts;
        let rows = [
            ("precision", found.precision, &parts.precision),
            ("recall", found.recall, &parts.recall),
            ("density", found.density, &parts.density),
            ("coverage", found.coverage, &parts.coverage),
        ];
        rows.into_iter()
            .zip(floors)
            .map(|((name, value, values), floor)| {
                let mut figure =
                    self.blank(real_set.len(), fake_set.len(), fake.resolution, Some(extractor));
                figure.name = named(name, &figure);
                figure.value = value;
                figure.interval = self.mean_interval(name, values, progress)?;
                if let Some(floor) = floor.as_ref().filter(|floor| floor.n < n) {
                    figure.notes.push(format!(
                        "the floors have {} images in each part, not {n}: the real set cannot be split into more",
                        floor.n
                    ));
                }
                figure.floor = floor;
                figure.notes.push(format!(
                    "precision, recall, density and coverage are over {k} neighbours; their intervals leave the other \
                     set as it is"
                ));
                Ok(figure)
            })
            .collect()
    }

    /// MS-SSIM between pictures of one prompt; its interval is over prompts.
    ///
    /// # Errors
    /// Those of [`prompt_similarity`].
    pub fn ms_ssim(
        &self,
        images: &dyn ImageSource,
        prompts: &[String],
        most_pairs: usize,
        progress: &dyn Progress,
    ) -> Result<Figure> {
        let found = prompt_similarity(images, prompts, most_pairs, self.seed, progress)?;
        let resolution = images.load(0)?.size();
        let mut figure = self.blank(0, images.len(), resolution, None);
        figure.name = format!("ms_ssim_within_prompt_{}_scales", found.scales);
        figure.value = found.mean;
        if found.per_prompt.len() > 1 {
            figure.interval = self.mean_interval("ms_ssim", &found.per_prompt, progress)?;
        }
        figure.notes.push(format!(
            "MS-SSIM with {} of 5 scales over {} pairs within {} prompts (1: the same picture over and over); its \
             interval is over prompts",
            found.scales,
            found.pairs,
            found.per_prompt.len()
        ));
        Ok(figure)
    }

    /// Fréchet distance between real statistics from a file and synthetic features. Without real features there is
    /// neither floor nor interval over real images, and no kernel distance.
    ///
    /// # Errors
    /// Those of [`frechet_distance_to_set`].
    pub fn compare_with_statistics(
        &self,
        real: &Moments,
        fake: &Extraction,
        extractor: &ExtractorId,
    ) -> Result<Figure> {
        let mut figure =
            self.blank(real.count.unwrap_or(0), fake.features.len(), fake.resolution, Some(extractor));
        figure.name = named("frechet_distance", &figure);
        figure.value = frechet_distance_to_set(real, &fake.features)?;
        if real.count.is_none() {
            figure
                .notes
                .push("the real statistics do not say of how many images they are (N real is 0 here)".into());
        }
        if real.extractor.is_none() || (real.resize.is_none() && extractor.resize.is_some()) {
            figure.notes.push(
                "the real statistics name neither network nor resize mode: those of this run are assumed"
                    .into(),
            );
        }
        figure.notes.push(
            "real statistics from a file have no images: no floor, no interval, no kernel distance".into(),
        );
        let smaller = real.count.map_or(fake.features.len(), |n| n.min(fake.features.len()));
        figure.notes.extend(small_n_note(smaller, extractor.feature_dim));
        Ok(figure)
    }

    fn blank(
        &self,
        n_real: usize,
        n_fake: usize,
        resolution: ImageSize,
        extractor: Option<&ExtractorId>,
    ) -> Figure {
        Figure {
            name: String::new(),
            value: 0.0,
            standard_deviation: None,
            interval: None,
            floor: None,
            n_real,
            n_fake,
            resolution,
            extractor: extractor.cloned(),
            seed: self.seed,
            notes: Vec::new(),
        }
    }

    fn config(&self) -> BootstrapConfig {
        BootstrapConfig {
            replicates: self.replicates,
            level: self.level,
            seed: self.seed,
            ..Default::default()
        }
    }

    fn mean_interval(&self, name: &str, values: &[f64], progress: &dyn Progress) -> Result<Option<Interval>> {
        if self.replicates == 0 {
            return Ok(None);
        }
        bootstrap_mean(name, values, &self.config(), progress).map(Some)
    }
}

fn floor_of(values: &[f64], n: usize) -> Floor {
    let splits = values.len();
    let mean = values.iter().sum::<f64>() / splits as f64;
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    let standard_deviation = if splits > 1 { (squares / (splits - 1) as f64).sqrt() } else { 0.0 };
    Floor { mean, standard_deviation, n, splits }
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;

    use super::*;
    use crate::error::MetricsError;
    use crate::frechet::FeatureStatistics;
    use crate::inception::NAME;
    use crate::testing::random_set;

    fn extraction(name: &str, n: usize, scale: f32) -> Extraction {
        Extraction {
            features: random_set(name, n, 6, scale),
            logits: Some(random_set(&format!("{name} logits"), n, 6, scale)),
            resolution: ImageSize::square(64),
        }
    }

    fn id(name: &str) -> ExtractorId {
        ExtractorId {
            name: name.into(),
            hash: "00".into(),
            feature_dim: 6,
            input_size: ImageSize::square(64),
            resize: Some("clean".into()),
        }
    }

    #[test]
    fn only_the_published_network_makes_fid_and_kid() {
        let evaluation = Evaluation { replicates: 20, floor_splits: 3, ..Default::default() };
        let (real, fake) = (extraction("real", 60, 1.0), extraction("fake", 40, 1.0));
        for (network, names) in [(NAME, ["fid", "kid"]), ("toy", ["frechet_distance", "kernel_distance"])] {
            let card = evaluation.compare(&real, &fake, &id(network), &Silent).unwrap();
            let found: Vec<&str> = card.figures.iter().map(|f| f.name.as_str()).collect();
            assert_eq!(found, names.map(|name| format!("{name}/{network}")));
        }
    }

    #[test]
    fn scores_and_precision_carry_everything_and_tell_good_from_bad() {
        let evaluation = Evaluation { replicates: 50, floor_splits: 4, ..Default::default() };
        let (real, fake) = (extraction("real", 90, 1.0), extraction("fake", 60, 1.0));
        let flat = extraction("flat", 60, 0.01);
        let score =
            |set: &Extraction| evaluation.inception_score(Some(&real), set, 10, &id("toy"), &Silent).unwrap();
        let (good, bad) = (score(&fake), score(&flat));
        assert!(
            good.value > bad.value + 0.1 && (bad.value - 1.0).abs() < 1e-3,
            "{} {}",
            good.value,
            bad.value
        );
        assert!(good.standard_deviation.unwrap() > 0.0);
        let floor = good.floor.as_ref().unwrap();
        assert_eq!((floor.n, floor.splits, good.n_real, good.n_fake), (60, 4, 90, 60));
        assert!(
            good.interval.as_ref().is_some_and(|i| i.low < good.value && good.value < i.high),
            "{good:?}"
        );
        let without = Extraction { logits: None, ..fake.clone() };
        assert!(evaluation.inception_score(None, &without, 10, &id("toy"), &Silent).is_err());

        let figures = evaluation.prdc(&real, &fake, 3, &id("toy"), &Silent).unwrap();
        let names: Vec<&str> = figures.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["precision/toy", "recall/toy", "density/toy", "coverage/toy"]);
        let bad = evaluation.prdc(&real, &flat, 3, &id("toy"), &Silent).unwrap();
        assert!(
            bad[1].value < figures[1].value - 0.3,
            "recall {} against {}",
            bad[1].value,
            figures[1].value
        );
        for figure in &figures {
            assert_eq!(figure.floor.as_ref().unwrap().n, 45);
            let interval = figure.interval.as_ref().unwrap();
            assert!(interval.low <= figure.value && figure.value <= interval.high, "{figure:?}");
        }
    }

    #[test]
    fn statistics_from_a_file_give_the_distance_of_the_sets_and_say_what_is_missing() {
        let evaluation = Evaluation::default();
        let (real, fake) = (extraction("real", 90, 1.0), extraction("fake", 60, 1.5));
        let moments = Moments::of(&FeatureStatistics::of(&real.features), None).unwrap();
        let figure = evaluation.compare_with_statistics(&moments, &fake, &id(NAME)).unwrap();
        let whole = Evaluation { replicates: 0, floor_splits: 0, ..evaluation.clone() };
        let card = whole.compare(&real, &fake, &id(NAME), &Silent).unwrap();
        let expected = card.figure("fid").unwrap().value;
        assert!((figure.value - expected).abs() < 1e-9 * expected, "{} against {expected}", figure.value);
        assert_eq!(
            (figure.n_real, figure.n_fake, figure.name.as_str()),
            (90, 60, card.figures[0].name.as_str())
        );
        assert!(figure.notes.iter().any(|n| n.contains("assumed")), "{:?}", figure.notes);
        let unknown = Moments { count: None, ..moments };
        let figure = evaluation.compare_with_statistics(&unknown, &fake, &id(NAME)).unwrap();
        assert!(figure.notes.iter().any(|n| n.contains("how many images")), "{:?}", figure.notes);
        let narrow = Extraction { features: random_set("narrow", 9, 5, 1.0), ..fake };
        let error = evaluation.compare_with_statistics(&unknown, &narrow, &id(NAME)).unwrap_err();
        assert!(matches!(error, MetricsError::SizeMismatch { .. }), "{error}");
    }
}
