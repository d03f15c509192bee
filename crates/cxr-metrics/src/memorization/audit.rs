//! The audit itself: every synthetic picture against the whole training set.

use std::collections::HashSet;

use cxr_core::progress::Progress;
use serde::{Deserialize, Serialize};

use super::calibration::{Calibration, Evidence, Observed};
use super::nearest::{Neighbour, nearest_in_views};
use super::prompts::{PromptMatch, PromptSummary, Reports};
use super::side::{AuditConfig, AuditSide};
use super::views::{PictureView, PixelViews};
use crate::error::{MetricsError, Result};
use crate::extractor::ExtractorId;
use crate::features::expect_size;

/// A search for copies with one configuration.
#[derive(Debug, Clone)]
pub struct MemorizationAudit {
    config: AuditConfig,
}

/// What the audit found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditReport {
    /// What counted as the same picture.
    pub config: AuditConfig,
    /// The network of the features; none where pixels alone were compared.
    pub extractor: Option<ExtractorId>,
    /// Synthetic pictures.
    pub n_synthetic: usize,
    /// Training pictures.
    pub n_train: usize,
    /// Where a copy begins, and how many real pictures that hits; none of an audit without held-out pictures, which
    /// flags nothing.
    pub calibration: Option<Calibration>,
    /// How flags and training prompts go together, where prompts of both sides are known.
    pub prompts: Option<PromptSummary>,
    /// What a reader has to know.
    pub notes: Vec<String>,
    /// One per synthetic picture, in their order.
    pub entries: Vec<AuditEntry>,
}

/// What the audit says of one synthetic picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Its position.
    pub image: usize,
    /// Its neighbours in pixels.
    pub pixels: Neighbour,
    /// How it was turned and moved to come near the nearest in pixels.
    pub view: PictureView,
    /// Its neighbours in features.
    pub features: Option<Neighbour>,
    /// Departure of its strongest evidence from held-out pictures, in their spreads; none without calibration.
    pub score: Option<f64>,
    /// What it is flagged for, the strongest first; empty for a picture that is not flagged.
    pub evidence: Vec<Evidence>,
    /// Whether its prompt is a training report.
    pub prompt: Option<PromptMatch>,
}

impl AuditEntry {
    /// Whether it looks like a copy.
    pub fn flagged(&self) -> bool {
        !self.evidence.is_empty()
    }

    /// The training picture that it looks like: the nearest by the strongest evidence.
    pub fn nearest(&self) -> usize {
        match (self.evidence.first(), &self.features) {
            (Some(Evidence::FeatureDistance | Evidence::FeatureRatio), Some(features)) => features.nearest,
            _ => self.pixels.nearest,
        }
    }

    fn observed(pixels: &Neighbour, features: Option<&Neighbour>) -> Observed {
        [Some(pixels.distance), pixels.ratio, features.map(|f| f.distance), features.and_then(|f| f.ratio)]
    }
}

impl AuditReport {
    /// The pictures that look like copies.
    pub fn flagged(&self) -> impl Iterator<Item = &AuditEntry> {
        self.entries.iter().filter(|entry| entry.flagged())
    }
}

/// The neighbours of one set.
struct Found {
    pixels: Vec<(Neighbour, PictureView)>,
    features: Option<Vec<Neighbour>>,
}

impl Found {
    fn observed(&self, index: usize) -> Observed {
        AuditEntry::observed(&self.pixels[index].0, self.features.as_ref().map(|f| &f[index]))
    }
}

