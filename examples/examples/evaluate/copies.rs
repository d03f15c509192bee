//! The search for copies of training images: a table, and a sheet of the nearest pairs.

use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result};
use cxr::core::atomic;
use cxr::dataset::contact_sheet;
use cxr::metrics::{
    AuditRow, Extraction, ImageSize, ImageSource, Neighbour, audit, distance_threshold, grey_pixels,
    nearest_neighbours,
};
use image::imageops::{self, FilterType};
use image::{ImageFormat, RgbImage};
use serde::Serialize;

use crate::set::Set;

/// Share of held-out images that may be as near to the training set as what counts as a copy.
const RATE: f64 = 0.01;
/// Side at which pixels are compared.
const SIDE: usize = 64;
/// Pairs on the sheet, and the side of a picture there.
const SHOWN: usize = 16;
const CELL: u32 = 160;

/// What was found.
#[derive(Debug, Serialize)]
pub(crate) struct Copies {
    pub(crate) images: usize,
    pub(crate) train: usize,
    /// Real images that the thresholds come from; 0 without any.
    pub(crate) held_out: usize,
    /// Share of them below each threshold.
    pub(crate) rate: f64,
    pub(crate) pixel_threshold: Option<f64>,
    pub(crate) feature_threshold: Option<f64>,
    pub(crate) near_in_pixels: Option<usize>,
    pub(crate) near_in_features: Option<usize>,
}

/// A set with its features.
pub(crate) type Extracted<'a> = (&'a Set, &'a Extraction);

/// Looks for copies, and writes copies.csv and copies.png.
pub(crate) fn search(
    fake: Extracted<'_>,
    train: Extracted<'_>,
    held_out: Option<Extracted<'_>>,
    out: &Path,
) -> Result<Copies> {
    let pixels = |set: &Set| grey_pixels(set, ImageSize::square(SIDE)).map_err(|error| set.explain(error));
    let (fake_pixels, train_pixels) = (pixels(fake.0)?, pixels(train.0)?);
    let groups = train.0.groups();
    let groups = groups.as_deref();
    let rows = audit((&fake_pixels, &fake.1.features), (&train_pixels, &train.1.features), groups)?;
    let mut copies = Copies {
        images: rows.len(),
        train: train.0.len(),
        held_out: 0,
        rate: RATE,
        pixel_threshold: None,
        feature_threshold: None,
        near_in_pixels: None,
        near_in_features: None,
    };
    if let Some((set, extraction)) = held_out {
        let in_pixels = nearest_neighbours(&pixels(set)?, &train_pixels, groups)?;
        let in_features = nearest_neighbours(&extraction.features, &train.1.features, groups)?;
        let pixel_threshold = distance_threshold(&in_pixels, RATE)?;
        let feature_threshold = distance_threshold(&in_features, RATE)?;
        copies.held_out = set.len();
        copies.near_in_pixels = Some(rows.iter().filter(|r| r.pixels.distance < pixel_threshold).count());
        copies.near_in_features =
            Some(rows.iter().filter(|r| r.features.distance < feature_threshold).count());
        (copies.pixel_threshold, copies.feature_threshold) = (Some(pixel_threshold), Some(feature_threshold));
    }
    table(&rows, fake.0, train.0, &copies, &out.join("copies.csv"))?;
    sheet(&rows, fake.0, train.0, &out.join("copies.png"))?;
    Ok(copies)
}

fn table(rows: &[AuditRow], fake: &Set, train: &Set, copies: &Copies, path: &Path) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let mut writer = csv::Writer::from_writer(Vec::new());
    let head = ["nearest", "distance", "ratio", "nearer_than_held_out"];
    let named = |what: &str| head.map(|name| format!("{what}_{name}"));
    let heads = ["image".to_string()].into_iter().chain(named("pixels")).chain(named("features"));
    writer.write_record(heads).with_context(failed)?;
    let cells = |neighbour: &Neighbour, threshold: Option<f64>| {
        [
            train.name(neighbour.nearest),
            neighbour.distance.to_string(),
            neighbour.ratio.map_or(String::new(), |ratio| ratio.to_string()),
            threshold.map_or(String::new(), |threshold| (neighbour.distance < threshold).to_string()),
        ]
    };
    for row in rows {
        let image = [fake.name(row.image)].into_iter();
        let pixels = cells(&row.pixels, copies.pixel_threshold);
        let features = cells(&row.features, copies.feature_threshold);
        writer.write_record(image.chain(pixels).chain(features)).with_context(failed)?;
    }
    let bytes = writer.into_inner().map_err(|error| error.into_error()).with_context(failed)?;
    atomic::write_bytes(path, &bytes).with_context(failed)
}

/// The synthetic images that are nearest in pixels, each with its nearest training image in pixels and in features.
fn sheet(rows: &[AuditRow], fake: &Set, train: &Set, path: &Path) -> Result<()> {
    let mut nearest: Vec<&AuditRow> = rows.iter().collect();
    nearest.sort_by(|a, b| a.pixels.distance.total_cmp(&b.pixels.distance));
    nearest.truncate(SHOWN);
    let cell = |set: &Set, index: usize| -> Result<RgbImage> {
        let picture = set.load(index).map_err(|error| set.explain(error))?;
        let ImageSize { width, height } = picture.size();
        let channels = picture.channels();
        let image = RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let pixel = &picture.pixels()[(y as usize * width + x as usize) * channels..][..channels];
            image::Rgb([pixel[0], pixel[channels / 2], pixel[channels - 1]])
        });
        Ok(imageops::resize(&image, CELL, CELL, FilterType::Triangle))
    };
    let mut cells = Vec::new();
    for row in nearest {
        cells.push(cell(fake, row.image)?);
        cells.push(cell(train, row.pixels.nearest)?);
        cells.push(cell(train, row.features.nearest)?);
    }
    let mut bytes = Cursor::new(Vec::new());
    contact_sheet(&cells, 6).write_to(&mut bytes, ImageFormat::Png)?;
    atomic::write_bytes(path, bytes.get_ref()).with_context(|| format!("cannot write {}", path.display()))
}
