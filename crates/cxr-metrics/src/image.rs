//! Pictures as the metrics see them, and where they come from.

use std::borrow::Cow;
use std::fmt;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::{FeatureSet, expect_size};

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSize {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

impl ImageSize {
    /// `side` by `side`.
    pub fn square(side: usize) -> Self {
        Self { width: side, height: side }
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// A decoded 8-bit picture, grey or RGB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    size: ImageSize,
    channels: usize,
    pixels: Vec<u8>,
}

impl Picture {
    /// Takes `pixels` by rows, `channels` (1 grey, 3 RGB) values each.
    ///
    /// # Errors
    /// An empty picture, other channels, a length that is not `width * height * channels`.
    pub fn new(size: ImageSize, channels: usize, pixels: Vec<u8>) -> Result<Self> {
        if channels != 1 && channels != 3 {
            return Err(MetricsError::InvalidParameter {
                name: "channels",
                value: channels.to_string(),
                expected: "1 (grey) or 3 (RGB)".into(),
            });
        }
        if size.width == 0 || size.height == 0 {
            return Err(MetricsError::InvalidParameter {
                name: "size",
                value: size.to_string(),
                expected: "at least one pixel".into(),
            });
        }
        expect_size(
            || format!("bytes of a {size} picture"),
            size.width * size.height * channels,
            pixels.len(),
        )?;
        Ok(Self { size, channels, pixels })
    }

    /// Width and height.
    pub fn size(&self) -> ImageSize {
        self.size
    }

    /// 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The bytes, by rows.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Grey values in [-1, 1], by rows: the mean of the channels over 127.5, less one.
    ///
    /// The plain mean and not a luminance: a radiograph has no colours, and where a decoder leaves a tint
    /// its channels count equally.
    pub fn grey(&self) -> Vec<f32> {
        let scale = 1.0 / (127.5 * self.channels as f32);
        let sum = |pixel: &[u8]| pixel.iter().map(|v| f32::from(*v)).sum::<f32>();
        self.pixels.chunks_exact(self.channels).map(|pixel| sum(pixel) * scale - 1.0).collect()
    }

    /// [`grey`](Self::grey), resized to `size` by [`resize_antialiased`].
    pub fn grey_at(&self, size: ImageSize) -> Vec<f32> {
        resize_antialiased(&self.grey(), self.size, size)
    }
}

/// A set of pictures that is read one by one, so that a large one need not fit into memory.
pub trait ImageSource: Sync {
    /// Number of pictures.
    fn len(&self) -> usize;

    /// The picture at a position below [`len`](Self::len); called from several threads.
    ///
    /// # Errors
    /// [`MetricsError::UnreadableImage`] with the file's name.
    fn load(&self, index: usize) -> Result<Cow<'_, Picture>>;

    /// What the picture at a position is called in errors: its file, where it has one.
    fn name(&self, index: usize) -> String {
        format!("number {index}")
    }

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl ImageSource for [Picture] {
    fn len(&self) -> usize {
        <[Picture]>::len(self)
    }

    fn load(&self, index: usize) -> Result<Cow<'_, Picture>> {
        Ok(Cow::Borrowed(&self[index]))
    }
}

impl ImageSource for Vec<Picture> {
    fn len(&self) -> usize {
        <[Picture]>::len(self)
    }

    fn load(&self, index: usize) -> Result<Cow<'_, Picture>> {
        Ok(Cow::Borrowed(&self[index]))
    }
}

/// Grey pixels in [-1, 1] of every picture at `size` `[n, height * width]`: the pixel side of a memorization audit.
///
/// # Errors
/// Those of the source.
pub fn grey_pixels(images: &dyn ImageSource, size: ImageSize) -> Result<FeatureSet> {
    let rows = (0..images.len())
        .into_par_iter()
        .map(|index| Ok(images.load(index)?.grey_at(size)))
        .collect::<Result<Vec<_>>>()?;
    FeatureSet::new(rows.concat(), size.width * size.height)
}

/// Bilinear resize with antialiasing (a triangle as wide as the reduction), as PIL's `BILINEAR` on floats.
/// A picture that has the size already is returned as it is.
///
/// # Panics
/// If `pixels` does not hold `from.width * from.height` values.
pub fn resize_antialiased(pixels: &[f32], from: ImageSize, to: ImageSize) -> Vec<f32> {
    resize(pixels, from, to, 1.0, |x| (1.0 - x.abs()).max(0.0))
}

/// Bicubic resize with antialiasing, as PIL's `BICUBIC` on floats (its parameter is -0.5). Values may leave the range
/// of the picture's.
///
/// # Panics
/// If `pixels` does not hold `from.width * from.height` values.
pub fn resize_bicubic(pixels: &[f32], from: ImageSize, to: ImageSize) -> Vec<f32> {
    resize(pixels, from, to, 2.0, |x| {
        const A: f64 = -0.5;
        match x.abs() {
            x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            _ => 0.0,
        }
    })
}

fn resize(
    pixels: &[f32],
    from: ImageSize,
    to: ImageSize,
    support: f64,
    kernel: impl Fn(f64) -> f64 + Copy,
) -> Vec<f32> {
    assert_eq!(pixels.len(), from.width * from.height, "pixels of a {from} picture");
    if from == to {
        return pixels.to_vec();
    }
    let across = taps(from.width, to.width, support, kernel);
    let rows: Vec<f32> = pixels
        .chunks_exact(from.width)
        .flat_map(|row| across.iter().map(|(start, weights)| weighted(weights, row[*start..].iter())))
        .collect();
    let down = taps(from.height, to.height, support, kernel);
    let mut out = Vec::with_capacity(to.width * to.height);
    for (start, weights) in &down {
        for x in 0..to.width {
            out.push(weighted(weights, rows[start * to.width + x..].iter().step_by(to.width)));
        }
    }
    out
}

/// For each output position: the first input position and the weights from there.
fn taps(from: usize, to: usize, support: f64, kernel: impl Fn(f64) -> f64) -> Vec<(usize, Vec<f64>)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = support * stretch;
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            let start = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let weights: Vec<f64> =
                (start..end).map(|x| kernel((x as f64 - centre + 0.5) / stretch)).collect();
            let total: f64 = weights.iter().sum();
            (start, weights.iter().map(|w| w / total).collect())
        })
        .collect()
}