impl MemorizationAudit {
    /// # Errors
    /// A configuration that is not valid.
    pub fn new(config: AuditConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// Looks for every synthetic picture in the training set, as near as `held_out` says that real pictures of
    /// others come. All three sides are made with this audit's configuration and with one extractor, or none.
    ///
    /// # Errors
    /// A side of another configuration or extractor; training pictures that were not made by
    /// [`AuditSide::reference`]; fewer held-out pictures than the rate needs (99 for 1 %); a held-out picture of
    /// a group that the training set has; cancellation.
    pub fn run(
        &self,
        synthetic: &AuditSide,
        train: &AuditSide,
        held_out: &AuditSide,
        progress: &dyn Progress,
    ) -> Result<AuditReport> {
        self.check("held-out", held_out, train)?;
        // Otherwise the thresholds would be those of another search.
        expect_size(
            || {
                "feature views of held-out pictures (with mirror images or without, as the synthetic ones)"
                    .into()
            },
            synthetic.features.len(),
            held_out.features.len(),
        )?;
        self.check("synthetic", synthetic, train)?;
        expect_other_groups(train, held_out)?;
        let real = self.search(held_out, train, progress)?;
        let observed: Vec<Observed> = (0..held_out.len()).map(|i| real.observed(i)).collect();
        let calibration = Calibration::of(&observed, self.config.rate)?;
        let notes = notes(train, held_out, &real, &calibration);
        self.report(synthetic, train, Some(calibration), notes, progress)
    }

    /// [`run`](Self::run) without held-out pictures, or with too few ([`AuditConfig::held_out_needed`]): the nearest
    /// training picture of every synthetic one, and no word on which are copies.
    ///
    /// # Errors
    /// As [`run`](Self::run), held-out pictures aside.
    pub fn run_uncalibrated(
        &self,
        synthetic: &AuditSide,
        train: &AuditSide,
        progress: &dyn Progress,
    ) -> Result<AuditReport> {
        self.check("synthetic", synthetic, train)?;
        let note = format!(
            "nothing is flagged: what counts as near takes {} held-out real pictures or more",
            self.config.held_out_needed()
        );
        self.report(synthetic, train, None, vec![note], progress)
    }

    fn report(
        &self,
        synthetic: &AuditSide,
        train: &AuditSide,
        calibration: Option<Calibration>,
        notes: Vec<String>,
        progress: &dyn Progress,
    ) -> Result<AuditReport> {
        let found = self.search(synthetic, train, progress)?;
        let reports = train.prompts.as_deref().map(Reports::new);
        let entry = |image: usize| {
            let observed = found.observed(image);
            let (pixels, view) = found.pixels[image].clone();
            let mut entry = AuditEntry {
                image,
                pixels,
                view,
                features: found.features.as_ref().map(|f| f[image].clone()),
                score: calibration.as_ref().map(|c| c.score(&observed)),
                evidence: calibration.as_ref().map(|c| c.evidence(&observed)).unwrap_or_default(),
                prompt: None,
            };
            let prompts = reports.as_ref().zip(synthetic.prompts.as_ref());
            entry.prompt = prompts.map(|(reports, own)| reports.find(&own[image], entry.nearest()));
            entry
        };
        let entries: Vec<AuditEntry> = (0..synthetic.len()).map(entry).collect();
        Ok(AuditReport {
            config: self.config.clone(),
            extractor: train.extractor.clone(),
            n_synthetic: synthetic.len(),
            n_train: train.len(),
            calibration,
            prompts: summary(&entries),
            notes,
            entries,
        })
    }

    fn check(&self, what: &str, side: &AuditSide, train: &AuditSide) -> Result<()> {
        let middles = train.middles.as_ref().map(|m| m.width());
        let window = (self.config.side - 2 * self.config.shift).pow(2);
        if side.pixels.width() != self.config.side.pow(2) || middles != Some(window) {
            return Err(MetricsError::InvalidParameter {
                name: "config",
                value: format!("not the one that the {what} pictures were read with"),
                expected: "one configuration, and training pictures from `AuditSide::reference`".into(),
            });
        }
        if side.extractor != train.extractor {
            let name = |side: &AuditSide| side.extractor.as_ref().map_or("none".into(), |e| e.name.clone());
            return Err(MetricsError::InvalidParameter {
                name: "extractor",
                value: format!("{} for the {what} pictures", name(side)),
                expected: format!("{}, with the same weights, as for the training pictures", name(train)),
            });
        }
        Ok(())
    }

    fn search(&self, side: &AuditSide, train: &AuditSide, progress: &dyn Progress) -> Result<Found> {
        let groups = train.groups.as_deref();
        let views = PixelViews::new(&side.pixels, &self.config);
        let middles = train.middles.as_ref().unwrap_or(&train.pixels);
        let pixels = nearest_in_views(&views, middles, groups, progress)?;
        let pixels = pixels.into_iter().map(|(found, view)| (found, views.views[view])).collect();
        let features = match (side.feature_views(), train.features.first()) {
            (Some(views), Some(train)) => {
                let found = nearest_in_views(&views, train, groups, progress)?;
                Some(found.into_iter().map(|(found, _)| found).collect())
            }
            _ => None,
        };
        Ok(Found { pixels, features })
    }
}

fn expect_other_groups(train: &AuditSide, held_out: &AuditSide) -> Result<()> {
    let (Some(train), Some(held_out)) = (&train.groups, &held_out.groups) else { return Ok(()) };
    let known: HashSet<&String> = train.iter().collect();
    let shared = held_out.iter().filter(|group| known.contains(group));
    match shared.clone().next() {
        None => Ok(()),
        Some(first) => Err(MetricsError::SharedGroups { pictures: shared.count(), group: first.clone() }),
    }
}

fn summary(entries: &[AuditEntry]) -> Option<PromptSummary> {
    let mut summary = PromptSummary::default();
    for entry in entries {
        summary.add(entry.prompt.as_ref()?, entry.flagged());
    }
    Some(summary)
}

fn notes(train: &AuditSide, held_out: &AuditSide, real: &Found, calibration: &Calibration) -> Vec<String> {
    let mut notes = Vec::new();
    if calibration.confidence < 0.95 {
        notes.push(format!(
            "{} held-out pictures hold the rate of {} with a confidence of {:.0} % alone: hold out {} for 95 %",
            calibration.held_out,
            calibration.rate,
            100.0 * calibration.confidence,
            (0.05f64.ln() / (1.0 - calibration.rate).ln()).ceil()
        ));
    }
    if train.groups.is_none() {
        notes.push(
            "no patients are known for the training set: the second nearest picture may be of the same patient, \
             and the ratio then says nothing"
                .to_string(),
        );
    }
    if train.groups.is_none() || held_out.groups.is_none() {
        notes.push(
            "whether held-out pictures are of the training set's patients was not checked: if they are, copies \
             are missed"
                .to_string(),
        );
    }
    let same = real.pixels.iter().filter(|(found, _)| found.distance < 1e-3).count();
    if same > 0 {
        notes.push(format!(
            "{same} held-out pictures are the same as training pictures: leave them out, or copies are missed"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;

    use super::*;
    use crate::features::FeatureSet;
    use crate::image::{ImageSize, Picture};
    use crate::testing::StopAfter;
    use cxr_core::random::Stream;

    fn pictures(name: &str, n: u64) -> Vec<Picture> {
        let picture = |i| {
            let mut stream = Stream::new(0, name, i);
            let pixels = (0..256).map(|_| stream.below(256) as u8).collect();
            Picture::new(ImageSize::square(16), 1, pixels).unwrap()
        };
        (0..n).map(picture).collect()
    }

    fn config() -> AuditConfig {
        AuditConfig { side: 16, ..AuditConfig::default() }
    }

    fn texts(n: usize, text: impl Fn(usize) -> String) -> Vec<String> {
        (0..n).map(text).collect()
    }

    fn sides() -> (AuditSide, AuditSide, AuditSide) {
        let train = pictures("train", 30);
        let mut made = pictures("made", 6);
        made[4] = train[9].clone();
        let query = |p: &Vec<Picture>| AuditSide::query(p, None, &config(), &Silent).unwrap();
        let reference = AuditSide::reference(&train, None, &config(), &Silent).unwrap();
        (query(&made), reference, query(&pictures("held out", 100)))
    }

    #[test]
    fn prompts_are_reported_apart_for_flagged_pictures() {
        let (made, train, held_out) = sides();
        let made = made.with_prompts(texts(6, |i| format!("Finding {}.", i + 5))).unwrap();
        let train = train.with_prompts(texts(30, |i| format!("finding {}", i % 10))).unwrap();
        let audit = MemorizationAudit::new(config()).unwrap();
        let report = audit.run(&made, &train, &held_out, &Silent).unwrap();
        let flagged: Vec<&AuditEntry> = report.flagged().collect();
        assert_eq!(flagged.len(), 1);
        assert_eq!((flagged[0].image, flagged[0].nearest()), (4, 9));
        assert_eq!(flagged[0].prompt, Some(PromptMatch { training_reports: 3, of_nearest: true }));
        let expected = PromptSummary {
            training_prompts: 5,
            training_prompts_flagged: 1,
            training_prompts_flagged_with_their_picture: 1,
            new_prompts: 1,
            new_prompts_flagged: 0,
        };
        assert_eq!(report.prompts, Some(expected));
        assert_eq!(report.notes.len(), 3, "{:?}", report.notes);
    }

    #[test]
    fn held_out_pictures_of_training_patients_are_refused_and_copies_among_them_noted() {
        let (made, train, held_out) = sides();
        let train = train.with_groups(texts(30, |i| format!("patient {i}"))).unwrap();
        let shared = held_out.clone().with_groups(texts(100, |i| format!("patient {}", i + 28))).unwrap();
        let audit = MemorizationAudit::new(config()).unwrap();
        match audit.run(&made, &train, &shared, &Silent) {
            Err(MetricsError::SharedGroups { pictures: 2, group }) => assert_eq!(group, "patient 28"),
            other => panic!("{other:?}"),
        }
        let mut leaked = pictures("held out", 100);
        leaked[7] = pictures("train", 30)[3].clone();
        let leaked = AuditSide::query(&leaked, None, &config(), &Silent).unwrap();
        let report = audit.run(&made, &train, &leaked, &Silent).unwrap();
        assert!(report.notes.iter().any(|n| n.starts_with("1 held-out pictures")), "{:?}", report.notes);
    }

    #[test]
    fn sides_that_do_not_fit_and_a_stop_are_errors() {
        let (made, train, held_out) = sides();
        let audit = MemorizationAudit::new(config()).unwrap();
        let other = AuditConfig { side: 12, ..config() };
        let wrong = AuditSide::query(&pictures("made", 3), None, &other, &Silent).unwrap();
        assert!(audit.run(&wrong, &train, &held_out, &Silent).is_err());
        // Features that are there already are as good, but on both sides.
        let features = |n: usize, width: usize| {
            FeatureSet::new((0..n * width).map(|i| (i * 7 % 5) as f32).collect(), width).unwrap()
        };
        let id = ExtractorId {
            name: "toy".into(),
            hash: "00".into(),
            feature_dim: 3,
            input_size: ImageSize::square(16),
            resize: None,
        };
        let with = |side: &AuditSide, mirrored: bool| {
            let own = features(side.len(), 3);
            side.clone().with_features(id.clone(), own.clone(), mirrored.then_some(own)).unwrap()
        };
        assert!(audit.run(&with(&made, true), &with(&train, false), &with(&held_out, true), &Silent).is_ok());
        assert!(
            audit.run(&with(&made, true), &with(&train, false), &with(&held_out, false), &Silent).is_err()
        );
        assert!(audit.run(&with(&made, true), &train, &held_out, &Silent).is_err());
        assert!(made.clone().with_features(id.clone(), features(6, 2), None).is_err());
        assert!(made.clone().with_features(id.clone(), features(5, 3), None).is_err());
        // Training pictures that were read as queries.
        assert!(audit.run(&made, &held_out, &held_out, &Silent).is_err());
        let few = AuditSide::query(&pictures("few", 98), None, &config(), &Silent).unwrap();
        assert!(matches!(
            audit.run(&made, &train, &few, &Silent),
            Err(MetricsError::TooFewSamples { needed: 99, .. })
        ));
        let open = audit.run_uncalibrated(&made, &train, &Silent).unwrap();
        assert_eq!((open.entries[4].pixels.nearest, open.flagged().count()), (9, 0));
        assert!(open.notes[0].contains("99") && open.entries[4].score.is_none(), "{:?}", open.notes);
        assert!(audit.run_uncalibrated(&wrong, &train, &Silent).is_err());
        assert!(made.clone().with_names(texts(5, |i| i.to_string())).is_err());
        assert!(made.clone().with_groups(vec![]).is_err());
        assert!(made.clone().with_prompts(vec![]).is_err());
        assert!(AuditSide::query(&pictures("none", 0), None, &config(), &Silent).is_err());
        let many = AuditSide::query(&pictures("many", 9000), None, &config(), &Silent).unwrap();
        let stopped = audit.run(&many, &train, &many, &StopAfter(1));
        assert!(matches!(stopped, Err(MetricsError::Cancelled { .. })));
    }
}
