//! Fetching a repository's files from the Hugging Face Hub into its cache.

use std::path::{Path, PathBuf};

use cxr_core::hash::sha256_file;
use cxr_core::progress::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::cache::{HubEnvironment, Snapshot, is_commit};
use super::names::Component;
use super::options::LoadOptions;
use super::sums;
use crate::Error;

/// Besides the weights, if the repository has them.
const CONFIGURATIONS: [&str; 8] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
];

/// How often a broken connection is taken up again, where the file broke off.
const RETRIES: usize = 5;

/// Fetches the files that a model needs, configurations first: those that are in the cache already are not fetched
/// again, and one that broke off is taken up where it did.
///
/// The revision becomes a commit before the first file is fetched, so that all files are of one version; the cache
/// notes which, once all are there.
pub(super) fn fetch(
    environment: &HubEnvironment,
    repository: &str,
    options: &LoadOptions,
) -> Result<Snapshot, Error> {
    let fetching = Fetching { environment, repository };
    if !environment.endpoint.starts_with("http://") && !environment.endpoint.starts_with("https://") {
        return Err(fetching.error("HF_ENDPOINT", format!("{:?} is no address", environment.endpoint)));
    }
    let cache = Cache::new(environment.cache.clone());
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(environment.endpoint.clone())
        .with_token(environment.token.clone())
        .with_progress(false)
        .with_retries(RETRIES)
        .with_user_agent("cxr", env!("CARGO_PKG_VERSION"))
        .build()
        .map_err(|error| fetching.refused("the connection", &error))?;
    let of = |revision: &str| Repo::with_revision(repository.into(), RepoType::Model, revision.into());
    let revision = &options.revision;
    let info = api
        .repo(of(revision))
        .info()
        .map_err(|error| fetching.refused(&format!("revision {revision}"), &error))?;
    let commit = info.sha;
    if !is_commit(&commit) {
        return Err(fetching.error(&format!("revision {revision}"), format!("{commit:?} is no commit")));
    }
    log::info!("{repository}: revision {revision} is commit {commit}");
    let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let pinned = api.repo(of(&commit));
    let path = cache.repo(of(&commit)).pointer_path(&commit);
    for name in
        needed(&names, options.variant.as_deref()).map_err(|(file, why)| fetching.error(&file, why))?
    {
        let file = path.join(&name);
        if !file.is_file() {
            fetching.file(&pinned, &name, &commit, options)?;
        }
    }
    // all are there: now the revision may be found without a network
    let note = cache.repo(of(revision)).create_ref(&commit);
    note.map_err(|source| Error::Io { path: environment.folder(repository).join("refs"), source })?;
    if *revision != commit {
        // hf-hub's own note of a commit's commit
        let _ = std::fs::remove_file(environment.folder(repository).join("refs").join(&commit));
    }
    Ok(Snapshot { path, commit })
}

/// The files to fetch of those that the repository has; or what is missing, and why it is needed.
fn needed(names: &[String], variant: Option<&str>) -> Result<Vec<String>, (String, String)> {
    let has = |name: &str| names.iter().any(|other| other == name);
    let mut files: Vec<String> =
        CONFIGURATIONS.iter().filter(|name| has(name)).map(|name| name.to_string()).collect();
    for part in
        ["scheduler/scheduler_config.json", "text_encoder/config.json", "unet/config.json", "vae/config.json"]
    {
        if !has(part) {
            let single =
                names.iter().filter(|name| name.ends_with(".safetensors") || name.ends_with(".ckpt"));
            let single: Vec<&str> = single.filter(|name| !name.contains('/')).map(String::as_str).collect();
            let why = match single.is_empty() {
                true => "not there; expected a repository in diffusers' layout".to_string(),
                false => format!(
                    "not there; expected a repository in diffusers' layout; download one of {} and give its path",
                    single.join(", ")
                ),
            };
            return Err((part.into(), why));
        }
    }
    // both spellings of a vocabulary are the same one
    if has("tokenizer/vocab.json") && has("tokenizer/merges.txt") {
        files.retain(|name| name != "tokenizer/tokenizer.json");
    }
    for component in Component::ALL {
        let candidates: Vec<String> =
            component.file_names(variant).iter().map(|name| format!("{component}/{name}")).collect();
        match candidates.iter().find(|name| has(name)) {
            Some(name) => files.push(name.clone()),
            None => {
                return Err((component.to_string(), format!("expected one of {}", candidates.join(", "))));
            }
        }
    }
    Ok(files)
}

