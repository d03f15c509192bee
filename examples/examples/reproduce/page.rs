//! The report page: table, loss curve, grids, data, audit, settings.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cxr::dataset::{LeakageReport, contact_sheet};
use cxr::metrics;
use cxr_examples::demo::{pictures::grey_image, thumbnails::Thumbnails};
use cxr_examples::progress::seconds_text;
use cxr_examples::report::{self, Comparison, Figure, Report, Table};

use crate::Args;
use crate::lora::Finetuned;
use crate::measure::{Copies, Measured};
use crate::picture::Pictures;

/// Columns and pictures of a grid.
const COLUMNS: usize = 4;
const SHOWN: usize = 32;

/// Writes the grids, `report.html` and `report.md`.
pub(crate) fn write(
    args: &Args,
    (data, leakage): (&Thumbnails, &LeakageReport),
    lora: &Finetuned,
    measured: &Measured,
    [base, adapted]: [&Pictures; 2],
    seconds: f64,
) -> Result<()> {
    let grids = args.out.join("grids");
    std::fs::create_dir_all(&grids).with_context(|| format!("cannot make {}", grids.display()))?;
    let real: Vec<_> = base.positions.iter().take(SHOWN).map(|&i| grey_image(&data.pixels[i])).collect();
    let count = real.len();
    let figure = |name: &str, caption: String, images: &[image::RgbImage]| -> Result<Figure> {
        let path = grids.join(name);
        save(images, &path)?;
        Ok(Figure { caption, path, wide: false })
    };
    let figures = vec![
        figure("real.png", format!("{count} held-out radiographs"), &real)?,
        figure("base.png", "The base model's pictures of the same impressions".into(), &open(&base.files)?)?,
        figure(
            "adapted.png",
            "The adapted model's pictures of the same impressions, from the same seeds".into(),
            &open(&adapted.files)?,
        )?,
        Figure {
            caption: format!("Loss of the fine-tuning, {} steps (the paper's Figure 2)", args.lora_steps),
            path: lora.curve.clone(),
            wide: true,
        },
    ];
    let report = Report {
        title: "Chest radiographs from impressions: base model and LoRA".into(),
        summary: summary(args, data, measured),
        comparison: comparison(measured),
        figures,
        tables: vec![
            prompts(base),
            copies(&measured.copies),
            preparation(data, leakage),
            settings(args, lora, measured, seconds),
        ],
    };
    report::write(&report, &args.out)
}

fn open(files: &[PathBuf]) -> Result<Vec<image::RgbImage>> {
    let read = |file: &PathBuf| {
        Ok(image::open(file).with_context(|| format!("cannot read {}", file.display()))?.to_rgb8())
    };
    files.iter().take(SHOWN).map(read).collect()
}

/// A grid at twice its size: thumbnails are hard to see otherwise.
fn save(images: &[image::RgbImage], path: &Path) -> Result<()> {
    let sheet = contact_sheet(images, COLUMNS);
    let side = images.first().map_or(0, image::RgbImage::width);
    let factor = if side < 128 { 2 } else { 1 };
    let (width, height) = (sheet.width() * factor, sheet.height() * factor);
    image::imageops::resize(&sheet, width, height, image::imageops::FilterType::Nearest)
        .save(path)
        .with_context(|| format!("cannot write {}", path.display()))
}

fn summary(args: &Args, data: &Thumbnails, measured: &Measured) -> Vec<String> {
    let mut lines = vec![format!(
        "{} pictures of each model were made from the impressions of {} held-out radiographs and compared with \
         those radiographs. No patient stands on both sides of the split.",
        args.pictures,
        data.split.test.len()
    )];
    if let Some(figure) = measured.adapted.figures.first() {
        lines.push(format!(
            "Distances are taken in the features of {}, a small network trained on the findings of the training \
             radiographs: they compare these sets with each other. They are not FID or KID, which are defined by \
             the Inception network, and not to be set beside published figures. With {} pictures and {} \
             radiographs they show a direction; the intervals say how sure it is.",
            figure.extractor.as_ref().map_or("the extractor", |e| e.name.as_str()),
            figure.n_fake,
            figure.n_real
        ));
    }
    if args.smoke {
        lines.push("This is a smoke run: every stage at its smallest. Its numbers mean nothing.".into());
    }
    lines
}

