//! Rank and alpha as PEFT's `LoraConfig` spells them: one pair, and patterns for the modules that differ.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::weights::Adapter;
use crate::{LoraError, Result};

/// The entries of PEFT's `LoraConfig` that say what the factors mean.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct PeftConfig {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    /// Written, because PEFT wants it; not read, because the keys say it.
    #[serde(default, skip_deserializing)]
    target_modules: Vec<String>,
    #[serde(default, skip_deserializing)]
    lora_dropout: f64,
    #[serde(skip_deserializing, default = "no_bias")]
    bias: String,
}

fn no_bias() -> String {
    "none".to_owned()
}

impl PeftConfig {
    /// # Errors
    /// If an entry is missing or of another type, or asks for what is not plain LoRA; `what` stands in the error.
    pub(super) fn from_json(json: Value, what: &str) -> Result<Self> {
        let config: Self =
            serde_json::from_value(json).map_err(|source| LoraError::Json { what: what.to_owned(), source })?;
        let wrong = |setting: &str, expected, found: &str| LoraError::Setting {
            setting: format!("{setting} in {what}"),
            expected,
            found: found.to_owned(),
        };
        if config.use_dora {
            return Err(wrong("use_dora", "false (DoRA is not plain LoRA)", "true"));
        }
        for pattern in config.rank_pattern.keys().chain(config.alpha_pattern.keys()) {
            if literal(pattern).is_none() {
                return Err(wrong("a pattern", "a module's path, not a regular expression", pattern));
            }
        }
        Ok(config)
    }

    /// Rank, and the scale of the product, of the module at `path`.
    pub(super) fn of(&self, path: &str) -> (usize, f64) {
        let rank = find(&self.rank_pattern, path).unwrap_or(self.r);
        let alpha = find(&self.alpha_pattern, path).unwrap_or(self.lora_alpha);
        let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        (rank, alpha / divisor)
    }

    /// The settings of one component of `adapter`: the most common pair, and patterns for the rest.
    ///
    /// # Errors
    /// If a module of the component is named by a flattened path.
    pub(super) fn describe(adapter: &Adapter, component: &str) -> Result<Self> {
        let modules: Vec<_> = adapter
            .modules
            .iter()
            .filter(|(key, _)| key.component == component)
            .map(|(key, weights)| (key.name.as_str().to_owned(), weights.rank, weights.alpha))
            .collect();
        let r = most_common(modules.iter().map(|(_, rank, _)| *rank as u64)) as usize;
        let lora_alpha = f64::from_bits(most_common(modules.iter().map(|(_, _, alpha)| alpha.to_bits())));
        let ranks = modules.iter().filter(|(_, rank, _)| *rank != r);
        let alphas = modules.iter().filter(|(_, _, alpha)| *alpha != lora_alpha);
        Ok(Self {
            r,
            lora_alpha,
            rank_pattern: ranks.map(|(path, rank, _)| (path.clone(), *rank)).collect(),
            alpha_pattern: alphas.map(|(path, _, alpha)| (path.clone(), *alpha)).collect(),
            use_rslora: false,
            use_dora: false,
            target_modules: modules.into_iter().map(|(path, ..)| path).collect(),
            lora_dropout: 0.0,
            bias: no_bias(),
        })
    }

    pub(super) fn to_json(&self) -> Result<Map<String, Value>> {
        let json = serde_json::to_value(self)
            .map_err(|source| LoraError::Json { what: "LoRA settings".to_owned(), source })?;
        Ok(match json {
            Value::Object(map) => map,
            _ => Map::new(),
        })
    }
}

/// The value of the pattern that is `path` or its tail.
fn find<T: Copy>(patterns: &BTreeMap<String, T>, path: &str) -> Option<T> {
    let matches = |pattern: &str| {
        literal(pattern).is_some_and(|(name, anchored)| match path.strip_suffix(name.as_str()) {
            Some(head) => head.is_empty() || (!anchored && head.ends_with('.')),
            None => false,
        })
    };
    patterns.iter().find(|(pattern, _)| matches(pattern)).map(|(_, value)| *value)
}

/// PEFT takes patterns as regular expressions; the path that one stands for if it is no more than that, and whether
/// it is anchored at the start.
fn literal(pattern: &str) -> Option<(String, bool)> {
    let (body, anchored) = match pattern.strip_prefix('^') {
        Some(rest) => (rest, true),
        None => (pattern, false),
    };
    let name = body.replace("\\.", ".");
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    plain.then_some((name, anchored))
}

/// The value that occurs most often, the smallest of them in a tie; 0 of none.
fn most_common(values: impl Iterator<Item = u64>) -> u64 {
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_default() += 1);
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map_or(0, |(value, _)| value)
}
