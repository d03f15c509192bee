//! Fetching the weight file from its public address into the cache.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cxr_core::hash::sha256_file;
use cxr_core::progress::{Progress, Stage};

use super::cache;
use super::weights::{WEIGHTS_ADDRESS, WEIGHTS_BYTES, WEIGHTS_SHA256};
use crate::error::{MetricsError, Result};

/// How often a broken connection is taken up again, where the file broke off.
const RETRIES: usize = 5;
/// Bytes between two calls of the progress.
const TOLD_EVERY: u64 = 1 << 20;

/// A file that is published.
struct Published<'a> {
    address: &'a str,
    sha256: &'a str,
    bytes: u64,
}

/// The published weight file, fetched into the cache (`CXR_CACHE`, or `cxr` in the user's cache folder) if it is not
/// there: about 96 MB. Its SHA-256 is checked before it gets its name; what has arrived of it is kept, so that another
/// call goes on from there.
///
/// # Errors
/// No connection, another answer than the file, another sum, a cache that cannot be written, cancellation.
pub fn fetch_weights(progress: &dyn Progress) -> Result<PathBuf> {
    let published = Published { address: WEIGHTS_ADDRESS, sha256: WEIGHTS_SHA256, bytes: WEIGHTS_BYTES };
    let path = cache::file()?;
    published.fetch(&path, progress)?;
    Ok(path)
}

/// Why an attempt ended.
enum Ended {
    /// Worth another attempt.
    Broken(String),
    For(MetricsError),
}

impl Published<'_> {
    fn fetch(&self, path: &Path, progress: &dyn Progress) -> Result<()> {
        if path.is_file() {
            return Ok(());
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|source| cannot_write(folder, source))?;
        }
        let part = path.with_extension("part");
        let _shown = Stage::begin(progress, "fetching the weights of Inception", Some(self.bytes));
        let agent = ureq::Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .user_agent(concat!("cxr/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let mut problem = String::new();
        for _ in 0..=RETRIES {
            match self.attempt(&agent, &part, progress) {
                Ok(()) => return self.keep(&part, path),
                Err(Ended::For(error)) => return Err(error),
                Err(Ended::Broken(why)) => problem = why,
            }
        }
        Err(self.error(format!("{problem}; what has arrived is kept, so try again")))
    }

    /// Reads on from where `part` ends.
    fn attempt(&self, agent: &ureq::Agent, part: &Path, progress: &dyn Progress) -> Result<(), Ended> {
        let failed = |source| Ended::For(cannot_write(part, source));
        let mut done = fs::metadata(part).map_or(0, |file| file.len());
        if done == self.bytes {
            return Ok(());
        }
        let mut request = agent.get(self.address);
        if done > 0 && done < self.bytes {
            request = request.header("Range", format!("bytes={done}-"));
        }
        let response = request.call().map_err(|error| match error {
            ureq::Error::StatusCode(code @ 500..) => {
                Ended::Broken(format!("the server answered with status {code}"))
            }
            ureq::Error::StatusCode(code) => Ended::For(self.error(format!(
                "the server answered with status {code}; download it by hand and give its path"
            ))),
            other => Ended::Broken(other.to_string()),
        })?;
        // Without 206 the file comes from its beginning.
        let append = response.status() == 206;
        let mut file: File = OpenOptions::new()
            .create(true)
            .append(append)
            .write(true)
            .truncate(!append)
            .open(part)
            .map_err(failed)?;
        done = if append { done } else { 0 };
        let mut reader = response.into_body().into_reader();
        let mut piece = vec![0; 1 << 16];
        let mut told = done;
        loop {
            let read = reader.read(&mut piece).map_err(|error| Ended::Broken(error.to_string()))?;
            file.write_all(&piece[..read]).map_err(failed)?;
            done += read as u64;
            if read == 0 && done < self.bytes {
                return Err(Ended::Broken(format!("it ended after {done} of {} bytes", self.bytes)));
            }
            if read == 0 || done > self.bytes {
                return Ok(());
            }
            if done - told >= TOLD_EVERY || done == self.bytes {
                told = done;
                if progress.advance(done, "").is_break() && done < self.bytes {
                    let stage = "fetching the weights of Inception".into();
                    return Err(Ended::For(MetricsError::Cancelled { stage, done, total: self.bytes }));
                }
            }
        }
    }

    /// Gives the whole file its name, if it is the published one.
    fn keep(&self, part: &Path, path: &Path) -> Result<()> {
        let failed = |source| MetricsError::File { path: part.into(), action: "read", source };
        let length = fs::metadata(part).map_err(failed)?.len();
        let found = sha256_file(part).map_err(failed)?;
        if length != self.bytes || found != self.sha256 {
            // Going on from it would never end well.
            let _ = fs::remove_file(part);
            return Err(self.error(format!(
                "{length} bytes with SHA-256 {found} came, expected {} with {}; nothing was kept",
                self.bytes, self.sha256
            )));
        }
        fs::rename(part, path).map_err(|source| cannot_write(path, source))
    }

    fn error(&self, problem: String) -> MetricsError {
        MetricsError::Download { address: self.address.into(), problem }
    }
}

