use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageReader};

use super::check_exists;
use crate::ImageError;

/// A decoded picture: grey where it is grey, colour only where its channels differ, 8 or 16 bits as stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Decoded {
    /// 8-bit grey.
    Grey8(image::GrayImage),
    /// 16-bit grey; the full range is black to white.
    Grey16(image::ImageBuffer<image::Luma<u16>, Vec<u16>>),
    /// 8-bit colour.
    Rgb8(image::RgbImage),
}

impl Decoded {
    /// Reads PNG (grey of 1 to 16 bits, colour, palette, with or without alpha), JPEG or, with the feature `dicom`,
    /// DICOM; told apart by content, not by name. The orientation that EXIF data give is applied. Alpha is dropped;
    /// colour with three equal channels becomes grey, which resizes three times as fast; 16-bit colour is reduced to
    /// 8 bits.
    ///
    /// DICOM: one frame, grey or RGB. The first window (or table) of interest is applied, or, where the file has
    /// none, the range of its values becomes black to white; MONOCHROME1 is inverted; the result has 16 bits.
    ///
    /// # Errors
    /// When the file is missing, empty, unreadable, truncated or in another format, or has several frames.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        // Asked only when reading fails or gives nothing: on some file systems a question takes as long as decoding a
        // few rows.
        let bytes = match std::fs::read(path) {
            Ok(bytes) if !bytes.is_empty() => bytes,
            outcome => {
                check_exists(path)?;
                outcome.map_err(|source| ImageError::Read { path: path.into(), source })?
            }
        };
        Self::from_bytes(&bytes).map_err(|reason| ImageError::Undecodable { path: path.into(), reason })
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let decoded = if bytes.get(128..132) == Some(b"DICM") {
            #[cfg(feature = "dicom")]
            let decoded = super::dicom::decode(bytes)?;
            #[cfg(not(feature = "dicom"))]
            return Err("it is DICOM, which this program was built without: add the feature `dicom`".into());
            #[cfg(feature = "dicom")]
            decoded
        } else {
            oriented(bytes).map_err(|error| error.to_string())?
        };
        if decoded.width() == 0 || decoded.height() == 0 {
            return Err(format!("its size is {} x {}", decoded.width(), decoded.height()));
        }
        Ok(match decoded {
            DynamicImage::ImageLuma8(grey) => Self::Grey8(grey),
            DynamicImage::ImageLuma16(grey) => Self::Grey16(grey),
            DynamicImage::ImageLumaA8(_) => Self::Grey8(decoded.into_luma8()),
            DynamicImage::ImageLumaA16(_) => Self::Grey16(decoded.into_luma16()),
            other => {
                let rgb = other.into_rgb8();
                match grey_of(&rgb) {
                    Some(grey) => Self::Grey8(grey),
                    None => Self::Rgb8(rgb),
                }
            }
        })
    }

    /// Width and height in pixels.
    pub fn dimensions(&self) -> (u32, u32) {
        match self {
            Self::Grey8(grey) => grey.dimensions(),
            Self::Grey16(grey) => grey.dimensions(),
            Self::Rgb8(rgb) => rgb.dimensions(),
        }
    }
}

/// A PNG or JPEG picture, turned as its EXIF data say.
fn oriented(bytes: &[u8]) -> Result<DynamicImage, image::ImageError> {
    let mut decoder = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?.into_decoder()?;
    // A small file can promise a huge picture.
    image::Limits::default().reserve(decoder.total_bytes())?;
    // What refuses a picture is its pixels, not its remarks: a broken orientation is none.
    let orientation = decoder.orientation();
    let mut decoded = DynamicImage::from_decoder(decoder)?;
    if let Ok(orientation) = orientation {
        decoded.apply_orientation(orientation);
    }
    Ok(decoded)
}

fn grey_of(rgb: &image::RgbImage) -> Option<image::GrayImage> {
    let pixels = rgb.as_raw().as_chunks::<3>().0;
    let grey = pixels.iter().map(|&[r, g, b]| (r == g && g == b).then_some(r)).collect::<Option<_>>()?;
    image::GrayImage::from_raw(rgb.width(), rgb.height(), grey)
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage};

    use super::*;
    use crate::image::dimensions;

    #[test]
    fn formats_and_depths() {
        let folder = tempfile::tempdir().unwrap();
        // The suffix is not believed: a JPEG may be called .png.
        let path = folder.path().join("x.png");
        let ramp = GrayImage::from_fn(9, 5, |x, y| Luma([(x * 25 + y) as u8]));

        ramp.save(&path).unwrap();
        assert_eq!(Decoded::open(&path).unwrap(), Decoded::Grey8(ramp.clone()));

        DynamicImage::ImageLuma8(ramp.clone()).to_rgb8().save(&path).unwrap();
        assert_eq!(
            Decoded::open(&path).unwrap(),
            Decoded::Grey8(ramp.clone()),
            "three equal channels are grey"
        );

        let rgba = RgbaImage::from_fn(9, 5, |x, y| {
            let v = ramp.get_pixel(x, y).0[0];
            Rgba([v, v, v, 7])
        });
        rgba.save(&path).unwrap();
        assert_eq!(Decoded::open(&path).unwrap(), Decoded::Grey8(ramp.clone()), "alpha is dropped");

        let deep = image::ImageBuffer::from_fn(9, 5, |x, y| Luma([(x * 7001 + y) as u16]));
        deep.save(&path).unwrap();
        assert_eq!(Decoded::open(&path).unwrap(), Decoded::Grey16(deep));

        let colour = RgbImage::from_pixel(4, 4, Rgb([1, 2, 3]));
        colour.save(&path).unwrap();
        assert_eq!(Decoded::open(&path).unwrap(), Decoded::Rgb8(colour));

        ramp.save_with_format(&path, image::ImageFormat::Jpeg).unwrap();
        assert_eq!(Decoded::open(&path).unwrap().dimensions(), (9, 5));
        assert_eq!(dimensions(&path).unwrap(), (9, 5), "without decoding");
    }

    #[test]
    fn broken_files_are_errors_of_their_kind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.png");
        assert!(matches!(Decoded::open(&path), Err(ImageError::Missing { .. })));
        std::fs::write(&path, []).unwrap();
        assert!(matches!(Decoded::open(&path), Err(ImageError::Empty { .. })));
        std::fs::write(&path, "no picture").unwrap();
        assert!(matches!(Decoded::open(&path), Err(ImageError::Undecodable { .. })));
        assert!(matches!(Decoded::open(folder.path()), Err(ImageError::Undecodable { .. })));
        assert!(matches!(dimensions(&path), Err(ImageError::Undecodable { .. })));
        assert!(matches!(dimensions(&folder.path().join("none")), Err(ImageError::Missing { .. })));

        GrayImage::from_fn(64, 64, |x, y| Luma([(x * y) as u8])).save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for length in (1..whole.len() - 12).step_by(97) {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(Decoded::open(&path), Err(ImageError::Undecodable { .. })), "{length} bytes");
        }
    }
}
