//! Where a model's files are, and reading them.

use std::path::{Path, PathBuf};

use burn::tensor::backend::Backend;
use cxr_core::tensor_file::TensorFile;
use cxr_kernels::DiffusionBackend;
use cxr_tokenizer::ClipTokenizer;

use super::cache::{HubEnvironment, Snapshot, find_snapshot};
use super::folder::ModelFolder;
use super::ldm::{Key, read_key, refuse_others};
use super::load::{Keys, Reader, bytes_of, match_names};
use super::names::{Component, canonical};
use super::options::LoadOptions;
use super::parts::{ModelConfig, ModelParts};
use super::sums;
use crate::Error;
use crate::text::ClipTextModel;
use crate::unet::UNet2dCondition;
use crate::vae::AutoencoderKl;

/// The repository of Stable Diffusion 1.5 that is maintained today.
pub const DEFAULT_REPO: &str = "stable-diffusion-v1-5/stable-diffusion-v1-5";

/// Where a model comes from.
///
/// Anything that a path or a text can be made into: `load("models/sd15", ..)`, `load(path, ..)`,
/// `load(DEFAULT_REPO, ..)`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModelSource {
    /// A folder in diffusers' layout, or a single-file checkpoint.
    Path(PathBuf),
    /// The same by its path, if that exists; else a repository on the Hugging Face Hub, as `owner/name`.
    Name(String),
}

impl From<&str> for ModelSource {
    fn from(name: &str) -> Self {
        Self::Name(name.into())
    }
}

impl From<String> for ModelSource {
    fn from(name: String) -> Self {
        Self::Name(name)
    }
}

impl From<&String> for ModelSource {
    fn from(name: &String) -> Self {
        Self::Name(name.clone())
    }
}

impl From<&Path> for ModelSource {
    fn from(path: &Path) -> Self {
        Self::Path(path.into())
    }
}

impl From<PathBuf> for ModelSource {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&PathBuf> for ModelSource {
    fn from(path: &PathBuf) -> Self {
        Self::Path(path.clone())
    }
}

/// The files of a model on this machine: a folder in diffusers' layout, or a single-file checkpoint in the names of
/// CompVis' latent diffusion.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    layout: Layout,
    config: Option<ModelConfig>,
    commit: Option<String>,
}

#[derive(Debug, Clone)]
enum Layout {
    Folder(ModelFolder),
    Checkpoint(PathBuf),
}

/// The tensors of some networks, found and checked but not read.
struct Weights {
    files: Vec<TensorFile>,
    networks: Vec<(Component, usize, Keys)>,
}

impl ModelFiles {
    /// Finds the files without reading weights.
    ///
    /// A path, or a name that is a path which exists, is a folder in diffusers' layout or a single-file checkpoint
    /// (`.safetensors`, `.ckpt`). Any other name is a repository, `owner/name`: a snapshot of the revision in the
    /// cache of the Hugging Face Hub is used as it is, without a network (`HF_HUB_CACHE`, `HF_HOME`, else
    /// `~/.cache/huggingface/hub`). What is not there is fetched if this was built with the feature `hub`, unless
    /// `HF_HUB_OFFLINE` is 1.
    ///
    /// # Errors
    /// [`Error::Source`] naming all places that were looked at; [`Error::Folder`] for a folder that lacks a part or
    /// is another kind of pipeline; [`Error::Download`] and [`Error::Checksum`] if fetching fails.
    pub fn locate(source: &ModelSource, options: &LoadOptions) -> Result<Self, Error> {
        let environment = HubEnvironment::from_variables(|name| std::env::var_os(name), std::env::home_dir());
        Self::locate_in(source, options, &environment)
    }

    pub(super) fn locate_in(
        source: &ModelSource,
        options: &LoadOptions,
        environment: &HubEnvironment,
    ) -> Result<Self, Error> {
        let (path, name) = match source {
            ModelSource::Path(path) => (path.as_path(), None),
            ModelSource::Name(name) => (Path::new(name), Some(name)),
        };
        let layout = if path.is_dir() {
            Layout::Folder(ModelFolder::open(path)?)
        } else if path.is_file() {
            Layout::Checkpoint(path.to_path_buf())
        } else if let Some(name) = name {
            return Self::repository(name, options, environment);
        } else {
            let (name, problem) = (path.display().to_string(), "no such file or folder".into());
            return Err(Error::Source { name, problem });
        };
        Ok(Self { layout, config: options.config.clone(), commit: None })
    }