struct Fetching<'a> {
    environment: &'a HubEnvironment,
    repository: &'a str,
}

impl Fetching<'_> {
    /// Fetches one file and checks it, by the sum that the hub itself names and by the published one.
    fn file(&self, repo: &ApiRepo, name: &str, commit: &str, options: &LoadOptions) -> Result<(), Error> {
        let mut stopped = false;
        let telling =
            Telling { progress: options.progress(), stopped: &mut stopped, begun: false, done: 0, told: 0 };
        let path = repo.download_with_progress(name, telling).map_err(|error| self.refused(name, &error))?;
        let checked = self.check(name, commit, &path);
        if checked.is_err() {
            // the name in the snapshot is a link to the file
            let _ = std::fs::canonicalize(&path).and_then(std::fs::remove_file);
            let _ = std::fs::remove_file(&path);
        }
        checked?;
        if stopped { Err(Error::Stopped) } else { Ok(()) }
    }

    fn check(&self, name: &str, commit: &str, path: &Path) -> Result<(), Error> {
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let within: PathBuf = Path::new("snapshots").join(commit).join(name);
        if !path.ends_with(&within) {
            return Err(
                self.error(name, format!("expected a file of commit {commit}, found {}", path.display()))
            );
        }
        // in the cache, a large file has its SHA-256 for a name
        let blob = std::fs::canonicalize(path).map_err(io)?;
        let expected = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if expected.len() == 64 && expected.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let found = sha256_file(&blob).map_err(io)?;
            if found != expected {
                let expected = format!("SHA-256 {expected}");
                return Err(Error::Checksum { path: path.to_path_buf(), expected, found });
            }
        }
        sums::check_download(self.repository, name, path)
    }

    /// What went wrong, and what to do.
    fn refused(&self, what: &str, error: &ApiError) -> Error {
        let HubEnvironment { endpoint, .. } = self.environment;
        let repository = self.repository;
        let problem = match status(error) {
            Some(code @ (401 | 403)) => {
                let token = match self.environment.token {
                    Some(_) => "the token must be of an account that may read it",
                    None => "set HF_TOKEN to a token of your account",
                };
                format!(
                    "access refused ({code}); if the repository is gated, accept its conditions at \
                     {endpoint}/{repository}; {token}"
                )
            }
            Some(404) => format!("not found at {endpoint}/{repository}"),
            Some(code) => format!("the hub answered with status {code}; try again later"),
            None => format!("{error}; what has arrived is kept, so try again"),
        };
        self.error(what, problem)
    }

    fn error(&self, file: &str, problem: String) -> Error {
        Error::Download { repository: self.repository.into(), file: file.into(), problem }
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// hf-hub's progress, told to ours: a stage for every file, in bytes.
struct Telling<'p> {
    progress: &'p dyn Progress,
    /// hf-hub cannot be stopped within a file.
    stopped: &'p mut bool,
    begun: bool,
    done: u64,
    told: u64,
}

/// Bytes between two calls: a read is a few kilobytes.
const TOLD_EVERY: u64 = 1 << 20;

