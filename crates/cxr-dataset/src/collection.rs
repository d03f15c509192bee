use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cxr_core::metadata::MetadataRow;
use serde::{Deserialize, Serialize};

use crate::{DatasetError, LabelSet, LeakageReport, ReadOptions, Split, TokenFilterReport, labels, source};

/// One image with the text that describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The image's name as the table gives it; unique in a collection, and what a split file lists.
    pub name: String,
    /// Where the image lies.
    pub image: PathBuf,
    /// The prompt: the impression through the prompt template.
    pub text: String,
    /// The impression the prompt was made from; splits and the leakage report compare it.
    pub impression: String,
    /// What a split keeps whole: a patient, or a study where no patient is known.
    pub group: Option<String>,
    /// Findings.
    pub labels: LabelSet,
    /// The projection, as the table gives it (`PA`, `Frontal`, ...).
    pub view: Option<String>,
    /// The line of the table on which this pair's row starts; the header is line 1.
    pub row: u64,
    /// Further columns, as the table gives them (age, sex, ...).
    pub extra: BTreeMap<String, String>,
}

impl Pair {
    /// Whether a label is set, capitals aside.
    pub fn has_label(&self, label: &str) -> bool {
        self.labels.iter().any(|own| own.eq_ignore_ascii_case(label))
    }

    /// Whether the view is this one, capitals aside.
    pub fn has_view(&self, view: &str) -> bool {
        self.view.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(view))
    }
}

/// A row that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The kind of problem, see [`DatasetError::kind`].
    pub kind: String,
    /// The whole message, with file and row.
    pub message: String,
}

/// Pairs in the order of their table, and how they came to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collection {
    /// Which source read it: `nih`, `kaggle` or `table`.
    pub source: String,
    /// The table whose lines [`Pair::row`] counts.
    pub table: PathBuf,
    /// The pairs.
    pub pairs: Vec<Pair>,
    /// How many rows the table has.
    pub rows_read: usize,
    /// Rows left out under [`crate::OnProblem::Skip`].
    pub skipped: Vec<Skipped>,
    /// Pairs left out because their impression holds a de-identification mark, under
    /// [`crate::Deidentified::Drop`].
    pub dropped_deidentified: usize,
    /// What the token filter did, once it has run.
    pub token_filter: Option<TokenFilterReport>,
}

impl Collection {
    /// Reads a folder (or a table), telling the known layouts apart by the tables they hold: Indiana's Kaggle edition
    /// (`indiana_reports.csv`), NIH ChestX-ray14 (`labels.csv` or `Data_Entry_2017*.csv`), or any table with named
    /// columns (`metadata.jsonl`, `metadata.csv`, or the path of a `.csv` / `.jsonl` file).
    ///
    /// # Errors
    /// When no table is found, and whatever the source reports, see [`source`].
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self, DatasetError> {
        source::open(path, options)
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Keeps the pairs that a test accepts, for instance one view: `collection.retain(|p| p.has_view("Frontal"))`.
    pub fn retain(&mut self, test: impl FnMut(&Pair) -> bool) {
        self.pairs.retain(test);
    }

    /// The pairs at these positions, in this order, with the history of the whole.
    ///
    /// # Panics
    /// When a position is not below [`Self::len`].
    pub fn subset(&self, positions: &[usize]) -> Self {
        let pairs = positions.iter().map(|&position| self.pairs[position].clone()).collect();
        Self { pairs, ..self.clone_without_pairs() }
    }

    fn clone_without_pairs(&self) -> Self {
        Self {
            source: self.source.clone(),
            table: self.table.clone(),
            pairs: Vec::new(),
            rows_read: self.rows_read,
            skipped: self.skipped.clone(),
            dropped_deidentified: self.dropped_deidentified,
            token_filter: self.token_filter.clone(),
        }
    }

    /// One metadata row per pair, the form that dataset, pictures and metrics share.
    ///
    /// An extra `seed` that is a number becomes the row's; other extras that have the name of a field of the row
    /// (a column `text` where the prompt comes from another one) are left out.
    pub fn metadata_rows(&self) -> Vec<MetadataRow> {
        let row = |pair: &Pair| MetadataRow {
            file_name: pair.name.clone(),
            text: pair.text.clone(),
            labels: pair.labels.iter().cloned().collect(),
            view: pair.view.clone(),
            group: pair.group.clone(),
            seed: pair.extra.get("seed").and_then(|seed| seed.trim().parse().ok()),
            extra: pair
                .extra
                .iter()
                .filter(|(key, _)| !MetadataRow::FIELDS.contains(&key.as_str()))
                .map(|(key, value)| (key.clone(), value.clone().into()))
                .collect(),
        };
        self.pairs.iter().map(row).collect()
    }

    /// What was read, left out and kept, and how it was divided.
    pub fn preparation_report(
        &self,
        split: Option<&Split>,
        leakage: Option<LeakageReport>,
    ) -> PreparationReport {
        let mut skipped = BTreeMap::new();
        for row in &self.skipped {
            *skipped.entry(row.kind.clone()).or_default() += 1;
        }
        PreparationReport {
            source: self.source.clone(),
            rows_read: self.rows_read,
            skipped,
            dropped_deidentified: self.dropped_deidentified,
            token_filter: self.token_filter.clone(),
            kept: self.len(),
            groups: distinct(self.pairs.iter().filter_map(|pair| pair.group.as_deref())),
            ungrouped: self.pairs.iter().filter(|pair| pair.group.is_none()).count(),
            distinct_impressions: distinct(self.pairs.iter().map(|pair| pair.impression.as_str())),
            per_view: labels::view_counts(&self.pairs),
            per_label: labels::counts(&self.pairs),
            split: split.map(|split| SplitSummary::new(self, split)),
            leakage,
        }
    }
}

fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> usize {
    values.collect::<BTreeSet<_>>().len()
}

/// The sizes of a split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitSummary {
    /// How it was made.
    #[serde(flatten)]
    pub config: crate::SplitConfig,
    /// Pairs on the training side.
    pub train: usize,
    /// Pairs held out.
    pub test: usize,
    /// Groups on the training side.
    pub train_groups: usize,
    /// Groups held out.
    pub test_groups: usize,
    /// Label counts of the training side.
    pub train_per_label: BTreeMap<String, usize>,
    /// Label counts of the held-out side.
    pub test_per_label: BTreeMap<String, usize>,
}

