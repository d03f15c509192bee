//! Adapters on a model: attach, load, choose, weigh, take off, export.

use std::collections::BTreeSet;

use burn::module::Module;
use burn::tensor::backend::Backend;
use cxr_core::random::Stream;
use cxr_kernels::nn::parameters;
use serde::{Deserialize, Serialize};

use crate::branch::Branch;
use crate::dropout::DropoutStep;
use crate::target::{self, Adaptable, LayerInfo, LayerMut, TargetSet, layers};
use crate::weights::{Adapter, Lookup, LoraWeights, ModuleKey, Provenance, UNET};
use crate::{LoraError, Result};

/// The adapter's name where none is given, as in PEFT.
pub const DEFAULT_NAME: &str = "default";

/// What [`attach`] makes.
///
/// | Setting | Default | Range |
/// |---|---|---|
/// | `rank` | 8 | 1 or more |
/// | `alpha` | `rank` | any finite number |
/// | `targets` | [`TargetSet::AllAttention`] | |
/// | `rank_stabilized` | false | |
/// | `dropout` | 0 | 0 or more, below 1 |
/// | `overrides` | none | ranks of 1 or more |
/// | `name` | `default` | not empty |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LoraConfig {
    /// Rows of `A`: parameters and work grow in proportion. 4 to 16 is usual.
    pub rank: usize,
    /// The adapter's output is scaled by `alpha / rank`: with alpha = rank the scale is 1.
    pub alpha: f64,
    /// The layers that get an adapter.
    pub targets: TargetSet,
    /// Scale by `alpha / sqrt(rank)` instead, which keeps gradients of one size as the rank grows
    /// (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA").
    pub rank_stabilized: bool,
    /// The probability with which each value of an adapter's input is dropped in training, as in PEFT.
    ///
    /// Masks are drawn only once [`set_dropout_step`] says from where, which a training loop does before each step.
    pub dropout: f64,
    /// Rank and alpha of some of the layers; the last that matches counts.
    pub overrides: Vec<PatternRank>,
    /// The adapter's name.
    pub name: String,
}

/// Rank and alpha of the layers that a pattern matches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatternRank {
    /// As in [`TargetSet::Patterns`].
    pub pattern: String,
    /// Their rank.
    pub rank: usize,
    /// Their alpha.
    pub alpha: f64,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self::new(8)
    }
}

impl LoraConfig {
    /// Rank `rank` and alpha = rank on all attention projections.
    pub fn new(rank: usize) -> Self {
        Self {
            rank,
            alpha: rank as f64,
            targets: TargetSet::default(),
            rank_stabilized: false,
            dropout: 0.0,
            overrides: Vec::new(),
            name: DEFAULT_NAME.to_owned(),
        }
    }

    /// Sets alpha.
    pub fn with_alpha(self, alpha: f64) -> Self {
        Self { alpha, ..self }
    }

    /// Sets the layers that get an adapter.
    pub fn with_targets(self, targets: TargetSet) -> Self {
        Self { targets, ..self }
    }

    /// Sets rank-stabilized scaling.
    pub fn with_rank_stabilized(self, rank_stabilized: bool) -> Self {
        Self { rank_stabilized, ..self }
    }

    /// Sets the probability of dropout.
    pub fn with_dropout(self, dropout: f64) -> Self {
        Self { dropout, ..self }
    }

    /// Sets rank and alpha of the layers that `pattern` matches.
    pub fn with_override(mut self, pattern: &str, rank: usize, alpha: f64) -> Self {
        self.overrides.push(PatternRank { pattern: pattern.to_owned(), rank, alpha });
        self
    }

    /// Sets the adapter's name.
    pub fn with_name(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// Checks what can be checked without a model; [`attach`] does so too.
    ///
    /// # Errors
    /// [`LoraError::Setting`] names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let wrong = |setting: &str, expected, found: String| {
            Err(LoraError::Setting { setting: setting.to_owned(), expected, found })
        };
        let of_overrides = self.overrides.iter().map(|o| (o.rank, o.alpha));
        for (rank, alpha) in std::iter::once((self.rank, self.alpha)).chain(of_overrides) {
            if rank == 0 {
                return wrong("rank", "1 or more", rank.to_string());
            }
            if !alpha.is_finite() {
                return wrong("alpha", "a finite number", alpha.to_string());
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong("dropout", "0 or more, below 1", self.dropout.to_string());
        }
        if self.name.is_empty() {
            return wrong("name", "at least one character", "empty".to_owned());
        }
        Ok(())
    }

