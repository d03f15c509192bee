//! What people look at: `metrics.jsonl` and the loss curve.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use plotters::style::register_font;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{TimestepLoss, TrainError};

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
    /// The most memory that the process has had at once so far, resident, in bytes; `None` where the system does not say.
    /// On a GPU this is the host's.
    #[serde(default)]
    pub peak_memory: Option<u64>,
}

/// One line of `validation.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Optimizer steps done, from 1.
    pub step: u64,
    /// Mean over all bins; one that is not finite is `null` in the file.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The loss by parts of the timesteps.
    pub bins: Vec<TimestepLoss>,
}

/// JSON has no NaN: what is not finite is written as null.
pub(crate) fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// A line of a file that grows over a run.
pub trait Line: Serialize + DeserializeOwned {
    /// Optimizer steps done.
    fn step(&self) -> u64;
}

impl Line for Record {
    fn step(&self) -> u64 {
        self.step
    }
}

impl Line for Validation {
    fn step(&self) -> u64 {
        self.step
    }
}

/// Appends to a file of JSON lines, as `metrics.jsonl` and `validation.jsonl` are.
pub struct Journal<L> {
    path: PathBuf,
    file: std::fs::File,
    lines: Vec<L>,
}

impl<L: Line> Journal<L> {
    /// Opens the file of a run that has done `step` steps; lines of later steps (of a run that was killed after
    /// its last checkpoint) are dropped.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let lines: Vec<L> = if path.exists() {
            read(path)?.into_iter().filter(|line: &L| line.step() <= step).collect()
        } else {
            Vec::new()
        };
        let text: String = lines.iter().map(text).collect();
        cxr_core::atomic::write_bytes(path, text.as_bytes()).map_err(TrainError::file(path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::file(path))?;
        Ok(Self { path: path.to_path_buf(), file, lines })
    }

    /// Appends one line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn append(&mut self, line: L) -> Result<(), TrainError> {
        self.file.write_all(text(&line).as_bytes()).map_err(TrainError::file(&self.path))?;
        self.lines.push(line);
        Ok(())
    }

    /// All lines, those of before included.
    pub fn lines(&self) -> &[L] {
        &self.lines
    }
}

fn text<L: Line>(line: &L) -> String {
    // Lines are numbers alone; JSON has a form for all of them (null for what is not finite).
    serde_json::to_string(line).map(|line| line + "\n").unwrap_or_default()
}

/// The lines of a `metrics.jsonl` or `validation.jsonl`; a last line that was cut off by a kill is left out.
///
/// # Errors
/// If the file cannot be read; [`TrainError::Line`] for any other line that cannot be understood.
pub fn read<L: Line>(path: &Path) -> Result<Vec<L>, TrainError> {
    let content = std::fs::read_to_string(path).map_err(TrainError::file(path))?;
    let mut lines = Vec::new();
    for (index, line) in content.split_inclusive('\n').enumerate() {
        match serde_json::from_str(line) {
            Ok(line) => lines.push(line),
            Err(_) if !line.ends_with('\n') => break,
            Err(problem) => {
                let (path, number) = (path.to_path_buf(), index + 1);
                return Err(TrainError::Line { path, number, problem: problem.to_string() });
            }
        }
    }
    Ok(lines)
}

/// The letters of the loss curve, so that it is drawn alike where no fonts are installed; `fonts/LICENSE` has its
/// terms.
const FONT: &[u8] = include_bytes!("../fonts/DejaVuSans-Latin.ttf");
/// Its name in the plotting library's table: one of our own, which replaces no font of the embedding program.
const FONT_NAME: &str = "cxr-trainer";

/// Draws the loss over the steps, raw and smoothed (the paper's Figure 2), and the validation loss in orange, as PNG.
///
/// # Errors
/// If there is nothing to draw, or the picture cannot be written.
pub fn plot_loss(
    records: &[Record],
    validations: &[Validation],
    title: &str,
    path: &Path,
) -> Result<(), TrainError> {
    let failed = |problem: String| TrainError::Plot { path: path.to_path_buf(), problem };
    let Some(last) = records.last() else {
        return Err(failed("no steps".to_string()));
    };
    register_font(FONT_NAME, FontStyle::Normal, FONT)
        .map_err(|_| failed("its font is broken".to_string()))?;
    // The scale leaves out the few highest losses of the start, which would flatten all the rest.
    let mut sorted: Vec<f64> = records.iter().map(|r| r.loss).filter(|l| l.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let top = sorted.get(sorted.len() * 98 / 100).or(sorted.last()).copied().unwrap_or(1.0).max(1e-9) * 1.15;
    let top =
        validations.iter().map(|v| v.loss).filter(|l| l.is_finite()).fold(top, |top, l| top.max(l * 1.05));
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
                .build_cartesian_2d(0.0..last.step as f64 * 1.01, 0.0..top)?;
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
            let (light, dark, orange) =
                (RGBColor(170, 195, 225), RGBColor(20, 70, 140), RGBColor(215, 110, 20));
            let key = |colour: RGBColor| {
                move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
            };
            chart.draw_series(LineSeries::new(points(|r| r.loss), light))?.label("loss").legend(key(light));
            chart
                .draw_series(LineSeries::new(points(|r| r.smoothed), dark.stroke_width(2)))?
                .label("smoothed")
                .legend(key(dark));
            if records.len() == 1 {
                // no line goes through one point
                chart.draw_series(
                    points(|r| r.smoothed).into_iter().map(|at| Circle::new(at, 3, dark.filled())),
                )?;
            }
            if !validations.is_empty() {
                let points = || validations.iter().map(|v| (v.step as f64, v.loss.min(top)));
                chart
                    .draw_series(LineSeries::new(points(), orange.stroke_width(2)))?
                    .label("validation")
                    .legend(key(orange));
                chart.draw_series(points().map(|point| Circle::new(point, 3, orange.filled())))?;
            }
            chart
                .configure_series_labels()
                // where a loss that falls does not come by
                .position(SeriesLabelPosition::LowerLeft)
                .label_font(label)
                .background_style(WHITE.mix(0.8))
                .border_style(RGBColor(220, 220, 220))
                .draw()?;
            root.present()?;
        }
        std::fs::rename(&temporary, path)?;
        Ok(())
    };
    draw().map_err(|problem| failed(problem.to_string()))
}
