//! The figures of every finding, and their table.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::measure::ThresholdRule;
use crate::interval::Interval;
use crate::labels::{ImageRecord, ViewGroup};

/// Which pictures a row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slice {
    /// All whose label is known.
    All,
    /// Frontal views.
    Frontal,
    /// Lateral views.
    Lateral,
    /// As negatives only pictures whose prompt or report denies the finding in words ("no effusion"): shows
    /// models that draw whatever is named.
    Denied,
}

impl Slice {
    /// All slices, in the order of tables.
    pub const ALL: [Self; 4] = [Self::All, Self::Frontal, Self::Lateral, Self::Denied];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Frontal => "frontal",
            Self::Lateral => "lateral",
            Self::Denied => "denied in words",
        }
    }

    /// Whether a picture with this label belongs to it.
    pub(super) fn holds(self, record: &ImageRecord, finding: &str, present: bool) -> bool {
        match self {
            Self::All => true,
            Self::Frontal => record.view_group() == Some(ViewGroup::Frontal),
            Self::Lateral => record.view_group() == Some(ViewGroup::Lateral),
            Self::Denied => present || record.denies(finding),
        }
    }
}

/// A figure, or why there is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Measured {
    /// A figure.
    Value {
        /// In [0, 1].
        value: f64,
        /// Bootstrap interval over patients; none without replicates.
        interval: Option<Interval>,
    },
    /// There are too few pictures of a kind that the figure needs.
    TooFew {
        /// How many of the needed kind there are (of the rarer one, where it needs both).
        found: usize,
        /// How many were asked for.
        needed: usize,
    },
    /// A share above a threshold, and no threshold: there were too few real pictures to choose it, or none was
    /// given.
    NoThreshold,
}

impl Measured {
    /// The figure, if there is one.
    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Value { value, .. } => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn text(&self) -> String {
        match self {
            Self::Value { value, interval: None } => format!("{value:.3}"),
            Self::Value { value, interval: Some(i) } => format!("{value:.3} ({:.3} to {:.3})", i.low, i.high),
            Self::TooFew { found, .. } => format!("N = {found}"),
            Self::NoThreshold => "no threshold".into(),
        }
    }
}

/// The figures of one finding on one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// Pictures whose label is known.
    pub n: usize,
    /// Of these, with the finding.
    pub positives: usize,
    /// Without it.
    pub negatives: usize,
    /// Area under the ROC curve.
    pub auroc: Measured,
    /// Share of positives at or above the threshold.
    pub sensitivity: Measured,
    /// Share of negatives below the threshold.
    pub specificity: Measured,
}

/// One finding in one slice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FindingRow {
    /// Name of the finding, as the classifier has it.
    pub finding: String,
    /// Which pictures.
    pub slice: Slice,
    /// Score from which on the finding counts as shown.
    pub threshold: Option<f32>,
    /// Synthetic pictures against the labels of their prompts.
    pub synthetic: Measure,
    /// Held-out real pictures against their labels.
    pub real: Measure,
}

/// What the classifier says of all findings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FindingsReport {
    /// Name of the classifier.
    pub classifier: String,
    /// Where thresholds come from.
    pub threshold: ThresholdRule,
    /// Fewest positives, and fewest negatives, of a figure.
    pub needed: usize,
    /// Seed of the intervals.
    pub seed: u64,
    /// By finding, then slice; slices without any picture are left out.
    pub rows: Vec<FindingRow>,
    /// What a reader has to know.
    pub notes: Vec<String>,
}

impl FindingsReport {
    /// The row of a finding in a slice.
    pub fn row(&self, finding: &str, slice: Slice) -> Option<&FindingRow> {
        self.rows.iter().find(|row| row.finding == finding && row.slice == slice)
    }

    /// As a Markdown table with its notes below.
    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| Finding | Pictures | AUROC, synthetic | AUROC, real | Sensitivity, synthetic | Sensitivity, real | \
             Specificity, synthetic | Specificity, real | Positives of N, synthetic | Positives of N, real |\n\
             |---|---|---|---|---|---|---|---|---|---|\n",
        );
        for FindingRow { finding, slice, synthetic, real, .. } in &self.rows {
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} of {} | {} of {} |",
                finding.replace('|', "\\|"),
                slice.name(),
                synthetic.auroc.text(),
                real.auroc.text(),
                synthetic.sensitivity.text(),
                real.sensitivity.text(),
                synthetic.specificity.text(),
                real.specificity.text(),
                synthetic.positives,
                synthetic.n,
                real.positives,
                real.n,
            );
        }
        for note in &self.notes {
            let _ = write!(text, "\n- {note}");
        }
        text
    }
}
