//! The settings of a fine-tuning, and the presets.

use std::path::Path;

use cxr_lora::LoraConfig;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::config::check;
use crate::{LearningRate, OptimizerConfig, SnrWeight, TrainConfig, TrainError};

/// Everything that a fine-tuning of an adapter is a function of, besides model and data.
///
/// | Setting | `paper_128` (default) | `clinical_512` | Range |
/// |---|---|---|---|
/// | `image_size` | 128 | 512 | pixels, a multiple of 8 |
/// | `epochs` | 20 | 20 | at least 1 |
/// | `max_steps` | none | none | at least 1: optimizer steps, whatever the epochs |
/// | `batch_size` | 4 | 2 | at least 1 |
/// | `accumulation` | 1 | 8 | at least 1: backward passes per optimizer step |
/// | `learning_rate` | 5e-5, constant | 1e-4, 500 steps of warm-up, then half a cosine | above 0 |
/// | `optimizer` | Adam | AdamW, weight decay 1e-2 | |
/// | `clip_norm` | none | 1 | above 0 |
/// | `ema` | none | none | decay in (0, 1) |
/// | `lora` | rank 8, alpha 8, all attention projections | the same | |
/// | `weight` | uniform | min-SNR, gamma 5 | gamma above 0 |
/// | `noise_offset` | 0 | 0 | 0 to 1 |
/// | `caption_dropout` | 0 | 0 | in [0, 1) |
/// | `base_dtype` | f32 | bf16 | of the frozen weights; the adapter is f32 in any case |
/// | `seed` | 0 | 0 | |
/// | `checkpoint_every` | 500 | 500 | optimizer steps, at least 1 |
/// | `keep_checkpoints` | 2 | 2 | at least 1 |
/// | `block_checkpointing` | false | false | less memory, about a third more time |
/// | `validation.every` | 500 | 500 | optimizer steps; 0 for no validation |
/// | `validation.pairs` | 32 | 32 | at least 1: pairs that are not trained on |
/// | `validation.bins` | 4 | 4 | at least 1: parts of the timesteps |
/// | `samples.every` | 1000 | 1000 | optimizer steps; 0 for no pictures |
/// | `samples.prompts` | five | five | at least one |
/// | `samples.steps` | 25 | 25 | denoising steps, at least 1 |
/// | `samples.guidance` | 7.5 | 7.5 | a finite number |
/// | `samples.seed` | 0 | 0 | of the first picture; the next has one more |
///
/// `paper_128` is the paper's section 7: on its 5,825 pairs, 29,140 steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct FinetuneConfig {
    /// Side of the pictures, in pixels.
    pub image_size: u32,
    /// How often every pair is seen.
    pub epochs: u64,
    /// Optimizer steps after which the run ends in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Samples per backward pass; the last batch of an epoch may be smaller.
    pub batch_size: usize,
    /// Backward passes per optimizer step; each counts by its number of samples.
    pub accumulation: usize,
    /// The largest Euclidean norm of all gradients together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Decay of the exponentially averaged copy of the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// A normal number times this is added to the noise of each channel.
    pub noise_offset: f32,
    /// How often a caption is left out, which trains the unconditional branch.
    pub caption_dropout: f32,
    /// Dtype of the frozen weights.
    pub base_dtype: BaseDtype,
    /// How much each timestep counts.
    pub weight: SnrWeight,
    /// Seed of every stream of the run.
    pub seed: u64,
    /// Optimizer steps between checkpoints.
    pub checkpoint_every: u64,
    /// How many checkpoints stay, besides the best.
    pub keep_checkpoints: usize,
    /// Go backward one block of the UNet at a time.
    pub block_checkpointing: bool,
    /// The learning rate at each step.
    pub learning_rate: LearningRate,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The adapter.
    pub lora: LoraConfig,
    /// The loss on pairs that are not trained on.
    pub validation: ValidationConfig,
    /// Pictures of the same prompts along the way.
    pub samples: SampleConfig,
}

/// The loss on pairs that are not trained on, always the same ones, with the same noise at the same timesteps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationConfig {
    /// Optimizer steps between two; 0 for none.
    pub every: u64,
    /// How many pairs, the first of those that are held out.
    pub pairs: usize,
    /// Into how many parts the timesteps are cut; every pair is seen once in each.
    pub bins: usize,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self { every: 500, pairs: 32, bins: 4 }
    }
}

/// Pictures that are made along the way, always of the same prompts and seeds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Optimizer steps between two grids; 0 for none.
    pub every: u64,
    /// One picture of each.
    pub prompts: Vec<String>,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Seed of the first picture; the next has one more.
    pub seed: u64,
}

