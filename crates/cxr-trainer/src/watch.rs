//! What people look at: `metrics.jsonl` and the loss curve.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use plotters::style::register_font;
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Optimizer steps done, from 1.
    pub step: u64,
    /// The epoch that the step's first sample belongs to, from 0.
    pub epoch: u64,
    /// Loss of the step.
    pub loss: f64,
    /// Exponential average of the loss.
    pub smoothed: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Samples per second since the line before.
    pub samples_per_second: f64,
}

/// Appends to a run's `metrics.jsonl`.
pub struct Metrics {
    path: PathBuf,
    file: std::fs::File,
}

impl Metrics {
    /// Opens the file of a run that has done `step` steps; lines of later steps (of a run that was killed after
    /// its last checkpoint) are dropped.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let kept: Vec<Record> = if path.exists() {
            read(path)?.into_iter().filter(|record| record.step <= step).collect()
        } else {
            Vec::new()
        };
        let mut text = String::new();
        for record in kept {
            text.push_str(&line(&record));
        }
        cxr_core::atomic::write_bytes(path, text.as_bytes()).map_err(TrainError::file(path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::file(path))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends one line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn append(&mut self, record: &Record) -> Result<(), TrainError> {
        self.file.write_all(line(record).as_bytes()).map_err(TrainError::file(&self.path))
    }
}

fn line(record: &Record) -> String {
    // A record is numbers alone; JSON has a form for all of them (null for what is not finite).
    serde_json::to_string(record).map(|line| line + "\n").unwrap_or_default()
}

/// The lines of a `metrics.jsonl`; a last line that was cut off by a kill is left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read(path: &Path) -> Result<Vec<Record>, TrainError> {
    let file = std::fs::File::open(path).map_err(TrainError::file(path))?;
    let mut records = Vec::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(TrainError::file(path))?;
        match serde_json::from_str(&line) {
            Ok(record) => records.push(record),
            Err(_) => break,
        }
    }
    Ok(records)
}

/// The letters of the loss curve, so that it is drawn alike where no fonts are installed; `fonts/LICENSE` has its
/// terms.
const FONT: &[u8] = include_bytes!("../fonts/DejaVuSans-Latin.ttf");
/// Its name in the plotting library's table: one of our own, which replaces no font of the embedding program.
const FONT_NAME: &str = "cxr-trainer";

/// Draws the loss over the steps, raw and smoothed (the paper's Figure 2), as PNG.
///
/// # Errors
/// If there is nothing to draw, or the picture cannot be written.
pub fn plot_loss(records: &[Record], title: &str, path: &Path) -> Result<(), TrainError> {
    let failed = |problem: String| TrainError::Plot { path: path.to_path_buf(), problem };
    let (Some(first), Some(last)) = (records.first(), records.last()) else {
        return Err(failed("no steps".to_string()));
    };
    register_font(FONT_NAME, FontStyle::Normal, FONT)
        .map_err(|_| failed("its font is broken".to_string()))?;
    // The scale leaves out the few highest losses of the start, which would flatten all the rest.
    let mut sorted: Vec<f64> = records.iter().map(|r| r.loss).filter(|l| l.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let top = sorted.get(sorted.len() * 98 / 100).or(sorted.last()).copied().unwrap_or(1.0).max(1e-9) * 1.15;
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        let temporary = path.with_extension("part.png");
        {
            let root = BitMapBackend::new(&temporary, (900, 480)).into_drawing_area();
            root.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&root)
                .margin(12)
                .set_label_area_size(LabelAreaPosition::Left, 60)
                .set_label_area_size(LabelAreaPosition::Bottom, 40)
                .caption(title, (FONT_NAME, 20))
                .build_cartesian_2d(
                    first.step as f64..(last.step as f64).max(first.step as f64 + 1.0),
                    0.0..top,
                )?;
            let label = (FONT_NAME, 14);
            chart
                .configure_mesh()
                .x_desc("step")
                .y_desc("loss")
                .label_style(label)
                .axis_desc_style(label)
                .x_label_formatter(&|step| format!("{step:.0}"))
                .bold_line_style(RGBColor(220, 220, 220))
                .light_line_style(WHITE)
                .draw()?;
            let points = |value: fn(&Record) -> f64| {
                records.iter().map(move |r| (r.step as f64, value(r).min(top))).collect::<Vec<_>>()
            };
            chart.draw_series(LineSeries::new(points(|r| r.loss), RGBColor(170, 195, 225)))?;
            chart.draw_series(LineSeries::new(
                points(|r| r.smoothed),
                RGBColor(20, 70, 140).stroke_width(2),
            ))?;
            root.present()?;
        }
        std::fs::rename(&temporary, path)?;
        Ok(())
    };
    draw().map_err(|problem| failed(problem.to_string()))
}
