//! Text to token ids, as transformers' `CLIPTokenizer` does it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{Lowercase, NFC, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Model, Tokenizer};

use crate::vocabulary::{self, MERGES_TXT, VOCAB_JSON};

/// The number of tokens that the text encoder takes.
pub const LENGTH: usize = 77;

const BEGIN: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// What separates words: contractions, runs of letters, single digits, runs of anything else but white space.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// What can be wrong with a vocabulary.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file cannot be read.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {problem}", .path.display())]
    Vocabulary {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        problem: String,
    },
}

/// A text as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// [`LENGTH`] ids: begin, the text, end, and end again for padding.
    pub ids: Vec<u32>,
    /// Whether tokens were left out because the text has more than 75.
    pub truncated: bool,
}

/// The byte-pair encoding of CLIP.
///
/// Text is normalized (Unicode NFC), runs of white space become one space, and letters become lower case. It is the
/// same as transformers' `CLIPTokenizer`, `<|startoftext|>` and `<|endoftext|>` within a text included, which become
/// the tokens that they name. Clones share the vocabulary.
#[derive(Debug, Clone)]
pub struct ClipTokenizer {
    tokenizer: Arc<Tokenizer>,
    begin: u32,
    end: u32,
}

impl ClipTokenizer {
    /// The tokenizer of CLIP ViT-L/14. It takes some ten milliseconds to set up; clone it rather than do so again.
    ///
    /// # Panics
    /// Never: the vocabulary is part of the crate.
    pub fn embedded() -> Self {
        Self::from_texts((Path::new("vocab.json"), VOCAB_JSON), (Path::new("merges.txt"), MERGES_TXT))
            .expect("the crate's own vocabulary is whole")
    }

    /// A tokenizer of another vocabulary, from `vocab.json` and `merges.txt` as published models have them in their
    /// folder `tokenizer`.
    ///
    /// # Errors
    /// If a file cannot be read, or they do not make a whole byte-level vocabulary; the error names the file.
    pub fn from_files(vocab: impl AsRef<Path>, merges: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|source| TokenizerError::File { path: path.to_path_buf(), source })
        };
        let (vocab, merges) = (vocab.as_ref(), merges.as_ref());
        Self::from_texts((vocab, &read(vocab)?), (merges, &read(merges)?))
    }

    /// A tokenizer of another vocabulary, from `tokenizer.json` as newer exports have it in place of the two files of
    /// [`from_files`](Self::from_files). Only vocabulary and merges are taken from it: the rest is CLIP's.
    ///
    /// # Errors
    /// If the file cannot be read, is of another kind of tokenizer, or does not make a whole byte-level vocabulary;
    /// the error names the file.
    pub fn from_tokenizer_json(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path)
            .map_err(|source| TokenizerError::File { path: path.to_path_buf(), source })?;
        let (vocab, merges) = vocabulary::split_tokenizer_json(&text)
            .map_err(|problem| TokenizerError::Vocabulary { path: path.to_path_buf(), problem })?;
        Self::from_texts((path, &vocab), (path, &merges))
    }

    /// Writes the vocabulary into a folder that exists, as `vocab.json`, `merges.txt` and the two files of settings
    /// that transformers wants beside them, under published models' names.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), TokenizerError> {
        let error = |source| TokenizerError::File { path: folder.to_path_buf(), source };
        self.tokenizer
            .get_model()
            .save(folder, None)
            .map_err(|source| error(std::io::Error::other(source)))?;
        let token = |content: &str| {
            serde_json::json!({
                "content": content, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false,
            })
        };
        let special = serde_json::json!({
            "bos_token": token(BEGIN), "eos_token": token(END), "unk_token": token(END), "pad_token": END,
        });
        let mut config = serde_json::json!({
            "tokenizer_class": "CLIPTokenizer", "do_lower_case": true, "errors": "replace",
            "add_prefix_space": false, "model_max_length": LENGTH,
        });
        if let (Some(config), Some(special)) = (config.as_object_mut(), special.as_object()) {
            config.extend(special.clone());
        }
        for (name, json) in [("special_tokens_map.json", special), ("tokenizer_config.json", config)] {
            std::fs::write(folder.join(name), format!("{json:#}\n")).map_err(error)?;
        }
        Ok(())
    }

    /// The ids of a text, cut or padded to [`LENGTH`].
    pub fn encode(&self, text: &str) -> Tokens {
        let text = self.ids_of(text);
        let kept = &text[..text.len().min(LENGTH - 2)];
        let mut ids = Vec::with_capacity(LENGTH);
        ids.push(self.begin);
        ids.extend_from_slice(kept);
        ids.resize(LENGTH, self.end);
        Tokens { ids, truncated: kept.len() < text.len() }
    }

    /// How many tokens a text has, begin and end included; [`encode`](Self::encode) cuts off what is above
    /// [`LENGTH`].
    pub fn length(&self, text: &str) -> usize {
        self.ids_of(text).len() + 2
    }

    /// The ids of a text alone, without begin and end.
    fn ids_of(&self, text: &str) -> Vec<u32> {
        let encoding = self.tokenizer.encode_fast(text, false);
        encoding.expect("a vocabulary that has every byte encodes every text").get_ids().to_vec()
    }

    fn from_texts(
        (vocab_path, vocab): (&Path, &str),
        (merges_path, merges): (&Path, &str),
    ) -> Result<Self, TokenizerError> {
        let wrong = |path: &Path, problem| TokenizerError::Vocabulary { path: path.to_path_buf(), problem };
        let vocab = vocabulary::parse_vocab(vocab).map_err(|problem| wrong(vocab_path, problem))?;
        let merges = vocabulary::parse_merges(merges).map_err(|problem| wrong(merges_path, problem))?;
        let id = |token: &str| {
            let problem = || wrong(vocab_path, format!("expected the token {token}, found none"));
            vocab.get(token).copied().ok_or_else(problem)
        };
        let (begin, end) = (id(BEGIN)?, id(END)?);
        for byte in ByteLevel::alphabet() {
            id(&byte.to_string())?;
            id(&format!("{byte}</w>"))?;
        }
        let tokenizer = build(vocab, merges).map_err(|problem| wrong(merges_path, problem.to_string()))?;
        Ok(Self { tokenizer: Arc::new(tokenizer), begin, end })
    }
}

/// The steps of transformers' `CLIPTokenizer`.
fn build(vocab: HashMap<String, u32>, merges: Vec<(String, String)>) -> tokenizers::Result<Tokenizer> {
    let model = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .end_of_word_suffix("</w>".to_string())
        .unk_token(END.to_string())
        .build()?;
    let white_space = Replace::new(ReplacePattern::Regex(r"\s+".to_string()), " ")?;
    let words = Split::new(SplitPattern::Regex(WORDS.to_string()), SplitDelimiterBehavior::Removed, true)?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(Normalizers::new(vec![NFC.into(), white_space.into(), Lowercase.into()])))
        .with_pre_tokenizer(Some(PreTokenizers::new(vec![
            words.into(),
            ByteLevel::default().add_prefix_space(false).into(),
        ])));
    tokenizer.add_special_tokens(&[AddedToken::from(BEGIN, true), AddedToken::from(END, true)]);
    Ok(tokenizer)
}
