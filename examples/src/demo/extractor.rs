//! Training the embedded feature extractor on the findings of the thumbnails, and judging it on held-out patients.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use burn::module::AutodiffModule;
use burn::tensor::{Tensor, TensorData};
use cxr::core::hash::sha256_hex;
use cxr::core::progress::Progress;
use cxr::core::random::Stream;
use cxr::dataset::impression::NO_FINDING;
use cxr::dataset::labels;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::metrics::small::{SmallConfig, SmallExtractor, SmallNetwork, multi_label_loss};
use cxr::metrics::{FeatureExtractor, FindingAuroc, Picture, auroc_table};
use cxr::trainer::{LearningRate, Objective, OptimizerConfig, Sample, TrainConfig, train};

use super::pictures::{SIDE, bilinear, metric_picture};
use super::thumbnails::Thumbnails;

/// Training pictures that a finding must have: fewer teach the network those pictures, not the finding.
const ENOUGH_TO_LEARN: usize = 25;
/// Held-out positives and negatives without which an area under the curve says nothing.
const ENOUGH_TO_JUDGE: usize = 5;

/// Largest turn, in degrees: patients stand a little askew.
const TURN: f32 = 8.0;
/// Largest shift, in sides.
const SHIFT: f32 = 0.04;
/// Largest change of size.
const ZOOM: f32 = 0.08;
/// Largest change of contrast.
const CONTRAST: f32 = 0.15;
/// Largest change of brightness, of a full scale of 1.
const BRIGHTNESS: f32 = 0.06;

/// Thumbnails and which of the named findings each shows.
#[derive(Debug, Clone)]
pub struct LabelledPictures {
    /// Names of the findings, one logit each.
    pub findings: Vec<String>,
    /// Grey pixels `[SIDE * SIDE]` in `[0, 1]`.
    pub thumbnails: Vec<Vec<f32>>,
    /// One label per finding, by thumbnail.
    pub labels: Vec<Vec<bool>>,
}

impl LabelledPictures {
    /// The thumbnails at some positions of the collection, labelled with `findings`.
    pub fn pick(thumbnails: &Thumbnails, positions: &[usize], findings: &[String]) -> Self {
        let shows = |position: usize, finding: &String| {
            let pair = &thumbnails.collection.pairs[position];
            if finding == NO_FINDING { pair.labels.is_empty() } else { pair.has_label(finding) }
        };
        Self {
            findings: findings.to_vec(),
            thumbnails: thumbnails.pick(positions),
            labels: positions.iter().map(|&p| findings.iter().map(|f| shows(p, f)).collect()).collect(),
        }
    }

    /// One 8-bit picture per thumbnail, as an extractor takes them.
    fn pictures(&self) -> Result<Vec<Picture>> {
        Ok(self
            .thumbnails
            .iter()
            .map(|pixels| metric_picture(pixels))
            .collect::<cxr::metrics::Result<_>>()?)
    }
}

/// The findings that the extractor learns: those with at least 25 positive pictures among the training patients, in
/// alphabetical order, then `No Finding`.
pub fn learnable_findings(thumbnails: &Thumbnails) -> Vec<String> {
    let train = thumbnails.split.train.iter().map(|&i| &thumbnails.collection.pairs[i]);
    let counts = labels::counts(train);
    let common = counts.into_iter().filter(|(_, count)| *count >= ENOUGH_TO_LEARN).map(|(name, _)| name);
    common.chain([NO_FINDING.to_string()]).collect()
}

/// The settings of the embedded extractor: 30 epochs of 800 thumbnails.
pub fn extractor_config() -> TrainConfig {
    TrainConfig {
        steps: 750,
        batch_size: 32,
        learning_rate: LearningRate::cosine(1e-3, 50),
        optimizer: OptimizerConfig { weight_decay: 0.05, ..OptimizerConfig::default() },
        clip_norm: Some(1.0),
        // The mean of the last few epochs: with this little data single steps still wander.
        ema: Some(0.99),
        ..TrainConfig::default()
    }
}

/// The findings of thumbnails, each time a little moved and with another contrast. Nothing is mirrored: the heart
/// is on the left.
pub struct Findings<B: DiffusionAutodiff> {
    pictures: LabelledPictures,
    /// By finding, `[k]`.
    positive_weights: Vec<f32>,
    device: B::Device,
}

