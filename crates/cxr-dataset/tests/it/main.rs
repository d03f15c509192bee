//! Whole folders: the committed thumbnails and tables, folders made on the spot, broken ones, and the real Indiana
//! tables where they are at hand.

#[cfg(feature = "dicom")]
mod dicom;
mod hostile;
mod images;
mod indiana;
mod loader;
mod nih;
mod scale;
mod table;

use std::path::{Path, PathBuf};

use cxr_dataset::{Collection, DatasetError, ReadOptions};
use image::{GrayImage, Luma};

/// A file or folder of the workspace.
fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Data that is not part of the project; says so and returns `None` when it is absent.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("CXR_TEST_DATA").map_or_else(|| workspace("../shared/data"), PathBuf::from);
    let found = root.join(path);
    if !found.exists() {
        println!("skipped: {} not found", found.display());
        return None;
    }
    Some(found)
}

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
