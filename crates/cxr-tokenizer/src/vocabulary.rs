//! The embedded vocabulary, and reading one.

use std::collections::HashMap;

/// `vocab.json` of CLIP ViT-L/14: the id of every token.
pub const VOCAB_JSON: &str = include_str!("../vocabulary/vocab.json");

/// `merges.txt` of CLIP ViT-L/14: which pairs become one token, first the ones to begin with.
pub const MERGES_TXT: &str = include_str!("../vocabulary/merges.txt");

/// Ids by token; they must be 0, 1, ... without a gap.
pub(crate) fn parse_vocab(json: &str) -> Result<HashMap<String, u32>, String> {
    let vocab: HashMap<String, u32> = serde_json::from_str(json)
        .map_err(|problem| format!("expected an object of ids by token: {problem}"))?;
    let mut seen = vec![false; vocab.len()];
    for (token, id) in &vocab {
        match seen.get_mut(*id as usize) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => return Err(format!("id {id} of token {token:?} is another token's, too")),
            None => return Err(format!("expected ids below {}, found {id} of token {token:?}", vocab.len())),
        }
    }
    Ok(vocab)
}

/// Pairs, one a line, after a line of version that may be missing.
pub(crate) fn parse_merges(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut merges = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.is_empty() || index == 0 && line.starts_with("#version") {
            continue;
        }
        match line.split_once(' ') {
            Some((first, second)) if !first.is_empty() && !second.is_empty() && !second.contains(' ') => {
                merges.push((first.to_string(), second.to_string()));
            }
            _ => return Err(format!("line {}: expected two tokens, found {line:?}", index + 1)),
        }
    }
    Ok(merges)
}

/// `vocab.json` and `merges.txt` out of the `tokenizer.json` of a byte-pair encoding.
pub(crate) fn split_tokenizer_json(json: &str) -> Result<(String, String), String> {
    use serde_json::Value;
    let file: Value = serde_json::from_str(json).map_err(|problem| format!("expected JSON: {problem}"))?;
    let model = &file["model"];
    if model["type"] != "BPE" {
        return Err(format!("expected a model of type \"BPE\", found {}", model["type"]));
    }
    let Value::Object(mut vocab) = model["vocab"].clone() else {
        return Err("expected ids by token under model.vocab".to_string());
    };
    // begin and end may stand here alone
    for token in file["added_tokens"].as_array().into_iter().flatten() {
        if let Some(content) = token["content"].as_str() {
            vocab.entry(content).or_insert_with(|| token["id"].clone());
        }
    }
    let mut merges = "#version: 0.2\n".to_string();
    let expected = || "expected pairs of tokens under model.merges".to_string();
    for merge in model["merges"].as_array().ok_or_else(expected)? {
        match merge {
            Value::String(pair) => merges.push_str(pair),
            Value::Array(pair) => match &pair[..] {
                [Value::String(first), Value::String(second)] => merges.extend([first, " ", second]),
                _ => return Err(expected()),
            },
            _ => return Err(expected()),
        }
        merges.push('\n');
    }
    Ok((Value::Object(vocab).to_string(), merges))
}
