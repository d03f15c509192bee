//! Rank and alpha as PEFT's `LoraConfig` spells them: one pair, and patterns for the modules that differ.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::weights::{Adapter, TEXT_ENCODER};
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
        let config: Self = serde_json::from_value(json)
            .map_err(|source| LoraError::Json { what: what.to_owned(), source })?;
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

    /// Rank and alpha, with which the scale is `alpha / rank`, of the module at `path`.
    pub(super) fn of(&self, path: &str) -> (usize, f64) {
        let rank = find(&self.rank_pattern, path).unwrap_or(self.r);
        let alpha = find(&self.alpha_pattern, path).unwrap_or(self.lora_alpha);
        (rank, if self.use_rslora { alpha * (rank as f64).sqrt() } else { alpha })
    }

    /// The settings of one component of `adapter`: the most common pair, and patterns for the rest.
    pub(super) fn describe(adapter: &Adapter, component: &str) -> Self {
        let modules: Vec<_> = adapter
            .modules
            .iter()
            .filter(|(key, _)| key.component == component)
            .map(|(key, weights)| {
                // Names are matched by their ends, and transformers 5 has the text encoder's without this start.
                let name = key.name.as_str();
                let name =
                    name.strip_prefix("text_model.").filter(|_| component == TEXT_ENCODER).unwrap_or(name);
                (name.to_owned(), weights.rank, weights.alpha)
            })
            .collect();
        let r = most_common(modules.iter().map(|(_, rank, _)| *rank as u64)) as usize;
        let lora_alpha = f64::from_bits(most_common(modules.iter().map(|(_, _, alpha)| alpha.to_bits())));
        // A pattern matches tails too. Only PEFT 0.15 and later know the anchor, so it stands only where another
        // module ends like this one.
        let pattern = |path: &String| {
            let is_tail = |(other, ..): &(String, usize, f64)| {
                other.strip_suffix(path.as_str()).is_some_and(|head| head.ends_with('.'))
            };
            if modules.iter().any(is_tail) { format!("^{path}") } else { path.clone() }
        };
        let ranks = modules.iter().filter(|(_, rank, _)| *rank != r);
        let alphas = modules.iter().filter(|(_, _, alpha)| *alpha != lora_alpha);
        Self {
            r,
            lora_alpha,
            rank_pattern: ranks.map(|(path, rank, _)| (pattern(path), *rank)).collect(),
            alpha_pattern: alphas.map(|(path, _, alpha)| (pattern(path), *alpha)).collect(),
            use_rslora: false,
            use_dora: false,
            target_modules: modules.into_iter().map(|(path, ..)| path).collect(),
            lora_dropout: 0.0,
            bias: no_bias(),
        }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::weights::{LoraWeights, ModuleKey, UNET};

    fn config(json: Value) -> Result<PeftConfig> {
        PeftConfig::from_json(json, "test")
    }

    #[test]
    fn patterns_are_tails_unless_anchored() {
        let config = config(json!({
            "r": 4, "lora_alpha": 8,
            "rank_pattern": {"mid.to_q": 2, "^up.to_k": 3},
            "alpha_pattern": {"mid\\.to_q": 1.5},
        }))
        .unwrap();
        assert_eq!(config.of("mid.to_q"), (2, 1.5));
        assert_eq!(config.of("down.mid.to_q"), (2, 1.5));
        // a tail starts at a dot
        assert_eq!(config.of("amid.to_q"), (4, 8.0));
        assert_eq!(config.of("up.to_k"), (3, 8.0));
        assert_eq!(config.of("down.up.to_k"), (4, 8.0));
    }

    #[test]
    fn rank_stabilized_scaling_is_folded_into_alpha() {
        let config = config(json!({"r": 16, "lora_alpha": 8, "use_rslora": true})).unwrap();
        let (rank, alpha) = config.of("to_q");
        // alpha / sqrt(rank) by definition
        assert_eq!(alpha / rank as f64, 8.0 / 16.0_f64.sqrt());
    }

    #[test]
    fn what_is_not_plain_lora_is_refused() {
        let base = |key: &str, value: Value| {
            let mut json = json!({"r": 4, "lora_alpha": 4});
            json[key] = value;
            config(json).unwrap_err().to_string()
        };
        assert!(base("use_dora", true.into()).contains("use_dora in test"));
        let error = base("rank_pattern", json!({".*to_q": 2}));
        assert!(error.contains("regular expression") && error.contains(".*to_q"), "{error}");
        assert!(base("r", json!("four")).contains("test: "));
        assert!(config(json!({"r": 4})).unwrap_err().to_string().contains("lora_alpha"));
    }

    /// Whether a model has the text encoder's names with `text_model` or without: the settings match by their ends.
    #[test]
    fn a_text_encoders_settings_fit_both_of_its_spellings() {
        let path = "text_model.encoder.layers.1.mlp.fc1";
        let weights = LoraWeights {
            rank: 2,
            in_features: 1,
            out_features: 1,
            kernel: None,
            alpha: 0.5,
            a: vec![1.0; 2],
            b: vec![1.0; 2],
        };
        let modules = [(ModuleKey::path(TEXT_ENCODER, path), weights)];
        let adapter = Adapter { modules: modules.into(), ..Adapter::default() };
        let json = PeftConfig::describe(&adapter, TEXT_ENCODER).to_json().unwrap();
        assert_eq!(json["target_modules"], json!(["encoder.layers.1.mlp.fc1"]));
        assert_eq!(config(json.into()).unwrap().of(path), (2, 0.5));
    }

    /// One module's path ends like another's, with another rank: a pattern alone would match both.
    #[test]
    fn a_description_reads_back_as_it_was() {
        let modules = [("to_k", 2, 0.7), ("mid.to_k", 10, 0.7), ("mid.to_q", 10, 0.7), ("up.to_q", 10, 3.0)];
        let weights = |rank, alpha| LoraWeights {
            rank,
            in_features: 1,
            out_features: 1,
            kernel: None,
            alpha,
            a: vec![1.0; rank],
            b: vec![1.0; rank],
        };
        let modules_of =
            modules.map(|(path, rank, alpha)| (ModuleKey::path(UNET, path), weights(rank, alpha)));
        let adapter = Adapter { modules: modules_of.into(), ..Adapter::default() };
        let json = PeftConfig::describe(&adapter, UNET).to_json().unwrap();
        assert_eq!(json["rank_pattern"], json!({"^to_k": 2}));
        assert_eq!(json["alpha_pattern"], json!({"up.to_q": 3.0}));
        let read = config(json.into()).unwrap();
        for (path, rank, alpha) in modules {
            assert_eq!(read.of(path), (rank, alpha), "{path}");
        }
    }
}
