use std::collections::{BTreeSet, HashSet};

use cxr_core::hash::sha256_file;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Collection, DatasetError, ImageError, Split};

/// What stands on both sides of a split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeakageReport {
    /// Held-out pairs.
    pub test_pairs: usize,
    /// Pairs without a group, on either side: nothing tells whether their patient is on the other side too.
    pub ungrouped_pairs: usize,
    /// Groups that stand on both sides.
    pub shared_groups: usize,
    /// Held-out pairs whose group is also trained on.
    pub test_pairs_with_shared_group: usize,
    /// Impressions that stand on both sides, word for word.
    pub repeated_impressions: usize,
    /// Held-out pairs whose impression is also trained on.
    pub test_pairs_with_repeated_impression: usize,
    /// Held-out images whose bytes are also trained on; `None` when the files were not compared.
    pub test_pairs_with_identical_image: Option<usize>,
    /// Names of up to eight such images.
    pub identical_images: Vec<String>,
    /// The same in sentences, with a warning where nothing protects the split.
    pub notes: Vec<String>,
}

impl LeakageReport {
    /// Compares the two sides; `compare_images` reads every file and compares SHA-256 of their bytes.
    ///
    /// # Errors
    /// When an image cannot be read, naming it and its row.
    pub fn measure(
        collection: &Collection,
        split: &Split,
        compare_images: bool,
    ) -> Result<Self, DatasetError> {
        let pair = |&i: &usize| &collection.pairs[i];
        let train_groups: HashSet<&str> =
            split.train.iter().map(pair).filter_map(|pair| pair.group.as_deref()).collect();
        let train_impressions: HashSet<&str> =
            split.train.iter().map(pair).map(|pair| pair.impression.as_str()).collect();
        let groups: Vec<&str> = split
            .test
            .iter()
            .map(pair)
            .filter_map(|pair| pair.group.as_deref())
            .filter(|group| train_groups.contains(group))
            .collect();
        let impressions: Vec<&str> = split
            .test
            .iter()
            .map(pair)
            .map(|pair| pair.impression.as_str())
            .filter(|impression| train_impressions.contains(impression))
            .collect();
        let identical = if compare_images { Some(identical_images(collection, split)?) } else { None };

        let mut report = Self {
            test_pairs: split.test.len(),
            ungrouped_pairs: collection.pairs.iter().filter(|pair| pair.group.is_none()).count(),
            shared_groups: groups.iter().collect::<BTreeSet<_>>().len(),
            test_pairs_with_shared_group: groups.len(),
            repeated_impressions: impressions.iter().collect::<BTreeSet<_>>().len(),
            test_pairs_with_repeated_impression: impressions.len(),
            test_pairs_with_identical_image: identical.as_ref().map(Vec::len),
            identical_images: identical.unwrap_or_default().into_iter().take(8).collect(),
            notes: Vec::new(),
        };
        report.notes = report.sentences(collection.len());
        Ok(report)
    }

    fn sentences(&self, pairs: usize) -> Vec<String> {
        let percent = |part: usize| 100.0 * part as f64 / self.test_pairs.max(1) as f64;
        let mut notes = Vec::new();
        if self.ungrouped_pairs == pairs {
            notes.push("no group is known for any pair: nothing protects this split from the same patient on both sides".into());
        } else if self.ungrouped_pairs > 0 {
            let n = self.ungrouped_pairs;
            notes.push(format!("{n} pair(s) have no group: nothing keeps their patients on one side"));
        }
        notes.push(format!(
            "{} group(s) stand on both sides, with {} held-out pair(s) ({:.1} %)",
            self.shared_groups,
            self.test_pairs_with_shared_group,
            percent(self.test_pairs_with_shared_group)
        ));
        notes.push(format!(
            "{} impression(s) stand on both sides word for word, with {} held-out pair(s) ({:.1} %)",
            self.repeated_impressions,
            self.test_pairs_with_repeated_impression,
            percent(self.test_pairs_with_repeated_impression)
        ));
        notes.push(match self.test_pairs_with_identical_image {
            None => "image files were not compared".into(),
            Some(n) => format!("{n} held-out image(s) are byte for byte among the training images"),
        });
        notes
    }
}

