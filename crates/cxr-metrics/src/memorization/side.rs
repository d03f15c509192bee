//! What the audit knows of a set of pictures.

use std::borrow::Cow;

use cxr_core::progress::Progress;
use serde::{Deserialize, Serialize};

use super::calibration::needed;
use super::views::{FeatureViews, middles};
use crate::error::{MetricsError, Result};
use crate::extractor::{ExtractorId, FeatureExtractor};
use crate::features::{FeatureSet, expect_samples, expect_size};
use crate::image::{ImageSize, ImageSource, Picture, grey_pixels};

/// What an audit takes for the same picture, and how often it may be wrong.
///
/// | Field | Default | What |
/// |---|---|---|
/// | `side` | 32 | pictures are reduced to this many cells a side before their pixels are compared |
/// | `shift` | 1 | cells by which a copy may be moved, in each direction |
/// | `mirror` | true | a copy may be mirrored |
/// | `rate` | 0.01 | share of real held-out pictures that may be flagged |
///
/// A cell of 64-pixel pictures is two pixels. The time of the search grows with
/// `side^2 * (2 shift + 1)^2 * (1 + mirror)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// Cells per side.
    pub side: usize,
    /// Reach of a shift, in cells.
    pub shift: usize,
    /// Whether mirror images count.
    pub mirror: bool,
    /// Share of held-out pictures that may be flagged, in (0, 0.5].
    pub rate: f64,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { side: 32, shift: 1, mirror: true, rate: 0.01 }
    }
}

impl AuditConfig {
    /// Fewest held-out pictures that a calibration takes: 99 for a rate of 1 %. For a confidence of 95 % it takes 299.
    pub fn held_out_needed(&self) -> usize {
        needed(self.rate)
    }

    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let invalid = |name, value: String, expected: String| {
            Err(MetricsError::InvalidParameter { name, value, expected })
        };
        if !(8..=256).contains(&self.side) {
            return invalid("side", self.side.to_string(), "8 to 256 cells".into());
        }
        if self.shift > self.side / 4 {
            let expected = format!("at most a quarter of the {} cells", self.side);
            return invalid("shift", self.shift.to_string(), expected);
        }
        if !(self.rate > 0.0 && self.rate <= 0.5) {
            let expected = "a share of held-out pictures above 0 and up to 0.5, as 0.01".into();
            return invalid("rate", self.rate.to_string(), expected);
        }
        Ok(())
    }
}

/// One set of pictures as the audit sees it: reduced pixels, features, and what is known of each picture.
#[derive(Debug, Clone)]
pub struct AuditSide {
    /// `[n, side * side]`, grey in [-1, 1].
    pub(super) pixels: FeatureSet,
    /// `[n, window * window]`: of training pictures alone.
    pub(super) middles: Option<FeatureSet>,
    /// Of the pictures, then of their mirror images; empty without an extractor.
    pub(super) features: Vec<FeatureSet>,
    pub(super) extractor: Option<ExtractorId>,
    pub(super) names: Vec<String>,
    pub(super) groups: Option<Vec<String>>,
    pub(super) prompts: Option<Vec<String>>,
}

impl AuditSide {
    /// Pictures that are looked for: synthetic ones, and the held-out real ones of the calibration.
    ///
    /// # Errors
    /// A configuration that is not valid, no pictures, those of the source and of the extractor.
    pub fn query(
        images: &dyn ImageSource,
        extractor: Option<&dyn FeatureExtractor>,
        config: &AuditConfig,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut side = Self::read(images, extractor, config, progress)?;
        if let (Some(extractor), true) = (extractor, config.mirror) {
            side.features.push(extractor.features(&Mirrored(images), progress)?);
        }
        Ok(side)
    }

    /// Adds features that are there already, to a side that was read without an extractor: of its pictures, and, for
    /// pictures that are looked for by a configuration with `mirror`, of their mirror images ([`Mirrored`]).
    ///
    /// # Errors
    /// Another number of features than of pictures, or of another width than `extractor` has.
    pub fn with_features(
        self,
        extractor: ExtractorId,
        features: FeatureSet,
        mirrored: Option<FeatureSet>,
    ) -> Result<Self> {
        let features: Vec<FeatureSet> = std::iter::once(features).chain(mirrored).collect();
        for set in &features {
            expect_size(|| "features of an audit's pictures".into(), self.len(), set.len())?;
            expect_size(|| "features per picture".into(), extractor.feature_dim, set.width())?;
        }
        Ok(Self { features, extractor: Some(extractor), ..self })
    }

