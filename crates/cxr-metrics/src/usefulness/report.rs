//! What heads trained on real, synthetic and both are worth, and their table.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::logistic::LogisticConfig;
use crate::extractor::ExtractorId;
use crate::findings::Measured;

/// A head trained on one set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// Training pictures with the finding.
    pub positives: usize,
    /// Training pictures without it.
    pub negatives: usize,
    /// Area under the ROC curve on the held-out real pictures.
    pub auroc: Measured,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsefulnessRow {
    /// Its name.
    pub finding: String,
    /// Held-out pictures with it.
    pub positives: usize,
    /// Held-out pictures without it.
    pub negatives: usize,
    /// Trained on real pictures.
    pub real: Trained,
    /// Trained on synthetic pictures.
    pub synthetic: Trained,
    /// Trained on both.
    pub both: Trained,
    /// Area of `both` less that of `real`, its interval from the same resampled pictures: narrower than those of
    /// the two.
    pub gain: Measured,
}

/// What synthetic pictures are worth for training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsefulnessReport {
    /// The network of the features.
    pub extractor: ExtractorId,
    /// How heads were trained.
    pub logistic: LogisticConfig,
    /// Fewest positives and negatives of a training set and of the held-out set.
    pub needed: usize,
    /// Seed of the intervals.
    pub seed: u64,
    /// Real training pictures.
    pub n_real: usize,
    /// Synthetic training pictures.
    pub n_synthetic: usize,
    /// Held-out real pictures.
    pub n_held_out: usize,
    /// One per finding.
    pub rows: Vec<UsefulnessRow>,
    /// What a reader has to know.
    pub notes: Vec<String>,
}

impl UsefulnessReport {
    /// The row of a finding.
    pub fn row(&self, finding: &str) -> Option<&UsefulnessRow> {
        self.rows.iter().find(|row| row.finding == finding)
    }

    /// As a Markdown table with its notes below.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "| Finding | Trained on real ({}) | On synthetic ({}) | On both | Both less real | Held-out positives of N |\n\
             |---|---|---|---|---|---|\n",
            self.n_real, self.n_synthetic
        );
        for UsefulnessRow { finding, positives, negatives, real, synthetic, both, gain } in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {positives} of {} |",
                finding.replace('|', "\\|"),
                real.auroc.text(),
                synthetic.auroc.text(),
                both.auroc.text(),
                gain.text(),
                positives + negatives
            );
        }
        for note in &self.notes {
            let _ = write!(text, "\n- {note}");
        }
        text
    }
}
