//! One head per finding.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::logistic::{LinearHead, LogisticConfig};
use crate::error::{MetricsError, Result};
use crate::features::{FeatureSet, expect_samples, expect_size};
use crate::labels::ImageRecord;

/// Pictures with their features and what is known of them.
#[derive(Debug, Clone, Copy)]
pub struct Labelled<'a> {
    /// One row per picture.
    pub features: &'a FeatureSet,
    /// One per picture, in the same order.
    pub records: &'a [ImageRecord],
}

impl Labelled<'_> {
    pub(super) fn check(&self, what: &str, findings: &[String]) -> Result<()> {
        expect_samples(&format!("the {what} set"), 1, self.features.len())?;
        expect_size(|| format!("records of {what} pictures"), self.features.len(), self.records.len())?;
        if findings.iter().all(|finding| self.records.iter().all(|r| r.has(finding).is_none())) {
            return Err(MetricsError::NoLabels { what: what.into(), findings: findings.join(", ") });
        }
        Ok(())
    }

    /// Positions of the pictures whose label is known, and the labels.
    pub(super) fn known(&self, finding: &str) -> (Vec<usize>, Vec<bool>) {
        self.records.iter().enumerate().filter_map(|(i, r)| Some((i, r.has(finding)?))).unzip()
    }
}

/// A head for every finding that has enough pictures: a classifier of any extractor's features.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinearHeads {
    /// Findings that have a head.
    pub findings: Vec<String>,
    /// Their heads.
    pub heads: Vec<LinearHead>,
    /// Findings without one, with positives and negatives of the training set.
    pub left_out: Vec<(String, usize, usize)>,
}

impl LinearHeads {
    /// Trains a head for each of `findings` with at least `needed` positives and negatives.
    ///
    /// # Errors
    /// No pictures, records of another number, no labels at all, no finding with enough of them, no convergence.
    pub fn fit(
        findings: &[String],
        train: Labelled<'_>,
        needed: usize,
        config: &LogisticConfig,
    ) -> Result<Self> {
        train.check("training", findings)?;
        let fits: Vec<Result<Fit>> = findings.par_iter().map(|f| fit(f, train, needed, config)).collect();
        let mut heads = Self { findings: Vec::new(), heads: Vec::new(), left_out: Vec::new() };
        for (finding, fit) in findings.iter().zip(fits) {
            match fit? {
                Fit { head: Some(head), .. } => {
                    heads.findings.push(finding.clone());
                    heads.heads.push(head);
                }
                Fit { positives, negatives, .. } => {
                    heads.left_out.push((finding.clone(), positives, negatives));
                }
            }
        }
        if heads.heads.is_empty() {
            let most = heads.left_out.iter().map(|(_, p, n)| *p.min(n)).max().unwrap_or(0);
            expect_samples("the finding with the most positives and negatives", needed.max(1), most)?;
        }
        Ok(heads)
    }

    /// The logits `[n, findings]`.
    ///
    /// # Errors
    /// Features of another width than the heads were trained on.
    pub fn scores(&self, features: &FeatureSet) -> Result<FeatureSet> {
        let columns = self.heads.iter().map(|head| head.scores(features)).collect::<Result<Vec<_>>>()?;
        let values = (0..features.len()).flat_map(|i| columns.iter().map(move |column| column[i])).collect();
        FeatureSet::new(values, columns.len())
    }
}

/// What became of one finding.
pub(super) struct Fit {
    pub(super) positives: usize,
    pub(super) negatives: usize,
    /// None with fewer than are needed.
    pub(super) head: Option<LinearHead>,
}

pub(super) fn fit(finding: &str, train: Labelled<'_>, needed: usize, config: &LogisticConfig) -> Result<Fit> {
    let (rows, labels) = train.known(finding);
    let positives = labels.iter().filter(|label| **label).count();
    let negatives = labels.len() - positives;
    let enough = positives.min(negatives) >= needed.max(1);
    let head = enough.then(|| LinearHead::fit(train.features, &rows, &labels, config)).transpose()?;
    Ok(Fit { positives, negatives, head })
}