    /// A repository by name: from the cache, or fetched.
    fn repository(name: &str, options: &LoadOptions, environment: &HubEnvironment) -> Result<Self, Error> {
        let wrong = |problem: String| Err(Error::Source { name: name.into(), problem });
        if !is_repository(name) {
            return wrong("no such file or folder, and not the name of a repository (owner/name)".into());
        }
        let revision = &options.revision;
        if !is_revision(revision) {
            return wrong(format!("revision {revision:?} is no branch, tag or commit"));
        }
        let snapshot = find_snapshot(environment, name, revision)?;
        let found = snapshot.as_ref().map(|snapshot| Self::snapshot(name, snapshot, options));
        if let Some(Ok(files)) = found {
            return Ok(files);
        }
        if cfg!(feature = "hub") && !environment.offline {
            #[cfg(feature = "hub")]
            return Self::snapshot(name, &super::hub::fetch(environment, name, options)?, options);
        }
        let why = match (environment.offline, cfg!(feature = "hub")) {
            (true, _) => "HF_HUB_OFFLINE is set, so it is not fetched",
            _ => {
                "to have it fetched, build with the feature `hub`; or download it with Hugging Face's `hf download`"
            }
        };
        match found {
            // part of it is there
            Some(Err(error)) => wrong(format!("the snapshot in the cache cannot be used ({error}); {why}")),
            _ => wrong(format!(
                "no such file or folder, and no snapshot of revision {revision} in {}; {why}",
                environment.folder(name).display()
            )),
        }
    }

    /// A snapshot in the cache, which must have every file that is needed: a folder, or one checkpoint.
    fn snapshot(name: &str, snapshot: &Snapshot, options: &LoadOptions) -> Result<Self, Error> {
        let Snapshot { path, commit } = snapshot;
        log::info!("{name} is at commit {commit}, in {}", path.display());
        let layout = match single_file(path) {
            Some(file) if !path.join("unet").is_dir() => Layout::Checkpoint(file),
            _ => {
                let folder = ModelFolder::open(path)?;
                if options.config.is_none() {
                    folder.config()?;
                }
                for component in Component::ALL {
                    folder.weight_file(component, options.variant.as_deref())?;
                }
                Layout::Folder(folder)
            }
        };
        Ok(Self { layout, config: options.config.clone(), commit: Some(commit.clone()) })
    }

    pub(super) fn from_folder(folder: ModelFolder, options: &LoadOptions) -> Self {
        Self { layout: Layout::Folder(folder), config: options.config.clone(), commit: None }
    }

    /// The folder, or the file.
    pub fn path(&self) -> &Path {
        match &self.layout {
            Layout::Folder(folder) => folder.path(),
            Layout::Checkpoint(path) => path,
        }
    }

    /// The commit of the repository that they are of, for a model by name: what to give as revision to have the same
    /// again.
    pub fn commit(&self) -> Option<&str> {
        self.commit.as_deref()
    }

    /// The configurations: those of the options that the files were found with, else the folder's own, else, for a
    /// single file, Stable Diffusion 1.5's.
    ///
    /// # Errors
    /// As [`ModelFolder::config`].
    pub fn config(&self) -> Result<ModelConfig, Error> {
        match (&self.config, &self.layout) {
            (Some(config), _) => Ok(config.clone()),
            (None, Layout::Folder(folder)) => folder.config(),
            (None, Layout::Checkpoint(_)) => Ok(ModelConfig::sd15()),
        }
    }