fn weighted<'a>(weights: &[f64], values: impl Iterator<Item = &'a f32>) -> f32 {
    weights.iter().zip(values).map(|(w, v)| w * f64::from(*v)).sum::<f64>() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grey_is_the_mean_of_the_channels_in_minus_one_to_one() {
        let picture = Picture::new(ImageSize { width: 2, height: 1 }, 3, vec![0, 0, 0, 255, 255, 0]).unwrap();
        let grey = picture.grey();
        assert_eq!(grey[0], -1.0);
        assert!((grey[1] - 1.0 / 3.0).abs() < 1e-6);
        let same = Picture::new(ImageSize { width: 2, height: 1 }, 1, vec![0, 170]).unwrap();
        assert!((same.grey()[1] - grey[1]).abs() < 1e-6);
    }

    #[test]
    fn resizing_keeps_constants_and_the_mean_of_a_halving() {
        let size = ImageSize { width: 8, height: 6 };
        let constant = resize_antialiased(&[0.25; 48], size, ImageSize { width: 3, height: 5 });
        assert_eq!(constant.len(), 15);
        assert!(constant.iter().all(|v| (v - 0.25).abs() < 1e-6));
        // A step edge stays one: rows are not mixed up with columns.
        let edge: Vec<f32> = (0..48).map(|i| if i % 8 < 4 { -1.0 } else { 1.0 }).collect();
        let half = resize_antialiased(&edge, size, ImageSize { width: 4, height: 3 });
        for row in half.chunks(4) {
            assert!(row[0] < -0.99 && row[3] > 0.99 && (row[1] + row[2]).abs() < 1e-6, "{row:?}");
        }
    }

    #[test]
    fn broken_pictures_are_refused() {
        let size = ImageSize::square(2);
        assert!(matches!(Picture::new(size, 2, vec![0; 8]), Err(MetricsError::InvalidParameter { .. })));
        assert!(matches!(Picture::new(size, 3, vec![0; 4]), Err(MetricsError::SizeMismatch { .. })));
        assert!(Picture::new(ImageSize { width: 0, height: 2 }, 1, vec![]).is_err());
    }
}
