//! A set of images: a folder or a table, with what is known of each image.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use cxr::dataset::image::Decoded;
use cxr::dataset::{Collection, ImageCache, ImageOptions, Pair, ReadOptions};
use cxr::metrics::{ImageSize, ImageSource, MetricsError, Picture};

/// Images of one flag. Stages that need prompts, labels, views or patients find them in `pairs`.
pub struct Set {
    /// The flag, for messages.
    pub flag: &'static str,
    /// What was given.
    pub path: PathBuf,
    /// In the order in which they are measured: by name, or of the table.
    pub files: Vec<PathBuf>,
    /// What the table says of each file; none for a folder without one.
    pub pairs: Option<Vec<Pair>>,
    /// Side that every image is brought to; none leaves them as they are.
    size: Option<u32>,
    /// Where images that were brought to size are kept, if they are.
    cache: Option<Arc<ImageCache>>,
}

impl Set {
    /// The images of a folder or a table, at least two; `size` is the side in pixels that they are brought to.
    ///
    /// # Errors
    /// If it cannot be read, or has fewer images; the message begins with the flag.
    pub fn open(flag: &'static str, path: &Path, size: Option<u32>) -> Result<Self> {
        let shown = || format!("{flag} {}", path.display());
        let of_table =
            path.is_file() || ["metadata.jsonl", "metadata.csv"].iter().any(|n| path.join(n).is_file());
        let (files, pairs) = if of_table {
            let pairs = Collection::open(path, &ReadOptions::default()).with_context(shown)?.pairs;
            (pairs.iter().map(|pair| pair.image.clone()).collect(), Some(pairs))
        } else {
            (list(path).with_context(shown)?, None)
        };
        ensure!(
            !files.is_empty(),
            "{}: no images; expected .png, .jpg or .jpeg files in it, or a metadata.jsonl that names them",
            shown()
        );
        ensure!(
            files.len() > 1,
            "{}: 1 image, expected at least 2, and hundreds for figures that say something",
            shown()
        );
        Ok(Self { flag, path: path.to_path_buf(), files, pairs, size, cache: None })
    }

    /// Some pairs of a collection that was read already, brought to a side of `size` pixels.
    pub fn of_collection(
        flag: &'static str,
        collection: &Collection,
        positions: &[usize],
        size: u32,
        cache: Option<Arc<ImageCache>>,
    ) -> Self {
        let pairs: Vec<Pair> = positions.iter().map(|&position| collection.pairs[position].clone()).collect();
        let files = pairs.iter().map(|pair| pair.image.clone()).collect();
        Self { flag, path: collection.table.clone(), files, pairs: Some(pairs), size: Some(size), cache }
    }

    /// For an error of measuring it: the flag, and what helps against mixed sizes.
    pub fn explain(&self, error: MetricsError) -> anyhow::Error {
        let mixed = matches!(error, MetricsError::MixedSizes { .. });
        let advice = if mixed { " (--size N brings all images to one size)" } else { "" };
        anyhow::Error::new(error).context(format!("{}{advice}", self.shown()))
    }

    /// The flag and what was given.
    pub fn shown(&self) -> String {
        format!("{} {}", self.flag, self.path.display())
    }

    /// Prompts, where the table has them.
    pub fn prompts(&self) -> Option<Vec<String>> {
        Some(self.pairs.as_ref()?.iter().map(|pair| pair.text.clone()).collect())
    }

    /// Patients (or studies), where the table has them: an image without one is its own.
    pub fn groups(&self) -> Option<Vec<String>> {
        let pairs = self.pairs.as_ref()?;
        let own = |(i, pair): (usize, &Pair)| pair.group.clone().unwrap_or_else(|| format!("image {i}"));
        pairs.iter().any(|pair| pair.group.is_some()).then(|| pairs.iter().enumerate().map(own).collect())
    }

    fn picture(&self, path: &Path) -> Result<Picture, Box<dyn std::error::Error + Send + Sync>> {
        if let Some(size) = self.size {
            let options = ImageOptions::new(size);
            let pixels = match &self.cache {
                Some(cache) => cache.load(path, &options)?.to_pixels().to_rgb(),
                None => cxr::dataset::image::load(path, &options)?.to_rgb(),
            };
            let size = ImageSize::square(size as usize);
            return Ok(Picture::new(size, 3, pixels.into_raw())?);
        }
        let decoded = Decoded::open(path)?;
        let (width, height) = decoded.dimensions();
        let (channels, pixels) = match decoded {
            Decoded::Grey8(grey) => (1, grey.into_raw()),
            // 65535 is 257 times 255.
            Decoded::Grey16(grey) => (1, grey.into_raw().iter().map(|v| ((v + 128) / 257) as u8).collect()),
            Decoded::Rgb8(rgb) => (3, rgb.into_raw()),
        };
        Ok(Picture::new(ImageSize { width: width as usize, height: height as usize }, channels, pixels)?)
    }
}

impl ImageSource for Set {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn load(&self, index: usize) -> cxr::metrics::Result<Cow<'_, Picture>> {
        let picture = self.picture(&self.files[index]);
        picture
            .map(Cow::Owned)
            .map_err(|source| MetricsError::UnreadableImage { name: self.name(index), source })
    }

    fn name(&self, index: usize) -> String {
        self.files[index].display().to_string()
    }
}

/// Images of a folder by name; where it has none itself, those of the folders in it.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut images = Vec::new();
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder).context("cannot be read")? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_dir() && !hidden {
            folders.push(path);
        } else if !hidden && is_image(&path) {
            images.push(path);
        }
    }
    images.sort();
    folders.sort();
    if images.is_empty() {
        for folder in folders {
            images.extend(list(&folder).with_context(|| folder.display().to_string())?);
        }
    }
    Ok(images)
}

fn is_image(path: &Path) -> bool {
    let Some(extension) = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()) else {
        return false;
    };
    ["png", "jpg", "jpeg"].contains(&extension.as_str()) || (cfg!(feature = "dicom") && extension == "dcm")
}
