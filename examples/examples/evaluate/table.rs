//! The table in the form of the paper: base, adapted, difference.

use std::fmt::Write;

use cxr::metrics::memorization::AuditReport;
use cxr::metrics::{Card, Figure};

use cxr_examples::evaluation::copies;
use cxr_examples::evaluation::labels::{NotAvailable, OfLabels};

use crate::distances::Measured;

/// Everything that a reader gets, in Markdown.
pub(crate) fn markdown(
    base: Option<&Measured>,
    adapted: &Measured,
    copies: Option<&AuditReport>,
    labels: &OfLabels,
) -> String {
    let mut out = String::from("# Evaluation\n\n");
    // Writing to a string does not fail.
    match base {
        Some(_) => out.push_str("| Figure | Base | LoRA | Difference |\n|---|---|---|---|\n"),
        None => out.push_str("| Figure | Synthetic |\n|---|---|\n"),
    }
    for figure in &adapted.card.figures {
        let name = metric(figure);
        match base {
            None => {
                let _ = writeln!(out, "| {name} | {} |", value(figure));
            }
            Some(base) => {
                let other = base.card.figures.iter().find(|other| other.name == figure.name);
                let shown = other.map_or("not available".into(), value);
                let difference = other.map_or("-".into(), |other| signed(figure.value - other.value));
                let _ = writeln!(out, "| {name} | {shown} | {} | {difference} |", value(figure));
            }
        }
    }
    for NotAvailable { figure, why } in &adapted.not_available {
        let rest = if base.is_some() { " | - | - |" } else { " |" };
        let _ = writeln!(out, "| {figure} | not available: {why}{rest}");
    }
    out.push_str(
        "\nIn brackets: confidence intervals over images. A distance is to be read beside its floor, what real images \
         score among themselves at that N, and not beside distances of other N, resolution or resize mode.\n",
    );
    let sets: [(&str, Option<&Card>); 2] = [("Base", base.map(|b| &b.card)), ("LoRA", Some(&adapted.card))];
    for (title, card) in sets {
        let title = if base.is_none() { "Synthetic" } else { title };
        if let Some(card) = card {
            let _ = write!(out, "\n## {title}\n\n{}", card.markdown());
        }
    }
    if let Some(copies) = copies {
        let _ = write!(out, "\n## Copies of training images\n\n{}\n", copies::words(copies));
    }
    if let Some(findings) = &labels.findings {
        let _ = write!(
            out,
            "\n## Does an image show its findings? ({})\n\n{}\n",
            findings.classifier,
            findings.markdown()
        );
    }
    if let Some(usefulness) = &labels.usefulness {
        let name = &usefulness.extractor.name;
        let _ = write!(
            out,
            "\n## What a linear head on {name} learns (AUROC on real images)\n\n{}\n",
            usefulness.markdown()
        );
    }
    for NotAvailable { figure, why } in &labels.not_available {
        let _ = write!(out, "\n{figure}: not available: {why}\n");
    }
    out
}

/// `fid/inception-v3-2015-12-05` as people write it.
fn metric(figure: &Figure) -> String {
    let (metric, extractor) = figure.name.split_once('/').unwrap_or((&figure.name, ""));
    let shown = match metric {
        "fid" => "FID".into(),
        "kid" => "KID".into(),
        "inception_score" => "Inception Score".into(),
        "frechet_distance" | "kernel_distance" => format!("{} ({extractor})", metric.replace('_', " ")),
        other => other.replace('_', " "),
    };
    let better = match metric {
        "fid" | "kid" | "frechet_distance" | "kernel_distance" => " (lower is better)",
        "precision" | "recall" | "density" | "coverage" => " (higher is better)",
        _ => "",
    };
    format!("{shown}{better}, N = {}", figure.n_fake)
}

fn value(figure: &Figure) -> String {
    let mut shown = number(figure.value);
    if let Some(deviation) = figure.standard_deviation {
        let _ = write!(shown, " ± {}", number(deviation));
    }
    if let Some(interval) = &figure.interval {
        let _ = write!(shown, " ({} to {})", number(interval.low), number(interval.high));
    }
    shown
}

fn signed(value: f64) -> String {
    format!("{}{}", if value > 0.0 { "+" } else { "" }, number(value))
}

/// As the paper prints them: two decimals, more where a number is small.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size < 1e-4 => format!("{value:.1e}"),
        size if size < 0.1 => format!("{value:.4}"),
        size if size < 1.0 => format!("{value:.3}"),
        _ => format!("{value:.2}"),
    }
}
