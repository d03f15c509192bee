use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use cxr_core::atomic;
use cxr_core::hash::{sha256_hex, stable_hash};

use crate::image::{Square, check_exists, load_square};
use crate::{DatasetError, ImageError, ImageOptions};

/// Raised when the same file and settings give other pixels than they did: what older versions kept is not read then.
const VERSION: &str = "cxr-image-cache-1";
/// The beginning of every file on disk; the sum of what follows stands behind it.
const MAGIC: &[u8; 8] = b"cxrimg01";

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
    Disk { folder: PathBuf },
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

    /// Keeps pictures in a folder, which is made if need be, in one file each; memory does not grow with their number.
    /// Every file carries a check sum, and a damaged one is made again. The folder may be deleted at any time: files
    /// of settings that are no longer used stay until then.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn on_disk(folder: impl Into<PathBuf>) -> Result<Self, DatasetError> {
        let folder = folder.into();
        std::fs::create_dir_all(&folder)
            .map_err(|source| DatasetError::Write { path: folder.clone(), source })?;
        Ok(Self::new(Store::Disk { folder }))
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
            Store::Disk { folder } => self.read(&place(folder, &key), options)?.map(Arc::new),
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
            Store::Disk { folder } => write(&place(folder, &key), &square)?,
        }
        Ok(square)
    }

    /// What it has done so far.
    pub fn counts(&self) -> CacheCounts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CacheCounts { kept: of(&self.kept), made: of(&self.made), rebuilt: of(&self.rebuilt) }
    }

    /// A picture from disk; `None` when it is not there, or damaged.
    fn read(&self, path: &Path, options: &ImageOptions) -> Result<Option<Square>, ImageError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ImageError::Cache { path: path.into(), source }),
        };
        let square = checked(&bytes).filter(|square| square.size == options.size);
        if square.is_none() {
            log::warn!("cached picture {} is damaged and is made again", path.display());
            self.rebuilt.fetch_add(1, Ordering::Relaxed);
        }
        Ok(square)
    }
}

/// What nobody who holds the lock does can leave half done.
fn lock(pictures: &Mutex<Pictures>) -> std::sync::MutexGuard<'_, Pictures> {
    pictures.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// SHA-256 of everything that decides which pixels a picture has.
fn key(image: &Path, options: &ImageOptions) -> Result<String, ImageError> {
    check_exists(image)?;
    let unreadable = |source| ImageError::Read { path: image.into(), source };
    let file = std::fs::metadata(image).map_err(unreadable)?;
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

/// Folders of a few hundred files each, for a collection of 100,000.
fn place(folder: &Path, key: &str) -> PathBuf {
    folder.join(&key[..2]).join(&key[2..])
}

fn write(path: &Path, square: &Square) -> Result<(), ImageError> {
    let content = square.to_bytes();
    let bytes = [&MAGIC[..], &stable_hash(&content).to_le_bytes(), &content].concat();
    let failed = |source| ImageError::Cache { path: path.into(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    // Not waiting for the disk: the check sum finds what a power failure leaves half written.
    atomic::write_bytes_unsynced(path, &bytes).map_err(failed)
}

/// The picture in a file, if the file is whole.
fn checked(bytes: &[u8]) -> Option<Square> {
    let (sum, content) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<8>()?;
    if u64::from_le_bytes(*sum) != stable_hash(content) {
        return None;
    }
    Square::from_bytes(content)
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

    /// The only file below a folder.
    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
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
        // Another process finds what is on disk.
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
    fn damaged_files_are_noticed_and_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let images = images(folder.path());
        let options = ImageOptions::new(8);
        let cache = ImageCache::on_disk(folder.path().join("cache")).unwrap();
        let whole = cache.load(&images[1], &options).unwrap();
        let path = files(&folder.path().join("cache")).pop().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let mut damages: Vec<Vec<u8>> =
            (0..bytes.len()).step_by(7).map(|end| bytes[..end].to_vec()).collect();
        damages.extend((0..bytes.len()).map(|place| {
            let mut other = bytes.clone();
            other[place] ^= 4;
            other
        }));
        damages.push([&bytes[..], b"more"].concat());
        for (number, damage) in damages.iter().enumerate() {
            std::fs::write(&path, damage).unwrap();
            assert_eq!(cache.load(&images[1], &options).unwrap(), whole);
            assert_eq!(counts(&cache), (0, number as u64 + 2, number as u64 + 1));
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        assert_eq!(files(&folder.path().join("cache")), [path], "nothing else is left");
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
        let error = cache.load(&images[0], &ImageOptions::new(8)).unwrap_err();
        assert!(matches!(error, ImageError::Cache { .. }) && error.to_string().contains("cache"), "{error}");
    }
}
