//! What is written for programs: every file appears whole.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use cxr::core::atomic;
use cxr::dataset::{Collection, ImageOptions, Pair, PreparationReport, ReadOptions, Split};
use serde::Serialize;

use crate::args::Args;

/// The columns that every pair has; further columns of the table follow. `image_path` is where a collection that is
/// read from this file finds its images.
const COLUMNS: [&str; 7] = ["file_name", "image_path", "text", "group", "view", "labels", "side"];

/// One row for each pair, which `Collection::open` reads again; names are those of split.json.
pub(crate) fn pairs(collection: &Collection, split: &Split, path: &Path) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let mut sides = vec![""; collection.len()];
    for (side, positions) in [("train", &split.train), ("test", &split.test)] {
        positions.iter().for_each(|&position| sides[position] = side);
    }
    let extras: BTreeSet<&str> =
        collection.pairs.iter().flat_map(|pair| pair.extra.keys()).map(String::as_str).collect();
    let extras: Vec<&str> = extras.into_iter().filter(|name| !COLUMNS.contains(name)).collect();
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(COLUMNS.iter().chain(&extras)).with_context(failed)?;
    for (pair, side) in collection.pairs.iter().zip(sides) {
        let image = std::path::absolute(&pair.image).with_context(failed)?;
        let labels = pair.labels.iter().map(String::as_str).collect::<Vec<_>>().join(";");
        let own = [
            pair.name.as_str(),
            &image.to_string_lossy(),
            &pair.text,
            pair.group.as_deref().unwrap_or_default(),
            pair.view.as_deref().unwrap_or_default(),
            &labels,
            side,
        ];
        writer
            .write_record(own.into_iter().chain(extras.iter().map(|name| extra(pair, name))))
            .with_context(failed)?;
    }
    let bytes = writer.into_inner().map_err(|error| error.into_error()).with_context(failed)?;
    atomic::write_bytes(path, &bytes).with_context(failed)
}

fn extra<'a>(pair: &'a Pair, name: &str) -> &'a str {
    pair.extra.get(name).map(String::as_str).unwrap_or_default()
}

/// The counts, and the settings that they come from.
pub(crate) fn report(
    args: &Args,
    options: &ReadOptions,
    collection: &Collection,
    left_out: usize,
    report: &PreparationReport,
    path: &Path,
) -> Result<()> {
    #[derive(Serialize)]
    struct File<'a> {
        data: &'a Path,
        reading: &'a ReadOptions,
        views: &'a [String],
        labels: &'a [String],
        /// File, row and reason of each row that `skipped` counts.
        skipped_rows: Vec<&'a str>,
        /// Pairs of other views and labels.
        left_out_by_view_or_label: usize,
        /// Nothing where only texts were looked at.
        images: Option<ImageOptions>,
        #[serde(flatten)]
        report: &'a PreparationReport,
    }
    let file = File {
        data: &args.data,
        reading: options,
        views: &args.view,
        labels: &args.label,
        skipped_rows: collection.skipped.iter().map(|row| row.message.as_str()).collect(),
        left_out_by_view_or_label: left_out,
        images: (!args.texts_only).then(|| args.image_options()),
        report,
    };
    let text = serde_json::to_string_pretty(&file)? + "\n";
    atomic::write_bytes(path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}
