mod pages;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use cxr_core::hash::sha256_hex;

use self::pages::{Found, Pages};
use crate::image::{Square, check_exists, load_square};
use crate::{DatasetError, ImageError, ImageOptions};

/// Raised when the same file and settings give other pixels than they did: what older versions kept is not read then.
const VERSION: &str = "cxr-image-cache-1";
/// How much is gathered before it is written to disk, in bytes: pages of 256 grey pictures of 128 pixels.
const PAGE: usize = 4 << 20;

/// Decoded pictures that have been brought to size, so that an image is decoded once and not once in every epoch.
///
/// A picture is kept in the depth of its file, so a kept picture gives the pixels that decoding anew gives, to the
/// bit. It is known by the image's absolute path, length and time of change, and by every field of [`ImageOptions`]:
/// another setting, or a file that was written again, is another picture. (The file's content is not hashed: that
/// would read it whole each time, which is what a cache is to avoid. A file that was replaced with its length and time
/// kept goes unnoticed.) Several threads, and several processes on one folder, may use it at once.
#[derive(Debug)]
pub struct ImageCache {
    store: Store,
    kept: AtomicU64,
    made: AtomicU64,
    rebuilt: AtomicU64,
}

#[derive(Debug)]
enum Store {
    Memory { limit: u64, pictures: Mutex<Pictures> },
    Disk(Pages),
}

#[derive(Debug, Default)]
struct Pictures {
    by_key: HashMap<String, Arc<Square>>,
    bytes: u64,
}

/// What a cache has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheCounts {
    /// Pictures that were there.
    pub kept: u64,
    /// Pictures that were decoded because they were not there, or not whole.
    pub made: u64,
    /// How many of these were there and damaged.
    pub rebuilt: u64,
}

impl ImageCache {
    fn new(store: Store) -> Self {
        Self { store, kept: AtomicU64::new(0), made: AtomicU64::new(0), rebuilt: AtomicU64::new(0) }
    }

    /// Keeps pictures in memory until their samples take `limit` bytes; what does not fit is decoded each time. A grey
    /// picture of 128 pixels takes 16 KiB, so 7,466 of them 117 MiB.
    ///
    /// Nothing is dropped for something new: every epoch visits every picture once, so the picture that was not
    /// needed for longest is the one that is needed next.
    pub fn in_memory(limit: u64) -> Self {
        Self::new(Store::Memory { limit, pictures: Mutex::default() })
    }

    /// Keeps pictures in a folder, which is made if need be; in memory are 4 MiB of pictures that are not written yet,
    /// and less than 200 bytes about each that is. Every picture carries a check sum, and a damaged one is made again.
    /// The folder may be deleted at any time: pictures of settings that are no longer used stay until then.
    ///
    /// The last pictures are written by [`Self::flush`], or when the cache is dropped.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub fn on_disk(folder: impl Into<PathBuf>) -> Result<Self, DatasetError> {
        Self::with_pages(folder.into(), PAGE)
    }

    fn with_pages(folder: PathBuf, page: usize) -> Result<Self, DatasetError> {
        let pages = Pages::open(folder.clone(), page);
        Ok(Self::new(Store::Disk(pages.map_err(|source| DatasetError::Write { path: folder, source })?)))
    }

    /// A picture brought to size, kept or made now.
    ///
    /// # Errors
    /// Those of [`load_square`], also for an image that was kept and is gone; on disk, when the picture cannot be
    /// written.
    ///
    /// # Panics
    /// When the size is outside [`ImageOptions::validate`]'s range.
    pub fn load(&self, image: &Path, options: &ImageOptions) -> Result<Arc<Square>, ImageError> {
        let key = key(image, options)?;
        let found = match &self.store {
            Store::Memory { pictures, .. } => lock(pictures).by_key.get(&key).cloned(),
            Store::Disk(pages) => match pages.load(&key)? {
                Found::Whole(square) => Some(square),
                Found::Nothing => None,
                Found::Damaged => {
                    log::warn!("the cached picture of {} is damaged and is made again", image.display());
                    self.rebuilt.fetch_add(1, Ordering::Relaxed);
                    None
                }
            },
        };
        if let Some(square) = found {
            self.kept.fetch_add(1, Ordering::Relaxed);
            return Ok(square);
        }
        // Decoded outside the lock. Two threads that want the same picture at once both make it: the same one.
        let square = Arc::new(load_square(image, options)?);
        self.made.fetch_add(1, Ordering::Relaxed);
        match &self.store {
            Store::Memory { limit, pictures } => {
                let mut pictures = lock(pictures);
                let bytes = pictures.bytes + square.bytes() as u64;
                if bytes <= *limit && pictures.by_key.insert(key, square.clone()).is_none() {
                    pictures.bytes = bytes;
                }
            }
            Store::Disk(pages) => pages.add(key, &square)?,
        }
        Ok(square)
    }

    /// What it has done so far.
    pub fn counts(&self) -> CacheCounts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CacheCounts { kept: of(&self.kept), made: of(&self.made), rebuilt: of(&self.rebuilt) }
    }

    /// Writes to disk what is not there yet.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn flush(&self) -> Result<(), ImageError> {
        match &self.store {
            Store::Memory { .. } => Ok(()),
            Store::Disk(pages) => pages.flush(),
        }
    }
}

