//! Pictures side by side, marked as synthetic like each of them.

use std::path::Path;

use cxr::dataset::contact_sheet;
use cxr::ldm::Error;
use cxr::ldm::pipeline::Image;
use image::RgbImage;

/// What a contact sheet shows at most.
const MOST: usize = 64;

/// The first pictures of a run.
#[derive(Default)]
pub struct Sheet {
    pictures: Vec<RgbImage>,
    first: Option<Image>,
}

impl Sheet {
    /// Adds a picture, while there is room.
    pub fn add(&mut self, image: &Image) {
        if self.pictures.len() < MOST {
            let (width, height) = (image.width as u32, image.height as u32);
            self.pictures.extend(RgbImage::from_raw(width, height, image.rgb.clone()));
        }
        self.first.get_or_insert_with(|| image.clone());
    }

    /// Writes a sheet that is about as wide as it is high; nothing without pictures.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(self, file: &Path) -> Result<(), Error> {
        let columns = (self.pictures.len() as f64).sqrt().ceil() as usize;
        self.save_with(columns, file)
    }

    /// Writes a sheet of so many columns.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_with(self, columns: usize, file: &Path) -> Result<(), Error> {
        let Some(mut grid) = self.first else { return Ok(()) };
        let sheet = contact_sheet(&self.pictures, columns.max(1));
        grid.settings.prompt = format!(
            "Contact sheet of {} pictures, the first of: {}",
            self.pictures.len(),
            grid.settings.prompt
        );
        (grid.width, grid.height) = (sheet.width() as usize, sheet.height() as usize);
        grid.rgb = sheet.into_raw();
        grid.save_png(file)
    }
}