    /// The selected layers with the rank and alpha (with which the scale is `alpha / rank`) of each.
    fn plan<'a>(&self, layers: &'a [LayerInfo]) -> Result<Vec<(&'a LayerInfo, usize, f64)>> {
        let paths: Vec<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
        let selected: BTreeSet<&str> = self.targets.select(&paths)?.into_iter().collect();
        for o in &self.overrides {
            if !selected.iter().any(|path| target::matches(&o.pattern, path)) {
                let first = selected.first().map(|path| (*path).to_owned());
                return Err(LoraError::NoTarget {
                    pattern: o.pattern.clone(),
                    layers: selected.len(),
                    first,
                });
            }
        }
        let chosen = layers.iter().filter(|layer| selected.contains(layer.path.as_str()));
        let settings = |layer: &'a LayerInfo| {
            let of_pattern = self.overrides.iter().rev().find(|o| target::matches(&o.pattern, &layer.path));
            let (rank, alpha) = of_pattern.map_or((self.rank, self.alpha), |o| (o.rank, o.alpha));
            let alpha = if self.rank_stabilized { alpha * (rank as f64).sqrt() } else { alpha };
            (layer, rank, alpha)
        };
        Ok(chosen.map(settings).collect())
    }
}

/// Attaches a new adapter and makes it the one thing in the model that trains; returns the number of layers.
///
/// `A ~ N(0, std = 1 / rank)`, from the stream of `seed` that is named after the layer's path, so that it does not
/// depend on which other layers are adapted; `B = 0`, so that the model's output does not change. The adapter is
/// f32 whatever the base's dtype. See [`train_only`] for the trainable flags.
///
/// # Errors
/// If a setting is out of range, a target matches nothing, an adapter of that name is there, or adapters are
/// merged. The model is unchanged then.
pub fn attach<B: Backend, M: Module<B> + Adaptable<B>>(
    model: &mut M,
    config: &LoraConfig,
    seed: u64,
) -> Result<usize> {
    config.validate()?;
    let layers = layers(model)?;
    check_free(model, &config.name)?;
    let plan = config.plan(&layers)?;
    let mut planned = plan.iter().peekable();
    model.visit_layers_mut(&mut |path, layer| {
        let Some((info, rank, alpha)) = planned.next_if(|(info, ..)| info.path == path) else { return };
        let weights = initial_weights(info, *rank, *alpha, seed);
        push(layer, &config.name, path, &weights).dropout = config.dropout;
    });
    train_only(model, &config.name)?;
    Ok(plan.len())
}

fn initial_weights(layer: &LayerInfo, rank: usize, alpha: f64, seed: u64) -> LoraWeights {
    let ([out_features, in_features], kernel) = (layer.shape, layer.kernel);
    let (a, b) = (Vec::new(), vec![0.0; out_features * rank]);
    let mut weights = LoraWeights { rank, in_features, out_features, kernel, alpha, a, b };
    weights.a = Stream::new(seed, &format!("lora.{}", layer.path), 0).normals(rank * weights.columns());
    weights.a.iter_mut().for_each(|value| *value /= rank as f32);
    weights
}

/// Freezes all parameters of the model except the factors of adapter `name`; returns how many layers have it.
///
/// Flags are set, not left to what initialization or loading makes of them. On a backend without autodiff there
/// are no flags: call this again once the model is on one.
///
/// # Errors
/// [`LoraError::NotAttached`].
pub fn train_only<B: Backend, M: Module<B> + Adaptable<B>>(model: &mut M, name: &str) -> Result<usize> {
    check_attached(model, name)?;
    *model = parameters::set_trainable(model.clone(), |_| false);
    for_each(model, name, |branch| branch.set_trainable(true))
}

/// Loads an adapter under [`DEFAULT_NAME`] into a model that is the [`UNET`] component; returns the number of
/// layers. `weight` is how much of it is added, 1 being what it was trained for.
///
/// # Errors
/// As [`load_named`].
pub fn load_adapter<B: Backend, M: Adaptable<B>>(
    model: &mut M,
    adapter: &Adapter,
    weight: f64,
) -> Result<usize> {
    load_named(&mut [(UNET, model)], adapter, DEFAULT_NAME, weight)
}