impl<B: DiffusionAutodiff> Findings<B> {
    /// An objective over these pictures.
    ///
    /// # Errors
    /// If there is not one label vector of the right length per thumbnail, a thumbnail has another size, or a
    /// finding has no positives or no negatives.
    pub fn new(pictures: LabelledPictures, device: &B::Device) -> Result<Self> {
        let LabelledPictures { findings, thumbnails, labels } = &pictures;
        ensure!(
            labels.len() == thumbnails.len(),
            "{} label vectors for {} thumbnails",
            labels.len(),
            thumbnails.len()
        );
        for (i, (labels, pixels)) in labels.iter().zip(thumbnails).enumerate() {
            ensure!(
                labels.len() == findings.len(),
                "thumbnail {i}: {} labels for {findings:?}",
                labels.len()
            );
            ensure!(
                pixels.len() == SIDE * SIDE,
                "thumbnail {i} has {} pixels, not {SIDE} x {SIDE}",
                pixels.len()
            );
        }
        let positive_weights = findings
            .iter()
            .enumerate()
            .map(|(k, finding)| {
                let positives = labels.iter().filter(|labels| labels[k]).count();
                let negatives = labels.len() - positives;
                ensure!(
                    positives > 0 && negatives > 0,
                    "{finding}: {positives} positive and {negatives} negative pictures teach nothing"
                );
                // Half way, in logarithms, to evening out a finding: all the way, thirty pictures of a rare one
                // would weigh as much as the other 770 together, and be learnt by heart.
                Ok((negatives as f32 / positives as f32).sqrt())
            })
            .collect::<Result<Vec<f32>>>()?;
        Ok(Self { pictures, positive_weights, device: device.clone() })
    }
}

impl<B: DiffusionAutodiff> Objective<B> for Findings<B> {
    type Model = SmallNetwork<B>;

    fn len(&self) -> usize {
        self.pictures.thumbnails.len()
    }

    fn fingerprint(&self) -> String {
        let LabelledPictures { findings, thumbnails, labels } = &self.pictures;
        let mut bytes: Vec<u8> = thumbnails.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        bytes.extend(labels.iter().flatten().map(|label| u8::from(*label)));
        let changes =
            format!("turn {TURN} shift {SHIFT} zoom {ZOOM} contrast {CONTRAST} brightness {BRIGHTNESS}");
        format!("thumbnails {} findings {findings:?} {changes}", &sha256_hex(&bytes)[..16])
    }

    fn loss(&self, model: &SmallNetwork<B>, samples: &[Sample], seed: u64) -> Tensor<B, 1> {
        let (n, k) = (samples.len(), self.pictures.findings.len());
        let (mut pixels, mut targets) = (Vec::with_capacity(n * SIDE * SIDE), Vec::with_capacity(n * k));
        for sample in samples {
            let mut stream = Stream::new(seed, "extractor picture", sample.position);
            let varied = varied(&self.pictures.thumbnails[sample.index], &mut stream);
            pixels.extend(varied.into_iter().map(|p| 2.0 * p - 1.0));
            targets
                .extend(self.pictures.labels[sample.index].iter().map(|label| f32::from(u8::from(*label))));
        }
        let pixels = Tensor::from_data(TensorData::new(pixels, [n, 1, SIDE, SIDE]), &self.device);
        let targets = Tensor::from_data(TensorData::new(targets, [n, k]), &self.device);
        let weights = Tensor::from_data(TensorData::new(self.positive_weights.clone(), [k]), &self.device);
        multi_label_loss(model.forward(pixels).logits, targets, None, Some(weights))
    }
}

