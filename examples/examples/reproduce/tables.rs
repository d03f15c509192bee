//! The tables of the report below its figures.

use cxr::metrics::findings::{Measured, Slice};
use cxr::metrics::memorization::Evidence;
use cxr_examples::evaluation::labels::{NotAvailable, OfLabels};
use cxr_examples::progress::seconds_text;
use cxr_examples::report::Table;
use serde_json::Value;

use crate::audit::Copies;
use crate::findings::Checked;
use crate::page::Parts;

/// Impressions that are shown: those of the grids.
const SHOWN: usize = 32;

/// All of them, in order.
pub(crate) fn all(parts: &Parts<'_>) -> Vec<Table> {
    vec![
        prompts(parts),
        copies(&parts.copies.result),
        findings(&parts.findings.result),
        usefulness(&parts.findings.result),
        preparation(parts),
        settings(parts),
        times(parts),
    ]
}

fn prompts(parts: &Parts<'_>) -> Table {
    let positions = parts.data.prompted(parts.settings.pictures.min(SHOWN));
    let place = |i: usize| format!("row {}, column {}", i / 4 + 1, i % 4 + 1);
    let text = |position: usize| parts.data.collection.pairs[position].text.clone();
    let rows = positions.iter().enumerate().map(|(i, &position)| (place(i), text(position))).collect();
    Table::of_values("Impressions of the grids, row by row", rows)
}

fn copies(copies: &Copies) -> Table {
    let mut rows = vec![(
        "look like copies (copies.csv has all pictures, copies.png those)".to_owned(),
        format!(
            "{} of {} pictures, against all {} training radiographs",
            copies.flagged, copies.pictures, copies.train
        ),
    )];
    if let Some(calibration) = &copies.calibration {
        rows.push(("in pixels, mirrored and moved".into(), copies.in_pixels.to_string()));
        rows.push(("in features".into(), copies.in_features.to_string()));
        rows.push((
            "held-out radiographs, by which it was calibrated".into(),
            format!(
                "{} of {} flagged: with {:.0} % confidence no more than {} % of real radiographs are",
                calibration.flagged,
                calibration.held_out,
                100.0 * calibration.confidence,
                100.0 * calibration.rate
            ),
        ));
        if let Some(pixels) = calibration.scale(Evidence::PixelDistance) {
            rows.push((
                "median distance in pixels to the nearest training radiograph".into(),
                format!(
                    "{:.3}; of held-out radiographs {:.3}; what counts as near: below {:.3}",
                    copies.pixel_median, pixels.median, pixels.threshold
                ),
            ));
        }
    }
    if let Some(prompts) = &copies.prompts {
        rows.push((
            "pictures whose impression is a training radiograph's".into(),
            format!(
                "{}, {} of them flagged; of {} others {}",
                prompts.training_prompts,
                prompts.training_prompts_flagged,
                prompts.new_prompts,
                prompts.new_prompts_flagged
            ),
        ));
    }
    let title = "Are there copies of training radiographs among the adapted model's pictures?";
    Table { notes: copies.notes.clone(), ..Table::of_values(title, rows) }
}

