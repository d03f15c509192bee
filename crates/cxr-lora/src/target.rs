//! Which layers an adapter goes on, and how a model lists those it has.

use std::collections::BTreeSet;

use burn::tensor::backend::Backend;
use serde::{Deserialize, Serialize};

use crate::branch::Branch;
use crate::conv::LoraConv2d;
use crate::linear::LoraLinear;
use crate::{LoraError, Result};

/// The projections of an attention, as diffusers names them.
const PROJECTIONS: [&str; 4] = [".to_q", ".to_k", ".to_v", ".to_out.0"];

/// The other products of a transformer: feed-forward, and the projections before and after its blocks.
const FEED_FORWARD_AND_PROJECTIONS: [&str; 4] = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"];

/// Which of a model's layers get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TargetSet {
    /// The four projections `to_q`, `to_k`, `to_v`, `to_out.0` of every attention.
    #[default]
    AllAttention,
    /// The same four of the cross-attentions (`attn2`) alone.
    CrossAttention,
    /// All attentions, and with them the feed-forward layers (`ff.net.0.proj`, `ff.net.2`) and the projections
    /// before and after the blocks (`proj_in`, `proj_out`): what kohya's scripts adapt in a UNet.
    Transformer,
    /// Every layer that at least one of the patterns matches.
    ///
    /// In a pattern `*` stands for any characters, dots included, and `?` for one. It has to match the path as a
    /// whole or from the start of one of its parts: `to_q` and `attn2.to_*` match wherever these are.
    Patterns(Vec<String>),
}

impl TargetSet {
    /// The paths that this set selects, in the order in which they are given.
    ///
    /// # Errors
    /// [`LoraError::NoTarget`] for a pattern that selects nothing.
    pub fn select<'a>(&self, paths: &[&'a str]) -> Result<Vec<&'a str>> {
        let mut selected = BTreeSet::new();
        match self {
            Self::AllAttention => {
                select_by("all_attention", paths, |path| attention(path).is_some(), &mut selected)?;
            }
            Self::CrossAttention => {
                let cross = |path: &str| attention(path).is_some_and(|name| name == "attn2");
                select_by("cross_attention", paths, cross, &mut selected)?;
            }
            Self::Transformer => {
                let other = |path: &str| FEED_FORWARD_AND_PROJECTIONS.iter().any(|name| matches(name, path));
                let wanted = |path: &str| attention(path).is_some() || other(path);
                select_by("transformer", paths, wanted, &mut selected)?;
            }
            Self::Patterns(patterns) => {
                if patterns.is_empty() {
                    return Err(no_target("", paths));
                }
                for pattern in patterns {
                    select_by(pattern, paths, |path| matches(pattern, path), &mut selected)?;
                }
            }
        }
        Ok(paths.iter().copied().filter(|path| selected.contains(path)).collect())
    }
}

impl std::fmt::Display for TargetSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AllAttention => f.write_str("all_attention"),
            Self::CrossAttention => f.write_str("cross_attention"),
            Self::Transformer => f.write_str("transformer"),
            Self::Patterns(patterns) => f.write_str(&patterns.join(",")),
        }
    }
}

fn select_by<'a>(
    name: &str,
    paths: &[&'a str],
    wanted: impl Fn(&str) -> bool,
    selected: &mut BTreeSet<&'a str>,
) -> Result<()> {
    let mut found = paths.iter().filter(|path| wanted(path)).peekable();
    if found.peek().is_none() {
        return Err(no_target(name, paths));
    }
    selected.extend(found);
    Ok(())
}

fn no_target(pattern: &str, paths: &[&str]) -> LoraError {
    LoraError::NoTarget {
        pattern: pattern.to_owned(),
        layers: paths.len(),
        first: paths.first().map(|path| (*path).to_owned()),
    }
}

