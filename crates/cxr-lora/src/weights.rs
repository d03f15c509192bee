//! An adapter's numbers, apart from any model and any file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{LoraError, Result};

/// The component that keys without a prefix belong to, as in diffusers.
pub const UNET: &str = "unet";

/// The component whose keys diffusers prefixes with `text_encoder.` and kohya with `lora_te_`.
pub const TEXT_ENCODER: &str = "text_encoder";

/// The two factors of one adapted layer, in PyTorch's layout.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraWeights {
    /// Rows of `a`, columns of `b`.
    pub rank: usize,
    /// Width of the layer's input; channels of a convolution's.
    pub in_features: usize,
    /// Width of the layer's output; channels of a convolution's.
    pub out_features: usize,
    /// Height and width of a convolution's kernel; `None` for a linear layer.
    ///
    /// A file need not tell a linear layer from a convolution of one pixel, and such factors fit both.
    pub kernel: Option<[usize; 2]>,
    /// The layer adds `alpha / rank * B (A x)`.
    ///
    /// An adapter with rank-stabilized scaling, `alpha / sqrt(rank)`, has its alpha times `sqrt(rank)` here, so
    /// that there is one rule and any file format can hold it.
    pub alpha: f64,
    /// `A`, `[rank, in_features]`, row by row; of a convolution `[rank, in_features, kh, kw]`.
    pub a: Vec<f32>,
    /// `B`, `[out_features, rank]`, row by row.
    pub b: Vec<f32>,
}

impl LoraWeights {
    /// The number of values in both factors.
    pub fn parameters(&self) -> usize {
        self.a.len() + self.b.len()
    }

    /// The number of values in a row of `a`.
    pub(crate) fn columns(&self) -> usize {
        let [height, width] = self.pixels();
        self.in_features * height * width
    }

    /// The kernel, of a linear layer as of a convolution of one pixel.
    pub(crate) fn pixels(&self) -> [usize; 2] {
        self.kernel.unwrap_or([1, 1])
    }

    /// The Frobenius norm of what the layer's weight gets, `alpha / rank * B A`.
    ///
    /// In f64, and from products of rank by rank values: `|B A|^2` is the sum of `(B^T B) * (A A^T)`.
    pub fn norm(&self) -> f64 {
        let (rank, columns) = (self.rank, self.columns());
        let a_row = |i: usize| &self.a[i * columns..(i + 1) * columns];
        let mut sum = 0.0;
        for i in 0..rank {
            for j in 0..rank {
                let of_a: f64 =
                    a_row(i).iter().zip(a_row(j)).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                let rows = self.b.chunks_exact(rank);
                let of_b: f64 = rows.map(|row| f64::from(row[i]) * f64::from(row[j])).sum();
                sum += of_a * of_b;
            }
        }
        // Rounding can take a sum of squares that is zero below it.
        (self.alpha / rank as f64).abs() * sum.max(0.0).sqrt()
    }

    /// Checks sizes and values; `name` stands in the error.
    pub(crate) fn check(&self, name: &str) -> Result<()> {
        let shape = |factor: &str, rows: usize, columns: usize, values: &[f32]| {
            if values.len() == rows * columns && !values.is_empty() {
                return Ok(());
            }
            Err(LoraError::FactorShape {
                key: format!("{name}.{factor}"),
                expected: format!("{rows} x {columns} values"),
                found: vec![values.len()],
            })
        };
        shape("lora_A", self.rank, self.columns(), &self.a)?;
        shape("lora_B", self.out_features, self.rank, &self.b)?;
        for (factor, values) in [("lora_A", &self.a), ("lora_B", &self.b)] {
            if !values.iter().all(|value| value.is_finite()) {
                return Err(LoraError::NotFinite { what: format!("{name}.{factor}") });
            }
        }
        if !self.alpha.is_finite() {
            return Err(LoraError::NotFinite { what: format!("{name}.alpha") });
        }
        Ok(())
    }
}

/// How a file names a module.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ModuleName {
    /// By its path in the model, with dots.
    Path(String),
    /// By its path with the dots turned into underscores, which only the model's own names can undo.
    Flattened(String),
}

impl ModuleName {
    /// The name as it stands in the file.
    pub fn as_str(&self) -> &str {
        let (Self::Path(name) | Self::Flattened(name)) = self;
        name
    }
}

impl ModuleName {
    /// The name that the module has in published models.
    ///
    /// transformers 5 took the part `text_model` out of CLIP's text encoder; its weights' files still have it.
    pub(crate) fn published(self, component: &str) -> Self {
        let restore = |name: String, without: &str, separator: char| match component == TEXT_ENCODER {
            true if name.starts_with(without) => format!("text_model{separator}{name}"),
            _ => name,
        };
        match self {
            Self::Path(name) => Self::Path(restore(name, "encoder.layers.", '.')),
            Self::Flattened(name) => Self::Flattened(restore(name, "encoder_layers_", '_')),
        }
    }
}

