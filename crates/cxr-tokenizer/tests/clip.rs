//! Against transformers' `CLIPTokenizer`: `fixtures/generate.py` has made the reference. The comparison is exact.

use std::path::{Path, PathBuf};

use cxr_tokenizer::vocabulary::{MERGES_TXT, VOCAB_JSON};
use cxr_tokenizer::{ClipTokenizer, LENGTH, TokenizerError};

const BEGIN: u32 = 49406;
const END: u32 = 49407;

fn reference() -> Vec<(String, Vec<u32>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/texts.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let texts = json["texts"].as_array().unwrap();
    texts
        .iter()
        .map(|text| serde_json::from_value(text.clone()).unwrap())
        .map(|Text { text, ids }| (text, ids))
        .collect()
}

#[derive(serde::Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

#[test]
fn ids_are_those_of_transformers() {
    let tokenizer = ClipTokenizer::embedded();
    let texts = reference();
    assert!(texts.len() >= 60);
    assert!(
        texts.iter().any(|(_, ids)| ids.len() > LENGTH) && texts.iter().any(|(_, ids)| ids.len() == LENGTH)
    );
    for (text, ids) in texts {
        assert_eq!(tokenizer.length(&text), ids.len(), "{text:?}");
        let tokens = tokenizer.encode(&text);
        assert_eq!(tokens.truncated, ids.len() > LENGTH, "{text:?}");
        let mut expected: Vec<u32> = ids[..ids.len().min(LENGTH) - 1].to_vec();
        expected.resize(LENGTH, END);
        // what is cut off is the end of the text, not the mark after it
        expected[LENGTH - 1] = END;
        assert_eq!(tokens.ids, expected, "{text:?}");
    }
}

#[test]
fn published_ids() {
    let tokenizer = ClipTokenizer::embedded();
    for (text, expected) in [
        ("a photo of a cat", &[BEGIN, 320, 1125, 539, 320, 2368, END][..]),
        (
            "No acute cardiopulmonary abnormality.",
            &[BEGIN, 871, 19734, 6211, 39858, 749, 856, 596, 28748, 696, 269, END],
        ),
    ] {
        let ids = tokenizer.encode(text).ids;
        assert_eq!(ids[..expected.len()], *expected);
        assert!(ids[expected.len()..].iter().all(|id| *id == END));
        assert_eq!(ids.len(), LENGTH);
    }
}

#[test]
fn truncation_begins_at_76_tokens() {
    let tokenizer = ClipTokenizer::embedded();
    for (words, truncated) in [(0, false), (74, false), (75, false), (76, true), (1000, true)] {
        let text = vec!["cat"; words].join(" ");
        assert_eq!(tokenizer.length(&text), words + 2);
        let tokens = tokenizer.encode(&text);
        assert_eq!((tokens.ids.len(), tokens.truncated), (LENGTH, truncated));
        assert_eq!((tokens.ids[0], tokens.ids[LENGTH - 1]), (BEGIN, END));
        assert_eq!(tokens.ids.iter().filter(|id| **id == 2368).count(), words.min(75));
    }
}

#[test]
fn any_text_has_ids() {
    let tokenizer = ClipTokenizer::embedded();
    // every character of the first planes, a few at a time, and long runs of the same
    let mut characters = (0..0x1f_ffff_u32).step_by(97).filter_map(char::from_u32).peekable();
    while characters.peek().is_some() {
        let text: String = characters.by_ref().take(50).collect();
        assert_eq!(tokenizer.encode(&text).ids.len(), LENGTH);
    }
    for run in ["a", "'", " ", "9", "é", "\u{301}", "\u{1F441}"] {
        assert_eq!(tokenizer.encode(&run.repeat(20_000)).ids[0], BEGIN);
    }
}

/// A folder with the two files, of which the second argument changes one.
fn files(vocab: &str, merges: &str) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (vocab_path, merges_path) = (folder.path().join("vocab.json"), folder.path().join("merges.txt"));
    std::fs::write(&vocab_path, vocab).unwrap();
    std::fs::write(&merges_path, merges).unwrap();
    (folder, vocab_path, merges_path)
}

#[test]
fn a_vocabulary_from_files_is_the_same() {
    // with the line ends of another system, and without the line of version
    let merges = MERGES_TXT.split_once('\n').unwrap().1.replace('\n', "\r\n");
    let (_folder, vocab, merges) = files(VOCAB_JSON, &merges);
    let tokenizer = ClipTokenizer::from_files(vocab, merges).unwrap();
    let embedded = ClipTokenizer::embedded();
    for (text, _) in reference() {
        assert_eq!(tokenizer.encode(&text), embedded.encode(&text));
    }
}

