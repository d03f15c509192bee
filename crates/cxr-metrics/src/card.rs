//! What a figure must carry to be believed: N, interval, floor, resolution, extractor, seed.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::extractor::ExtractorId;
use crate::image::ImageSize;
use crate::interval::{Floor, Interval};

/// One figure with everything that it depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Name of the metric with its extractor, e.g. `frechet_distance/cxr-small-v1`.
    pub name: String,
    /// The number.
    pub value: f64,
    /// Standard deviation over subsets or splits, where the metric has one.
    pub standard_deviation: Option<f64>,
    /// Confidence interval over images.
    pub interval: Option<Interval>,
    /// The same figure between parts of the real set.
    pub floor: Option<Floor>,
    /// Real images.
    pub n_real: usize,
    /// Synthetic images.
    pub n_fake: usize,
    /// Size of the pictures that were measured.
    pub resolution: ImageSize,
    /// The network that made the features; none for a metric without.
    pub extractor: Option<ExtractorId>,
    /// Seed of every random choice.
    pub seed: u64,
    /// What a reader has to know: small N, unequal sizes, what was left out.
    pub notes: Vec<String>,
}

/// The figures of one comparison.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// In the order in which they were taken.
    pub figures: Vec<Figure>,
}

impl Card {
    /// The figure of this full name, or of this metric (`frechet_distance`) whatever the extractor.
    pub fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|f| f.name == name || f.name.split('/').next() == Some(name))
    }

    /// A Markdown table with the notes below it.
    pub fn markdown(&self) -> String {
        let mut out = String::from(
            "| Figure | Value | Interval | Floor (real against real) | N real | N synthetic | Resolution |\n\
             |---|---|---|---|---|---|---|\n",
        );
        for figure in &self.figures {
            // Writing to a string does not fail.
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} |",
                figure.name,
                with_deviation(figure.value, figure.standard_deviation),
                figure.interval.as_ref().map_or("-".into(), |i| {
                    format!("{} to {} ({:.0} %)", number(i.low), number(i.high), 100.0 * i.level)
                }),
                figure.floor.as_ref().map_or("-".into(), |f| {
                    format!("{} (N = {})", with_deviation(f.mean, Some(f.standard_deviation)), f.n)
                }),
                figure.n_real,
                figure.n_fake,
                figure.resolution,
            );
        }
        let mut notes: Vec<String> = Vec::new();
        for figure in &self.figures {
            if let Some(id) = &figure.extractor {
                let short = id.hash.get(..12).unwrap_or(&id.hash);
                let resize = id.resize.as_ref().map_or(String::new(), |mode| format!(", resize mode {mode}"));
                notes.push(format!("{} has {} outputs, SHA-256 {short}{resize}.", id.name, id.feature_dim));
            }
            notes.extend(figure.notes.iter().cloned());
        }
        for (i, note) in notes.iter().enumerate() {
            if !notes[..i].contains(note) {
                let _ = write!(out, "\n- {note}");
            }
        }
        out.push('\n');
        out
    }
}

fn with_deviation(value: f64, deviation: Option<f64>) -> String {
    deviation.map_or(number(value), |d| format!("{} ± {}", number(value), number(d)))
}

/// Four significant figures.
fn number(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if size == 0.0 => "0".into(),
        _ if size < 1e-3 => format!("{value:.3e}"),
        _ => {
            let digits = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
            format!("{value:.digits$}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> Card {
        let figure = Figure {
            name: "frechet_distance/toy".into(),
            value: 12.3456,
            standard_deviation: None,
            interval: Some(Interval {
                low: 10.0,
                high: 15.5,
                level: 0.95,
                method: "bootstrap percentile".into(),
                replicates: Some(10),
            }),
            floor: Some(Floor { mean: 0.012347, standard_deviation: 0.00012, n: 50, splits: 3 }),
            n_real: 100,
            n_fake: 200,
            resolution: ImageSize::square(64),
            extractor: Some(ExtractorId {
                name: "toy".into(),
                hash: "0123456789abcdef".into(),
                feature_dim: 8,
                input_size: ImageSize::square(64),
                resize: None,
            }),
            seed: 1,
            notes: vec!["few images".into()],
        };
        Card { figures: vec![figure.clone(), Figure { name: "kernel_distance/toy".into(), ..figure }] }
    }

    #[test]
    fn a_card_survives_json() {
        let json = serde_json::to_string(&card()).unwrap();
        assert_eq!(serde_json::from_str::<Card>(&json).unwrap(), card());
        assert_eq!(card().figure("kernel_distance").unwrap().name, "kernel_distance/toy");
        assert!(card().figure("kernel").is_none());
    }

    #[test]
    fn the_table_names_n_interval_floor_and_extractor_once() {
        let table = card().markdown();
        for part in ["12.35", "10.00 to 15.50 (95 %)", "0.01235", "(N = 50)", "| 100 | 200 | 64x64 |"] {
            assert!(table.contains(part), "{part} in\n{table}");
        }
        assert_eq!(table.matches("SHA-256 0123456789ab.").count(), 1);
        assert_eq!(table.matches("few images").count(), 1);
    }
}
