//! The audit's pairs as CSV.

use std::path::Path;

use super::audit::{AuditEntry, AuditReport};
use super::calibration::Evidence;
use super::nearest::Neighbour;
use super::side::AuditSide;
use crate::error::{MetricsError, Result};
use crate::features::expect_size;

/// The columns of [`AuditReport::write_csv`], in their order.
pub const COLUMNS: [&str; 17] = [
    "picture",
    "flagged_for",
    "score",
    "nearest",
    "nearest_group",
    "pixel_distance",
    "pixel_second",
    "pixel_second_distance",
    "pixel_ratio",
    "mirrored",
    "right",
    "down",
    "feature_nearest",
    "feature_distance",
    "feature_second_distance",
    "feature_ratio",
    "prompt_in_training_reports",
];

impl AuditReport {
    /// Writes one row per pair, the strongest evidence first: flagged pairs alone, or with `all` every picture.
    /// `synthetic` and `train` are the sides that were audited, for the names.
    ///
    /// `flagged_for` lists [`Evidence::name`]s separated by `;`; `nearest` is the training picture that the
    /// picture looks like, with its group; `prompt_in_training_reports` counts training reports with the
    /// picture's prompt. What is not known is empty.
    ///
    /// # Errors
    /// Sides of other sizes, a file that cannot be written.
    pub fn write_csv(&self, path: &Path, all: bool, synthetic: &AuditSide, train: &AuditSide) -> Result<()> {
        self.expect_sides(synthetic, train)?;
        let rows = self.strongest_first(all).into_iter().map(|entry| row(entry, synthetic, train));
        let mut writer = csv::Writer::from_writer(Vec::new());
        let mut written = writer.write_record(COLUMNS);
        for row in rows {
            written = written.and_then(|()| writer.write_record(&row));
        }
        let failed = |source| MetricsError::File { path: path.to_path_buf(), action: "write", source };
        written.map_err(|error| failed(error.into()))?;
        let bytes = writer.into_inner().map_err(|error| failed(error.into_error()))?;
        cxr_core::atomic::write_bytes(path, &bytes).map_err(failed)
    }

    pub(super) fn expect_sides(&self, synthetic: &AuditSide, train: &AuditSide) -> Result<()> {
        expect_size(|| "synthetic pictures of an audit".into(), self.n_synthetic, synthetic.len())?;
        expect_size(|| "training pictures of an audit".into(), self.n_train, train.len())
    }

    /// Flagged entries, or all, by falling score; without scores by their distance in pixels.
    pub(super) fn strongest_first(&self, all: bool) -> Vec<&AuditEntry> {
        let mut entries: Vec<&AuditEntry> = self.entries.iter().filter(|e| all || e.flagged()).collect();
        // Without a score, the negative distance takes its place, in all of them.
        let strength = |entry: &AuditEntry| entry.score.unwrap_or(-entry.pixels.distance);
        entries.sort_by(|a, b| strength(b).total_cmp(&strength(a)));
        entries
    }
}

fn row(entry: &AuditEntry, synthetic: &AuditSide, train: &AuditSide) -> [String; 17] {
    let known = |value: Option<f64>| value.map(|v| format!("{v:.6}")).unwrap_or_default();
    let name = |index: usize| train.name(index).to_string();
    let feature = |value: fn(&Neighbour) -> Option<f64>| known(entry.features.as_ref().and_then(value));
    let pixels = &entry.pixels;
    [
        synthetic.name(entry.image).to_string(),
        entry.evidence.iter().map(|e| Evidence::name(*e)).collect::<Vec<_>>().join(";"),
        known(entry.score),
        name(entry.nearest()),
        train.groups.as_ref().map(|groups| groups[entry.nearest()].clone()).unwrap_or_default(),
        known(Some(pixels.distance)),
        pixels.second.map(name).unwrap_or_default(),
        known(pixels.second_distance),
        known(pixels.ratio),
        entry.view.mirrored.to_string(),
        entry.view.right.to_string(),
        entry.view.down.to_string(),
        entry.features.as_ref().map(|f| name(f.nearest)).unwrap_or_default(),
        feature(|f| Some(f.distance)),
        feature(|f| f.second_distance),
        feature(|f| f.ratio),
        entry.prompt.as_ref().map(|p| p.training_reports.to_string()).unwrap_or_default(),
    ]
}