/// Loads an adapter under `name` into the components given; returns the number of layers.
///
/// The factors are frozen; [`train_only`] makes them trainable.
///
/// # Errors
/// Strict: a module of the adapter that matches no layer, or whose shape differs, is an error, as is an adapter
/// without modules, a value that is not finite, a name that is taken, and a merged model. The models are unchanged
/// then.
pub fn load_named<B: Backend>(
    models: &mut [(&str, &mut dyn Adaptable<B>)],
    adapter: &Adapter,
    name: &str,
    weight: f64,
) -> Result<usize> {
    if !weight.is_finite() {
        let (setting, found) = ("weight".to_owned(), weight.to_string());
        return Err(LoraError::Setting { setting, expected: "a finite number", found });
    }
    let mut unmatched: BTreeSet<&ModuleKey> = adapter.modules.keys().collect();
    let mut matched = Vec::new();
    for (component, model) in models.iter() {
        check_free(*model, name)?;
        matched.push(match_layers(component, &layers(*model)?, adapter, &mut unmatched)?);
    }
    let total = adapter.modules.len();
    if !unmatched.is_empty() || total == 0 {
        let modules = unmatched.iter().map(|key| key.to_string()).collect();
        return Err(LoraError::Unmatched { matched: total - unmatched.len(), total, modules });
    }
    for ((_, model), matched) in models.iter_mut().zip(&matched) {
        let mut matched = matched.iter().peekable();
        model.visit_layers_mut(&mut |path, layer| {
            if let Some((_, weights)) = matched.next_if(|(matched, _)| matched == path) {
                push(layer, name, path, weights).weight = weight;
            }
        });
    }
    Ok(total)
}

/// The layers of one component that the adapter has factors for, in the order of the model.
fn match_layers<'a>(
    component: &str,
    layers: &[LayerInfo],
    adapter: &'a Adapter,
    unmatched: &mut BTreeSet<&ModuleKey>,
) -> Result<Vec<(String, &'a LoraWeights)>> {
    let paths: Vec<&str> = layers.iter().map(|layer| layer.path.as_str()).collect();
    let lookup = Lookup::new(&paths)?;
    let mut found = std::collections::BTreeMap::new();
    for (key, weights) in adapter.modules.iter().filter(|(key, _)| key.component == component) {
        let Some(path) = lookup.find(&key.name) else { continue };
        weights.check(&key.to_string())?;
        unmatched.remove(key);
        if found.insert(path, (key, weights)).is_some() {
            return Err(LoraError::AmbiguousLayer { path: key.to_string() });
        }
    }
    let mut in_order = Vec::new();
    for layer in layers {
        let Some((key, weights)) = found.get(layer.path.as_str()) else { continue };
        let full = |[out, input]: [usize; 2], [height, width]: [usize; 2]| [out, input, height, width];
        let expected = full(layer.shape, layer.kernel.unwrap_or([1, 1]));
        let found = full([weights.out_features, weights.in_features], weights.pixels());
        if found != expected {
            return Err(LoraError::LayerShape { module: key.to_string(), expected, found });
        }
        in_order.push((layer.path.clone(), *weights));
    }
    Ok(in_order)
}

/// Takes adapter `name` off; returns how many layers had it.
///
/// # Errors
/// [`LoraError::NotAttached`], [`LoraError::Merged`].
pub fn detach<B: Backend, M: Adaptable<B> + ?Sized>(model: &mut M, name: &str) -> Result<usize> {
    check_attached(model, name)?;
    check_unmerged(model)?;
    let mut removed = 0;
    model.visit_layers_mut(&mut |_, layer| {
        let adapters = layer.adapters();
        let before = adapters.len();
        adapters.retain(|branch| branch.name != name);
        removed += before - adapters.len();
    });
    Ok(removed)
}

/// Lets adapter `name` take part or not; returns how many layers have it.
///
/// # Errors
/// [`LoraError::NotAttached`], [`LoraError::Merged`].
pub fn set_enabled<B: Backend, M: Adaptable<B> + ?Sized>(
    model: &mut M,
    name: &str,
    enabled: bool,
) -> Result<usize> {
    check_unmerged(model)?;
    for_each(model, name, |branch| branch.enabled = enabled)
}

/// Sets how much of adapter `name` is added, on top of `alpha / rank`; returns how many layers have it.
///
/// # Errors
/// [`LoraError::NotAttached`], [`LoraError::Merged`], [`LoraError::Setting`] if `weight` is not finite.
pub fn set_weight<B: Backend, M: Adaptable<B> + ?Sized>(
    model: &mut M,
    name: &str,
    weight: f64,
) -> Result<usize> {
    if !weight.is_finite() {
        let (setting, found) = ("weight".to_owned(), weight.to_string());
        return Err(LoraError::Setting { setting, expected: "a finite number", found });
    }
    check_unmerged(model)?;
    for_each(model, name, |branch| branch.weight = weight)
}

