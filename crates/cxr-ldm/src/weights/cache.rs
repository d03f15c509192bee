//! The cache of the Hugging Face Hub: `models--owner--name/refs/<revision>` holds a commit, and
//! `models--owner--name/snapshots/<commit>/` has its files.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::Error;

/// What the variables of Hugging Face's tools say.
#[derive(Debug, Clone)]
pub(super) struct HubEnvironment {
    /// The folder of the cache.
    pub(super) cache: PathBuf,
    /// Whether nothing may be fetched.
    pub(super) offline: bool,
    /// Where to fetch from, without a slash at its end.
    #[cfg_attr(not(feature = "hub"), allow(dead_code, reason = "for fetching alone"))]
    pub(super) endpoint: String,
    /// The user's token.
    #[cfg_attr(not(feature = "hub"), allow(dead_code, reason = "for fetching alone"))]
    pub(super) token: Option<String>,
}

/// A version of a repository in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) path: PathBuf,
    pub(super) commit: String,
}

impl HubEnvironment {
    /// From variables, by `variable`, and the user's home folder.
    pub(super) fn from_variables(variable: impl Fn(&str) -> Option<OsString>, home: Option<PathBuf>) -> Self {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| set(name).map(PathBuf::from);
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let hugging_face = path("HF_HOME").unwrap_or_else(|| {
            let caches = path("XDG_CACHE_HOME").unwrap_or_else(|| home.unwrap_or_default().join(".cache"));
            caches.join("huggingface")
        });
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| hugging_face.join("token"));
        let token = text("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());
        let offline = text("HF_HUB_OFFLINE")
            .is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"));
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Self {
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| hugging_face.join("hub")),
            offline,
            endpoint: endpoint.trim_end_matches('/').to_string(),
            token: token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
        }
    }

    /// The folder of a repository in the cache.
    pub(super) fn folder(&self, repository: &str) -> PathBuf {
        self.cache.join(format!("models--{}", repository.replace('/', "--")))
    }
}

/// The snapshot of a revision: a branch or tag that the cache has a note of, or a commit. `None` if there is none.
///
/// # Errors
/// [`Error::Source`] if the note is broken.
pub(super) fn find_snapshot(
    environment: &HubEnvironment,
    repository: &str,
    revision: &str,
) -> Result<Option<Snapshot>, Error> {
    let folder = environment.folder(repository);
    let note = folder.join("refs").join(revision);
    let commit = match std::fs::read_to_string(&note) {
        Ok(text) => text.trim().to_string(),
        Err(_) => revision.to_string(),
    };
    // it becomes part of a path
    if note.is_file() && !is_commit(&commit) {
        let problem = format!("expected a commit in {}, found {commit:?}; delete it", note.display());
        return Err(Error::Source { name: repository.into(), problem });
    }
    let path = folder.join("snapshots").join(&commit);
    Ok((is_commit(&commit) && is_not_empty(&path)).then_some(Snapshot { path, commit }))
}

/// Whether a text is a whole commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_not_empty(folder: &Path) -> bool {
    folder.read_dir().is_ok_and(|mut entries| entries.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14";

    fn environment(variables: &[(&str, &str)]) -> HubEnvironment {
        let of = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        HubEnvironment::from_variables(of, Some("/home/me".into()))
    }

    #[test]
    fn variables_say_where_the_cache_is() {
        for (variables, expected) in [
            (&[][..], "/home/me/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/h/hub"),
            (&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")], "/c"),
            (&[("HF_HUB_CACHE", "")], "/home/me/.cache/huggingface/hub"),
        ] {
            assert_eq!(environment(variables).cache, Path::new(expected), "{variables:?}");
        }
        for (value, offline) in [("1", true), ("True", true), ("ON", true), ("0", false), ("", false)] {
            assert_eq!(environment(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value:?}");
        }
        assert!(!environment(&[]).offline);
        assert_eq!(environment(&[]).folder("a/b"), Path::new("/home/me/.cache/huggingface/hub/models--a--b"));
    }

    #[test]
    fn the_token_is_that_of_the_variable_or_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let token = |variables: &[(&str, &str)]| environment(variables).token;
        assert_eq!(token(&[("HF_HOME", home)]), None);
        std::fs::write(folder.path().join("token"), " of-the-file\n").unwrap();
        assert_eq!(token(&[("HF_HOME", home)]).unwrap(), "of-the-file");
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", "given")]).unwrap(), "given");
        let elsewhere = folder.path().join("none");
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN_PATH", elsewhere.to_str().unwrap())]), None);
    }

    #[test]
    fn revisions_are_notes_or_commits() {
        let folder = tempfile::tempdir().unwrap();
        let environment = environment(&[("HF_HUB_CACHE", folder.path().to_str().unwrap())]);
        let find = |revision: &str| find_snapshot(&environment, "owner/name", revision).unwrap();
        assert_eq!(find("main"), None);
        let repository = environment.folder("owner/name");
        let snapshot = repository.join("snapshots").join(COMMIT);
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repository.join("refs/refs/pr")).unwrap();
        std::fs::write(repository.join("refs/main"), COMMIT).unwrap();
        assert_eq!(find("main"), None, "an empty folder is a download that broke off");
        std::fs::write(snapshot.join("model_index.json"), "{}").unwrap();
        let expected = Some(Snapshot { path: snapshot, commit: COMMIT.into() });
        assert_eq!(find("main"), expected);
        assert_eq!(find(COMMIT), expected);
        assert_eq!(find("fp16"), None);
        assert_eq!(find("refs/pr"), None);
        std::fs::write(repository.join("refs/refs/pr/1"), format!("{COMMIT}\n")).unwrap();
        assert_eq!(find("refs/pr/1"), expected);
        std::fs::write(repository.join("refs/main"), "../../secrets").unwrap();
        let error = find_snapshot(&environment, "owner/name", "main").unwrap_err().to_string();
        assert!(error.contains("secrets") && error.contains("refs/main"), "{error}");
    }
}
