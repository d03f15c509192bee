//! Pictures on disk, many to a file.
//!
//! A file for each picture would be simpler, but making a file takes longer than decoding a small radiograph on some
//! file systems (0.7 ms against 0.3 on the one this was measured on). So pictures are gathered and written as pages of
//! some megabytes. A page appears whole and is never changed: its table names its pictures, each with a check sum, and
//! has one itself.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cxr_core::atomic;
use cxr_core::hash::stable_hash;

use super::lock;
use crate::ImageError;
use crate::image::Square;

/// What a picture is known by: SHA-256 in hexadecimal.
pub(super) type Key = String;

const MAGIC: &[u8; 8] = b"cxrpage1";
/// Key, length and check sum of one picture in a page's table.
const ENTRY: usize = 64 + 4 + 8;
const SUFFIX: &str = "cxrpage";

#[derive(Debug)]
pub(super) struct Pages {
    folder: PathBuf,
    /// Bytes of samples that are gathered before they are written.
    page: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<PathBuf>,
    index: HashMap<Key, Place>,
    /// Further places of pictures that were made again because an earlier one was damaged.
    again: HashMap<Key, Vec<Place>>,
    /// Pictures that are not on disk yet, those that are being written among them.
    resident: HashMap<Key, Arc<Square>>,
    gathered: Vec<Key>,
    bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    offset: u64,
    length: u32,
    sum: u64,
}

/// What was found of a picture.
pub(super) enum Found {
    Whole(Arc<Square>),
    Damaged,
    Nothing,
}

impl Pages {
    /// Reads the tables of all pages in a folder; a page with a damaged one is left alone.
    pub(super) fn open(folder: PathBuf, page: usize) -> io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        let mut state = State::default();
        let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)?
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<Vec<_>>>()?
            .into_iter()
            .filter(|path| path.extension().is_some_and(|end| end == SUFFIX))
            .collect();
        paths.sort();
        for path in paths {
            match read_table(&path) {
                Ok(table) => state.add(path, table),
                Err(reason) => log::warn!("page {} of cached pictures is left out: {reason}", path.display()),
            }
        }
        Ok(Self { folder, page, state: Mutex::new(state) })
    }

    pub(super) fn load(&self, key: &str) -> Result<Found, ImageError> {
        let places: Vec<(Place, PathBuf)> = {
            let state = lock(&self.state);
            if let Some(square) = state.resident.get(key) {
                return Ok(Found::Whole(square.clone()));
            }
            let all = state.index.get(key).into_iter().chain(state.again.get(key).into_iter().flatten());
            all.map(|place| (*place, state.files[place.file].clone())).collect()
        };
        let mut found = Found::Nothing;
        for (place, path) in places {
            match read_picture(&path, place) {
                Ok(Some(square)) => return Ok(Found::Whole(Arc::new(square))),
                Ok(None) => found = Found::Damaged,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(ImageError::Cache { path, source }),
            }
        }
        Ok(found)
    }

    /// Takes a picture in; it is on disk when a page is full, or after [`Self::flush`].
    pub(super) fn add(&self, key: Key, square: &Arc<Square>) -> Result<(), ImageError> {
        let full = {
            let mut state = lock(&self.state);
            if state.resident.insert(key.clone(), square.clone()).is_none() {
                state.gathered.push(key);
                state.bytes += square.bytes();
            }
            (state.bytes >= self.page).then(|| state.take())
        };
        full.map_or(Ok(()), |pictures| self.write(pictures))
    }

    /// Writes what is gathered.
    pub(super) fn flush(&self) -> Result<(), ImageError> {
        let pictures = lock(&self.state).take();
        if pictures.is_empty() { Ok(()) } else { self.write(pictures) }
    }

    /// Writes a page, outside the lock: other threads find its pictures in memory meanwhile.
    fn write(&self, pictures: Vec<(Key, Arc<Square>)>) -> Result<(), ImageError> {
        // The pictures are in memory already: one at a time is made into bytes, for its sum and again to be written.
        let (mut table, mut picture) = (Vec::with_capacity(ENTRY * pictures.len()), Vec::new());
        for (key, square) in &pictures {
            picture.clear();
            square.append_bytes(&mut picture);
            table.extend(key.as_bytes());
            table.extend((picture.len() as u32).to_le_bytes());
            table.extend(stable_hash(&picture).to_le_bytes());
        }
        let sum = stable_hash(&table);
        // Two pages of one name have the same pictures.
        let path = self.folder.join(format!("{sum:016x}.{SUFFIX}"));
        let written = std::fs::create_dir_all(&self.folder).and_then(|()| {
            // Not waiting for the disk: the check sums find what a power failure leaves half written.
            atomic::write_unsynced(&path, |writer| {
                writer.write_all(MAGIC)?;
                writer.write_all(&(pictures.len() as u32).to_le_bytes())?;
                writer.write_all(&sum.to_le_bytes())?;
                writer.write_all(&table)?;
                pictures.iter().try_for_each(|(_, square)| {
                    picture.clear();
                    square.append_bytes(&mut picture);
                    writer.write_all(&picture)
                })
            })
        });
        let mut state = lock(&self.state);
        for (key, _) in &pictures {
            state.resident.remove(key);
        }
        written.map_err(|source| ImageError::Cache { path: path.clone(), source })?;
        state.add(path, places(&table));
        Ok(())
    }
}