/// As transformers 5 exports it: both spellings of merges, and the marks outside of the vocabulary.
#[test]
fn a_vocabulary_from_one_file_is_the_same() {
    let mut vocab: serde_json::Value = serde_json::from_str(VOCAB_JSON).unwrap();
    let marks = ["<|startoftext|>", "<|endoftext|>"]
        .map(|mark| serde_json::json!({"content": mark, "id": vocab.as_object_mut().unwrap().remove(mark).unwrap()}));
    let lines = || MERGES_TXT.lines().skip(1).filter(|line| !line.is_empty());
    let pairs: Vec<Vec<&str>> = lines().map(|line| line.split(' ').collect()).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let read = |model: serde_json::Value| {
        let file = serde_json::json!({"version": "1.0", "added_tokens": marks, "model": model});
        std::fs::write(&path, file.to_string()).unwrap();
        ClipTokenizer::from_tokenizer_json(&path)
    };
    let embedded = ClipTokenizer::embedded();
    for merges in [serde_json::json!(pairs), serde_json::json!(lines().collect::<Vec<_>>())] {
        let found = read(serde_json::json!({"type": "BPE", "vocab": vocab, "merges": merges})).unwrap();
        for (text, _) in reference() {
            assert_eq!(found.encode(&text), embedded.encode(&text));
        }
    }
    for (model, expected) in [
        (serde_json::json!({"type": "Unigram"}), "expected a model of type \"BPE\", found \"Unigram\""),
        (serde_json::json!({"type": "BPE", "vocab": []}), "model.vocab"),
        (serde_json::json!({"type": "BPE", "vocab": vocab, "merges": [["a"]]}), "model.merges"),
        (serde_json::json!({"type": "BPE", "vocab": {}, "merges": []}), "expected"),
    ] {
        let error = read(model).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer.json: ") && error.contains(expected),
            "expected {expected:?} in {error}"
        );
    }
}

#[test]
fn broken_vocabularies_are_refused_by_name() {
    let without = |token: &str| {
        let mut vocab: std::collections::BTreeMap<String, u32> = serde_json::from_str(VOCAB_JSON).unwrap();
        let removed = vocab.remove(token).unwrap();
        vocab.values_mut().filter(|id| **id > removed).for_each(|id| *id -= 1);
        serde_json::to_string(&vocab).unwrap()
    };
    for (vocab, merges, expected) in [
        ("[]".to_string(), MERGES_TXT.to_string(), "vocab.json: expected an object of ids by token"),
        ("{\"a\": 1}".into(), MERGES_TXT.into(), "vocab.json: expected ids below 1, found 1 of token \"a\""),
        ("{\"a\": 0, \"b\": 0}".into(), MERGES_TXT.into(), "another token's, too"),
        ("{\"a\": -1}".into(), MERGES_TXT.into(), "vocab.json: "),
        (without("<|endoftext|>"), MERGES_TXT.into(), "expected the token <|endoftext|>, found none"),
        (without("!"), MERGES_TXT.into(), "expected the token !, found none"),
        (without("th"), MERGES_TXT.into(), "merges.txt: "),
        (VOCAB_JSON.into(), "#version: 0.2\ni n\nabc\n".into(), "merges.txt: line 3: expected two tokens"),
        (VOCAB_JSON.into(), "a b c\n".into(), "merges.txt: line 1: expected two tokens"),
    ] {
        let (_folder, vocab, merges) = files(&vocab, &merges);
        let error = ClipTokenizer::from_files(vocab, merges).unwrap_err();
        assert!(matches!(error, TokenizerError::Vocabulary { .. }));
        assert!(error.to_string().contains(expected), "expected {expected:?} in {error}");
    }
    let (_folder, vocab, merges) = files(VOCAB_JSON, MERGES_TXT);
    std::fs::remove_file(&merges).unwrap();
    let error = ClipTokenizer::from_files(vocab, merges).unwrap_err();
    assert!(
        matches!(&error, TokenizerError::File { .. }) && error.to_string().contains("merges.txt"),
        "{error}"
    );
}

/// Tokenizers are shared between threads, and clones are cheap.
#[test]
fn threads_agree() {
    let tokenizer = ClipTokenizer::embedded();
    let expected = tokenizer.encode("Mild cardiomegaly.");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (tokenizer, expected) = (tokenizer.clone(), &expected);
            scope.spawn(move || {
                (0..50).for_each(|_| assert_eq!(&tokenizer.encode("Mild cardiomegaly."), expected))
            });
        }
    });
}

#[test]
fn what_is_saved_is_the_same_vocabulary() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = ClipTokenizer::embedded();
    tokenizer.save(folder.path()).unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(json(&read("vocab.json")), json(VOCAB_JSON));
    let merges = |text: &str| {
        text.lines()
            .filter(|line| !line.starts_with("#version") && !line.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let (found, expected): (Vec<String>, Vec<String>) = (merges(&read("merges.txt")), merges(MERGES_TXT));
    assert!(found == expected, "{} and {} merges", found.len(), expected.len());
    assert_eq!(json(&read("tokenizer_config.json"))["tokenizer_class"], "CLIPTokenizer");
    assert_eq!(json(&read("special_tokens_map.json"))["eos_token"]["content"], "<|endoftext|>");

    let again = ClipTokenizer::from_files(folder.path().join("vocab.json"), folder.path().join("merges.txt"))
        .unwrap();
    for (text, _) in reference() {
        assert_eq!(again.encode(&text), tokenizer.encode(&text), "{text:?}");
    }
    assert!(matches!(tokenizer.save(Path::new("/nonexistent/folder")), Err(TokenizerError::File { .. })));
}
