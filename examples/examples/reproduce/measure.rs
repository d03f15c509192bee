//! Distances of both sets of pictures to held-out radiographs, and the search for copies.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cxr::core::hash::sha256_hex;
use cxr::core::progress::Progress;
use cxr::kernels::DiffusionBackend;
use cxr::metrics::memorization::{
    AuditConfig, AuditReport, AuditSide, Calibration, Evidence, MemorizationAudit, PromptSummary, write_png,
};
use cxr::metrics::small::SmallExtractor;
use cxr::metrics::{Card, Evaluation, Extraction, FeatureExtractor, ImageSize, ImageSource, Picture};
use cxr_examples::demo::pictures::metric_picture;
use cxr_examples::demo::thumbnails::Thumbnails;
use cxr_examples::progress::Counting;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::picture::Pictures;
use crate::{Args, stage};

/// Pairs of the sheet of copies.
const SHEET: usize = 24;

/// Everything that is measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Pictures of the base model against held-out radiographs.
    pub(crate) base: Card,
    /// Pictures of the adapted model against the same.
    pub(crate) adapted: Card,
    /// As many training radiographs against the same: what perfect pictures would score.
    pub(crate) train: Card,
    /// Copies among the adapted model's pictures.
    pub(crate) copies: Copies,
}

/// What the audit says of the adapted model's pictures; `copies.csv` has all of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Copies {
    /// Pictures.
    pub(crate) pictures: usize,
    /// Training radiographs.
    pub(crate) train: usize,
    /// Held-out radiographs, on which it was calibrated.
    pub(crate) held_out: usize,
    /// Held-out radiographs that would be flagged.
    pub(crate) held_out_flagged: usize,
    /// That no more than 1 % of real radiographs are.
    pub(crate) confidence: f64,
    /// Pictures that look like copies.
    pub(crate) flagged: usize,
    /// Of these, in pixels.
    pub(crate) in_pixels: usize,
    /// Of these, in features.
    pub(crate) in_features: usize,
    /// The distance in pixels below which a picture counts.
    pub(crate) pixel_threshold: f64,
    /// Median distance in pixels of pictures.
    pub(crate) pixel_median: f64,
    /// Median distance in pixels of held-out radiographs.
    pub(crate) held_out_pixel_median: f64,
    /// Pictures whose impression is a training radiograph's.
    pub(crate) prompts: PromptSummary,
}

/// Measures, or finds it measured.
pub(crate) fn measure<B: DiffusionBackend>(
    args: &Args,
    data: &Thumbnails,
    extractor: &SmallExtractor<B>,
    base: &Pictures,
    adapted: &Pictures,
    progress: &dyn Progress,
) -> Result<Measured> {
    let (base_files, adapted_files) = (read(&base.files)?, read(&adapted.files)?);
    let hash = |pictures: &[Picture]| {
        sha256_hex(&pictures.iter().flat_map(|p| p.pixels().iter().copied()).collect::<Vec<u8>>())
    };
    let (held_out, train) = (radiographs(data, &data.split.test)?, radiographs(data, &data.split.train)?);
    let key = stage::key(&json!({
        "base": hash(&base_files), "adapted": hash(&adapted_files), "held_out": hash(&held_out),
        "train": hash(&train), "extractor": extractor.hash(), "replicates": args.replicates, "seed": args.seed,
    }))?;
    let record = args.out.join("measured.json");
    if let Some(done) = stage::done(&record, &key) {
        progress.begin("measuring", None);
        progress.end("already done");
        return Ok(done);
    }
    // four extractions; an interval and a floor of two distances, of three sets; five extractions and four searches
    // for copies
    let counting = Counting::begin(progress, "measuring", 4 + 3 * 4 + 5 + 4);
    let progress: &dyn Progress = &counting;
    let evaluation = Evaluation { replicates: args.replicates, seed: args.seed, ..Evaluation::default() };
    let take = |pictures: &Vec<Picture>| extractor.extract(pictures, progress);
    let (held_out_features, train_features) = (take(&held_out)?, take(&train)?);
    let (base_features, adapted_features) = (take(&base_files)?, take(&adapted_files)?);
    let compare = |fake: &Extraction| evaluation.compare(&held_out_features, fake, &extractor.id(), progress);
    // as many as there are pictures, evenly over the training set: what a distance is depends on how many they are
    let count = args.pictures.min(train.len());
    let even: Vec<usize> = (0..count).map(|i| i * train.len() / count).collect();
    let real = Extraction { features: train_features.features.select(&even), ..train_features.clone() };
    let measured = Measured {
        base: compare(&base_features)?,
        adapted: compare(&adapted_features)?,
        train: compare(&real)?,
        copies: copies(args, data, extractor, (&adapted_files, adapted), &train, &held_out, progress)?,
    };
    stage::keep(&record, &key, &measured)?;
    counting.finish(&format!(
        "{} pictures of each model, {} held-out radiographs",
        args.pictures,
        held_out.len()
    ));
    Ok(measured)
}