    /// Loads everything to `device`, tensor by tensor: memory stays near that of the weights.
    ///
    /// # Errors
    /// As [`config`](Self::config), and
    /// - [`Error::Weights`] listing every tensor that is missing, unexpected or of another shape;
    /// - [`Error::Checkpoint`] for a single file that is of another kind of model;
    /// - [`Error::TensorFile`] if a file is broken, [`Error::NotFinite`] naming a tensor with a NaN or an infinity,
    ///   or with a value that the dtype cannot hold;
    /// - [`Error::Tokenizer`] for what is wrong with the vocabulary;
    /// - [`Error::Checksum`] and [`Error::NoChecksum`] if the options ask to verify;
    /// - [`Error::Stopped`] if progress says so.
    pub fn load<B: DiffusionBackend>(
        &self,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<ModelParts<B>, Error> {
        let parts = self.config()?.init::<B>(device)?;
        let weights = self.weights(&parts, options, &Component::ALL)?;
        let tokenizer = self.tokenizer()?;
        let mut reader = weights.reader(options);
        let (text, file, keys) = weights.of(parts.text, Component::TextEncoder);
        let text = reader.fill(text, Component::TextEncoder, file, keys)?;
        let (unet, file, keys) = weights.of(parts.unet, Component::Unet);
        let unet = reader.fill(unet, Component::Unet, file, keys)?;
        let (vae, file, keys) = weights.of(parts.vae, Component::Vae);
        let vae = reader.fill(vae, Component::Vae, file, keys)?;
        let hash = reader.finish();
        Ok(ModelParts { text, unet, vae, tokenizer, dtype: options.dtype, hash, ..parts })
    }

    /// Loads the text encoder alone.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_text<B: DiffusionBackend>(
        &self,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<ClipTextModel<B>, Error> {
        self.load_one(options, device, Component::TextEncoder, |parts| parts.text)
    }

    /// Loads the denoiser alone.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_unet<B: DiffusionBackend>(
        &self,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<UNet2dCondition<B>, Error> {
        self.load_one(options, device, Component::Unet, |parts| parts.unet)
    }

    /// Loads the autoencoder alone.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_vae<B: DiffusionBackend>(
        &self,
        options: &LoadOptions,
        device: &B::Device,
    ) -> Result<AutoencoderKl<B>, Error> {
        self.load_one(options, device, Component::Vae, |parts| parts.vae)
    }

    fn load_one<B: DiffusionBackend, M: burn::module::Module<B>>(
        &self,
        options: &LoadOptions,
        device: &B::Device,
        component: Component,
        part: impl FnOnce(ModelParts<B>) -> M,
    ) -> Result<M, Error> {
        let parts = self.config()?.init::<B>(device)?;
        let weights = self.weights(&parts, options, &[component])?;
        let (module, file, keys) = weights.of(part(parts), component);
        weights.reader(options).fill(module, component, file, keys)
    }

    /// The hash of all weights, as [`ModelParts::hash`] has it, without keeping any in memory: every tensor is read once.
    ///
    /// # Errors
    /// As [`load`](Self::load), but for values that are not finite, which are not looked for.
    pub fn hash<B: Backend>(&self, options: &LoadOptions, device: &B::Device) -> Result<String, Error> {
        let parts = self.config()?.init::<B>(device)?;
        let weights = self.weights(&parts, options, &Component::ALL)?;
        let mut reader = weights.reader(options);
        for (component, file, keys) in &weights.networks {
            reader.skim(*component, &weights.files[*file], keys)?;
        }
        Ok(reader.finish())
    }

    /// The vocabulary: the folder's own, or CLIP's.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] naming what is wrong with a file.
    pub fn tokenizer(&self) -> Result<ClipTokenizer, Error> {
        match &self.layout {
            Layout::Folder(folder) => folder.tokenizer(),
            Layout::Checkpoint(_) => Ok(ClipTokenizer::embedded()),
        }
    }

