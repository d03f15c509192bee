//! Distances of both sets of pictures to held-out radiographs, and the search for copies.

use std::path::PathBuf;

use anyhow::{Context, Result};
use cxr::core::hash::sha256_hex;
use cxr::core::progress::Progress;
use cxr::kernels::DiffusionBackend;
use cxr::metrics::small::SmallExtractor;
use cxr::metrics::{
    Card, Evaluation, Extraction, FeatureExtractor, ImageSize, Picture, audit, distance_threshold,
    grey_pixels, nearest_neighbours,
};
use cxr_examples::demo::pictures::{SIDE, metric_picture};
use cxr_examples::demo::thumbnails::Thumbnails;
use cxr_examples::progress::Counting;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::picture::Pictures;
use crate::{Args, stage};

/// Share of held-out radiographs that may be as near to the training set as what counts as a copy.
const COPY_RATE: f64 = 0.01;

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

/// How near the adapted model's pictures are to training radiographs, in pixels and in features.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Copies {
    /// Pictures.
    pub(crate) pictures: usize,
    /// Training radiographs.
    pub(crate) train: usize,
    /// Nearer in pixels than all but 1 % of held-out radiographs are.
    pub(crate) near_in_pixels: usize,
    /// Nearer in features than all but 1 % of held-out radiographs are.
    pub(crate) near_in_features: usize,
    /// The distance in pixels below which a picture counts.
    pub(crate) pixel_threshold: f64,
    /// Median distance in pixels of pictures.
    pub(crate) pixel_median: f64,
    /// Median distance in pixels of held-out radiographs.
    pub(crate) held_out_pixel_median: f64,
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
    // four extractions; an interval and a floor of two distances, of three sets
    let counting = Counting::begin(progress, "measuring", 4 + 3 * 4);
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
        copies: copies(
            data,
            (&adapted_files, &adapted_features),
            (&train, &train_features),
            (&held_out, &held_out_features),
        )?,
    };
    stage::keep(&record, &key, &measured)?;
    counting.finish(&format!(
        "{} pictures of each model, {} held-out radiographs",
        args.pictures,
        held_out.len()
    ));
    Ok(measured)
}

type Set<'a> = (&'a Vec<Picture>, &'a Extraction);

fn copies(data: &Thumbnails, made: Set<'_>, train: Set<'_>, held_out: Set<'_>) -> Result<Copies> {
    let size = ImageSize::square(SIDE);
    let pixels = |set: Set<'_>| grey_pixels(set.0, size);
    let (made_pixels, train_pixels, held_out_pixels) = (pixels(made)?, pixels(train)?, pixels(held_out)?);
    let patients: Vec<String> = data
        .split
        .train
        .iter()
        .map(|&i| data.collection.pairs[i].group.clone().unwrap_or_else(|| format!("pair {i}")))
        .collect();
    let groups = Some(patients.as_slice());
    let rows = audit((&made_pixels, &made.1.features), (&train_pixels, &train.1.features), groups)?;
    let real_pixels = nearest_neighbours(&held_out_pixels, &train_pixels, groups)?;
    let real_features = nearest_neighbours(&held_out.1.features, &train.1.features, groups)?;
    let pixel_threshold = distance_threshold(&real_pixels, COPY_RATE)?;
    let feature_threshold = distance_threshold(&real_features, COPY_RATE)?;
    Ok(Copies {
        pictures: rows.len(),
        train: train.0.len(),
        near_in_pixels: rows.iter().filter(|row| row.pixels.distance < pixel_threshold).count(),
        near_in_features: rows.iter().filter(|row| row.features.distance < feature_threshold).count(),
        pixel_threshold,
        pixel_median: median(rows.iter().map(|row| row.pixels.distance).collect()),
        held_out_pixel_median: median(real_pixels.iter().map(|n| n.distance).collect()),
    })
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
