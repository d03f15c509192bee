use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use cxr_core::atomic;
use cxr_core::hash::stable_hash;
use serde::{Deserialize, Serialize};

use crate::{Collection, DatasetError, Pair};

/// What stays whole when a collection is divided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitRule {
    /// A group (patient or study) stands on one side. A pair without a group is a group of its own, and counted in
    /// the leakage report as unprotected.
    #[default]
    ByGroup,
    /// Every pair for itself, as the paper did it: the same study, and the same patient, stand on both sides.
    PairLevel,
    /// An impression stands on one side.
    ByPrompt,
}

impl SplitRule {
    fn name(self) -> &'static str {
        match self {
            Self::ByGroup => "by_group",
            Self::PairLevel => "pair_level",
            Self::ByPrompt => "by_prompt",
        }
    }
}

/// How to divide a collection.
///
/// | Field | Default | Range |
/// |---|---|---|
/// | `rule` | `by_group` | |
/// | `train_fraction` | 0.8 | between 0 and 1, both excluded |
/// | `seed` | 0 | any |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitConfig {
    /// What stays whole.
    pub rule: SplitRule,
    /// The share of pairs to train on.
    pub train_fraction: f64,
    /// Another seed, another split.
    pub seed: u64,
}

impl Default for SplitConfig {
    fn default() -> Self {
        Self { rule: SplitRule::default(), train_fraction: 0.8, seed: 0 }
    }
}

/// A collection divided in two: positions in [`Collection::pairs`], each in rising order, each pair on exactly one
/// side.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// How it was made.
    pub config: SplitConfig,
    /// Pairs to train on.
    pub train: Vec<usize>,
    /// Pairs held out.
    pub test: Vec<usize>,
}

/// The file: names instead of positions, so that it stays true when a table is sorted anew.
#[derive(Serialize, Deserialize)]
struct SplitFile {
    format: String,
    #[serde(flatten)]
    config: SplitConfig,
    train: Vec<String>,
    test: Vec<String>,
}

const FORMAT: &str = "cxr-split-1";

impl Split {
    /// Divides a collection.
    ///
    /// The units that stay whole are put in the order of a stable hash of (seed, rule, unit); single pairs are taken
    /// until `ceil(train_fraction x N)` is reached, larger units as long as one more brings the training side nearer
    /// to that number. The order of the table does not matter, and neither do machine and version.
    ///
    /// # Errors
    /// When the fraction is out of range, or a side would be empty.
    pub fn new(collection: &Collection, config: &SplitConfig) -> Result<Self, DatasetError> {
        if !(config.train_fraction > 0.0 && config.train_fraction < 1.0) {
            return Err(DatasetError::Setting {
                field: "train_fraction",
                value: config.train_fraction.to_string(),
                expected: "a number between 0 and 1, both excluded",
            });
        }
        let mut units: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (position, pair) in collection.pairs.iter().enumerate() {
            units.entry(unit_of(pair, config.rule)).or_default().push(position);
        }
        let units_count = units.len();
        let mut order: Vec<_> = units.into_iter().collect();
        order.sort_by_cached_key(|(unit, _)| {
            (
                stable_hash(format!("split\0{}\0{}\0{unit}", config.seed, config.rule.name()).as_bytes()),
                unit.clone(),
            )
        });

        let target = train_target(collection.len(), config.train_fraction);
        let (mut train, mut test) = (Vec::new(), Vec::new());
        for (_, positions) in order {
            let missing = target.saturating_sub(train.len());
            // Nearer with this unit than without it: |missing - size| < missing.
            let side = if positions.len() < 2 * missing { &mut train } else { &mut test };
            side.extend(positions);
        }
        for (side, positions) in [("train", &mut train), ("test", &mut test)] {
            if positions.is_empty() {
                return Err(DatasetError::EmptySide {
                    rule: config.rule.name().into(),
                    train_fraction: config.train_fraction,
                    side,
                    pairs: collection.len(),
                    units: units_count,
                });
            }
            positions.sort_unstable();
        }
        Ok(Self { config: config.clone(), train, test })
    }