    /// Pictures that are looked in: the whole training set.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub fn reference(
        images: &dyn ImageSource,
        extractor: Option<&dyn FeatureExtractor>,
        config: &AuditConfig,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let side = Self::read(images, extractor, config, progress)?;
        Ok(Self { middles: Some(middles(&side.pixels, config)?), ..side })
    }

    fn read(
        images: &dyn ImageSource,
        extractor: Option<&dyn FeatureExtractor>,
        config: &AuditConfig,
        progress: &dyn Progress,
    ) -> Result<Self> {
        config.validate()?;
        expect_samples("the set of pictures", 1, images.len())?;
        let pixels = grey_pixels(images, ImageSize::square(config.side))?;
        let features = extractor.map(|extractor| extractor.features(images, progress)).transpose()?;
        Ok(Self {
            pixels,
            middles: None,
            features: features.into_iter().collect(),
            extractor: extractor.map(FeatureExtractor::id),
            names: (0..images.len()).map(|i| images.name(i)).collect(),
            groups: None,
            prompts: None,
        })
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.pixels.len()
    }

    /// Whether there are none: never, [`query`](Self::query) and [`reference`](Self::reference) refuse that.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// Names the pictures, for the table and the sheet, otherwise than their source does.
    ///
    /// # Errors
    /// Another number of names than of pictures.
    pub fn with_names(self, names: Vec<String>) -> Result<Self> {
        expect_size(|| "names of an audit's pictures".into(), self.len(), names.len())?;
        Ok(Self { names, ..self })
    }

    /// Says which pictures belong together (patient or study). Of the training set: the second nearest is then
    /// of another group, and held-out pictures must be of none of its groups.
    ///
    /// # Errors
    /// Another number of groups than of pictures.
    pub fn with_groups(self, groups: Vec<String>) -> Result<Self> {
        expect_size(|| "groups of an audit's pictures".into(), self.len(), groups.len())?;
        Ok(Self { groups: Some(groups), ..self })
    }

    /// Gives the prompts of synthetic pictures, the reports of training pictures.
    ///
    /// # Errors
    /// Another number of prompts than of pictures.
    pub fn with_prompts(self, prompts: Vec<String>) -> Result<Self> {
        expect_size(|| "prompts of an audit's pictures".into(), self.len(), prompts.len())?;
        Ok(Self { prompts: Some(prompts), ..self })
    }

    /// The name of a picture.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn name(&self, index: usize) -> &str {
        &self.names[index]
    }

    pub(super) fn feature_views(&self) -> Option<FeatureViews<'_>> {
        (!self.features.is_empty()).then_some(FeatureViews(&self.features))
    }
}

/// The same pictures, left and right exchanged.
pub struct Mirrored<'a>(pub &'a dyn ImageSource);

impl ImageSource for Mirrored<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&self, index: usize) -> String {
        self.0.name(index)
    }

    fn load(&self, index: usize) -> Result<Cow<'_, Picture>> {
        let picture = self.0.load(index)?;
        let (size, channels) = (picture.size(), picture.channels());
        let rows = picture.pixels().chunks_exact(size.width * channels);
        let pixels = rows.flat_map(|row| row.chunks_exact(channels).rev().flatten().copied()).collect();
        Ok(Cow::Owned(Picture::new(size, channels, pixels)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirroring_turns_pixels_and_keeps_their_channels() {
        let size = ImageSize { width: 2, height: 2 };
        let picture = Picture::new(size, 3, (0..12).collect()).unwrap();
        let pictures = vec![picture];
        let mirrored = Mirrored(&pictures).load(0).unwrap().into_owned();
        assert_eq!(mirrored.pixels(), [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        type Change = fn(&mut AuditConfig);
        let broken: [(&str, Change); 5] = [
            ("side", |c| c.side = 4),
            ("side", |c| c.side = 1024),
            ("shift", |c| c.shift = 9),
            ("rate", |c| c.rate = 0.0),
            ("rate", |c| c.rate = f64::NAN),
        ];
        for (field, change) in broken {
            let mut config = AuditConfig::default();
            change(&mut config);
            match config.validate() {
                Err(MetricsError::InvalidParameter { name, .. }) => assert_eq!(name, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
