//! The report page: table, loss curve, grids, audit, findings, data, settings.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use cxr::dataset::contact_sheet;
use cxr::metrics;
use cxr_examples::finetune::Finetuned;
use cxr_examples::report::{self, Comparison, Figure, Report};
use serde_json::json;

use crate::args::{Args, Settings};
use crate::audit::Copies;
use crate::data::Data;
use crate::distances::Distances;
use crate::findings::Checked;
use crate::picture::Pictures;
use crate::stage::{self, Done, Stage, Stages};
use crate::{lora, tables};

/// Columns and pictures of a grid.
const COLUMNS: usize = 4;
const SHOWN: usize = 32;

/// What all stages have made.
pub(crate) struct Parts<'a> {
    pub(crate) args: &'a Args,
    pub(crate) settings: &'a Settings,
    pub(crate) data: &'a Data,
    pub(crate) model_hash: &'a str,
    pub(crate) base: &'a Pictures,
    pub(crate) adapter: &'a Done<Finetuned>,
    pub(crate) adapted: &'a Pictures,
    pub(crate) distances: &'a Done<Distances>,
    pub(crate) copies: &'a Done<Copies>,
    pub(crate) findings: &'a Done<Checked>,
}

impl Parts<'_> {
    /// Writes the grids, `report.html` and `report.md`, or finds that done.
    pub(crate) fn write(&self, stages: &Stages<'_>) -> Result<()> {
        let key = stage::key(&json!({
            "base": self.base.done.key, "adapter": self.adapter.key, "adapted": self.adapted.done.key,
            "distances": self.distances.key, "copies": self.copies.key, "findings": self.findings.key,
            "settings": self.settings, "version": env!("CARGO_PKG_VERSION"),
        }))?;
        let record = stages.path("report.json");
        let whole = |_: &()| ["report.html", "report.md"].iter().all(|name| stages.path(name).is_file());
        if stages.found(Stage::Report, &record, &key, whole)?.is_some() {
            return Ok(());
        }
        let started = Instant::now();
        let report = Report {
            title: "Chest radiographs from impressions: base model and LoRA".into(),
            summary: self.summary(),
            comparison: comparison(&self.distances.result),
            figures: self.figures(stages)?,
            tables: tables::all(self),
        };
        report::write(&report, stages.out)?;
        stages.keep(&record, &key, started, ())?;
        Ok(())
    }

    fn figures(&self, stages: &Stages<'_>) -> Result<Vec<Figure>> {
        let grids = stages.path("grids");
        std::fs::create_dir_all(&grids).with_context(|| format!("cannot make {}", grids.display()))?;
        let positions = self.data.prompted(self.settings.pictures.min(SHOWN));
        let real: Vec<image::RgbImage> =
            positions.iter().map(|&position| self.data.picture(position)).collect::<Result<_>>()?;
        let figure = |name: &str, caption: String, images: &[image::RgbImage]| -> Result<Figure> {
            let path = grids.join(name);
            save(images, &path)?;
            Ok(Figure { caption, path, wide: false })
        };
        let base = "The base model's pictures of the same impressions (the paper's Figure 3)";
        let adapted = "The adapted model's pictures of the same impressions, from the same seeds (the paper's Figure 4)";
        let mut figures = vec![
            figure("real.png", format!("{} held-out radiographs", real.len()), &real)?,
            figure("base.png", base.into(), &open(&self.base.files)?)?,
            figure("adapted.png", adapted.into(), &open(&self.adapted.files)?)?,
            Figure {
                caption: format!(
                    "Loss of the fine-tuning, {} steps (the paper's Figure 2)",
                    self.adapter.result.steps
                ),
                path: stages.path(lora::CURVE),
                wide: true,
            },
        ];
        let copies = stages.path("copies.png");
        if copies.is_file() {
            let caption = match self.copies.result.flagged {
                0 => {
                    "The pictures that are nearest to a training radiograph, each beside it; none is flagged"
                }
                _ => "Pictures that look like copies, each beside the training radiograph that it looks like",
            };
            figures.push(Figure { caption: caption.into(), path: copies, wide: true });
        }
        Ok(figures)
    }

    fn summary(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "{} pictures of each model were made from the impressions of {} held-out radiographs and compared with \
             those radiographs. {}",
            self.settings.pictures,
            self.data.split.test.len(),
            match self.data.prepared.result.report.leakage.as_ref().map(|leakage| leakage.shared_groups) {
                Some(0) => "No patient or study that is known stands on both sides of the split.",
                _ => "Some patients or studies stand on both sides of the split: see the data below.",
            }
        )];
        lines.extend(self.distances.result.adapted.figures.first().map(said_of_n));
        lines.push(
            "A distance is of two sets of pictures. It does not say that a picture shows its impression: for that \
             stands the table of findings, as far as the classifier can be trusted, whose figures on radiographs are \
             beside it."
                .into(),
        );
        if self.settings.smoke {
            lines.push("This is a smoke run: every stage at its smallest. Its numbers mean nothing.".into());
        }
        lines
    }
}