/// Says where the masks of the next forward passes of adapter `name` come from, or with `None` that nothing is
/// dropped; returns how many layers have it.
///
/// A training loop calls this before each step, with the step's number. Only factors that are tracked by autodiff
/// drop anything: a validation on the inner model, or a frozen adapter, needs no call.
///
/// # Errors
/// [`LoraError::NotAttached`].
pub fn set_dropout_step<B: Backend, M: Adaptable<B> + ?Sized>(
    model: &mut M,
    name: &str,
    step: Option<DropoutStep>,
) -> Result<usize> {
    for_each(model, name, |branch| branch.dropout_step = step)
}

/// Whether the adapters of a model drop inputs where autodiff does not track their factors as well, once
/// [`set_dropout_step`] says where the masks come from: for a training loop that goes forward without a graph, to go
/// forward once more, with the same masks, on the way back.
pub fn set_dropout_untracked<B: Backend, M: Adaptable<B> + ?Sized>(model: &mut M, untracked: bool) {
    model.visit_layers_mut(&mut |_, layer| {
        layer.adapters().iter_mut().for_each(|branch| branch.dropout_untracked = untracked);
    });
}

/// The names of the adapters that are attached, in the order of their first layers.
pub fn attached<B: Backend, M: Adaptable<B> + ?Sized>(model: &M) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    model.visit_layers(&mut |_, layer| {
        for branch in layer.adapters() {
            if !names.contains(&branch.name) {
                names.push(branch.name.clone());
            }
        }
    });
    names
}

/// Copies adapter `name` out of a model that is the component `component` ([`UNET`] for diffusers' UNet).
///
/// The weight set with [`set_weight`] is not part of it. The provenance holds this crate's version; add the rest.
///
/// # Errors
/// [`LoraError::NotAttached`], [`LoraError::NotFinite`].
pub fn export<B: Backend, M: Adaptable<B> + ?Sized>(
    model: &M,
    name: &str,
    component: &str,
) -> Result<Adapter> {
    check_attached(model, name)?;
    let mut adapter = Adapter {
        provenance: Provenance {
            crate_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            ..Provenance::default()
        },
        ..Adapter::default()
    };
    let mut outcome = Ok(());
    model.visit_layers(&mut |path, layer| {
        let branches = layer.adapters().iter().filter(|branch| branch.name == name);
        for branch in branches {
            let weights = branch.to_weights(layer.kernel());
            if outcome.is_ok() {
                outcome = weights.check(path);
            }
            adapter.modules.insert(ModuleKey::path(component, path), weights);
        }
    });
    outcome.map(|()| adapter)
}

fn push<'a, B: Backend>(
    layer: LayerMut<'a, B>,
    name: &str,
    path: &str,
    weights: &LoraWeights,
) -> &'a mut Branch<B> {
    let branch = Branch::new(name, path, weights, &layer.device());
    let adapters = layer.adapters();
    let position = adapters.len();
    adapters.push(branch);
    &mut adapters[position]
}

fn for_each<B: Backend, M: Adaptable<B> + ?Sized>(
    model: &mut M,
    name: &str,
    mut change: impl FnMut(&mut Branch<B>),
) -> Result<usize> {
    check_attached(model, name)?;
    let mut changed = 0;
    model.visit_layers_mut(&mut |_, layer| {
        for branch in layer.adapters().iter_mut().filter(|branch| branch.name == name) {
            change(branch);
            changed += 1;
        }
    });
    Ok(changed)
}

fn check_attached<B: Backend, M: Adaptable<B> + ?Sized>(model: &M, name: &str) -> Result<()> {
    let attached = attached(model);
    if attached.iter().any(|other| other == name) {
        return Ok(());
    }
    Err(LoraError::NotAttached { name: name.to_owned(), attached })
}

/// That no layer has an adapter of that name, and none is merged.
fn check_free<B: Backend, M: Adaptable<B> + ?Sized>(model: &M, name: &str) -> Result<()> {
    check_unmerged(model)?;
    let mut taken = None;
    model.visit_layers(&mut |path, layer| {
        if taken.is_none() && layer.adapters().iter().any(|branch| branch.name == name) {
            taken = Some(path.to_owned());
        }
    });
    match taken {
        Some(path) => Err(LoraError::AlreadyAttached { name: name.to_owned(), path }),
        None => Ok(()),
    }
}

pub(crate) fn check_unmerged<B: Backend, M: Adaptable<B> + ?Sized>(model: &M) -> Result<()> {
    let mut merged = None;
    model.visit_layers(&mut |path, layer| {
        if merged.is_none() && layer.is_merged() {
            merged = Some(path.to_owned());
        }
    });
    merged.map_or(Ok(()), |path| Err(LoraError::Merged { path }))
}