impl Drop for ImageCache {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            log::warn!("pictures are not kept: {error}");
        }
    }
}

/// What nobody who holds the lock does can leave half done.
fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// SHA-256 of everything that decides which pixels a picture has.
fn key(image: &Path, options: &ImageOptions) -> Result<String, ImageError> {
    let unreadable = |source| ImageError::Read { path: image.into(), source };
    let file = match std::fs::metadata(image) {
        Ok(file) if file.is_file() && file.len() > 0 => file,
        outcome => {
            check_exists(image)?;
            outcome.map_err(unreadable)?
        }
    };
    let changed = file.modified().map_err(unreadable)?;
    let changed = match changed.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => format!("{}", since.as_nanos()),
        Err(before) => format!("-{}", before.duration().as_nanos()),
    };
    let path = std::path::absolute(image).map_err(unreadable)?;
    // Named one by one: a field that is added to the options is missed by the compiler here, not by the key.
    let ImageOptions { size, filter, fit } = options;
    let text = format!("{VERSION}\0{size}\0{filter:?}\0{fit:?}\0{}\0{changed}\0", file.len());
    Ok(sha256_hex(&[text.as_bytes(), path.as_os_str().as_encoded_bytes()].concat()))
}

#[cfg(test)]
mod tests {
    use ::image::{DynamicImage, GrayImage, ImageBuffer, Luma, Rgb, RgbImage};

    use super::*;
    use crate::image::load;
    use crate::{Filter, Fit};

    fn counts(cache: &ImageCache) -> (u64, u64, u64) {
        let CacheCounts { kept, made, rebuilt } = cache.counts();
        (kept, made, rebuilt)
    }

    /// A grey image of 8 and of 16 bits and one in colour.
    fn images(folder: &Path) -> Vec<PathBuf> {
        let deep = ImageBuffer::from_fn(40, 30, |x, y| Luma([(x * 1601 + y) as u16]));
        let colour = RgbImage::from_fn(40, 30, |x, y| Rgb([x as u8, y as u8, 200]));
        let all: [(&str, DynamicImage); 3] = [
            ("a.png", GrayImage::from_fn(40, 30, |x, y| Luma([(x * y) as u8])).into()),
            ("b.png", deep.into()),
            ("c.png", colour.into()),
        ];
        all.map(|(name, image)| {
            image.save(folder.join(name)).unwrap();
            folder.join(name)
        })
        .to_vec()
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn kept_pictures_are_the_same_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        let disk = || ImageCache::on_disk(folder.path().join("cache")).unwrap();
        let options = ImageOptions::new(16);
        for cache in [ImageCache::in_memory(u64::MAX), disk()] {
            for round in 0..2 {
                for image in &images {
                    let fresh = load(image, &options).unwrap();
                    assert_eq!(cache.load(image, &options).unwrap().to_pixels(), fresh, "{round} {image:?}");
                }
            }
            assert_eq!(counts(&cache), (3, 3, 0));
        }
        // Another process finds what is on disk: the caches of the loop wrote it when they were dropped.
        let again = disk();
        assert_eq!(
            again.load(&images[1], &options).unwrap().to_pixels(),
            load(&images[1], &options).unwrap()
        );
        assert_eq!(counts(&again), (1, 0, 0));
    }