    /// Writes the split as JSON: how it was made, and the image names of both sides.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path, collection: &Collection) -> Result<(), DatasetError> {
        let names = |side: &[usize]| side.iter().map(|&i| collection.pairs[i].name.clone()).collect();
        let file = SplitFile {
            format: FORMAT.into(),
            config: self.config.clone(),
            train: names(&self.train),
            test: names(&self.test),
        };
        let text = serde_json::to_string_pretty(&file)
            .map_err(|error| DatasetError::Write { path: path.into(), source: error.into() })?;
        atomic::write_bytes(path, text.as_bytes())
            .map_err(|source| DatasetError::Write { path: path.into(), source })
    }

    /// Reads a split of this collection.
    ///
    /// # Errors
    /// When the file cannot be read, or when its names are not exactly the collection's, each once.
    pub fn read(path: &Path, collection: &Collection) -> Result<Self, DatasetError> {
        let text = std::fs::read(path).map_err(|source| DatasetError::Read { path: path.into(), source })?;
        let unparsable = |reason: String| DatasetError::SplitFile { path: path.into(), reason };
        let file: SplitFile = serde_json::from_slice(&text).map_err(|error| unparsable(error.to_string()))?;
        if file.format != FORMAT {
            return Err(unparsable(format!("format is {:?}, expected {FORMAT:?}", file.format)));
        }
        let mismatch = |reason: String| DatasetError::SplitMismatch { path: path.into(), reason };
        let mut open: HashMap<&str, usize> =
            collection.pairs.iter().enumerate().map(|(i, pair)| (pair.name.as_str(), i)).collect();
        let mut side = |names: &[String]| -> Result<Vec<usize>, DatasetError> {
            let mut positions = Vec::with_capacity(names.len());
            for name in names {
                positions.push(open.remove(name.as_str()).ok_or_else(|| {
                    mismatch(format!("it lists {name:?} twice, or the collection has no such image"))
                })?);
            }
            positions.sort_unstable();
            Ok(positions)
        };
        let (train, test) = (side(&file.train)?, side(&file.test)?);
        if let Some(name) = open.keys().min() {
            return Err(mismatch(format!(
                "{} image(s) of the collection are not in it, for instance {name:?}",
                open.len()
            )));
        }
        Ok(Self { config: file.config, train, test })
    }
}

/// The paper's `ceil(fraction x N)`, safe from the last bit of the product: 0.7 x 10 is 7, not 8.
fn train_target(pairs: usize, fraction: f64) -> usize {
    (fraction * pairs as f64 - 1e-9).ceil() as usize
}