impl hf_hub::api::Progress for Telling<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        // called again whenever the file is taken up again
        if !std::mem::replace(&mut self.begun, true) {
            self.progress.begin(&format!("downloading {filename}"), Some(size as u64));
        }
        (self.done, self.told) = (0, 0);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        if self.done - self.told >= TOLD_EVERY {
            self.told = self.done;
            *self.stopped |= self.progress.advance(self.done, "").is_break();
        }
    }

    fn finish(&mut self) {
        *self.stopped |= self.progress.advance(self.done, "").is_break();
    }
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        if self.begun {
            self.progress.end("");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::ops::ControlFlow;
    use std::sync::{Arc, Mutex};

    use cxr_core::hash::sha256_hex;

    use super::super::files::{ModelFiles, ModelSource};
    use super::*;

    const COMMIT: &str = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14";
    const REPOSITORY: &str = "owner/name";
    const TEXT: &str = "text_encoder/model.fp16.safetensors";

    /// What a small hub has and saw. Weight files have their SHA-256 for a tag, as on the real one.
    #[derive(Default)]
    struct Hub {
        files: BTreeMap<String, Vec<u8>>,
        /// Answers files with this status to those without a token.
        gated: Option<u16>,
        /// Sends other bytes than the tag says.
        broken: bool,
        /// Stops in the middle of a file, as often as this.
        drops: usize,
        asked: Vec<String>,
    }

    /// Starts a hub on this machine; it ends with the test's process.
    fn start(hub: Hub) -> (String, Arc<Mutex<Hub>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Arc::new(Mutex::new(hub));
        let served = hub.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(&mut served.lock().unwrap(), stream);
            }
        });
        (address, hub)
    }

    fn answer(hub: &mut Hub, mut stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let Some(request) = lines.next() else { return };
        let headers: BTreeMap<String, String> = lines
            .take_while(|line| !line.is_empty())
            .filter_map(|line| {
                line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_string()))
            })
            .collect();
        let target = request.split(' ').nth(1).unwrap().to_string();
        let mut send = |status: &str, more: &str, length: usize, body: &[u8]| {
            let head =
                format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{more}\r\n");
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        };
        if target == format!("/api/models/{REPOSITORY}/revision/main") {
            let siblings: Vec<_> =
                hub.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
            let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
            return send("200 OK", "", body.len(), body.as_bytes());
        }
        let name = target.strip_prefix(&format!("/{REPOSITORY}/resolve/{COMMIT}/")).unwrap_or("");
        let Some(file) = hub.files.get(name) else { return send("404 Not Found", "", 0, b"") };
        if let Some(status) =
            hub.gated.filter(|_| headers.get("authorization") != Some(&"Bearer secret".into()))
        {
            return send(&format!("{status} No"), "", 0, b"");
        }
        let range = headers["range"].strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let from: usize = range.0.parse().unwrap();
        let to = range.1.parse().map_or(file.len(), |last: usize| last + 1);
        let tag =
            if name.ends_with(".safetensors") { sha256_hex(file) } else { sha256_hex(file)[..40].into() };
        let more = format!(
            "Content-Range: bytes {from}-{}/{}\r\nETag: \"{tag}\"\r\nX-Repo-Commit: {COMMIT}\r\n",
            to - 1,
            file.len()
        );
        let mut body = file[from..to].to_vec();
        if range.1.is_empty() {
            hub.asked.push(format!("{name} from {from}"));
            if hub.broken {
                body.fill(b'?');
            }
            if hub.drops > 0 && name == TEXT {
                hub.drops -= 1;
                return send("206 Partial Content", &more, body.len(), &body[..body.len() / 2]);
            }
        }
        send("206 Partial Content", &more, body.len(), &body);
    }

    fn hub() -> Hub {
        let config = super::super::ModelConfig::sd15();
        let schedule = serde_json::to_string(&config.schedule).unwrap();
        let mut files: BTreeMap<String, Vec<u8>> = [
            ("model_index.json", r#"{"_class_name": "StableDiffusionPipeline"}"#.to_string()),
            ("text_encoder/config.json", config.text.to_json()),
            ("unet/config.json", config.unet.to_json()),
            ("vae/config.json", config.vae.to_json()),
            ("scheduler/scheduler_config.json", schedule),
            ("tokenizer/vocab.json", "{}".into()),
            ("tokenizer/merges.txt", "m".into()),
            ("README.md", "not needed".into()),
        ]
        .into_iter()
        .map(|(name, text)| (name.to_string(), text.into_bytes()))
        .collect();
        for name in [
            TEXT,
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "safety_checker/model.safetensors",
            "v1-5-pruned-emaonly.safetensors",
        ] {
            files.insert(name.into(), name.repeat(1000).into_bytes());
        }
        Hub { files, ..Hub::default() }
    }

    fn environment(cache: &Path, endpoint: &str) -> HubEnvironment {
        HubEnvironment { cache: cache.into(), offline: false, endpoint: endpoint.into(), token: None }
    }

    fn locate(environment: &HubEnvironment, options: &LoadOptions) -> Result<ModelFiles, Error> {
        ModelFiles::locate_in(&ModelSource::from(REPOSITORY), options, environment)
    }

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>, bool);

    impl Progress for &'static Log {
        fn begin(&self, stage: &str, total: Option<u64>) {
            self.0.lock().unwrap().push(format!("{stage} of {}", total.unwrap()));
        }
        fn advance(&self, done: u64, _message: &str) -> ControlFlow<()> {
            self.0.lock().unwrap().push(done.to_string());
            if self.1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
        fn end(&self, _message: &str) {
            self.0.lock().unwrap().push("end".into());
        }
    }

    #[test]
    fn what_is_needed_is_fetched_once_and_pinned() {
        let folder = tempfile::tempdir().unwrap();
        let (address, hub) = start(Hub { drops: 1, ..hub() });
        let environment = environment(folder.path(), &address);
        let log: &'static Log = Box::leak(Box::default());
        let files = locate(&environment, &LoadOptions::default().with_progress(log)).unwrap();
        assert_eq!(files.commit(), Some(COMMIT));
        let mut asked = std::mem::take(&mut hub.lock().unwrap().asked);
        asked.sort();
        let half = TEXT.len() * 500;
        let mut expected: Vec<String> =
            CONFIGURATIONS[..7].iter().map(|name| format!("{name} from 0")).collect();
        expected.push(format!("{TEXT} from 0"));
        expected.push(format!("{TEXT} from {half}"));
        expected
            .extend(["unet", "vae"].map(|part| format!("{part}/diffusion_pytorch_model.safetensors from 0")));
        expected.sort();
        assert_eq!(asked, expected, "no other files, and one was taken up where it broke off");
        let lines = log.0.lock().unwrap();
        let at =
            lines.iter().position(|line| *line == format!("downloading {TEXT} of {}", 2 * half)).unwrap();
        assert_eq!(lines[at + 1..at + 3], [(2 * half).to_string(), "end".into()]);
        // the second time, the cache has it, without a network
        hub.lock().unwrap().files.clear();
        let offline = HubEnvironment { offline: true, ..environment.clone() };
        assert_eq!(locate(&offline, &LoadOptions::default()).unwrap().path(), files.path());
        let pinned = LoadOptions::default().with_revision(COMMIT);
        assert_eq!(locate(&offline, &pinned).unwrap().path(), files.path());
        let refs = environment.folder(REPOSITORY).join("refs");
        assert_eq!(refs.read_dir().unwrap().count(), 1);
        assert!(hub.lock().unwrap().asked.is_empty());
    }

    #[test]
    fn offline_nothing_is_fetched() {
        let folder = tempfile::tempdir().unwrap();
        let (address, hub) = start(hub());
        let environment = HubEnvironment { offline: true, ..environment(folder.path(), &address) };
        let error = locate(&environment, &LoadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("HF_HUB_OFFLINE is set"), "{error}");
        assert!(hub.lock().unwrap().asked.is_empty());
    }

    #[test]
    fn a_gated_repository_names_the_page() {
        for status in [401, 403] {
            let folder = tempfile::tempdir().unwrap();
            let (address, _hub) = start(Hub { gated: Some(status), ..hub() });
            let environment = environment(folder.path(), &address);
            let error = locate(&environment, &LoadOptions::default()).unwrap_err().to_string();
            let page = format!("accept its conditions at {address}/{REPOSITORY}");
            assert!(error.contains(&page) && error.contains("HF_TOKEN"), "{error}");
            assert!(error.contains(&status.to_string()) && !error.contains('\n'), "{error}");
            let environment = HubEnvironment { token: Some("secret".into()), ..environment };
            locate(&environment, &LoadOptions::default()).unwrap();
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (address, served) = start(hub());
        let environment = environment(folder.path(), &address);
        let refused = |options: LoadOptions| locate(&environment, &options).unwrap_err().to_string();
        let error = refused(LoadOptions::default().with_revision("none"));
        assert!(error.contains("revision none") && error.contains("not found"), "{error}");
        let error = refused(LoadOptions::default().with_variant("mine"));
        assert!(error.contains("text_encoder/model.mine.safetensors"), "{error}");
        served.lock().unwrap().files.remove("unet/config.json");
        let error = refused(LoadOptions::default());
        assert!(error.contains("unet/config.json") && error.contains("v1-5-pruned-emaonly"), "{error}");
        drop(served);
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let environment = HubEnvironment { endpoint: format!("http://{nobody}"), ..environment.clone() };
        let error = locate(&environment, &LoadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("try again") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn bytes_that_are_not_those_of_the_sum_are_thrown_away() {
        let folder = tempfile::tempdir().unwrap();
        let (address, hub) = start(hub());
        let environment = environment(folder.path(), &address);
        // configurations first, then other bytes
        let log: &'static Log = Box::leak(Box::new(Log(Mutex::default(), true)));
        for _ in 0..7 {
            let stopped = locate(&environment, &LoadOptions::default().with_progress(log));
            assert!(matches!(stopped, Err(Error::Stopped)), "{stopped:?}");
        }
        hub.lock().unwrap().broken = true;
        let error = locate(&environment, &LoadOptions::default()).unwrap_err();
        assert!(matches!(&error, Error::Checksum { path, .. } if path.ends_with(TEXT)), "{error}");
        assert!(error.to_string().contains(&sha256_hex(&TEXT.repeat(1000).into_bytes())), "{error}");
        hub.lock().unwrap().broken = false;
        locate(&environment, &LoadOptions::default()).unwrap();
    }
}
