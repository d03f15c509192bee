//! Flagged pictures beside the training pictures that they look like, as one picture.

use std::path::Path;

use super::audit::{AuditEntry, AuditReport};
use super::calibration::Evidence;
use super::glyphs::{ADVANCE, LINE, draw};
use super::side::AuditSide;
use crate::error::{MetricsError, Result};
use crate::features::expect_size;
use crate::image::{ImageSize, ImageSource, Picture};

/// Side of each picture on the sheet.
const SIDE: usize = 128;
const GAP: usize = 2;
const LINES: usize = 4;
/// Background, and the letters on it.
const GREY: u8 = 40;
const INK: u8 = 230;
/// Pairs per row.
const COLUMNS: usize = 3;

const CELL: ImageSize = ImageSize { width: 2 * SIDE + 2 * GAP, height: SIDE + 2 * GAP + LINES * LINE };

impl AuditReport {
    /// The flagged pairs with the strongest evidence, at most `limit`: left the synthetic picture, right the
    /// training picture, below them their names, distances and ratios with the thresholds. Of an audit without
    /// calibration the nearest pairs. None without any pair.
    ///
    /// # Errors
    /// Sources and sides of other sizes than what was audited, pictures that cannot be read.
    pub fn sheet(
        &self,
        limit: usize,
        (synthetic, made): (&AuditSide, &dyn ImageSource),
        (train, trained): (&AuditSide, &dyn ImageSource),
    ) -> Result<Option<Picture>> {
        self.expect_sides(synthetic, train)?;
        expect_size(|| "synthetic pictures of a sheet".into(), synthetic.len(), made.len())?;
        expect_size(|| "training pictures of a sheet".into(), train.len(), trained.len())?;
        let mut entries = self.strongest_first(self.calibration.is_none());
        entries.truncate(limit);
        if entries.is_empty() {
            return Ok(None);
        }
        let columns = COLUMNS.min(entries.len());
        let mut sheet = Canvas::new(columns * CELL.width, entries.len().div_ceil(columns) * CELL.height);
        for (i, entry) in entries.into_iter().enumerate() {
            let (x, y) = (i % columns * CELL.width + GAP, i / columns * CELL.height + GAP);
            sheet.picture(&*made.load(entry.image)?, x, y);
            sheet.picture(&*trained.load(entry.nearest())?, x + SIDE, y);
            for (line, text) in self.caption(entry, synthetic, train).iter().enumerate() {
                sheet.text(text, x, y + SIDE + 3 + line * LINE);
            }
        }
        Picture::new(sheet.size, 1, sheet.pixels).map(Some)
    }

    fn caption(&self, entry: &AuditEntry, synthetic: &AuditSide, train: &AuditSide) -> [String; LINES] {
        let scale = |kind| self.calibration.as_ref().and_then(|calibration| calibration.scale(kind));
        let bound = |kind| scale(kind).map(|scale| scale.threshold);
        let line = |what: &str, values: [(Option<f64>, Evidence); 2]| {
            let [distance, ratio] = values.map(|(value, kind)| match (value, bound(kind)) {
                (Some(value), Some(bound)) => format!("{value:.3}/{bound:.3}"),
                (Some(value), None) => format!("{value:.3}"),
                (None, _) => "-".into(),
            });
            format!("{what} {distance} RATIO {ratio}")
        };
        let pixels = &entry.pixels;
        let features = entry.features.as_ref().map_or(String::new(), |f| {
            line("FEAT", [(Some(f.distance), Evidence::FeatureDistance), (f.ratio, Evidence::FeatureRatio)])
        });
        [
            file_name(synthetic.name(entry.image)).to_string(),
            format!("= {}", file_name(train.name(entry.nearest()))),
            line(
                "PIX",
                [(Some(pixels.distance), Evidence::PixelDistance), (pixels.ratio, Evidence::PixelRatio)],
            ),
            features,
        ]
    }
}

/// Without the folders, for which a caption has no room.
fn file_name(name: &str) -> &str {
    name.rsplit(['/', '\\']).next().unwrap_or(name)
}

/// Writes a picture as PNG.
///
/// # Errors
/// A file that cannot be written.
pub fn write_png(picture: &Picture, path: &Path) -> Result<()> {
    let size = picture.size();
    cxr_core::atomic::write(path, |file| {
        let mut encoder = png::Encoder::new(file, size.width as u32, size.height as u32);
        encoder.set_color(if picture.channels() == 1 {
            png::ColorType::Grayscale
        } else {
            png::ColorType::Rgb
        });
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(picture.pixels())?;
        Ok(writer.finish()?)
    })
    .map_err(|source| MetricsError::File { path: path.to_path_buf(), action: "write", source })
}

struct Canvas {
    size: ImageSize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self { size: ImageSize { width, height }, pixels: vec![GREY; width * height] }
    }

    fn picture(&mut self, picture: &Picture, x: usize, y: usize) {
        let grey = picture.grey_at(ImageSize::square(SIDE));
        for (row, line) in grey.chunks_exact(SIDE).enumerate() {
            let start = (y + row) * self.size.width + x;
            for (pixel, value) in self.pixels[start..][..SIDE].iter_mut().zip(line) {
                *pixel = ((value + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
            }
        }
    }

    fn text(&mut self, text: &str, x: usize, y: usize) {
        let width = self.size.width;
        draw(text, 2 * SIDE / ADVANCE, |dx, dy| self.pixels[(y + dy) * width + x + dx] = INK);
    }
}