impl SplitSummary {
    fn new(collection: &Collection, split: &Split) -> Self {
        let groups =
            |side: &[usize]| distinct(side.iter().filter_map(|&i| collection.pairs[i].group.as_deref()));
        let labels = |side: &[usize]| labels::counts(side.iter().map(|&i| &collection.pairs[i]));
        Self {
            config: split.config.clone(),
            train: split.train.len(),
            test: split.test.len(),
            train_groups: groups(&split.train),
            test_groups: groups(&split.test),
            train_per_label: labels(&split.train),
            test_per_label: labels(&split.test),
        }
    }
}

/// Everything a reader of the results needs to know about the data; serializes to `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreparationReport {
    /// Which source read it.
    pub source: String,
    /// How many rows the table has.
    pub rows_read: usize,
    /// How many of them were skipped, by the kind of problem.
    pub skipped: BTreeMap<String, usize>,
    /// How many were dropped for a de-identification mark.
    pub dropped_deidentified: usize,
    /// What the token filter did.
    pub token_filter: Option<TokenFilterReport>,
    /// How many pairs remain.
    pub kept: usize,
    /// How many groups they come from.
    pub groups: usize,
    /// How many of them have no group.
    pub ungrouped: usize,
    /// How many different impressions they carry.
    pub distinct_impressions: usize,
    /// Pairs per view.
    pub per_view: BTreeMap<String, usize>,
    /// Pairs per label.
    pub per_label: BTreeMap<String, usize>,
    /// The split's sizes.
    pub split: Option<SplitSummary>,
    /// What the split lets through.
    pub leakage: Option<LeakageReport>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::SplitConfig;

    /// A pair with a name and an impression, and nothing else.
    pub(crate) fn pair(name: &str, impression: &str) -> Pair {
        Pair {
            name: name.into(),
            image: name.into(),
            text: impression.into(),
            impression: impression.into(),
            group: None,
            labels: LabelSet::new(),
            view: None,
            row: 2,
            extra: BTreeMap::new(),
        }
    }

    /// A collection of such pairs.
    pub(crate) fn collection(pairs: Vec<Pair>) -> Collection {
        Collection {
            source: "test".into(),
            table: "test.csv".into(),
            rows_read: pairs.len(),
            pairs,
            skipped: Vec::new(),
            dropped_deidentified: 0,
            token_filter: None,
        }
    }

    #[test]
    fn report_counts_and_survives_json() {
        let mut pairs: Vec<_> = (0..10).map(|i| pair(&format!("{i}.png"), ["a", "b"][i % 2])).collect();
        for (i, pair) in pairs.iter_mut().enumerate() {
            pair.group = (i < 8).then(|| format!("p{}", i / 2));
            pair.labels = labels::parse(if i < 3 { "Mass" } else { "" });
        }
        let collection = collection(pairs);
        let split = Split::new(&collection, &SplitConfig::default()).unwrap();
        let leakage = LeakageReport::measure(&collection, &split, false).unwrap();
        let report = collection.preparation_report(Some(&split), Some(leakage));
        assert_eq!(
            (report.kept, report.groups, report.ungrouped, report.distinct_impressions),
            (10, 4, 2, 2)
        );
        assert_eq!(report.per_label["Mass"], 3);
        let summary = report.split.as_ref().unwrap();
        assert_eq!(summary.train_groups + summary.test_groups, 4);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<PreparationReport>(&json).unwrap(), report);
    }

    #[test]
    fn subset_keeps_order_and_retain_filters() {
        let mut collection = collection(vec![pair("a", "x"), pair("b", "y"), pair("c", "z")]);
        collection.pairs[1].view = Some("Lateral".into());
        let names: Vec<_> = collection.subset(&[2, 0]).pairs.into_iter().map(|pair| pair.name).collect();
        assert_eq!(names, ["c", "a"]);
        collection.retain(|pair| pair.has_view("lateral"));
        assert_eq!((collection.len(), collection.pairs[0].name.as_str()), (1, "b"));
    }
}
