//! Mean and covariance of a set, kept in a file: what pytorch-fid keeps in its `.npz`.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::error::{MetricsError, Result};
use crate::extractor::ExtractorId;
use crate::frechet::FeatureStatistics;
use crate::npy::{self, Array};

/// Widest features that a file may have: a hostile header asks for no more memory than this.
const MOST_FEATURES: usize = 1 << 15;
/// How far a covariance may be from its transpose, relative to its largest element.
const SYMMETRY: f64 = 1e-6;

/// Mean and covariance of the features of a set, with what is known of where they come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// `[d]`
    pub mean: Vec<f64>,
    /// Unbiased, row-major `[d, d]`.
    pub covariance: Vec<f64>,
    /// Number of images; pytorch-fid's files do not say it.
    pub count: Option<usize>,
    /// Hash of the extractor; pytorch-fid's files do not say it.
    pub extractor: Option<String>,
    /// Name of its resize mode.
    pub resize: Option<String>,
}

impl Moments {
    /// Of some statistics; `extractor` is noted with them.
    ///
    /// # Errors
    /// Fewer than two samples.
    pub fn of(statistics: &FeatureStatistics, extractor: Option<&ExtractorId>) -> Result<Self> {
        Ok(Self {
            mean: statistics.mean().to_vec(),
            covariance: statistics.covariance()?,
            count: Some(statistics.count()),
            extractor: extractor.map(|id| id.hash.clone()),
            resize: extractor.and_then(|id| id.resize.clone()),
        })
    }

    /// Number of features.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// Whether these can be compared with features of `extractor`: by width, and by hash and resize mode where the
    /// file names them.
    ///
    /// # Errors
    /// [`MetricsError::Statistics`] that says which of them differs.
    pub fn expect_of(&self, path: &Path, extractor: &ExtractorId) -> Result<()> {
        let differs = |what: &str, own: String, other: String| {
            let problem = format!(
                "its {what} is {own}, that of the network in use {other}: take statistics of the same network, or the \
                 folder of images"
            );
            Err(MetricsError::Statistics { path: path.into(), problem })
        };
        if self.width() != extractor.feature_dim {
            let (own, other) = (self.width().to_string(), extractor.feature_dim.to_string());
            return differs("number of features", own, other);
        }
        match (&self.resize, &extractor.resize) {
            (Some(own), other) if Some(own) != other.as_ref() => {
                return differs("resize mode", own.clone(), other.clone().unwrap_or("none".into()));
            }
            _ => {}
        }
        match &self.extractor {
            Some(own) if *own != extractor.hash => differs("hash", own.clone(), extractor.hash.clone()),
            _ => Ok(()),
        }
    }