/// One module of an adapter: of which component, under which name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModuleKey {
    /// The part of the pipeline it is in: [`UNET`], [`TEXT_ENCODER`], or a name of one's own.
    pub component: String,
    /// The module in it.
    pub name: ModuleName,
}

impl ModuleKey {
    /// The module at `path` of `component`.
    pub fn path(component: &str, path: &str) -> Self {
        Self { component: component.to_owned(), name: ModuleName::Path(path.to_owned()) }
    }
}

impl std::fmt::Display for ModuleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.component, self.name.as_str())
    }
}

/// Where an adapter comes from; kept in the header of the files written here.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// SHA-256 of the base model's weights.
    pub base_model: Option<String>,
    /// SHA-256 of the data: of its list of pairs.
    pub dataset: Option<String>,
    /// SHA-256 of the file that says which of them are trained on.
    pub split: Option<String>,
    /// Rank it was trained with.
    pub rank: Option<usize>,
    /// Alpha it was trained with.
    pub alpha: Option<f64>,
    /// The layers it was attached to.
    pub targets: Option<String>,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Seed of the run.
    pub seed: Option<u64>,
    /// Version of this crate that wrote it.
    pub crate_version: Option<String>,
}

/// An adapter: factors by module, and where they come from.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Adapter {
    /// The factors of every adapted module.
    pub modules: BTreeMap<ModuleKey, LoraWeights>,
    /// Where they come from.
    pub provenance: Provenance,
}

impl Adapter {
    /// The number of values in all factors.
    pub fn parameters(&self) -> usize {
        self.modules.values().map(LoraWeights::parameters).sum()
    }

    /// The components that have modules.
    pub fn components(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.modules.keys().map(|key| key.component.as_str()).collect();
        names.dedup();
        names
    }

    /// Moves all modules to another component: a file does not always say which one it is for.
    #[must_use]
    pub fn with_component(self, component: &str) -> Self {
        let rename = |(key, weights): (ModuleKey, LoraWeights)| {
            let name = key.name.published(component);
            (ModuleKey { component: component.to_owned(), name }, weights)
        };
        Self { modules: self.modules.into_iter().map(rename).collect(), ..self }
    }

    /// The same adapter with every module named by its path, looked up in `paths` of `component`.
    ///
    /// # Errors
    /// [`LoraError::Unmatched`] lists the modules of `component` that `paths` lacks;
    /// [`LoraError::AmbiguousLayer`] if two paths differ in dots and underscores alone.
    pub fn resolve(&self, component: &str, paths: &[&str]) -> Result<Self> {
        let lookup = Lookup::new(paths)?;
        let mut modules = BTreeMap::new();
        let mut unmatched = Vec::new();
        let mut total = 0;
        for (key, weights) in &self.modules {
            if key.component != component {
                modules.insert(key.clone(), weights.clone());
                continue;
            }
            total += 1;
            match lookup.find(&key.name) {
                Some(path) => {
                    modules.insert(ModuleKey::path(component, path), weights.clone());
                }
                None => unmatched.push(key.to_string()),
            }
        }
        if !unmatched.is_empty() {
            return Err(LoraError::Unmatched { matched: total - unmatched.len(), total, modules: unmatched });
        }
        Ok(Self { modules, provenance: self.provenance.clone() })
    }
}

/// The layers of a model by path and by flattened path.
pub(crate) struct Lookup<'a> {
    paths: BTreeMap<&'a str, &'a str>,
    flattened: BTreeMap<String, &'a str>,
}

impl<'a> Lookup<'a> {
    pub(crate) fn new(paths: &[&'a str]) -> Result<Self> {
        let mut flattened = BTreeMap::new();
        for path in paths {
            if flattened.insert(flatten(path), *path).is_some() {
                return Err(LoraError::AmbiguousLayer { path: flatten(path) });
            }
        }
        Ok(Self { paths: paths.iter().map(|path| (*path, *path)).collect(), flattened })
    }

    pub(crate) fn find(&self, name: &ModuleName) -> Option<&'a str> {
        match name {
            ModuleName::Path(path) => self.paths.get(path.as_str()).copied(),
            ModuleName::Flattened(name) => self.flattened.get(name).copied(),
        }
    }
}

/// kohya's spelling of a path.
pub(crate) fn flatten(path: &str) -> String {
    path.replace('.', "_")
}