fn cannot_write(path: &Path, source: io::Error) -> MetricsError {
    MetricsError::File { path: path.into(), action: "write", source }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    use cxr_core::hash::sha256_hex;
    use cxr_core::progress::Silent;

    use super::*;
    use crate::testing::StopAfter;

    /// What a small server has and saw.
    #[derive(Default)]
    struct Server {
        file: Vec<u8>,
        /// Stops in the middle of what it sends, as often as this.
        drops: usize,
        /// Answers with this instead.
        status: Option<u16>,
        /// Knows no ranges.
        whole: bool,
        asked: Vec<String>,
    }

    /// Starts it on this machine; it ends with the test's process.
    fn start(server: Server) -> (String, Arc<Mutex<Server>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/weights.pth", listener.local_addr().unwrap());
        let server = Arc::new(Mutex::new(server));
        let served = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(&mut served.lock().unwrap(), stream);
            }
        });
        (address, server)
    }

    fn answer(server: &mut Server, mut stream: TcpStream) {
        let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(std::result::Result::ok);
        let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let range =
            head.iter().find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(String::from));
        let from = range.and_then(|range| range.trim_end_matches('-').parse().ok()).unwrap_or(0);
        server.asked.push(format!("from {from}"));
        let from = if server.whole { 0 } else { from };
        let body = server.file[from..].to_vec();
        let status = match (server.status, from) {
            (Some(status), _) => format!("{status} No"),
            (None, 0) => "200 OK".into(),
            (None, _) => "206 Partial Content".into(),
        };
        let length = if server.status.is_some() { 0 } else { body.len() };
        let mut sent = if server.status.is_some() { 0 } else { body.len() };
        if server.drops > 0 {
            server.drops -= 1;
            sent /= 2;
        }
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body[..sent]));
    }

    fn file() -> Vec<u8> {
        (0..(3u32 << 20)).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    fn fetch(address: &str, path: &Path, progress: &dyn Progress) -> Result<()> {
        let (bytes, sha256) = (file().len() as u64, sha256_hex(&file()));
        Published { address, sha256: &sha256, bytes }.fetch(path, progress)
    }

    #[test]
    fn a_file_is_fetched_once_and_taken_up_where_it_broke_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/weights.pth");
        let (address, server) = start(Server { file: file(), drops: 1, ..Server::default() });
        fetch(&address, &path, &Silent).unwrap();
        assert_eq!(fs::read(&path).unwrap(), file());
        let half = file().len() / 2;
        assert_eq!(server.lock().unwrap().asked, ["from 0".to_string(), format!("from {half}")]);
        fetch(&address, &path, &Silent).unwrap();
        assert_eq!(server.lock().unwrap().asked.len(), 2);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_stop_keeps_what_has_arrived_and_a_server_without_ranges_sends_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.pth");
        let (address, server) = start(Server { file: file(), whole: true, ..Server::default() });
        let stopped = fetch(&address, &path, &StopAfter(1 << 20));
        assert!(matches!(stopped, Err(MetricsError::Cancelled { .. })), "{stopped:?}");
        assert!(!path.exists() && path.with_extension("part").metadata().unwrap().len() >= 1 << 20);
        fetch(&address, &path, &Silent).unwrap();
        assert_eq!(fs::read(&path).unwrap(), file());
        assert_ne!(server.lock().unwrap().asked[1], "from 0");
    }

    #[test]
    fn other_bytes_and_refusals_leave_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.pth");
        let mut other = file();
        other[7] ^= 1;
        let (address, server) = start(Server { file: other, ..Server::default() });
        let error = fetch(&address, &path, &Silent).unwrap_err().to_string();
        assert!(error.contains(&sha256_hex(&file())) && error.contains(&address), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        server.lock().unwrap().file.push(0);
        assert!(fetch(&address, &path, &Silent).is_err());
        server.lock().unwrap().status = Some(404);
        let error = fetch(&address, &path, &Silent).unwrap_err().to_string();
        assert!(error.contains("404") && error.contains("by hand"), "{error}");
        assert_eq!(server.lock().unwrap().asked.len(), 3);
        server.lock().unwrap().status = Some(503);
        let error = fetch(&address, &path, &Silent).unwrap_err().to_string();
        assert!(error.contains("503") && error.contains("try again"), "{error}");
        assert_eq!(server.lock().unwrap().asked.len(), 3 + RETRIES + 1);
        assert!(!path.exists());
    }
}