    /// Writes an `.npz` with `mu` and `sigma`, which pytorch-fid reads as a path to compare with, and with `n`,
    /// `extractor` and `resize`, which it ignores.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let d = self.width();
        let mut arrays = vec![
            ("mu", npy::write_f64(&[d], &self.mean)),
            ("sigma", npy::write_f64(&[d, d], &self.covariance)),
        ];
        if let Some(count) = self.count {
            arrays.push(("n", npy::write_i64(count as i64)));
        }
        for (name, text) in [("extractor", &self.extractor), ("resize", &self.resize)] {
            if let Some(text) = text {
                arrays.push((name, npy::write_text(text)));
            }
        }
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        let mut archive = ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let write = |archive: &mut ZipWriter<_>| -> std::io::Result<()> {
            for (name, bytes) in &arrays {
                archive.start_file(format!("{name}.npy"), stored).map_err(std::io::Error::other)?;
                archive.write_all(bytes)?;
            }
            Ok(())
        };
        write(&mut archive)
            .and_then(|()| archive.finish().map_err(std::io::Error::other))
            .and_then(|bytes| cxr_core::atomic::write_bytes(path, bytes.get_ref()))
            .map_err(|source| MetricsError::File { path: path.into(), action: "write", source })
    }

    /// Reads an `.npz` that has `mu` and `sigma`: pytorch-fid's, or one of [`save`](Self::save).
    ///
    /// # Errors
    /// A file that cannot be read, is no such archive, or whose arrays are not a mean and a covariance of one width.
    pub fn load(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| MetricsError::File {
            path: path.into(),
            action: "read",
            source,
        })?;
        let refuse = |problem: String| MetricsError::Statistics { path: path.into(), problem };
        let mut archive = ZipArchive::new(BufReader::new(file))
            .map_err(|error| refuse(format!("it is no .npz archive ({error})")))?;
        let mut read = |name: &str| -> Result<Option<Array>> {
            let wrong = |problem: String| refuse(format!("its array `{name}`: {problem}"));
            let entry = match archive.by_name(&format!("{name}.npy")) {
                Ok(entry) => entry,
                Err(zip::result::ZipError::FileNotFound) => return Ok(None),
                Err(error) => return Err(wrong(error.to_string())),
            };
            let mut bytes = Vec::new();
            let most = (8 * MOST_FEATURES * MOST_FEATURES) as u64;
            entry.take(most).read_to_end(&mut bytes).map_err(|error| wrong(error.to_string()))?;
            npy::read(&bytes).map(Some).map_err(wrong)
        };
        let missing = |name: &str| {
            refuse(format!(
                "it has no array `{name}`: expected `mu` and `sigma`, as pytorch-fid --save-stats writes"
            ))
        };
        let mean = read("mu")?.ok_or_else(|| missing("mu"))?;
        let covariance = read("sigma")?.ok_or_else(|| missing("sigma"))?;
        let (count, extractor, resize) = (read("n")?, read("extractor")?, read("resize")?);
        let d = match mean.shape[..] {
            [d] if d > 0 && d <= MOST_FEATURES => d,
            _ => return Err(refuse(format!("`mu` has shape {:?}, expected [d]", mean.shape))),
        };
        if covariance.shape != [d, d] {
            return Err(refuse(format!("`sigma` has shape {:?}, expected [{d}, {d}]", covariance.shape)));
        }
        let numbers =
            |name: &str, array: Array| array.numbers().map_err(|p| refuse(format!("`{name}`: {p}")));
        let moments = Self {
            mean: numbers("mu", mean)?,
            covariance: numbers("sigma", covariance)?,
            count: count.map(|n| numbers("n", n)).transpose()?.and_then(|n| n.first().map(|n| *n as usize)),
            extractor: extractor.and_then(|text| text.text()),
            resize: resize.and_then(|text| text.text()),
        };
        moments.check(path)?;
        Ok(moments)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let d = self.width();
        for (name, values) in [("mu", &self.mean), ("sigma", &self.covariance)] {
            if let Some(place) = values.iter().position(|v| !v.is_finite()) {
                return Err(MetricsError::NonFinite {
                    what: format!("`{name}` of {}", path.display()),
                    row: place / d,
                    column: place % d,
                    value: values[place],
                });
            }
        }
        let largest = self.covariance.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let off =
            |i: usize| (self.covariance[i] - self.covariance[i % d * d + i / d]).abs() > SYMMETRY * largest;
        match (0..d * d).find(|&i| off(i)) {
            None => Ok(()),
            Some(i) => Err(MetricsError::Statistics {
                path: path.into(),
                problem: format!(
                    "`sigma` is no covariance: not symmetric at row {}, column {}",
                    i / d,
                    i % d
                ),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageSize;
    use crate::testing::random_set;

    fn id() -> ExtractorId {
        ExtractorId {
            name: "toy".into(),
            hash: "ab12".into(),
            feature_dim: 5,
            input_size: ImageSize::square(8),
            resize: Some("clean".into()),
        }
    }

    #[test]
    fn what_is_saved_is_read_back_and_held_against_the_network() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("real.npz");
        let moments = Moments::of(&FeatureStatistics::of(&random_set("x", 30, 5, 1.0)), Some(&id())).unwrap();
        moments.save(&path).unwrap();
        let found = Moments::load(&path).unwrap();
        assert_eq!(found, moments);
        found.expect_of(&path, &id()).unwrap();
        for (other, word) in [
            (ExtractorId { hash: "ff".into(), ..id() }, "hash"),
            (ExtractorId { resize: Some("pytorch-fid".into()), ..id() }, "resize"),
            (ExtractorId { feature_dim: 6, ..id() }, "features"),
        ] {
            let error = found.expect_of(&path, &other).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("real.npz"), "{error}");
        }
        // What says nothing of its network is taken by its width.
        Moments { extractor: None, resize: None, ..found }.expect_of(&path, &id()).unwrap();
    }

    #[test]
    fn broken_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.npz");
        let good = Moments::of(&FeatureStatistics::of(&random_set("x", 30, 3, 1.0)), None).unwrap();
        let refused = |change: &dyn Fn(&mut Moments)| {
            let mut moments = good.clone();
            change(&mut moments);
            moments.save(&path).unwrap();
            Moments::load(&path).unwrap_err().to_string()
        };
        assert!(refused(&|m| m.covariance[1] += 1.0).contains("not symmetric"));
        assert!(refused(&|m| m.mean[2] = f64::NAN).contains("`mu`"));
        assert!(Moments::load(&folder.path().join("none.npz")).is_err());
        good.save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 10, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = Moments::load(&path).unwrap_err().to_string();
            assert!(error.contains("bad.npz"), "{error}");
        }
        for place in 0..whole.len().min(300) {
            let mut bytes = whole.clone();
            bytes[place] ^= 0x55;
            std::fs::write(&path, &bytes).unwrap();
            // Whatever it says, it does not panic.
            let _ = Moments::load(&path);
        }
    }
}