    /// Finds and checks the tensors of some components, of all files before the first is read, which may take a
    /// while.
    fn weights<B: Backend>(
        &self,
        parts: &ModelParts<B>,
        options: &LoadOptions,
        wanted: &[Component],
    ) -> Result<Weights, Error> {
        match &self.layout {
            Layout::Folder(folder) => {
                let variant = options.variant.as_deref();
                let paths: Vec<PathBuf> = wanted
                    .iter()
                    .map(|component| folder.weight_file(*component, variant))
                    .collect::<Result<_, _>>()?;
                let files: Vec<TensorFile> = paths.iter().map(TensorFile::open).collect::<Result<_, _>>()?;
                let mut networks = Vec::new();
                for (index, (component, file)) in wanted.iter().zip(&files).enumerate() {
                    let names =
                        file.names().filter_map(|key| Some((canonical(*component, key)?, key.to_string())));
                    let mut problems = Vec::new();
                    let keys = match_component(parts, *component, file, names, &mut problems);
                    check(file, problems)?;
                    networks.push((*component, index, keys));
                }
                if options.verify {
                    let files = wanted.iter().zip(&paths);
                    let named = files
                        .map(|(component, path)| (sums::name_in_folder(*component, path), path.as_path()));
                    sums::verify(named, options.progress())?;
                }
                Ok(Weights { files, networks })
            }
            Layout::Checkpoint(path) => {
                let file = TensorFile::open(path)?;
                refuse_others(&file, &parts.config)?;
                let mut tensors: Vec<(Component, Vec<(String, String)>)> =
                    Component::ALL.into_iter().map(|component| (component, Vec::new())).collect();
                let mut problems = Vec::new();
                for key in file.names() {
                    match read_key(&parts.config, key) {
                        Key::Ignored => {}
                        Key::Tensor(component, name) => {
                            let (_, names) = &mut tensors[component as usize];
                            names.push((name, key.to_string()));
                        }
                        Key::Unknown => problems.push(super::TensorProblem {
                            path: key.to_string(),
                            expected: None,
                            found: file.info(key).map(|info| info.shape.clone()),
                        }),
                    }
                }
                let mut networks = Vec::new();
                for (component, names) in tensors {
                    let keys = match_component(parts, component, &file, names, &mut problems);
                    if wanted.contains(&component) {
                        networks.push((component, 0, keys));
                    }
                }
                check(&file, problems)?;
                if options.verify {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    sums::verify([(name, path.as_path())], options.progress())?;
                }
                Ok(Weights { files: vec![file], networks })
            }
        }
    }
}

impl Weights {
    fn reader<'p>(&self, options: &'p LoadOptions) -> Reader<'p> {
        let total = self.networks.iter().map(|(_, file, keys)| bytes_of(&self.files[*file], keys)).sum();
        Reader::new(options.dtype, options.progress(), total)
    }

    /// A module with the file and the keys of its tensors.
    fn of<M>(&self, module: M, wanted: Component) -> (M, &TensorFile, &Keys) {
        let network = self.networks.iter().find(|(component, ..)| *component == wanted);
        let (_, file, keys) = network.expect("the components that are wanted were looked for");
        (module, &self.files[*file], keys)
    }
}

fn match_component<B: Backend>(
    parts: &ModelParts<B>,
    component: Component,
    file: &TensorFile,
    names: impl IntoIterator<Item = (String, String)>,
    problems: &mut Vec<super::TensorProblem>,
) -> Keys {
    match component {
        Component::TextEncoder => match_names::<B, _>(&parts.text, component, file, names, problems),
        Component::Unet => match_names::<B, _>(&parts.unet, component, file, names, problems),
        Component::Vae => match_names::<B, _>(&parts.vae, component, file, names, problems),
    }
}

fn check(file: &TensorFile, problems: Vec<super::TensorProblem>) -> Result<(), Error> {
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Weights { file: file.path().to_path_buf(), problems }),
    }
}

/// Whether a text can be the name of a repository: `owner/name`.
fn is_repository(name: &str) -> bool {
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part.len() <= 96 && part.chars().all(plain) && !part.starts_with('.')
    };
    name.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// Whether a text can be a branch, a tag or a commit, and is safe as a path below a folder.
fn is_revision(revision: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    let part = |part: &str| !part.is_empty() && part.chars().all(plain) && !part.starts_with('.');
    revision.len() <= 200 && revision.split('/').all(part)
}