impl Default for SampleConfig {
    fn default() -> Self {
        let prompts = [
            "No acute cardiopulmonary abnormality.",
            "Cardiomegaly.",
            "Small left pleural effusion.",
            "Right lower lobe pneumonia.",
            "Hyperexpanded lungs, emphysema.",
        ];
        Self { every: 1000, prompts: prompts.map(str::to_owned).into(), steps: 25, guidance: 7.5, seed: 0 }
    }
}

/// A dtype of frozen weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseDtype {
    /// Single precision.
    #[default]
    F32,
    /// Half precision, 11 bits.
    F16,
    /// Half precision with the range of single, 8 bits.
    Bf16,
}

/// The names of the presets.
pub const PRESETS: [&str; 2] = ["paper_128", "clinical_512"];

impl Default for FinetuneConfig {
    fn default() -> Self {
        Self::paper_128()
    }
}

impl FinetuneConfig {
    /// The paper's: 128 pixels, batches of 4, 20 epochs, Adam at 5e-5, rank 8.
    pub fn paper_128() -> Self {
        Self {
            image_size: 128,
            epochs: 20,
            max_steps: None,
            batch_size: 4,
            accumulation: 1,
            learning_rate: LearningRate::constant(5e-5),
            optimizer: OptimizerConfig::default(),
            clip_norm: None,
            ema: None,
            lora: LoraConfig::new(8),
            weight: SnrWeight::Uniform,
            noise_offset: 0.0,
            caption_dropout: 0.0,
            base_dtype: BaseDtype::F32,
            seed: 0,
            checkpoint_every: 500,
            keep_checkpoints: 2,
            block_checkpointing: false,
            validation: ValidationConfig::default(),
            samples: SampleConfig::default(),
        }
    }

    /// For pictures of 512 pixels: what has proved itself since, and the memory of one GPU in mind.
    pub fn clinical_512() -> Self {
        Self {
            image_size: 512,
            batch_size: 2,
            accumulation: 8,
            learning_rate: LearningRate::cosine(1e-4, 500),
            optimizer: OptimizerConfig { weight_decay: 1e-2, ..OptimizerConfig::default() },
            clip_norm: Some(1.0),
            weight: SnrWeight::MinSnr(5.0),
            base_dtype: BaseDtype::Bf16,
            ..Self::paper_128()
        }
    }

    /// The preset of a name.
    ///
    /// # Errors
    /// [`TrainError::Preset`] lists those there are.
    pub fn preset(name: &str) -> Result<Self, TrainError> {
        match name {
            "paper_128" => Ok(Self::paper_128()),
            "clinical_512" => Ok(Self::clinical_512()),
            _ => Err(TrainError::Preset { name: name.to_owned(), known: PRESETS.join(", ") }),
        }
    }

    /// These settings with those of a TOML file in place of its own; what the file leaves out stays.
    ///
    /// # Errors
    /// [`TrainError::File`], [`TrainError::Config`] naming the file and what is wrong in it.
    pub fn with_file(&self, path: &Path) -> Result<Self, TrainError> {
        let text = std::fs::read_to_string(path).map_err(TrainError::file(path))?;
        let place = path.display().to_string();
        let wrong =
            |problem: String| TrainError::Config { place: place.clone(), problem: problem.trim().to_owned() };
        let table: Table = text.parse().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
        let mut all = self.table();
        merge(&mut all, table);
        Value::Table(all).try_into().map_err(|error: toml::de::Error| wrong(error.to_string()))
    }