impl State {
    /// A page that is on disk.
    fn add(&mut self, path: PathBuf, table: Vec<(Key, Place)>) {
        let file = self.files.len();
        self.files.push(path);
        for (key, place) in table {
            let place = Place { file, ..place };
            match self.index.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(place);
                }
                Entry::Occupied(entry) => self.again.entry(entry.key().clone()).or_default().push(place),
            }
        }
    }

    /// What is gathered, which stays resident until it is written.
    fn take(&mut self) -> Vec<(Key, Arc<Square>)> {
        self.bytes = 0;
        let keys = std::mem::take(&mut self.gathered);
        keys.into_iter()
            .filter_map(|key| self.resident.get(&key).cloned().map(|square| (key, square)))
            .collect()
    }
}

/// Where the pictures of a table lie; the file is filled in by whoever knows it.
fn places(table: &[u8]) -> Vec<(Key, Place)> {
    let mut offset = (MAGIC.len() + 4 + 8 + table.len()) as u64;
    let entry = |entry: &[u8; ENTRY]| {
        let (key, rest) = entry.split_at(64);
        let (length, sum) = rest.split_at(4);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let place = Place { file: 0, offset, length: number(length) as u32, sum: number(sum) };
        offset += u64::from(place.length);
        (String::from_utf8_lossy(key).into_owned(), place)
    };
    table.as_chunks::<ENTRY>().0.iter().map(entry).collect()
}

/// The table at the beginning of a page, checked against the length of the file.
fn read_table(path: &Path) -> Result<Vec<(Key, Place)>, String> {
    let text = |error: io::Error| error.to_string();
    let mut file = std::fs::File::open(path).map_err(text)?;
    let length = file.metadata().map_err(text)?.len();
    let (mut magic, mut count, mut sum) = ([0; 8], [0; 4], [0; 8]);
    for part in [&mut magic[..], &mut count[..], &mut sum[..]] {
        file.read_exact(part).map_err(text)?;
    }
    let bytes = u64::from(u32::from_le_bytes(count)) * ENTRY as u64;
    if &magic != MAGIC || bytes > length {
        return Err("it is no page".into());
    }
    let mut table = vec![0; bytes as usize];
    file.read_exact(&mut table).map_err(text)?;
    if u64::from_le_bytes(sum) != stable_hash(&table) {
        return Err("its table is damaged".into());
    }
    Ok(places(&table))
}

/// A picture; `None` when it is not whole.
fn read_picture(path: &Path, place: Place) -> io::Result<Option<Square>> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(place.offset))?;
    let mut bytes = vec![0; place.length as usize];
    match file.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let whole = stable_hash(&bytes) == place.sum;
    Ok(if whole { Square::from_bytes(&bytes) } else { None })
}
