//! The embedded radiographs: read, split by patient, decoded.

use std::path::Path;

use anyhow::{Context, Result};
use cxr::dataset::{Collection, ImageOptions, LeakageReport, ReadOptions, Split, SplitConfig, image};

use super::pictures::SIDE;

/// The thumbnails with their prompts, divided so that no patient stands on both sides.
pub struct Thumbnails {
    /// Names, prompts, labels, patients.
    pub collection: Collection,
    /// Positions in the collection.
    pub split: Split,
    /// Grey pixels `[SIDE * SIDE]` in `[0, 1]`, by position in the collection.
    pub pixels: Vec<Vec<f32>>,
}

impl Thumbnails {
    /// Reads a folder in NIH's layout.
    ///
    /// # Errors
    /// If the table or an image cannot be read, or the collection cannot be split.
    pub fn open(folder: &Path) -> Result<Self> {
        let collection = Collection::open(folder, &ReadOptions::default())?;
        let split = Split::new(&collection, &SplitConfig::default())?;
        let options = ImageOptions::new(SIDE as u32);
        let pixels = collection
            .pairs
            .iter()
            .map(|pair| {
                let picture = image::load(&pair.image, &options)
                    .with_context(|| format!("{}, row {}", collection.table.display(), pair.row))?;
                Ok(picture.values[..SIDE * SIDE].iter().map(|v| 0.5 * v + 0.5).collect())
            })
            .collect::<Result<Vec<Vec<f32>>>>()?;
        Ok(Self { collection, split, pixels })
    }

    /// What the split lets through all the same.
    ///
    /// # Errors
    /// If an image cannot be read.
    pub fn leakage(&self) -> Result<LeakageReport> {
        Ok(LeakageReport::measure(&self.collection, &self.split, true)?)
    }

    /// Grey pixels of some positions.
    pub fn pick(&self, positions: &[usize]) -> Vec<Vec<f32>> {
        positions.iter().map(|&i| self.pixels[i].clone()).collect()
    }

    /// Prompts of some positions.
    pub fn prompts(&self, positions: &[usize]) -> Vec<String> {
        positions.iter().map(|&i| self.collection.pairs[i].text.clone()).collect()
    }
}
