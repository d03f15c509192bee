use std::collections::{BTreeMap, BTreeSet};

use cxr_tokenizer::ClipTokenizer;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Collection, DatasetError};

/// Keeps the pairs whose prompt the text encoder can read whole.
///
/// A pair is dropped as empty when its impression is empty (a view alone is no description), and as too long when
/// its prompt's CLIP length, beginning and end marks included, exceeds [`Self::max_length`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenFilter {
    /// The longest prompt in tokens, both marks included; 77 for CLIP, at least 3.
    pub max_length: usize,
}

impl Default for TokenFilter {
    fn default() -> Self {
        Self { max_length: 77 }
    }
}

/// What a [`TokenFilter`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenFilterReport {
    /// The limit.
    pub max_length: usize,
    /// Pairs before.
    pub read: usize,
    /// Pairs dropped because their impression is empty.
    pub empty: usize,
    /// Pairs dropped because their prompt is too long.
    pub too_long: usize,
    /// Pairs after.
    pub kept: usize,
    /// How many pairs have prompts of each length in tokens, those that are too long included, empty ones not.
    pub histogram: BTreeMap<usize, usize>,
}

impl TokenFilterReport {
    /// The longest prompt before filtering, 0 when there is none.
    pub fn longest(&self) -> usize {
        self.histogram.last_key_value().map_or(0, |(length, _)| *length)
    }
}

impl TokenFilter {
    /// Drops what does not fit, remembers the counts in the collection, and returns them.
    ///
    /// # Errors
    /// When [`Self::max_length`] is below 3: the two marks alone take 2.
    pub fn apply(
        &self,
        collection: &mut Collection,
        tokenizer: &ClipTokenizer,
    ) -> Result<TokenFilterReport, DatasetError> {
        if self.max_length < 3 {
            let value = self.max_length.to_string();
            return Err(DatasetError::Setting { field: "max_length", value, expected: "3 or more" });
        }
        // Reports repeat themselves: each text is tokenized once.
        let texts: BTreeSet<&str> = collection.pairs.iter().map(|pair| pair.text.as_str()).collect();
        let lengths: Vec<(String, usize)> =
            texts.into_par_iter().map(|text| (text.to_owned(), tokenizer.length(text))).collect();
        let lengths: BTreeMap<String, usize> = lengths.into_iter().collect();

        let mut report = TokenFilterReport {
            max_length: self.max_length,
            read: collection.len(),
            ..TokenFilterReport::default()
        };
        collection.pairs.retain(|pair| {
            if pair.impression.trim().is_empty() {
                report.empty += 1;
                return false;
            }
            let length = lengths[&pair.text];
            *report.histogram.entry(length).or_default() += 1;
            report.too_long += usize::from(length > self.max_length);
            length <= self.max_length
        });
        report.kept = collection.len();
        collection.token_filter = Some(report.clone());
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collection::tests::{collection, pair};

    #[test]
    fn empty_and_too_long_are_counted_and_the_limit_is_inclusive() {
        let tokenizer = ClipTokenizer::embedded();
        // "cat" is one token: n of them make n + 2.
        let cats = |n: usize| vec!["cat"; n].join(" ");
        let mut with_view = pair("v", "");
        with_view.text = "Frontal chest radiograph.".into();
        let mut all = collection(vec![
            pair("a", &cats(75)),
            pair("b", &cats(76)),
            pair("c", ""),
            pair("d", "cat"),
            pair("e", "cat"),
            with_view,
        ]);
        let report = TokenFilter::default().apply(&mut all, &tokenizer).unwrap();
        assert_eq!((report.read, report.empty, report.too_long, report.kept), (6, 2, 1, 3));
        assert_eq!(report.histogram, BTreeMap::from([(3, 2), (77, 1), (78, 1)]));
        assert_eq!(report.longest(), 78);
        assert_eq!(all.pairs.iter().map(|pair| pair.name.as_str()).collect::<Vec<_>>(), ["a", "d", "e"]);
        assert_eq!(all.token_filter, Some(report));
        assert!(TokenFilter { max_length: 2 }.apply(&mut all, &tokenizer).is_err());
    }
}