    /// These settings with one changed: `key=value`, a key with dots for a setting within another
    /// (`learning_rate.peak=1e-4`), and a value as TOML has it; `none` turns a setting off that may be.
    ///
    /// # Errors
    /// [`TrainError::Config`] says what is wrong, and which settings there are.
    pub fn with_setting(&self, assignment: &str) -> Result<Self, TrainError> {
        let wrong = |problem: String| TrainError::Config { place: format!("`{assignment}`"), problem };
        let (key, value) = assignment
            .split_once('=')
            .ok_or_else(|| wrong("expected key=value, e.g. batch_size=2".to_owned()))?;
        let (key, value) = (key.trim(), value.trim());
        let parts: Vec<&str> = key.split('.').collect();
        let mut all = self.table();
        let mut table = &mut all;
        for part in &parts[..parts.len() - 1] {
            table = match table.get_mut(*part) {
                Some(Value::Table(inner)) => inner,
                _ => {
                    return Err(wrong(format!(
                        "there is no setting `{key}`; there are {}",
                        known(&self.table())
                    )));
                }
            };
        }
        let last = parts[parts.len() - 1].to_owned();
        if value == "none" {
            table.remove(&last);
            if !OPTIONAL.contains(&key) {
                return Err(wrong(format!("only {} can be none", OPTIONAL.join(", "))));
            }
        } else {
            // What is no number, truth value, list or table is a word.
            let parsed = format!("value = {value}").parse::<Table>().ok();
            let found = parsed.and_then(|mut table| table.remove("value"));
            table.insert(last, found.unwrap_or_else(|| Value::String(value.to_owned())));
        }
        Value::Table(all).try_into().map_err(|error: toml::de::Error| {
            wrong(format!("{}; settings: {}", error.message(), known(&self.table())))
        })
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`TrainError::Setting`] names the first that cannot be meant; [`TrainError::Lora`] for the adapter's.
    pub fn validate(&self) -> Result<(), TrainError> {
        let size = self.image_size;
        check("image_size", size, size > 0 && size.is_multiple_of(8), "a multiple of 8")?;
        check("epochs", self.epochs, self.epochs >= 1, "at least 1")?;
        if let Some(steps) = self.max_steps {
            check("max_steps", steps, steps >= 1, "at least 1")?;
        }
        let offset = self.noise_offset;
        check("noise_offset", offset, (0.0..=1.0).contains(&offset), "a number from 0 to 1")?;
        let dropout = self.caption_dropout;
        check("caption_dropout", dropout, (0.0..1.0).contains(&dropout), "a number in [0, 1)")?;
        if let SnrWeight::MinSnr(gamma) = self.weight {
            check("weight.min_snr", gamma, gamma.is_finite() && gamma > 0.0, "a number above 0")?;
        }
        let ValidationConfig { pairs, bins, .. } = self.validation;
        check(
            "validation.pairs",
            pairs,
            pairs >= 1,
            "at least 1; validation.every=0 turns the validation off",
        )?;
        check("validation.bins", bins, bins >= 1, "at least 1")?;
        let SampleConfig { prompts, steps, guidance, .. } = &self.samples;
        let some = !prompts.is_empty();
        check("samples.prompts", "empty", some, "a prompt; samples.every=0 turns the pictures off")?;
        check("samples.steps", steps, *steps >= 1, "at least 1")?;
        check("samples.guidance", guidance, guidance.is_finite(), "a finite number")?;
        self.lora.validate()?;
        self.train_config(1, 1).validate()
    }

    /// The settings of the loop over so many samples, by so many processes: a step takes a batch of each.
    pub fn train_config(&self, samples: usize, ranks: usize) -> TrainConfig {
        let per_step = self.batch_size.saturating_mul(self.accumulation).saturating_mul(ranks);
        let per_epoch = samples.div_ceil(per_step.max(1)) as u64;
        let steps = self.epochs.saturating_mul(per_epoch);
        TrainConfig {
            steps: self.max_steps.map_or(steps, |limit| steps.min(limit)),
            batch_size: self.batch_size,
            accumulation: self.accumulation,
            learning_rate: self.learning_rate,
            optimizer: self.optimizer,
            clip_norm: self.clip_norm,
            ema: self.ema,
            seed: self.seed,
            checkpoint_every: self.checkpoint_every,
            keep_checkpoints: self.keep_checkpoints,
        }
    }

    /// All settings as a TOML file, which [`with_file`](Self::with_file) reads.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("settings are plain values by name")
    }

    fn table(&self) -> Table {
        Table::try_from(self).expect("settings are plain values by name")
    }
}

/// Settings that may be turned off.
const OPTIONAL: [&str; 3] = ["max_steps", "clip_norm", "ema"];

/// Every setting's key, with dots.
fn known(table: &Table) -> String {
    fn collect(table: &Table, prefix: &str, into: &mut Vec<String>) {
        for (key, value) in table {
            match value {
                Value::Table(inner) => collect(inner, &format!("{prefix}{key}."), into),
                _ => into.push(format!("{prefix}{key}")),
            }
        }
    }
    let mut keys: Vec<String> = OPTIONAL.map(str::to_owned).into();
    collect(table, "", &mut keys);
    keys.sort();
    keys.dedup();
    keys.join(", ")
}

