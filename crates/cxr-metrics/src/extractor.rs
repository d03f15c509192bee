//! What turns pictures into features: a trait, so that a figure can be taken with any network and says which.

use std::borrow::Cow;

use cxr_core::progress::{Progress, Stage};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::{FeatureSet, expect_samples, expect_size};
use crate::image::{ImageSize, ImageSource, Picture};
use crate::progress::advance;

/// Which network made the features: two figures compare only where these agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractorId {
    /// Name of the network and its training, e.g. `cxr-small-v1`.
    pub name: String,
    /// SHA-256 of its configuration and weights, in hexadecimal.
    pub hash: String,
    /// Number of features.
    pub feature_dim: usize,
    /// What pictures are resized to.
    pub input_size: ImageSize,
    /// How they are resized, where the network has several ways.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<String>,
}

/// The rest of a batch's way: the network itself.
pub type Staged<'a> = Box<dyn FnOnce() -> Result<BatchOutput> + Send + 'a>;

/// What a network says of one batch, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchOutput {
    /// Features `[n, feature_dim]`.
    pub features: Vec<f32>,
    /// Logits `[n, logit_names().len()]`; empty without heads.
    pub logits: Vec<f32>,
}

/// What a network says of a set of pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct Extraction {
    /// One row per picture, in the order of the source.
    pub features: FeatureSet,
    /// Logits per picture, for a network with heads.
    pub logits: Option<FeatureSet>,
    /// Size of the pictures as they came, before any resize of the network's own.
    pub resolution: ImageSize,
}

/// A network that turns pictures into feature vectors. An implementation gives the first methods; batches,
/// checks and progress are the same for all.
pub trait FeatureExtractor: Send + Sync {
    /// Name of the network and its training.
    fn name(&self) -> &str;

    /// SHA-256 of configuration and weights, in hexadecimal.
    fn hash(&self) -> &str;

    /// Number of features.
    fn feature_dim(&self) -> usize;

    /// What pictures are resized to.
    fn input_size(&self) -> ImageSize;

    /// Name of the way in which they are resized, for a network that has several.
    fn resize_mode(&self) -> Option<&str> {
        None
    }

    /// Names of the logits, empty without heads.
    fn logit_names(&self) -> &[String] {
        &[]
    }

    /// Pictures per forward pass: more take memory, and change no result.
    fn batch_size(&self) -> usize {
        32
    }

    /// Prepares one batch (resize and range are the network's own) and runs it.
    ///
    /// # Errors
    /// A picture that the network does not take, a result that cannot be read back.
    fn extract_batch(&self, images: &[Cow<'_, Picture>]) -> Result<BatchOutput>;

    /// Does what can be done before the network runs (resize and range), and returns the rest. While the network
    /// works on one batch, the next is staged on another thread.
    ///
    /// # Errors
    /// As [`extract_batch`](Self::extract_batch).
    fn stage<'a>(&'a self, images: Vec<Cow<'a, Picture>>) -> Result<Staged<'a>> {
        Ok(Box::new(move || self.extract_batch(&images)))
    }

    /// Name, hash and sizes, for the card of a figure.
    fn id(&self) -> ExtractorId {
        ExtractorId {
            name: self.name().into(),
            hash: self.hash().into(),
            feature_dim: self.feature_dim(),
            input_size: self.input_size(),
            resize: self.resize_mode().map(String::from),
        }
    }

    /// Features, and logits where there are heads, of every picture. Pictures of a batch are read in parallel, and
    /// the next batch is read and resized while the network runs.
    ///
    /// # Errors
    /// No pictures, pictures of different sizes, an unreadable one, non-finite features, cancellation.
    fn extract(&self, images: &dyn ImageSource, progress: &dyn Progress) -> Result<Extraction> {
        let total = images.len();
        expect_samples("the set of pictures", 1, total)?;
        let (width, heads) = (self.feature_dim(), self.logit_names().len());
        let name = format!("features of {}", self.name());
        let _shown = Stage::begin(progress, &name, Some(total as u64));
        let (mut features, mut logits) = (Vec::with_capacity(total * width), Vec::new());
        let mut resolution = self.input_size();
        ahead(
            self.batch_size(),
            total,
            |start, end, first| {
                let batch =
                    (start..end).into_par_iter().map(|i| images.load(i)).collect::<Result<Vec<_>>>()?;
                check_sizes(first, images, start, &batch)?;
                Ok((end, *first, self.stage(batch)?))
            },
            |(end, size, staged)| {
                let output = staged()?;
                let count = end - features.len() / width;
                expect_size(|| "features of a batch".into(), count * width, output.features.len())?;
                expect_size(|| "logits of a batch".into(), count * heads, output.logits.len())?;
                // Which picture it was is what a person wants to know.
                expect_finite(images, features.len() / width, &output.features, width)?;
                expect_finite(images, features.len() / width, &output.logits, heads)?;
                features.extend(output.features);
                logits.extend(output.logits);
                resolution = size.unwrap_or(resolution);
                advance(progress, &name, end, total)
            },
        )?;
        Ok(Extraction {
            features: FeatureSet::new(features, width)?,
            logits: if heads > 0 { Some(FeatureSet::new(logits, heads)?) } else { None },
            resolution,
        })
    }

    /// [`extract`](Self::extract) for its features alone.
    ///
    /// # Errors
    /// As [`extract`](Self::extract).
    fn features(&self, images: &dyn ImageSource, progress: &dyn Progress) -> Result<FeatureSet> {
        Ok(self.extract(images, progress)?.features)
    }
}

/// Makes batches on a thread of their own, one ahead of what uses them, in order. The first error of either side ends
/// both; one of making comes after the batches before it.
fn ahead<T: Send>(
    batch: usize,
    total: usize,
    make: impl Fn(usize, usize, &mut Option<ImageSize>) -> Result<T> + Send,
    mut consume: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let batch = batch.max(1);
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::sync_channel(0);
        scope.spawn(move || {
            let mut first = None;
            for start in (0..total).step_by(batch) {
                let made = make(start, (start + batch).min(total), &mut first);
                let failed = made.is_err();
                // The other side has gone where it met an error.
                if sender.send(made).is_err() || failed {
                    break;
                }
            }
        });
        // By value: dropped with the first error, so that the thread ends.
        receiver.into_iter().try_for_each(|made| consume(made?))
    })
}