/// The name of the attention (`attn1`) that the layer at `path` is a projection of, if it is one.
fn attention(path: &str) -> Option<&str> {
    let parent = PROJECTIONS.iter().find_map(|projection| path.strip_suffix(projection))?;
    parent.rsplit('.').next()
}

/// Whether `pattern` matches `path` as a whole or from the start of one of its parts.
pub(crate) fn matches(pattern: &str, path: &str) -> bool {
    let starts = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]);
    std::iter::once(path).chain(starts).any(|tail| glob(pattern.as_bytes(), tail.as_bytes()))
}

/// Glob with `*` and `?`; linear in space, and in time at most the product of the lengths.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on when the text stops matching: after the last star, one byte further on.
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            retry = Some((p + 1, t));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == b'?' || pattern[p] == text[t]) {
            (p, t) = (p + 1, t + 1);
        } else if let Some((after_star, from)) = retry {
            (p, t) = (after_star, from + 1);
            retry = Some((after_star, from + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// A model's layer that an adapter can be attached to, by reference.
#[derive(Debug)]
#[non_exhaustive]
pub enum LayerRef<'a, B: Backend> {
    /// A linear layer.
    Linear(&'a LoraLinear<B>),
    /// A convolution.
    Conv2d(&'a LoraConv2d<B>),
}

/// A model's layer that an adapter can be attached to, by mutable reference.
#[derive(Debug)]
#[non_exhaustive]
pub enum LayerMut<'a, B: Backend> {
    /// A linear layer.
    Linear(&'a mut LoraLinear<B>),
    /// A convolution.
    Conv2d(&'a mut LoraConv2d<B>),
}

impl<'a, B: Backend> LayerRef<'a, B> {
    /// `[out, in]` of the layer's weight.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Linear(layer) => [layer.out_features(), layer.in_features()],
            Self::Conv2d(layer) => [layer.out_channels(), layer.in_channels()],
        }
    }

    /// Height and width of a convolution's kernel.
    pub fn kernel(&self) -> Option<[usize; 2]> {
        match self {
            Self::Linear(_) => None,
            Self::Conv2d(layer) => Some([layer.kernel(); 2]),
        }
    }

    /// The layer's adapters.
    pub fn adapters(&self) -> &'a [Branch<B>] {
        match self {
            Self::Linear(layer) => &layer.adapters,
            Self::Conv2d(layer) => &layer.adapters,
        }
    }

    /// Whether adapters are merged into the weight.
    pub fn is_merged(&self) -> bool {
        match self {
            Self::Linear(layer) => layer.merged,
            Self::Conv2d(layer) => layer.merged,
        }
    }

    /// The adapters that change the output now.
    pub(crate) fn active(&self) -> impl Iterator<Item = &'a Branch<B>> {
        let merged = self.is_merged();
        self.adapters().iter().filter(move |branch| !merged && branch.is_active())
    }
}

impl<'a, B: Backend> LayerMut<'a, B> {
    pub(crate) fn adapters(self) -> &'a mut Vec<Branch<B>> {
        match self {
            Self::Linear(layer) => &mut layer.adapters,
            Self::Conv2d(layer) => &mut layer.adapters,
        }
    }

    pub(crate) fn set_merged(self, merged: bool) {
        match self {
            Self::Linear(layer) => layer.merged = merged,
            Self::Conv2d(layer) => layer.merged = merged,
        }
    }

    pub(crate) fn device(&self) -> B::Device {
        match self {
            Self::Linear(layer) => layer.weight.lazy_device(),
            Self::Conv2d(layer) => layer.weight.lazy_device(),
        }
    }
}

/// A model that lists the layers which an adapter can be attached to.
///
/// The path of a layer is its path as a module (`down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`),
/// which is the stem of its weight's key in the model's file. Both visits list the same layers in the same order.
pub trait Adaptable<B: Backend> {
    /// Calls `visit` with every layer and its path.
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>));

    /// Calls `visit` with every layer and its path.
    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>));
}

