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
