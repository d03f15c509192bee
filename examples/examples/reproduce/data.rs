//! The first stage: radiographs, looked at and split.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use cxr::core::hash::{sha256_file, sha256_hex};
use cxr::dataset::{
    Collection, ImageCache, ImageLoader, ImageOptions, LeakageReport, OnProblem, PreparationReport,
    ReadOptions, Split, SplitConfig, TokenFilter,
};
use cxr::tokenizer::ClipTokenizer;
use cxr_examples::demo;
use cxr_examples::evaluation::Set;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::{Args, Settings};
use crate::stage::{self, Done, Stage, Stages};

/// Radiographs on both sides of the split.
pub(crate) struct Data {
    pub(crate) collection: Collection,
    pub(crate) split: Split,
    /// How they are brought to the size of the pictures.
    pub(crate) images: ImageLoader,
    pub(crate) prepared: Done<Prepared>,
}

/// What preparing found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Prepared {
    pub(crate) report: PreparationReport,
    /// Names of pairs whose image cannot be used.
    left_out: Vec<String>,
}

/// The table as it is, before any image was looked at.
pub(crate) fn open(args: &Args) -> Result<Collection> {
    let folder = args.data.clone().unwrap_or_else(demo::data_folder);
    let options = ReadOptions { on_problem: on_problem(args), ..ReadOptions::default() };
    let mut collection =
        Collection::open(&folder, &options).with_context(|| format!("--data {}", folder.display()))?;
    TokenFilter::default().apply(&mut collection, &ClipTokenizer::embedded())?;
    Ok(collection)
}

fn on_problem(args: &Args) -> OnProblem {
    if args.skip { OnProblem::Skip } else { OnProblem::Stop }
}

fn split(args: &Args, collection: &Collection) -> Result<Split> {
    let split = match &args.split {
        Some(file) => Split::read(file, collection).context("--split")?,
        None => Split::new(collection, &SplitConfig::default()).context("--data")?,
    };
    let (train, test) = (split.train.len(), split.test.len());
    ensure!(
        train >= 2 && test >= 4,
        "--data, --split: {train} radiographs to train on and {test} held out, expected at least 2 and 4"
    );
    Ok(split)
}

/// Looks at every image, splits, and measures what the split lets through; or finds that done.
pub(crate) fn prepare(
    args: &Args,
    settings: &Settings,
    mut collection: Collection,
    stages: &Stages<'_>,
) -> Result<Data> {
    let folder = stages.path("data");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let cache = Arc::new(ImageCache::on_disk(folder.join("cache"))?);
    let images = ImageLoader::new(ImageOptions::new(settings.finetune.image_size)).with_cache(cache);
    let named = args.split.as_ref().map(sha256_file).transpose().context("--split")?;
    let key = stage::key(&json!({
        "pairs": sha256_hex(&serde_json::to_vec(&collection.metadata_rows())?), "images": sizes(&collection),
        "split": named, "size": settings.finetune.image_size,
    }))?;
    let record = folder.join("done.json");
    let split_file = folder.join("split.json");
    let whole = |_: &Prepared| split_file.is_file();
    if let Some(prepared) = stages.found::<Prepared>(Stage::Prepare, &record, &key, whole)? {
        let left_out: BTreeSet<&String> = prepared.result.left_out.iter().collect();
        collection.retain(|pair| !left_out.contains(&pair.name));
        let split = split(args, &collection)?;
        return Ok(Data { collection, split, images, prepared });
    }
    let started = Instant::now();
    let names: Vec<String> = collection.pairs.iter().map(|pair| pair.name.clone()).collect();
    collection.load_images(&images, on_problem(args), stages.progress).context("--data")?;
    let kept: BTreeSet<&String> = collection.pairs.iter().map(|pair| &pair.name).collect();
    let left_out = names.iter().filter(|name| !kept.contains(name)).cloned().collect();
    let split = split(args, &collection)?;
    if !args.enlarge {
        cxr_examples::finetune::check_sizes(&settings.finetune, &collection, &split)?;
    }
    stages.progress.begin("leakage", None);
    let leakage = LeakageReport::measure(&collection, &split, true)?;
    stages.progress.end("");
    split.write(&split_file, &collection)?;
    let report = collection.preparation_report(Some(&split), Some(leakage));
    stage::write_json(&folder.join("report.json"), &report)?;
    let prepared = stages.keep(&record, &key, started, Prepared { report, left_out })?;
    Ok(Data { collection, split, images, prepared })
}

/// Lengths of the image files: a table that stays while its images change is other data.
fn sizes(collection: &Collection) -> String {
    let length = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
    let all: Vec<u64> = collection.pairs.iter().map(|pair| length(&pair.image)).collect();
    sha256_hex(format!("{all:?}").as_bytes())
}

impl Data {
    /// What the results of all later stages depend on.
    pub(crate) fn key(&self) -> &str {
        &self.prepared.key
    }

    /// The pairs that a set of pictures has its prompts from: held-out ones, in turn.
    pub(crate) fn prompted(&self, pictures: usize) -> Vec<usize> {
        let test = &self.split.test;
        (0..pictures).map(|i| test[i % test.len()]).collect()
    }

    pub(crate) fn held_out(&self) -> Set {
        self.set("held-out radiographs", &self.split.test)
    }

    pub(crate) fn train(&self) -> Set {
        self.set("training radiographs", &self.split.train)
    }

    /// So many training radiographs, evenly over all of them: what a distance is depends on how many they are.
    pub(crate) fn some_of_train(&self, count: usize) -> Set {
        let train = &self.split.train;
        let count = count.min(train.len());
        let even: Vec<usize> = (0..count).map(|i| train[i * train.len() / count]).collect();
        self.set("training radiographs", &even)
    }

    fn set(&self, what: &'static str, positions: &[usize]) -> Set {
        Set::of_collection(
            what,
            &self.collection,
            positions,
            self.images.options.size,
            self.images.cache.clone(),
        )
    }

    /// A radiograph as it was measured.
    pub(crate) fn picture(&self, position: usize) -> Result<image::RgbImage> {
        let path: &Path = &self.collection.pairs[position].image;
        Ok(cxr::dataset::image::load(path, &self.images.options)?.to_rgb())
    }
}