/// What the distances of so many pictures can and cannot show.
fn said_of_n(figure: &metrics::Figure) -> String {
    let (n, real) = (figure.n_fake, figure.n_real);
    let name = figure.extractor.as_ref().map_or("the extractor", |e| e.name.as_str());
    if figure.name.starts_with("fid/") {
        return format!(
            "FID and KID are those of the Inception network of 2015. FID is biased upwards, and at {n} pictures and \
             {real} radiographs by far: it shows a direction, and can be held against the training radiographs' in the \
             same row, which are as many, but not against published figures of other numbers of pictures or another \
             resolution. KID has no such bias; its interval says how sure it is."
        );
    }
    let kind = match figure.name.split('/').next_back() {
        Some(name) if name.starts_with("cxr-small") => {
            "a small network of this project that was trained on the findings of radiographs"
        }
        _ => "a network with other weights than those that define FID",
    };
    format!(
        "Distances are taken in the features of {name}, {kind}: they compare these sets with each other. They are not FID \
         or KID, which are defined by the published weights of the Inception network, and not to be set beside \
         published figures. With {n} pictures and {real} radiographs they show a direction; the intervals say how sure \
         it is."
    )
}

fn open(files: &[PathBuf]) -> Result<Vec<image::RgbImage>> {
    let read = |file: &PathBuf| {
        Ok(image::open(file).with_context(|| format!("cannot read {}", file.display()))?.to_rgb8())
    };
    files.iter().take(SHOWN).map(read).collect()
}

/// A grid; thumbnails are hard to see unless it is enlarged.
fn save(images: &[image::RgbImage], path: &Path) -> Result<()> {
    let sheet = contact_sheet(images, COLUMNS);
    let side = images.first().map_or(0, image::RgbImage::width);
    let factor = if side < 128 { 2 } else { 1 };
    let (width, height) = (sheet.width() * factor, sheet.height() * factor);
    image::imageops::resize(&sheet, width, height, image::imageops::FilterType::Nearest)
        .save(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

fn comparison(distances: &Distances) -> Vec<Comparison> {
    let Distances { base, adapted, train } = distances;
    let figures = base.figures.iter().zip(&adapted.figures).zip(&train.figures);
    figures
        .map(|((base, adapted), train)| Comparison {
            name: base.name.clone(),
            base: value(base),
            adapted: value(adapted),
            difference: format!(
                "{} ({:+.0} %)",
                number(adapted.value - base.value),
                100.0 * (adapted.value - base.value) / base.value
            ),
            floor: value(train),
        })
        .collect()
}

fn value(figure: &metrics::Figure) -> String {
    let interval = figure.interval.as_ref().map_or(String::new(), |i| {
        format!(" ({} to {}, {:.0} %)", number(i.low), number(i.high), 100.0 * i.level)
    });
    format!("{}{interval}, N = {} and {}", number(figure.value), figure.n_fake, figure.n_real)
}

fn number(value: f64) -> String {
    if value.abs() >= 10.0 { format!("{value:.1}") } else { format!("{value:.3}") }
}