/// Names of the held-out images whose bytes are also on the training side.
fn identical_images(collection: &Collection, split: &Split) -> Result<Vec<String>, DatasetError> {
    let digest = |&i: &usize| -> Result<String, DatasetError> {
        let pair = &collection.pairs[i];
        sha256_file(&pair.image).map_err(|source| DatasetError::Image {
            table: collection.table.clone(),
            row: pair.row,
            source: ImageError::Read { path: pair.image.clone(), source },
        })
    };
    let train: HashSet<String> = split.train.par_iter().map(digest).collect::<Result<_, _>>()?;
    let test: Vec<String> = split.test.par_iter().map(digest).collect::<Result<_, _>>()?;
    let found = split.test.iter().zip(test).filter(|(_, digest)| train.contains(digest));
    Ok(found.map(|(&i, _)| collection.pairs[i].name.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collection::tests::{collection, pair};
    use crate::{SplitConfig, SplitRule};

    fn split(train: &[usize], test: &[usize]) -> Split {
        Split { config: SplitConfig::default(), train: train.into(), test: test.into() }
    }

    #[test]
    fn all_three_leaks_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut pairs = vec![pair("a", "x"), pair("b", "y"), pair("c", "x"), pair("d", "x"), pair("e", "z")];
        for (pair, (group, bytes)) in
            pairs.iter_mut().zip([("1", "A"), ("2", "B"), ("1", "A"), ("3", "D"), ("4", "E")])
        {
            pair.group = Some(group.into());
            pair.image = folder.path().join(&pair.name);
            std::fs::write(&pair.image, bytes).unwrap();
        }
        let all = collection(pairs);
        let report = LeakageReport::measure(&all, &split(&[0, 1], &[2, 3, 4]), true).unwrap();
        assert_eq!((report.shared_groups, report.test_pairs_with_shared_group), (1, 1));
        assert_eq!((report.repeated_impressions, report.test_pairs_with_repeated_impression), (1, 2));
        assert_eq!(report.test_pairs_with_identical_image, Some(1));
        assert_eq!(report.identical_images, ["c"]);
        assert!(
            report.notes.iter().any(|note| note.contains("2 held-out pair(s) (66.7 %)")),
            "{:?}",
            report.notes
        );

        std::fs::remove_file(folder.path().join("e")).unwrap();
        let error = LeakageReport::measure(&all, &split(&[0, 1], &[2, 3, 4]), true).unwrap_err();
        assert!(error.to_string().contains("row 2"), "{error}");
    }

    #[test]
    fn no_groups_means_no_protection() {
        let all = collection((0..9).map(|i| pair(&i.to_string(), &i.to_string())).collect());
        let split = Split::new(&all, &SplitConfig::default()).unwrap();
        let report = LeakageReport::measure(&all, &split, false).unwrap();
        assert_eq!((report.ungrouped_pairs, report.shared_groups, report.repeated_impressions), (9, 0, 0));
        assert!(report.notes[0].contains("nothing protects"));
        assert_eq!(report.test_pairs_with_identical_image, None);
    }

    #[test]
    fn the_rules_do_what_they_promise() {
        let mut pairs: Vec<_> =
            (0..200).map(|i| pair(&i.to_string(), ["x", "y", "z", "u", "v"][i % 5])).collect();
        pairs.iter_mut().enumerate().for_each(|(i, pair)| pair.group = Some((i / 2).to_string()));
        let all = collection(pairs);
        let measure = |rule| {
            let split = Split::new(&all, &SplitConfig { rule, ..SplitConfig::default() }).unwrap();
            LeakageReport::measure(&all, &split, false).unwrap()
        };
        assert_eq!(measure(SplitRule::ByGroup).shared_groups, 0);
        assert!(measure(SplitRule::PairLevel).shared_groups > 10);
        assert_eq!(measure(SplitRule::ByPrompt).repeated_impressions, 0);
        assert_eq!(measure(SplitRule::PairLevel).repeated_impressions, 5);
    }
}