fn findings(checked: &Checked) -> Table {
    let title = "Does a picture show its findings?".to_owned();
    let Some(adapted) = &checked.adapted.findings else {
        return lacking(&title, &checked.adapted, "findings");
    };
    let head = [
        "Finding",
        "AUROC, base",
        "AUROC, LoRA",
        "AUROC, radiographs",
        "Sensitivity, LoRA",
        "Sensitivity, radiographs",
        "Specificity, LoRA",
        "Specificity, radiographs",
        "With it, of N: LoRA; radiographs",
    ];
    let rows = adapted.rows.iter().filter(|row| row.slice == Slice::All).map(|row| {
        let base = checked.base.findings.as_ref().and_then(|base| base.row(&row.finding, Slice::All));
        let (made, real) = (&row.synthetic, &row.real);
        vec![
            row.finding.clone(),
            base.map_or("not available".into(), |base| measured(&base.synthetic.auroc)),
            measured(&made.auroc),
            measured(&real.auroc),
            measured(&made.sensitivity),
            measured(&real.sensitivity),
            measured(&made.specificity),
            measured(&real.specificity),
            format!("{} of {}; {} of {}", made.positives, made.n, real.positives, real.n),
        ]
    });
    let rows = rows.collect();
    let mut notes = vec![format!(
        "By {}: a finding counts as shown where its score is above the threshold that parts the held-out radiographs best. \
         An area of 0.5 is chance. Where the area on radiographs is near 0.5, the classifier cannot tell, and says \
         nothing of pictures either. A finding of fewer than {} pictures, or of all but so few, has no figure. \
         findings.json has views and denied findings too.",
        adapted.classifier, adapted.needed
    )];
    notes.extend(adapted.notes.iter().cloned());
    notes.extend(why(&checked.base, "findings").into_iter().map(|why| format!("base: {why}")));
    Table { title, head: head.map(str::to_owned).into(), rows, notes }
}

fn usefulness(checked: &Checked) -> Table {
    let title = "What does a classifier learn from the adapted model's pictures?".to_owned();
    let Some(report) = &checked.adapted.usefulness else {
        return lacking(&title, &checked.adapted, "usefulness");
    };
    let head = [
        "Finding".to_owned(),
        format!("Trained on radiographs ({})", report.n_real),
        format!("On pictures ({})", report.n_synthetic),
        "On both".into(),
        "Both less radiographs".into(),
        "Held-out radiographs with it, of N".into(),
    ];
    let rows = report.rows.iter().map(|row| {
        vec![
            row.finding.clone(),
            measured(&row.real.auroc),
            measured(&row.synthetic.auroc),
            measured(&row.both.auroc),
            measured(&row.gain),
            format!("{} of {}", row.positives, row.positives + row.negatives),
        ]
    });
    let rows = rows.collect();
    let mut notes = vec![format!(
        "Areas under the ROC curve on held-out radiographs, of linear heads on the features of {}.",
        report.extractor.name
    )];
    notes.extend(report.notes.iter().cloned());
    Table { title, head: head.into(), rows, notes }
}

/// The table of what cannot be measured.
fn lacking(title: &str, labels: &OfLabels, name: &str) -> Table {
    let rows = why(labels, name).into_iter().map(|why| (name.to_owned(), why)).collect();
    Table::of_values(title, rows)
}

/// Why a figure is not there.
fn why(labels: &OfLabels, name: &str) -> Vec<String> {
    let of = labels.not_available.iter().filter(|NotAvailable { figure, .. }| figure == name);
    of.map(|lacking| format!("not available: {}", lacking.why)).collect()
}

fn measured(measured: &Measured) -> String {
    match measured {
        Measured::Value { value, interval: None } => format!("{value:.2}"),
        Measured::Value { value, interval: Some(i) } => format!("{value:.2} ({:.2} to {:.2})", i.low, i.high),
        Measured::TooFew { found, .. } => format!("too few: {found}"),
        Measured::NoThreshold => "no threshold".into(),
    }
}

fn preparation(parts: &Parts<'_>) -> Table {
    let report = &parts.data.prepared.result.report;
    let split = &parts.data.split;
    let data = parts.args.data.as_ref();
    let mut rows = vec![
        ("data".to_owned(), data.map_or("the embedded thumbnails".into(), |data| data.display().to_string())),
        ("layout".into(), report.source.clone()),
        ("rows read".into(), report.rows_read.to_string()),
        ("radiographs kept".into(), report.kept.to_string()),
    ];
    rows.extend(report.skipped.iter().map(|(kind, count)| (format!("left out: {kind}"), count.to_string())));
    if let Some(filter) = &report.token_filter {
        let text = format!("at most {} tokens", filter.max_length);
        rows.push(("impressions".into(), text));
    }
    rows.extend([
        ("training side".into(), split.train.len().to_string()),
        ("held out".into(), split.test.len().to_string()),
        ("split".into(), format!("{:?}, seed {}", split.config.rule, split.config.seed)),
    ]);
    let notes = report.leakage.iter().flat_map(|leakage| &leakage.notes);
    rows.extend(notes.map(|note| ("leakage".to_owned(), note.clone())));
    Table::of_values("Data, and what stands on both sides of its split", rows)
}

