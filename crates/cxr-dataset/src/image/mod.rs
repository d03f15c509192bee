//! Pictures: from a file to pixels in the range of the autoencoder, and back to something to look at.

mod decode;
#[cfg(feature = "dicom")]
mod dicom;
mod resize;
mod sheet;
mod square;

use std::path::Path;

use image::{ImageReader, Rgb, RgbImage};
use serde::{Deserialize, Serialize};

use crate::{DatasetError, ImageError};

pub use decode::Decoded;
pub use sheet::contact_sheet;
pub use square::{Samples, Square};

/// The filter that resizes; all of them widen with the reduction, so that nothing aliases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Windowed sinc of radius 3: the sharpest, with slight ringing.
    #[default]
    Lanczos3,
    /// Cubic of radius 2.
    CatmullRom,
    /// Triangle of radius 1, as the paper's training program used.
    Bilinear,
    /// Mean of the pixels that fall together.
    Box,
}

/// What to do with a picture that is not square.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// The short side becomes the size, the long side loses both ends.
    #[default]
    CentreCrop,
    /// The long side becomes the size, the short side is filled up with black on both ends.
    PadToSquare,
}

/// How pictures are brought to one size.
///
/// | Field | Default | Range |
/// |---|---|---|
/// | `size` | 128 (`paper_128`) | 1 to 8192; the models need a multiple of 8 |
/// | `filter` | `lanczos3` | |
/// | `fit` | `centre_crop` | |
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageOptions {
    /// Width and height of the result in pixels.
    pub size: u32,
    /// The filter that resizes.
    #[serde(default)]
    pub filter: Filter,
    /// What to do with a picture that is not square.
    #[serde(default)]
    pub fit: Fit,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self::new(128)
    }
}

impl ImageOptions {
    /// Squares of this many pixels, Lanczos, centre crop.
    pub fn new(size: u32) -> Self {
        Self { size, filter: Filter::default(), fit: Fit::default() }
    }

    /// The paper's: bilinear, centre crop.
    pub fn paper(size: u32) -> Self {
        Self { filter: Filter::Bilinear, ..Self::new(size) }
    }

    /// Refuses sizes that cannot be meant.
    ///
    /// # Errors
    /// When the size is 0 or above 8192.
    pub fn validate(&self) -> Result<(), DatasetError> {
        match self.size {
            1..=8192 => Ok(()),
            size => Err(DatasetError::Setting {
                field: "image size",
                value: size.to_string(),
                expected: "1 to 8192 (a multiple of 8 for the models)",
            }),
        }
    }
}

/// A square picture as the autoencoder takes it: three planes `[3, size, size]`, red, green, blue (equal for grey),
/// values in [-1, 1], black -1.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `3 * size * size` values, plane by plane, row by row.
    pub values: Vec<f32>,
    /// Width and height.
    pub size: usize,
}

impl Pixels {
    /// As 8-bit colours, rounded to nearest; values outside [-1, 1] are clamped.
    pub fn to_rgb(&self) -> RgbImage {
        let plane = self.size * self.size;
        let byte = |value: f32| ((value + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
        RgbImage::from_fn(self.size as u32, self.size as u32, |x, y| {
            let at = y as usize * self.size + x as usize;
            Rgb([0, 1, 2].map(|channel| byte(self.values[channel * plane + at])))
        })
    }
}

/// Reads a picture and brings it to size: decode, resize, crop or pad, [-1, 1]. Nothing is random, nothing is
/// flipped.
///
/// # Errors
/// When the file is missing, empty, unreadable or no image. Never a blank picture in place of a real one.
///
/// # Panics
/// When the size is outside [`ImageOptions::validate`]'s range.
pub fn load(path: &Path, options: &ImageOptions) -> Result<Pixels, ImageError> {
    load_square(path, options).map(|square| square.to_pixels())
}

/// [`load`] without the last step: the samples as the resizer left them, which is what a cache keeps.
///
/// # Errors
/// As [`load`].
///
/// # Panics
/// As [`load`].
pub fn load_square(path: &Path, options: &ImageOptions) -> Result<Square, ImageError> {
    assert!(options.validate().is_ok(), "image size {} is not within 1 to 8192", options.size);
    let decoded = Decoded::open(path)?;
    resize::to_square(&decoded, options)
        .map_err(|reason| ImageError::Undecodable { path: path.into(), reason })
}

/// Width and height of a picture as it is stored, from the beginning of its file; those of a DICOM file take decoding.
///
/// # Errors
/// As [`load`].
pub fn dimensions(path: &Path) -> Result<(u32, u32), ImageError> {
    let undecodable = |reason: String| ImageError::Undecodable { path: path.into(), reason };
    let reader = match ImageReader::open(path) {
        Ok(reader) => reader,
        Err(source) => {
            check_exists(path)?;
            return Err(ImageError::Read { path: path.into(), source });
        }
    };
    let reader =
        reader.with_guessed_format().map_err(|source| ImageError::Read { path: path.into(), source })?;
    if reader.format().is_none() {
        return Decoded::open(path).map(|decoded| decoded.dimensions());
    }
    reader.into_dimensions().map_err(|error| undecodable(error.to_string()))
}

/// Whether a file is there and has bytes, without decoding it.
///
/// # Errors
/// When it is missing, empty or unreadable.
pub fn check_exists(path: &Path) -> Result<(), ImageError> {
    match std::fs::metadata(path) {
        Ok(file) if !file.is_file() => {
            Err(ImageError::Undecodable { path: path.into(), reason: "it is no file".into() })
        }
        Ok(file) if file.len() == 0 => Err(ImageError::Empty { path: path.into() }),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(ImageError::Missing { path: path.into() })
        }
        Err(source) => Err(ImageError::Read { path: path.into(), source }),
    }
}