/// Of a batch whose first picture is `first`.
fn expect_finite(images: &dyn ImageSource, first: usize, values: &[f32], width: usize) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(place) => {
            let row = first + place / width;
            Err(MetricsError::NonFinite {
                what: format!("what the network gives for image {}", images.name(row)),
                row,
                column: place % width,
                value: f64::from(values[place]),
            })
        }
    }
}

fn check_sizes(
    first: &mut Option<ImageSize>,
    images: &dyn ImageSource,
    start: usize,
    batch: &[Cow<'_, Picture>],
) -> Result<()> {
    for (offset, picture) in batch.iter().enumerate() {
        let expected = *first.get_or_insert(picture.size());
        if picture.size() != expected {
            return Err(MetricsError::MixedSizes {
                index: start + offset,
                name: images.name(start + offset),
                expected: expected.to_string(),
                found: picture.size().to_string(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;

    use super::*;
    use crate::testing::StopAfter;

    /// Mean and first pixel of each picture, three to a batch.
    struct Toy;

    impl FeatureExtractor for Toy {
        fn name(&self) -> &str {
            "toy"
        }
        fn hash(&self) -> &str {
            "00"
        }
        fn feature_dim(&self) -> usize {
            2
        }
        fn input_size(&self) -> ImageSize {
            ImageSize::square(2)
        }
        fn batch_size(&self) -> usize {
            3
        }
        fn extract_batch(&self, images: &[Cow<'_, Picture>]) -> Result<BatchOutput> {
            let features = images.iter().flat_map(|p| {
                let grey = p.grey();
                [grey.iter().sum::<f32>() / grey.len() as f32, grey[0]]
            });
            Ok(BatchOutput { features: features.collect(), logits: vec![] })
        }
    }

    fn pictures(n: u8) -> Vec<Picture> {
        (0..n).map(|i| Picture::new(ImageSize::square(2), 1, vec![i, 0, 0, 0]).unwrap()).collect()
    }

    #[test]
    fn batches_keep_the_order_of_the_source() {
        let out = Toy.extract(&pictures(8), &Silent).unwrap();
        assert_eq!((out.features.len(), out.resolution, &out.logits), (8, ImageSize::square(2), &None));
        for (i, row) in out.features.rows().enumerate() {
            assert!((row[1] - (i as f32 / 127.5 - 1.0)).abs() < 1e-6);
        }
    }

    #[test]
    fn empty_mixed_and_stopped_sets_are_errors() {
        assert!(matches!(Toy.features(&pictures(0), &Silent), Err(MetricsError::TooFewSamples { .. })));
        let mut mixed = pictures(5);
        mixed.push(Picture::new(ImageSize::square(3), 1, vec![0; 9]).unwrap());
        let error = Toy.features(&mixed, &Silent).unwrap_err();
        assert!(matches!(error, MetricsError::MixedSizes { index: 5, .. }), "{error}");
        let stopped = Toy.features(&pictures(8), &StopAfter(2));
        assert!(matches!(stopped, Err(MetricsError::Cancelled { done: 3, total: 8, .. })));
    }

    /// Reads pictures of one pixel, notes when, and fails at one of them.
    struct Reading {
        fails_at: usize,
        read: std::sync::atomic::AtomicUsize,
    }

    impl ImageSource for Reading {
        fn len(&self) -> usize {
            9
        }
        fn load(&self, index: usize) -> Result<Cow<'_, Picture>> {
            self.read.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            if index == self.fails_at {
                let source = "broken".into();
                return Err(MetricsError::UnreadableImage { name: self.name(index), source });
            }
            Ok(Cow::Owned(Picture::new(ImageSize::square(2), 1, vec![index as u8; 4])?))
        }
        fn name(&self, index: usize) -> String {
            format!("{index}.png")
        }
    }

    /// Waits, within the first batch, until pictures of the next were read.
    struct Waiting<'a>(&'a Reading);

    impl FeatureExtractor for Waiting<'_> {
        fn name(&self) -> &str {
            "waiting"
        }
        fn hash(&self) -> &str {
            "00"
        }
        fn feature_dim(&self) -> usize {
            2
        }
        fn input_size(&self) -> ImageSize {
            ImageSize::square(2)
        }
        fn batch_size(&self) -> usize {
            3
        }
        fn extract_batch(&self, images: &[Cow<'_, Picture>]) -> Result<BatchOutput> {
            let begun = std::time::Instant::now();
            while images[0].pixels()[0] == 0 && self.0.read.load(std::sync::atomic::Ordering::SeqCst) <= 3 {
                assert!(begun.elapsed().as_secs() < 60, "the next batch is not read while the network runs");
                std::thread::yield_now();
            }
            Toy.extract_batch(images)
        }
    }

    #[test]
    fn the_next_batch_is_read_while_the_network_runs_and_errors_come_in_their_turn() {
        let reading = |fails_at| Reading { fails_at, read: Default::default() };
        let whole = reading(99);
        let features = Waiting(&whole).features(&whole, &Silent).unwrap();
        assert!(features.rows().enumerate().all(|(i, row)| (row[1] - (i as f32 / 127.5 - 1.0)).abs() < 1e-6));
        let broken = reading(7);
        let error = Waiting(&broken).features(&broken, &Silent).unwrap_err();
        assert!(matches!(&error, MetricsError::UnreadableImage { name, .. } if name == "7.png"), "{error}");
        // An error of the network in the first batch comes before the third is read.
        struct Failing;
        impl FeatureExtractor for Failing {
            fn name(&self) -> &str {
                "failing"
            }
            fn hash(&self) -> &str {
                "00"
            }
            fn feature_dim(&self) -> usize {
                2
            }
            fn input_size(&self) -> ImageSize {
                ImageSize::square(2)
            }
            fn batch_size(&self) -> usize {
                3
            }
            fn extract_batch(&self, _: &[Cow<'_, Picture>]) -> Result<BatchOutput> {
                Ok(BatchOutput { features: vec![0.0], logits: vec![] })
            }
        }
        let broken = reading(7);
        assert!(matches!(Failing.features(&broken, &Silent), Err(MetricsError::SizeMismatch { .. })));
    }

    #[test]
    fn a_picture_that_gives_no_finite_feature_is_named() {
        struct Dividing;
        impl FeatureExtractor for Dividing {
            fn name(&self) -> &str {
                "dividing"
            }
            fn hash(&self) -> &str {
                "00"
            }
            fn feature_dim(&self) -> usize {
                2
            }
            fn input_size(&self) -> ImageSize {
                ImageSize::square(2)
            }
            fn batch_size(&self) -> usize {
                3
            }
            fn extract_batch(&self, images: &[Cow<'_, Picture>]) -> Result<BatchOutput> {
                let features = images.iter().flat_map(|p| [1.0, (f32::from(p.pixels()[0]) - 5.0).sqrt()]);
                Ok(BatchOutput { features: features.collect(), logits: vec![] })
            }
        }
        let error = Dividing.features(&pictures(9)[5..].to_vec(), &Silent);
        assert!(error.is_ok());
        let error =
            Dividing.features(&Reading { fails_at: 99, read: Default::default() }, &Silent).unwrap_err();
        assert!(matches!(&error, MetricsError::NonFinite { row: 0, column: 1, .. }), "{error}");
        assert!(error.to_string().contains("0.png"), "{error}");
    }
}