/// What [`layers`] says of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// Its path.
    pub path: String,
    /// `[out, in]` of its weight.
    pub shape: [usize; 2],
    /// Height and width of a convolution's kernel; `None` for a linear layer.
    pub kernel: Option<[usize; 2]>,
    /// Whether adapters are merged into its weight.
    pub merged: bool,
}

/// The layers of a model that an adapter can be attached to.
///
/// # Errors
/// [`LoraError::AmbiguousLayer`] if two have the same path.
pub fn layers<B: Backend, M: Adaptable<B> + ?Sized>(model: &M) -> Result<Vec<LayerInfo>> {
    let mut found = Vec::new();
    model.visit_layers(&mut |path, layer| {
        let (shape, kernel, merged) = (layer.shape(), layer.kernel(), layer.is_merged());
        found.push(LayerInfo { path: path.to_owned(), shape, kernel, merged });
    });
    let mut seen = BTreeSet::new();
    match found.iter().find(|layer| !seen.insert(layer.path.as_str())) {
        Some(twice) => Err(LoraError::AmbiguousLayer { path: twice.path.clone() }),
        None => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [&str; 7] = [
        "conv_in",
        "down.0.attn1.to_q",
        "down.0.attn1.to_out.0",
        "down.0.attn2.to_q",
        "down.0.attn2.to_k",
        "down.0.ff.net.2",
        "to_q_like",
    ];

    #[test]
    fn named_sets_select_the_projections() {
        let all = TargetSet::AllAttention.select(&PATHS).unwrap();
        assert_eq!(all, PATHS[1..5]);
        let cross = TargetSet::CrossAttention.select(&PATHS).unwrap();
        assert_eq!(cross, PATHS[3..5]);
        let transformer = TargetSet::Transformer.select(&PATHS).unwrap();
        assert_eq!(transformer, PATHS[1..6]);
    }

    #[test]
    fn patterns_match_whole_paths_and_tails() {
        let select = |patterns: &[&str]| {
            TargetSet::Patterns(patterns.iter().map(|p| (*p).to_owned()).collect()).select(&PATHS)
        };
        assert_eq!(select(&["to_q"]).unwrap(), [PATHS[1], PATHS[3]]);
        assert_eq!(select(&["attn2.to_*", "conv_in"]).unwrap(), [PATHS[0], PATHS[3], PATHS[4]]);
        assert_eq!(select(&["down.*.net.?"]).unwrap(), [PATHS[5]]);
        assert_eq!(select(&["*"]).unwrap(), PATHS);
        let error = select(&["to_q", "attn3.*"]).unwrap_err().to_string();
        assert!(error.contains("`attn3.*`") && error.contains('7') && error.contains("conv_in"), "{error}");
        assert!(select(&[]).is_err());
        // A tail starts at a dot: no match in the middle of a name.
        assert!(select(&["q"]).is_err());
    }

    #[test]
    fn glob_agrees_with_a_plain_recursion() {
        fn slow(pattern: &[u8], text: &[u8]) -> bool {
            match pattern.split_first() {
                None => text.is_empty(),
                Some((b'*', rest)) => (0..=text.len()).any(|skip| slow(rest, &text[skip..])),
                Some((b'?', rest)) => !text.is_empty() && slow(rest, &text[1..]),
                Some((byte, rest)) => text.first() == Some(byte) && slow(rest, &text[1..]),
            }
        }
        let words = |alphabet: &'static [u8], longest: u32| {
            (0..=longest).flat_map(move |length| {
                let n = alphabet.len();
                (0..n.pow(length))
                    .map(move |code| (0..length).map(|i| alphabet[code / n.pow(i) % n]).collect::<Vec<u8>>())
            })
        };
        for pattern in words(b"ab*?", 4) {
            for text in words(b"ab", 5) {
                assert_eq!(glob(&pattern, &text), slow(&pattern, &text), "{pattern:?} {text:?}");
            }
        }
    }
}
