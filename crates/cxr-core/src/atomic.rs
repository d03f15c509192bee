//! Files and folders that are whole or not there: written under another name beside their place, then renamed.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempDir};

/// What the names of unfinished files and folders begin with: what a killed process leaves.
pub const PREFIX: &str = ".tmp-";

/// Writes a file through `fill`; on an error nothing is left, and what was there before stays.
///
/// # Errors
/// What `fill` or the system says.
pub fn write(path: impl AsRef<Path>, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let file = filled(path.as_ref(), fill)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn filled(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<NamedTempFile> {
    let mut file = builder(0o666).tempfile_in(parent(path)?)?;
    let mut writer = BufWriter::new(file.as_file_mut());
    fill(&mut writer)?;
    writer.flush()?;
    drop(writer);
    Ok(file)
}

/// [`write()`] of bytes at hand.
///
/// # Errors
/// As [`write()`].
pub fn write_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
    write(path, |writer| writer.write_all(bytes))
}

/// [`write()`] without waiting for the disk. Other programs see the file whole or not at all, but after a power failure
/// it may be there and damaged: for files that carry check sums and can be made again.
///
/// # Errors
/// As [`write()`].
pub fn write_unsynced(
    path: impl AsRef<Path>,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let path = path.as_ref();
    filled(path, fill)?.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// A folder that is filled beside its place and appears there whole.
///
/// Dropped without [`commit`](Self::commit), it leaves nothing.
#[derive(Debug)]
pub struct AtomicDir {
    temporary: TempDir,
    target: PathBuf,
}

impl AtomicDir {
    /// Starts a folder that will be at `target`.
    ///
    /// # Errors
    /// If the folder above cannot be written to, or something other than a folder is at `target`.
    pub fn new(target: impl AsRef<Path>) -> io::Result<Self> {
        let target = target.as_ref().to_path_buf();
        refuse_file(&target)?;
        let temporary = builder(0o777).tempdir_in(parent(&target)?)?;
        Ok(Self { temporary, target })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Puts the folder into its place, instead of the folder that is there.
    ///
    /// # Errors
    /// If it cannot be renamed; what was there before stays. If the old folder cannot be removed, the new one is in
    /// its place all the same.
    pub fn commit(self) -> io::Result<()> {
        let Self { temporary, target } = self;
        // A folder cannot be renamed onto one that is not empty: the old one steps aside, and back on failure.
        let aside = temporary.path().with_extension("old");
        let replaced = target.exists();
        if replaced {
            refuse_file(&target)?;
            std::fs::rename(&target, &aside)?;
        }
        if let Err(error) = std::fs::rename(temporary.path(), &target) {
            if replaced {
                std::fs::rename(&aside, &target)?;
            }
            return Err(error);
        }
        // Renamed away: there is nothing left for the guard to remove.
        let _ = temporary.keep();
        if replaced { std::fs::remove_dir_all(&aside) } else { Ok(()) }
    }
}

fn refuse_file(target: &Path) -> io::Result<()> {
    if target.exists() && !target.is_dir() {
        let message = format!("{} is there and is no folder", target.display());
        return Err(io::Error::new(io::ErrorKind::NotADirectory, message));
    }
    Ok(())
}

/// The folder that a path is in, which must exist.
fn parent(path: &Path) -> io::Result<&Path> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path has no folder")),
    };
    if !parent.is_dir() {
        let message = format!("the folder {} does not exist", parent.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    Ok(parent)
}

/// Temporary files are for their owner alone by default; a result is for whom the process's umask says.
fn builder(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(folder: &TempDir) -> usize {
        std::fs::read_dir(folder.path()).unwrap().count()
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_bytes(&path, b"old").unwrap();
        let failed = write(&path, |writer| {
            writer.write_all(b"half")?;
            Err(io::Error::other("no more"))
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(count(&folder), 1);
        write_bytes(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        write_unsynced(&path, |writer| writer.write_all(b"newer")).unwrap();
        assert_eq!((std::fs::read(&path).unwrap(), count(&folder)), (b"newer".to_vec(), 1));
        assert!(
            write_bytes(folder.path().join("missing/a"), b"").unwrap_err().to_string().contains("missing")
        );
    }

    #[test]
    fn a_folder_appears_whole_and_replaces_whole() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("result");
        for content in ["one", "two"] {
            let dir = AtomicDir::new(&target).unwrap();
            std::fs::create_dir(dir.path().join("inner")).unwrap();
            std::fs::write(dir.path().join("inner").join(content), content).unwrap();
            assert!(!target.join("inner").join(content).exists());
            dir.commit().unwrap();
            assert!(target.join("inner").join(content).exists());
        }
        assert!(!target.join("inner/one").exists());
        let dropped = AtomicDir::new(&target).unwrap();
        std::fs::write(dropped.path().join("half"), "half").unwrap();
        drop(dropped);
        assert_eq!(count(&folder), 1);
    }

    #[test]
    fn a_folder_does_not_replace_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("result");
        std::fs::write(&target, "a file").unwrap();
        assert!(AtomicDir::new(&target).unwrap_err().to_string().contains("no folder"));
        // nor one that comes later
        std::fs::remove_file(&target).unwrap();
        let dir = AtomicDir::new(&target).unwrap();
        std::fs::write(&target, "a file").unwrap();
        assert!(dir.commit().is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"a file");
        assert_eq!(count(&folder), 1);
    }

    #[cfg(unix)]
    #[test]
    fn results_have_the_permissions_of_other_files() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        std::fs::write(path("plain"), "").unwrap();
        std::fs::create_dir(path("plain folder")).unwrap();
        write_bytes(path("atomic"), b"").unwrap();
        AtomicDir::new(path("atomic folder")).unwrap().commit().unwrap();
        let mode = |name| path(name).metadata().unwrap().mode();
        assert_eq!(mode("atomic"), mode("plain"));
        assert_eq!(mode("atomic folder"), mode("plain folder"));
    }
}