fn unit_of(pair: &Pair, rule: SplitRule) -> String {
    // The prefix keeps an ungrouped image apart from a group that has its name.
    match (rule, &pair.group) {
        (SplitRule::ByGroup, Some(group)) => format!("group {group}"),
        (SplitRule::ByGroup | SplitRule::PairLevel, _) => format!("image {}", pair.name),
        (SplitRule::ByPrompt, _) => format!("impression {}", pair.impression),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::collection::tests::{collection, pair};

    /// `n` pairs; groups of 1 to 7 images; 5 impressions.
    fn sample(n: usize) -> Collection {
        let mut pairs: Vec<_> =
            (0..n).map(|i| pair(&format!("{i}.png"), &format!("text {}", i * i % 11))).collect();
        let (mut group, mut left) = (0, 1);
        for pair in &mut pairs {
            if left == 0 {
                group += 1;
                left = group % 7 + 1;
            }
            left -= 1;
            pair.group = Some(group.to_string());
        }
        collection(pairs)
    }

    fn config(rule: SplitRule, train_fraction: f64, seed: u64) -> SplitConfig {
        SplitConfig { rule, train_fraction, seed }
    }

    #[test]
    fn every_pair_is_on_exactly_one_side_and_units_stay_whole() {
        let all = sample(500);
        for rule in [SplitRule::ByGroup, SplitRule::PairLevel, SplitRule::ByPrompt] {
            for seed in 0..5 {
                let split = Split::new(&all, &config(rule, 0.8, seed)).unwrap();
                let mut both: Vec<_> = split.train.iter().chain(&split.test).copied().collect();
                both.sort_unstable();
                assert_eq!(both, (0..500).collect::<Vec<_>>());
                let units = |side: &[usize]| -> BTreeSet<String> {
                    side.iter().map(|&i| unit_of(&all.pairs[i], rule)).collect()
                };
                assert!(units(&split.train).is_disjoint(&units(&split.test)), "{rule:?}");
            }
        }
    }

    #[test]
    fn sizes_follow_the_fraction() {
        let all = sample(7281);
        let pairs = Split::new(&all, &config(SplitRule::PairLevel, 0.8, 3)).unwrap();
        assert_eq!((pairs.train.len(), pairs.test.len()), (5825, 1456));
        let groups = Split::new(&all, &config(SplitRule::ByGroup, 0.8, 3)).unwrap();
        assert!(groups.train.len().abs_diff(5825) <= 3, "{}", groups.train.len());
        assert_eq!([train_target(10, 0.7), train_target(1000, 0.8), train_target(11, 0.8)], [7, 800, 9]);
    }

    #[test]
    fn a_known_split_stays_what_it_is() {
        // Written down once: a change of the hash or of the order is a change of everybody's test set.
        let split = Split::new(&sample(20), &config(SplitRule::PairLevel, 0.8, 1)).unwrap();
        assert_eq!(split.test, KNOWN_TEST);
    }
    const KNOWN_TEST: [usize; 4] = [1, 9, 15, 16];

    #[test]
    fn the_order_of_the_table_does_not_matter_but_the_seed_does() {
        let all = sample(100);
        let reversed = collection(all.pairs.iter().rev().cloned().collect());
        let names = |all: &Collection, seed| -> BTreeSet<String> {
            let split = Split::new(all, &config(SplitRule::ByGroup, 0.8, seed)).unwrap();
            split.test.iter().map(|&i| all.pairs[i].name.clone()).collect()
        };
        assert_eq!(names(&all, 1), names(&reversed, 1));
        assert_ne!(names(&all, 1), names(&all, 2));
    }

    #[test]
    fn impossible_splits_are_refused() {
        let all = sample(10);
        for fraction in [0.0, 1.0, -0.5, f64::NAN, f64::INFINITY] {
            assert!(Split::new(&all, &config(SplitRule::PairLevel, fraction, 0)).is_err(), "{fraction}");
        }
        let mut one_group = sample(4);
        one_group.pairs.iter_mut().for_each(|pair| pair.group = Some("7".into()));
        let error = Split::new(&one_group, &SplitConfig::default()).unwrap_err();
        assert!(matches!(error, DatasetError::EmptySide { side: "test", units: 1, .. }), "{error}");
        assert!(Split::new(&collection(Vec::new()), &SplitConfig::default()).is_err());
    }

    #[test]
    fn the_file_brings_back_the_split_and_only_for_its_collection() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("split.json");
        let all = sample(30);
        let split = Split::new(&all, &SplitConfig::default()).unwrap();
        split.write(&path, &all).unwrap();
        assert_eq!(Split::read(&path, &all).unwrap(), split);

        let more = sample(31);
        assert!(Split::read(&path, &more).unwrap_err().to_string().contains("\"30.png\""));
        let fewer = sample(29);
        assert!(Split::read(&path, &fewer).unwrap_err().to_string().contains("\"29.png\""));

        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"1.png\"", "\"2.png\"")).unwrap();
        assert!(matches!(Split::read(&path, &all), Err(DatasetError::SplitMismatch { .. })));
        std::fs::write(&path, text.replace(FORMAT, "cxr-split-9")).unwrap();
        assert!(matches!(Split::read(&path, &all), Err(DatasetError::SplitFile { .. })));
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(Split::read(&path, &all), Err(DatasetError::SplitFile { .. })));
    }
}