    #[test]
    fn every_setting_and_every_change_of_the_file_counts() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        let cache = ImageCache::on_disk(folder.path().join("cache")).unwrap();
        let base = ImageOptions::new(16);
        let mut made = 0;
        for options in [
            base.clone(),
            ImageOptions { size: 17, ..base.clone() },
            ImageOptions { filter: Filter::Bilinear, ..base.clone() },
            ImageOptions { fit: Fit::PadToSquare, ..base.clone() },
        ] {
            made += 1;
            let fresh = load(&images[0], &options).unwrap();
            assert_eq!(cache.load(&images[0], &options).unwrap().to_pixels(), fresh, "{options:?}");
            assert_eq!(counts(&cache), (0, made, 0), "{options:?}");
        }
        // The same length and other content, a second later.
        let bytes = std::fs::read(&images[0]).unwrap();
        std::fs::write(&images[0], bytes).unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(1);
        std::fs::File::options().write(true).open(&images[0]).unwrap().set_modified(later).unwrap();
        cache.load(&images[0], &base).unwrap();
        assert_eq!(counts(&cache), (0, made + 1, 0));
        // An image that is gone is gone, whatever is kept of it.
        std::fs::remove_file(&images[0]).unwrap();
        assert!(matches!(cache.load(&images[0], &base), Err(ImageError::Missing { .. })));
    }

    #[test]
    fn damaged_pictures_are_noticed_and_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        let options = ImageOptions::new(8);
        let kept = folder.path().join("cache");
        let cache = || ImageCache::on_disk(&kept).unwrap();
        let whole: Vec<_> = images.iter().map(|image| cache().load(image, &options).unwrap()).collect();
        let pages = files(&kept);
        assert_eq!(pages.len(), 3, "each cache wrote what it had when it was dropped");
        let bytes = std::fs::read(&pages[0]).unwrap();
        let mut damages: Vec<Vec<u8>> =
            (0..bytes.len()).step_by(9).map(|end| bytes[..end].to_vec()).collect();
        damages.extend((0..bytes.len()).map(|place| {
            let mut other = bytes.clone();
            other[place] ^= 4;
            other
        }));
        for (number, damage) in damages.iter().enumerate() {
            for page in files(&kept).iter().filter(|page| !pages.contains(page)) {
                std::fs::remove_file(page).unwrap();
            }
            std::fs::write(&pages[0], damage).unwrap();
            let first = cache();
            for (image, whole) in images.iter().zip(&whole) {
                assert_eq!(first.load(image, &options).unwrap(), *whole, "damage {number}");
            }
            assert_eq!((first.counts().kept, first.counts().made), (2, 1), "damage {number}");
            // While it was open, what was written since is found too, and so it is by the next one.
            first.flush().unwrap();
            for cache in [first, cache()] {
                let before = cache.counts();
                for (image, whole) in images.iter().zip(&whole) {
                    assert_eq!(cache.load(image, &options).unwrap(), *whole);
                }
                let CacheCounts { kept, made, rebuilt } = cache.counts();
                assert_eq!((kept, made, rebuilt), (before.kept + 3, before.made, before.rebuilt));
            }
        }
    }

    #[test]
    fn damage_is_counted_and_pages_are_written_as_they_fill() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        let options = ImageOptions::new(8);
        let kept = folder.path().join("cache");
        // The first picture has 64 bytes of samples, the second 128, the third 192.
        let cache = ImageCache::with_pages(kept.clone(), 192).unwrap();
        let pages = |cache: &ImageCache, image: &Path| {
            cache.load(image, &options).unwrap();
            files(&kept).len()
        };
        assert_eq!(images.iter().map(|image| pages(&cache, image)).collect::<Vec<_>>(), [0, 1, 2]);
        cache.flush().unwrap();
        assert_eq!(files(&kept).len(), 2, "there was nothing left to write");
        for page in files(&kept) {
            let mut bytes = std::fs::read(&page).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            std::fs::write(&page, bytes).unwrap();
        }
        for image in &images {
            cache.load(image, &options).unwrap();
        }
        // The first picture of the first page is whole.
        assert_eq!(counts(&cache), (1, 5, 2));
        // Pages that somebody deletes are no damage.
        cache.flush().unwrap();
        std::fs::remove_dir_all(&kept).unwrap();
        cache.load(&images[0], &options).unwrap();
        assert_eq!(counts(&cache), (1, 6, 2));
    }

    #[test]
    fn memory_stays_below_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        let options = ImageOptions::new(8);
        // Room for the grey one of 8 bits and for the one of 16, not for the one in colour.
        let cache = ImageCache::in_memory(64 + 128);
        for _ in 0..2 {
            for image in &images {
                cache.load(image, &options).unwrap();
            }
        }
        assert_eq!(counts(&cache), (2, 4, 0));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(ImageCache::on_disk(file.join("cache")).unwrap_err().to_string().contains("cache"));
        let inner = folder.path().join("cache");
        let cache = ImageCache::on_disk(&inner).unwrap();
        std::fs::remove_dir(&inner).unwrap();
        std::fs::write(&inner, "x").unwrap();
        cache.load(&images[0], &ImageOptions::new(8)).unwrap();
        let error = cache.flush().unwrap_err();
        assert!(matches!(error, ImageError::Cache { .. }) && error.to_string().contains("cache"), "{error}");
    }
}