fn settings(parts: &Parts<'_>) -> Table {
    let Parts { args, settings, adapter, distances, .. } = parts;
    let short = |hash: &str| hash.get(..16).unwrap_or(hash).to_owned();
    let made = &adapter.result;
    let mut rows: Vec<(String, String)> = vec![
        ("base model".into(), args.model.clone().unwrap_or_else(|| "the embedded model".into())),
        ("hash of its weights".into(), short(parts.model_hash)),
        ("preset".into(), args.preset.clone().unwrap_or_else(|| "none".into())),
        ("pictures of each model".into(), settings.pictures.to_string()),
        ("their side".into(), format!("{} pixels", settings.finetune.image_size)),
        ("sampler".into(), format!("DPM-Solver++ 2M, {} steps", settings.sampling_steps)),
        ("guidance".into(), settings.guidance.to_string()),
        (
            "adapter".into(),
            format!("{} layers, {} parameters beside {} frozen", made.layers, made.trainable, made.frozen),
        ),
        ("smoothed loss at the end".into(), format!("{:.4}", made.loss)),
        ("seed".into(), settings.seed.to_string()),
    ];
    let config = serde_json::to_value(&settings.finetune).unwrap_or_default();
    flatten("", &config, &mut rows);
    let figures = || distances.result.adapted.figures.iter();
    if let Some(extractor) = figures().find_map(|figure| figure.extractor.as_ref()) {
        let resize = extractor.resize.as_ref().map_or(String::new(), |mode| format!(", resize {mode}"));
        let text = format!("{}, hash {}{resize}", extractor.name, short(&extractor.hash));
        rows.push(("network of the distances".into(), text));
    }
    for note in figures().flat_map(|figure| &figure.notes) {
        if !rows.iter().any(|(_, text)| text == note) {
            rows.push(("distances".into(), note.clone()));
        }
    }
    rows.push(("program".into(), format!("cxr {}", env!("CARGO_PKG_VERSION"))));
    Table::of_values("Settings", rows)
}

/// Settings of the fine-tuning by their keys, with dots.
fn flatten(prefix: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(table) => {
            for (key, value) in table {
                let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&key, value, rows);
            }
        }
        Value::String(text) => rows.push((format!("fine-tuning: {prefix}"), text.clone())),
        Value::Number(number) if number.is_f64() => {
            // Settings of single precision are not meant to the digits of double.
            let value = number.as_f64().unwrap_or(f64::NAN);
            let single = value as f32;
            let same = f64::from(single) == value;
            let text = if same { single.to_string() } else { value.to_string() };
            rows.push((format!("fine-tuning: {prefix}"), text));
        }
        other => rows.push((format!("fine-tuning: {prefix}"), other.to_string())),
    }
}

fn times(parts: &Parts<'_>) -> Table {
    let rows = [
        ("prepare", parts.data.prepared.seconds),
        ("base-pictures", parts.base.done.seconds),
        ("finetune", parts.adapter.seconds),
        ("lora-pictures", parts.adapted.done.seconds),
        ("audit", parts.copies.seconds),
        ("distances", parts.distances.seconds),
        ("findings", parts.findings.seconds),
    ];
    let rows = rows.map(|(stage, seconds)| (stage.to_owned(), seconds_text(seconds)));
    let notes = vec!["Of the call that finished the stage, in minutes and seconds.".to_owned()];
    Table { notes, ..Table::of_values("Times", rows.into()) }
}