fn comparison(measured: &Measured) -> Vec<Comparison> {
    let figures = measured.base.figures.iter().zip(&measured.adapted.figures).zip(&measured.train.figures);
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

fn prompts(pictures: &Pictures) -> Table {
    let rows = pictures.prompts.iter().take(SHOWN).enumerate();
    Table {
        title: "Impressions of the grids, row by row".into(),
        rows: rows
            .map(|(i, text)| (format!("row {}, column {}", i / COLUMNS + 1, i % COLUMNS + 1), text.clone()))
            .collect(),
    }
}

fn copies(copies: &Copies) -> Table {
    let prompts = &copies.prompts;
    Table {
        title: "Are there copies of training radiographs among the adapted model's pictures?".into(),
        rows: vec![
            (
                "look like copies (copies.csv has all pictures, copies.png shows those)".into(),
                format!(
                    "{} of {} pictures, against all {} training radiographs",
                    copies.flagged, copies.pictures, copies.train
                ),
            ),
            ("in pixels, mirrored and moved".into(), copies.in_pixels.to_string()),
            ("in features".into(), copies.in_features.to_string()),
            (
                "held-out radiographs of other patients, by which it was calibrated".into(),
                format!(
                    "{} of {} flagged: with {:.0} % confidence no more than 1 % of real radiographs are",
                    copies.held_out_flagged,
                    copies.held_out,
                    100.0 * copies.confidence
                ),
            ),
            (
                "median distance in pixels to the nearest training radiograph".into(),
                format!(
                    "{:.3}; of held-out radiographs {:.3}; what counts as near: below {:.3}",
                    copies.pixel_median, copies.held_out_pixel_median, copies.pixel_threshold
                ),
            ),
            (
                "pictures whose impression is a training radiograph's".into(),
                format!(
                    "{}, {} of them flagged; of {} others {}",
                    prompts.training_prompts,
                    prompts.training_prompts_flagged,
                    prompts.new_prompts,
                    prompts.new_prompts_flagged
                ),
            ),
        ],
    }
}

fn preparation(data: &Thumbnails, leakage: &LeakageReport) -> Table {
    let mut rows = vec![
        ("radiographs".into(), data.collection.len().to_string()),
        ("training side".into(), data.split.train.len().to_string()),
        ("held out".into(), data.split.test.len().to_string()),
        ("split".into(), format!("{:?}, seed {}", data.split.config.rule, data.split.config.seed)),
    ];
    rows.extend(leakage.notes.iter().map(|note| ("leakage".to_string(), note.clone())));
    Table { title: "Data".into(), rows }
}

fn settings(args: &Args, lora: &Finetuned, measured: &Measured, seconds: f64) -> Table {
    let short = |hash: &str| hash.get(..16).unwrap_or(hash).to_string();
    let mut rows: Vec<(String, String)> = vec![
        ("pictures of each model".into(), args.pictures.to_string()),
        ("sampler".into(), format!("DPM-Solver++ 2M, {} steps", args.sampling_steps)),
        ("guidance".into(), args.guidance.to_string()),
        ("adapter".into(), format!("rank {}, alpha {}, {} layers", args.rank, args.rank, lora.layers)),
        (
            "trainable parameters".into(),
            format!("{} beside {} frozen", lora.parameters, lora.unet_parameters),
        ),
        (
            "fine-tuning".into(),
            format!(
                "{} steps of {} radiographs, Adam, rate {}, caption dropout {}",
                args.lora_steps, args.lora_batch, args.lora_rate, args.caption_dropout
            ),
        ),
        ("smoothed loss at the end".into(), format!("{:.4}", lora.loss)),
        ("seed".into(), args.seed.to_string()),
        ("base model, hash of its weights".into(), short(&lora.model_hash)),
    ];
    if let Some(extractor) = measured.adapted.figures.first().and_then(|f| f.extractor.as_ref()) {
        let text = format!("{}, hash {}", extractor.name, short(&extractor.hash));
        rows.push(("extractor".into(), text));
    }
    let notes = measured.adapted.figures.iter().flat_map(|f| &f.notes);
    rows.extend(notes.map(|note| ("note".to_string(), note.clone())));
    rows.push(("program".into(), format!("cxr {}", env!("CARGO_PKG_VERSION"))));
    rows.push(("time of this call".into(), seconds_text(seconds)));
    Table { title: "Settings".into(), rows }
}