/// Puts the values of `from` in place of those of `into`, table by table.
fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => merge(inner, value),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cxr_lora::TargetSet;

    use super::*;

    #[test]
    fn the_papers_run_has_29_140_steps() {
        let config = FinetuneConfig::preset("paper_128").unwrap();
        assert_eq!(config, FinetuneConfig::default());
        let train = config.train_config(5825, 1);
        assert_eq!((train.steps, train.batch_size, train.clip_norm), (29_140, 4, None));
        assert_eq!(train.learning_rate, LearningRate::constant(5e-5));
        assert_eq!((train.optimizer.weight_decay, train.optimizer.epsilon), (0.0, 1e-8));
        assert_eq!((config.lora.rank, config.lora.alpha), (8, 8.0));
        assert_eq!((config.lora.targets.clone(), config.lora.dropout), (TargetSet::AllAttention, 0.0));
        // 5825 samples, 32 for each step
        assert_eq!(config.train_config(5825, 8).steps, 20 * 183);
        assert_eq!(FinetuneConfig { max_steps: Some(7), ..config }.train_config(5825, 1).steps, 7);
        let clinical = FinetuneConfig::preset("clinical_512").unwrap();
        // 5825 samples, 16 for each step
        assert_eq!(clinical.train_config(5825, 1).steps, 20 * 365);
        for preset in PRESETS {
            FinetuneConfig::preset(preset).unwrap().validate().unwrap();
        }
        let error = FinetuneConfig::preset("paper").unwrap_err().to_string();
        assert!(error.contains("`paper`") && error.contains("paper_128, clinical_512"), "{error}");
    }

    #[test]
    fn toml_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        for preset in PRESETS {
            let config = FinetuneConfig::preset(preset).unwrap();
            std::fs::write(&path, config.to_toml()).unwrap();
            for other in PRESETS {
                let other = FinetuneConfig::preset(other).unwrap();
                let other = FinetuneConfig { clip_norm: config.clip_norm, ..other };
                assert_eq!(other.with_file(&path).unwrap(), config);
            }
        }
        std::fs::write(&path, "batch_size = 2\n[lora]\nrank = 4\n").unwrap();
        let config = FinetuneConfig::paper_128().with_file(&path).unwrap();
        assert_eq!((config.batch_size, config.lora.rank, config.lora.alpha, config.epochs), (2, 4, 8.0, 20));
        for (text, word) in
            [("batchsize = 2", "batchsize"), ("batch_size = \"two\"", "batch_size"), ("a = ", "line 1")]
        {
            std::fs::write(&path, text).unwrap();
            let error = FinetuneConfig::paper_128().with_file(&path).unwrap_err().to_string();
            assert!(error.contains("config.toml") && error.contains(word), "{error}");
        }
        let error = FinetuneConfig::paper_128().with_file(Path::new("absent.toml")).unwrap_err().to_string();
        assert!(error.contains("absent.toml"), "{error}");
    }

    #[test]
    fn settings_one_by_one() {
        let config = FinetuneConfig::paper_128();
        let set = |assignment: &str| config.with_setting(assignment);
        assert_eq!(set("batch_size=2").unwrap().batch_size, 2);
        assert_eq!(set("learning_rate.peak = 1e-4").unwrap().learning_rate.peak, 1e-4);
        assert_eq!(
            set("learning_rate.schedule=cosine").unwrap().learning_rate.schedule,
            crate::Schedule::Cosine
        );
        assert_eq!(set("clip_norm=0.5").unwrap().clip_norm, Some(0.5));
        assert_eq!(set("lora.targets=cross_attention").unwrap().lora.targets, TargetSet::CrossAttention);
        assert_eq!(set("weight={ min_snr = 5.0 }").unwrap().weight, SnrWeight::MinSnr(5.0));
        assert_eq!(set("base_dtype=bf16").unwrap().base_dtype, BaseDtype::Bf16);
        let patterns = set("lora.targets={ patterns = [\"to_q\"] }").unwrap().lora.targets;
        assert_eq!(patterns, TargetSet::Patterns(vec!["to_q".to_owned()]));
        let clinical = FinetuneConfig::clinical_512();
        assert_eq!(clinical.with_setting("clip_norm=none").unwrap().clip_norm, None);
        for (assignment, word) in [
            ("batch", "key=value"),
            ("batchsize=2", "batch_size"),
            ("lora.rnk=2", "lora.rank"),
            ("adapter.rank=2", "lora.rank"),
            ("batch_size=two", "two"),
            ("seed=none", "clip_norm"),
        ] {
            let error = set(assignment).unwrap_err().to_string();
            assert!(error.contains(assignment) && error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_setting_that_cannot_be_meant_is_named() {
        let config = FinetuneConfig::paper_128();
        for (assignment, name) in [
            ("image_size=100", "image_size"),
            ("image_size=0", "image_size"),
            ("epochs=0", "epochs"),
            ("max_steps=0", "max_steps"),
            ("batch_size=0", "batch_size"),
            ("accumulation=0", "accumulation"),
            ("learning_rate.peak=0.0", "learning_rate.peak"),
            ("caption_dropout=1.0", "caption_dropout"),
            ("noise_offset=-0.1", "noise_offset"),
            ("weight={ min_snr = 0.0 }", "weight.min_snr"),
            ("lora.rank=0", "rank"),
            ("lora.dropout=1.0", "dropout"),
        ] {
            let error = config.with_setting(assignment).unwrap().validate().unwrap_err().to_string();
            assert!(error.contains(name), "{assignment}: {error}");
        }
    }
}