/// The only checkpoint in a folder.
fn single_file(folder: &Path) -> Option<PathBuf> {
    let entries = folder.read_dir().ok()?.filter_map(Result::ok).map(|entry| entry.path());
    let is_checkpoint = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "safetensors" || extension == "ckpt")
            && path.is_file()
    };
    let mut checkpoints = entries.filter(is_checkpoint);
    checkpoints.next().filter(|_| checkpoints.next().is_none())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const COMMIT: &str = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14";
    const WEIGHTS: [&str; 3] = [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    /// A cache of which nothing may be fetched.
    fn cache(folder: &Path) -> HubEnvironment {
        let of = |name: &str| match name {
            "HF_HUB_CACHE" => Some(folder.into()),
            "HF_HUB_OFFLINE" => Some("1".into()),
            _ => None,
        };
        HubEnvironment::from_variables(of, None)
    }

    /// Configurations, and weights that are only there.
    fn fill(snapshot: &Path) {
        let config = ModelConfig::sd15();
        let schedule = serde_json::to_string(&config.schedule).unwrap();
        for (name, text) in [
            ("model_index.json", r#"{"_class_name": "StableDiffusionPipeline"}"#.to_string()),
            ("text_encoder/config.json", config.text.to_json()),
            ("unet/config.json", config.unet.to_json()),
            ("vae/config.json", config.vae.to_json()),
            ("scheduler/scheduler_config.json", schedule),
        ]
        .into_iter()
        .chain(WEIGHTS.map(|name| (name, String::new())))
        {
            let path = snapshot.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn locate(source: impl Into<ModelSource>, environment: &HubEnvironment) -> Result<ModelFiles, String> {
        ModelFiles::locate_in(&source.into(), &LoadOptions::default(), environment).map_err(|e| e.to_string())
    }

    #[test]
    fn a_name_is_looked_up_in_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let environment = cache(folder.path());
        let error = locate(DEFAULT_REPO, &environment).unwrap_err();
        for part in
            [DEFAULT_REPO, "no such file or folder", "revision main", "models--stable-diffusion-v1-5--"]
        {
            assert!(error.contains(part), "expected {part:?} in {error}");
        }
        let repository = environment.folder(DEFAULT_REPO);
        let snapshot = repository.join("snapshots").join(COMMIT);
        fill(&snapshot);
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), COMMIT).unwrap();
        let files = locate(DEFAULT_REPO.to_string(), &environment).unwrap();
        assert_eq!((files.path(), files.commit()), (snapshot.as_path(), Some(COMMIT)));
        assert_eq!(files.config().unwrap(), ModelConfig::sd15());
        for (revision, there) in [(COMMIT, true), ("fp16", false), ("../main", false), ("a b", false)] {
            let options = LoadOptions::default().with_revision(revision);
            let found = ModelFiles::locate_in(&DEFAULT_REPO.into(), &options, &environment);
            assert_eq!(found.is_ok(), there, "{revision}: {found:?}");
        }
        // a path is never a name
        assert!(
            locate(Path::new(DEFAULT_REPO), &environment).unwrap_err().contains("no such file or folder")
        );
        // a download that broke off
        fs::remove_file(snapshot.join(WEIGHTS[1])).unwrap();
        let error = locate(DEFAULT_REPO, &environment).unwrap_err();
        assert!(
            error.contains("cannot be used") && error.contains("unet") && error.contains("OFFLINE"),
            "{error}"
        );
    }

    #[test]
    fn a_snapshot_may_be_a_single_file() {
        let folder = tempfile::tempdir().unwrap();
        let environment = cache(folder.path());
        let snapshot = environment.folder("me/model").join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("model.safetensors"), "").unwrap();
        let options = LoadOptions::default().with_revision(COMMIT);
        let files = ModelFiles::locate_in(&"me/model".into(), &options, &environment).unwrap();
        assert_eq!(files.path(), snapshot.join("model.safetensors"));
        fs::write(snapshot.join("other.ckpt"), "").unwrap();
        assert!(ModelFiles::locate_in(&"me/model".into(), &options, &environment).is_err());
    }

    #[test]
    fn paths_come_first_and_what_is_no_name_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let environment = cache(folder.path());
        let there = folder.path().join("owner/name");
        fill(&there);
        let text = there.to_str().unwrap();
        assert_eq!(locate(text, &environment).unwrap().path(), there);
        assert_eq!(locate(&there, &environment).unwrap().path(), there);
        let file = there.join("single.ckpt");
        fs::write(&file, "").unwrap();
        assert_eq!(locate(file.as_path(), &environment).unwrap().path(), file);
        for name in ["", "name", "/etc/none", "a/b/c", "../name", "owner/..", "owner/na me", "https://x/y"] {
            let error = locate(name, &environment).unwrap_err();
            assert!(error.contains("not the name of a repository"), "{name}: {error}");
        }
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn without_the_feature_the_error_says_how_to_build() {
        let folder = tempfile::tempdir().unwrap();
        let environment = HubEnvironment { offline: false, ..cache(folder.path()) };
        let error = locate(DEFAULT_REPO, &environment).unwrap_err();
        assert!(
            error.contains("feature `hub`") && error.contains(folder.path().to_str().unwrap()),
            "{error}"
        );
    }
}