/// Trains `cxr-small-v1` on these pictures. Checkpoints go to `folder`: a run that was stopped goes on from there.
///
/// # Errors
/// Those of [`Findings::new`] and of the trainer; if `progress` asks to stop before the last step, since what is
/// there by then does not deserve the extractor's name.
pub fn train_extractor<B: DiffusionAutodiff>(
    pictures: LabelledPictures,
    config: &TrainConfig,
    folder: &Path,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<SmallExtractor<B::InnerBackend>> {
    let sizes = SmallConfig::v1(pictures.findings.clone());
    let network = sizes.init_random::<B>(config.seed, device)?;
    let objective = Findings::<B>::new(pictures, device)?;
    let trained = train::<B, _>(network, &objective, config, folder, progress)?;
    ensure!(
        !trained.stopped,
        "stopped after {} of {} steps; start again to go on from there",
        trained.step,
        config.steps
    );
    let network = trained.averaged.unwrap_or(trained.model);
    Ok(SmallExtractor::new(sizes, network.valid(), device)?)
}

/// How well the extractor's logits tell pictures with a finding from those without, by finding. The intervals
/// count every picture as a patient of its own, and are too narrow where patients have several.
///
/// # Errors
/// If the pictures are labelled with other findings than the extractor's, or `progress` asks to stop.
pub fn judge_extractor<B: DiffusionBackend>(
    extractor: &SmallExtractor<B>,
    held_out: &LabelledPictures,
    progress: &dyn Progress,
) -> Result<Vec<FindingAuroc>> {
    let names = extractor.logit_names();
    ensure!(names == held_out.findings, "the extractor knows {names:?}, the labels {:?}", held_out.findings);
    let logits = extractor
        .extract(&held_out.pictures()?, progress)?
        .logits
        .context("an extractor with named findings gives logits")?;
    let labels: Vec<Option<bool>> = held_out.labels.iter().flatten().copied().map(Some).collect();
    Ok(auroc_table(names, logits.values(), &labels, ENOUGH_TO_JUDGE)?)
}

/// Mean of the areas under the curve, over the findings that have one.
pub fn mean_auroc(table: &[FindingAuroc]) -> Option<f64> {
    let values: Vec<f64> = table.iter().filter_map(|row| Some(row.auroc.as_ref()?.value)).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// A thumbnail a little turned, shifted, resized, and with another contrast and brightness; in `[0, 1]`.
fn varied(thumbnail: &[f32], stream: &mut Stream) -> Vec<f32> {
    let mut signed = |scale: f32| stream.range(-scale, scale);
    let (sin, cos) = signed(TURN.to_radians()).sin_cos();
    let [shift_x, shift_y] = [signed(SHIFT), signed(SHIFT)].map(|s| s * SIDE as f32);
    let zoom = 1.0 + signed(ZOOM);
    let contrast = 1.0 + signed(CONTRAST);
    let brightness = signed(BRIGHTNESS);
    let centre = (SIDE as f32 - 1.0) / 2.0;
    (0..SIDE * SIDE)
        .map(|i| {
            let [x, y] = [i % SIDE, i / SIDE].map(|v| v as f32 - centre);
            let u = zoom * (cos * x - sin * y) + centre + shift_x;
            let v = zoom * (sin * x + cos * y) + centre + shift_y;
            (0.5 + contrast * (bilinear(thumbnail, u, v) - 0.5) + brightness).clamp(0.0, 1.0)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use cxr::core::progress::Silent;
    use cxr::kernels::Flex;

    use super::*;

    /// Bright pictures show the first finding, dark ones the second.
    fn toy(n: usize) -> LabelledPictures {
        let bright = |i: usize| i.is_multiple_of(2);
        let pixels = |i: usize| {
            let level = if bright(i) { 0.6 } else { 0.2 };
            (0..SIDE * SIDE).map(|p| level + 0.2 * ((p * (i + 3)) % 17) as f32 / 17.0).collect()
        };
        LabelledPictures {
            findings: vec!["Bright".into(), NO_FINDING.into()],
            thumbnails: (0..n).map(pixels).collect(),
            labels: (0..n).map(|i| vec![bright(i), !bright(i)]).collect(),
        }
    }

    #[test]
    fn variation_is_named_by_its_stream_stays_in_range_and_mirrors_nothing() {
        // A bright mark on the left.
        let source: Vec<f32> = (0..SIDE * SIDE).map(|i| f32::from(i % SIDE < SIDE / 4)).collect();
        let make = |i| varied(&source, &mut Stream::new(1, "test", i));
        assert_eq!(make(3), make(3));
        assert_ne!(make(3), make(4));
        for i in 0..200 {
            let pixels = make(i);
            assert!(pixels.iter().all(|p| (0.0..=1.0).contains(p)));
            let side = |left: bool| -> f32 {
                (0..SIDE * SIDE).filter(|p| (p % SIDE < SIDE / 2) == left).map(|p| pixels[p]).sum()
            };
            assert!(side(true) > side(false), "variation {i}");
        }
    }

    #[test]
    fn training_tells_bright_from_dark_and_judging_says_so() {
        let config = TrainConfig {
            steps: 12,
            batch_size: 8,
            learning_rate: LearningRate::constant(3e-3),
            ema: None,
            ..extractor_config()
        };
        let folder = tempfile::tempdir().unwrap();
        let device = Default::default();
        let extractor =
            train_extractor::<Autodiff<Flex>>(toy(16), &config, folder.path(), &device, &Silent).unwrap();
        assert_eq!(extractor.logit_names(), ["Bright", NO_FINDING]);
        let table = judge_extractor(&extractor, &toy(12), &Silent).unwrap();
        assert_eq!(mean_auroc(&table), Some(1.0), "{table:?}");
        let other = LabelledPictures { findings: vec!["Dark".into(), "Mass".into()], ..toy(12) };
        assert!(judge_extractor(&extractor, &other, &Silent).is_err());
    }

    #[test]
    fn what_cannot_teach_is_refused_by_name() {
        let device = Default::default();
        let refused =
            |pictures| Findings::<Autodiff<Flex>>::new(pictures, &device).err().unwrap().to_string();
        let mut always = toy(4);
        always.labels.iter_mut().for_each(|labels| labels[0] = true);
        assert!(refused(always).starts_with("Bright: 4 positive and 0 negative"));
        let mut short = toy(4);
        short.labels[2].pop();
        assert!(refused(short).starts_with("thumbnail 2: 1 labels"));
    }

    #[test]
    fn common_findings_of_training_patients_and_no_finding_are_learnt() {
        let thumbnails = Thumbnails::open(&super::super::data_folder()).unwrap();
        let findings = learnable_findings(&thumbnails);
        assert_eq!(findings.last().map(String::as_str), Some(NO_FINDING));
        assert!(
            findings.iter().any(|f| f == "Effusion") && findings.iter().all(|f| f != "Hernia"),
            "{findings:?}"
        );
        let train = LabelledPictures::pick(&thumbnails, &thumbnails.split.train, &findings);
        for k in 0..findings.len() {
            assert!(
                train.labels.iter().filter(|labels| labels[k]).count() >= ENOUGH_TO_LEARN,
                "{}",
                findings[k]
            );
        }
    }
}
