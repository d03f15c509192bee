//! Whole folders: the committed thumbnails and tables, folders made on the spot, broken ones, and the real Indiana
//! tables where they are at hand.

#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod images;
mod indiana;
mod loader;
mod nih;
mod scale;
mod table;

use std::path::Path;

use common::{shared, workspace};
use cxr_dataset::{Collection, DatasetError, ReadOptions};
use image::{GrayImage, Luma};

fn open(folder: &Path) -> Result<Collection, DatasetError> {
    Collection::open(folder, &ReadOptions::default())
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A small grey image whose bytes depend on its number.
fn write_image(folder: &Path, name: &str, number: u8) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    GrayImage::from_fn(20, 16, |x, y| Luma([number ^ (x * y) as u8])).save(path).unwrap();
}
