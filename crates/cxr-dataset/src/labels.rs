//! Labels as sets of words, and how often each occurs.

use std::collections::{BTreeMap, BTreeSet};

use crate::Pair;

/// The labels of one image, each once, in alphabetical order.
pub type LabelSet = BTreeSet<String>;

/// Splits a cell of labels at `;` and `|` (Indiana's and NIH's separators); blanks around a label and empty labels
/// are dropped.
///
/// ```
/// let labels = cxr_dataset::labels::parse("Opacity;Opacity; Pleural Effusion;");
/// assert_eq!(labels.into_iter().collect::<Vec<_>>(), ["Opacity", "Pleural Effusion"]);
/// ```
pub fn parse(cell: &str) -> LabelSet {
    cell.split([';', '|']).map(str::trim).filter(|label| !label.is_empty()).map(str::to_owned).collect()
}

/// In how many pairs each label stands.
pub fn counts<'a>(pairs: impl IntoIterator<Item = &'a Pair>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for label in pairs.into_iter().flat_map(|pair| &pair.labels) {
        *counts.entry(label.clone()).or_default() += 1;
    }
    counts
}

/// In how many pairs each view stands; pairs without one are counted under `unknown`.
pub fn view_counts<'a>(pairs: impl IntoIterator<Item = &'a Pair>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for pair in pairs {
        *counts.entry(pair.view.clone().unwrap_or_else(|| "unknown".into())).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collection::tests::pair;

    #[test]
    fn both_separators_and_blanks() {
        let labels = parse(" Cardiomegaly|Effusion ;; Effusion| ");
        assert_eq!(labels, LabelSet::from(["Cardiomegaly".to_owned(), "Effusion".to_owned()]));
        assert!(parse(" ; | ").is_empty());
        // A heading with a comma stays whole.
        assert_eq!(parse("Pulmonary Disease, Chronic Obstructive").len(), 1);
    }

    #[test]
    fn a_label_counts_once_per_pair() {
        let mut pairs = vec![pair("a", "x"), pair("b", "x"), pair("c", "x")];
        pairs[0].labels = parse("Mass;Mass;Nodule");
        pairs[1].labels = parse("Mass");
        pairs[1].view = Some("PA".into());
        assert_eq!(counts(&pairs), BTreeMap::from([("Mass".to_owned(), 2), ("Nodule".to_owned(), 1)]));
        assert_eq!(view_counts(&pairs), BTreeMap::from([("PA".to_owned(), 1), ("unknown".to_owned(), 2)]));
    }
}