fn copies<B: DiffusionBackend>(
    args: &Args,
    data: &Thumbnails,
    extractor: &SmallExtractor<B>,
    (made, pictures): (&dyn ImageSource, &Pictures),
    train: &dyn ImageSource,
    held_out: &dyn ImageSource,
    progress: &dyn Progress,
) -> Result<Copies> {
    let config = AuditConfig::default();
    let names =
        |of: &[usize]| of.iter().map(|&i| data.collection.pairs[i].name.clone()).collect::<Vec<String>>();
    let patients = |of: &[usize]| {
        let patient =
            |&i: &usize| data.collection.pairs[i].group.clone().unwrap_or_else(|| format!("pair {i}"));
        of.iter().map(patient).collect::<Vec<String>>()
    };
    let (train_at, held_out_at) = (&data.split.train, &data.split.test);
    let made_side = AuditSide::query(made, Some(extractor), &config, progress)?
        .with_names(pictures.files.iter().map(|file| file_name(file)).collect())?
        .with_prompts(pictures.prompts.clone())?;
    let train_side = AuditSide::reference(train, Some(extractor), &config, progress)?
        .with_names(names(train_at))?
        .with_groups(patients(train_at))?
        .with_prompts(data.prompts(train_at))?;
    let held_out_side = AuditSide::query(held_out, Some(extractor), &config, progress)?
        .with_names(names(held_out_at))?
        .with_groups(patients(held_out_at))?;
    let audit = MemorizationAudit::new(config)?.run(&made_side, &train_side, &held_out_side, progress)?;
    audit.write_csv(&args.out.join("copies.csv"), true, &made_side, &train_side)?;
    let sheet = args.out.join("copies.png");
    match audit.sheet(SHEET, (&made_side, made), (&train_side, train))? {
        Some(picture) => write_png(&picture, &sheet)?,
        // of an earlier run
        None if sheet.exists() => {
            std::fs::remove_file(&sheet).with_context(|| format!("cannot remove {}", sheet.display()))?;
        }
        None => {}
    }
    let calibration =
        audit.calibration.as_ref().context("an audit with held-out radiographs is calibrated")?;
    Ok(summary(&audit, calibration))
}

fn summary(audit: &AuditReport, calibration: &Calibration) -> Copies {
    let for_any = |kinds: [Evidence; 2]| {
        audit.flagged().filter(|entry| entry.evidence.iter().any(|e| kinds.contains(e))).count()
    };
    let pixels = calibration.scale(Evidence::PixelDistance);
    Copies {
        pictures: audit.n_synthetic,
        train: audit.n_train,
        held_out: calibration.held_out,
        held_out_flagged: calibration.flagged,
        confidence: calibration.confidence,
        flagged: audit.flagged().count(),
        in_pixels: for_any([Evidence::PixelDistance, Evidence::PixelRatio]),
        in_features: for_any([Evidence::FeatureDistance, Evidence::FeatureRatio]),
        pixel_threshold: pixels.map_or(0.0, |scale| scale.threshold),
        pixel_median: median(audit.entries.iter().map(|entry| entry.pixels.distance).collect()),
        held_out_pixel_median: pixels.map_or(0.0, |scale| scale.median),
        prompts: audit.prompts.clone().unwrap_or_default(),
    }
}

fn file_name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The pictures of some files.
fn read(files: &[PathBuf]) -> Result<Vec<Picture>> {
    files
        .iter()
        .map(|file| {
            let image =
                image::open(file).with_context(|| format!("cannot read {}", file.display()))?.to_rgb8();
            let size = ImageSize { width: image.width() as usize, height: image.height() as usize };
            Ok(Picture::new(size, 3, image.into_raw())?)
        })
        .collect()
}

/// Radiographs as grey pictures.
fn radiographs(data: &Thumbnails, positions: &[usize]) -> Result<Vec<Picture>> {
    Ok(positions.iter().map(|i| metric_picture(&data.pixels[*i])).collect::<cxr::metrics::Result<_>>()?)
}
