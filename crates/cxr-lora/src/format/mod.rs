//! Adapter files: one submodule per scheme of key names, and one reader that tells them apart.

mod attn_processor;
mod diffusers;
mod diffusers_lora;
mod kohya;
mod peft;
mod peft_config;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use serde::{Deserialize, Serialize};

use crate::weights::{Adapter, LoraWeights, ModuleKey, ModuleName, Provenance};
use crate::{LoraError, Result};
use peft_config::PeftConfig;

/// The header entry of a safetensors file that holds the [`Provenance`] as JSON.
const PROVENANCE_KEY: &str = "cxr_provenance";

/// The schemes of key names in use for Stable Diffusion 1.x, for a module `M` of the UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `unet.M.lora_A.weight`: diffusers as it writes today. Read and written.
    Diffusers,
    /// `unet.M.lora.down.weight`: diffusers for a while. Read.
    DiffusersLora,
    /// `attn1.processor.to_q_lora.down.weight`: diffusers' attention processors, the oldest. Read.
    AttnProcessor,
    /// `base_model.model.M.lora_A.weight` and `adapter_config.json`: a folder of PEFT's. Read and written.
    Peft,
    /// `lora_unet_M.lora_down.weight` with underscores for dots: kohya's scripts. Read and written.
    Kohya,
    /// The same with the block names of the original latent diffusion code (`input_blocks_1_1`). Read.
    KohyaLdm,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Diffusers => "diffusers' LoRA format",
            Self::DiffusersLora => "diffusers' older `.lora.` format",
            Self::AttnProcessor => "diffusers' attention processor format",
            Self::Peft => "PEFT's adapter format",
            Self::Kohya => "kohya's format",
            Self::KohyaLdm => "kohya's format with LDM block names",
        })
    }
}

impl Format {
    /// Whether one file may hold keys of both.
    fn mixes_with(self, other: Self) -> bool {
        let family = |format| match format {
            Self::Diffusers => 0,
            Self::DiffusersLora | Self::AttnProcessor => 1,
            Self::Peft => 2,
            Self::Kohya | Self::KohyaLdm => 3,
        };
        family(self) == family(other)
    }
}

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Factor {
    A,
    B,
    Alpha,
}

/// A key, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Parsed {
    format: Format,
    module: ModuleKey,
    factor: Factor,
}

impl Parsed {
    fn path(format: Format, component: &str, path: &str, factor: Factor) -> Self {
        let name = ModuleName::Path(path.to_owned()).published(component);
        Self { format, module: ModuleKey { component: component.to_owned(), name }, factor }
    }
}

fn parse(key: &str) -> Option<Parsed> {
    peft::parse(key)
        .or_else(|| kohya::parse(key))
        .or_else(|| diffusers::parse(key))
        .or_else(|| attn_processor::parse(key))
        .or_else(|| diffusers_lora::parse(key))
}

/// Reads an adapter from a file (safetensors, or a PyTorch pickle in which nothing is run) or from a folder as PEFT
/// or diffusers writes it, and says of which format it is.
///
/// Reading does not need the model. Names with underscores for dots (kohya's) stay so until the adapter is loaded
/// into a model, or [`Adapter::resolve`]d.
///
/// # Errors
/// Strict: a key of no known scheme, or of another scheme than the rest, a missing factor, a shape that does not
/// fit, a rank other than the file's own settings say, a value that is not finite; each names the key.
pub fn read(path: impl AsRef<Path>) -> Result<(Adapter, Format)> {
    let (file, format, parsed) = open(path.as_ref())?;
    let settings = match format {
        Format::Diffusers => diffusers::settings(&file, &parsed)?,
        Format::Peft => peft::settings(file.path())?,
        _ => BTreeMap::new(),
    };
    let mut modules = BTreeMap::new();
    for (module, keys) in group(parsed) {
        let weights = read_module(&file, &module, &keys, settings.get(&module.component))?;
        modules.insert(module, weights);
    }
    let provenance = match file.metadata().get(PROVENANCE_KEY) {
        Some(json) => serde_json::from_str(json)
            .map_err(|source| LoraError::Json { what: format!("header entry `{PROVENANCE_KEY}`"), source })?,
        None => Provenance::default(),
    };
    Ok((Adapter { modules, provenance }, format))
}

/// The keys of `A` and `B` of each module of an adapter file, as they stand in it.
///
/// # Errors
/// As [`read`], as far as keys are concerned.
pub fn factor_keys(path: impl AsRef<Path>) -> Result<BTreeMap<ModuleKey, [String; 2]>> {
    let (_file, _format, parsed) = open(path.as_ref())?;
    let both = |(module, keys): (ModuleKey, Keys)| {
        let missing = |missing| LoraError::MissingFactor { module: module.to_string(), missing };
        let a = keys.a.ok_or_else(|| missing("A (down)"))?;
        let b = keys.b.ok_or_else(|| missing("B (up)"))?;
        Ok((module, [a, b]))
    };
    group(parsed).into_iter().map(both).collect()
}

/// Writes an adapter as safetensors, in f32, with its [`Provenance`] in the header.
///
/// `path` is a file for [`Format::Diffusers`] and [`Format::Kohya`], a folder that does not exist yet for
/// [`Format::Peft`]. What was there before stays until the new file is whole.
///
/// # Errors
/// [`LoraError::CannotWrite`] for the other formats, for modules that are named by a flattened path where the format
/// needs the path ([`Adapter::resolve`] finds it), and for an adapter without modules.
pub fn write(path: impl AsRef<Path>, adapter: &Adapter, format: Format) -> Result<()> {
    let refuse = |reason| LoraError::CannotWrite { module: "adapter".to_owned(), format, reason };
    if adapter.modules.is_empty() {
        return Err(refuse("it has no modules"));
    }
    for (key, weights) in &adapter.modules {
        weights.check(&key.to_string())?;
    }
    match format {
        Format::Diffusers => diffusers::write(path.as_ref(), adapter),
        Format::Peft => peft::write(path.as_ref(), adapter),
        Format::Kohya => kohya::write(path.as_ref(), adapter),
        Format::DiffusersLora | Format::AttnProcessor | Format::KohyaLdm => {
            Err(refuse("files of this kind are read only; write diffusers', PEFT's or kohya's"))
        }
    }
}

/// The file with the tensors that [`read`] reads for `path`: itself, or the one in a folder.
pub fn weights_file(path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    const NAMES: [&str; 4] = [
        "adapter_model.safetensors",
        "adapter_model.bin",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.bin",
    ];
    if !path.is_dir() {
        return path.to_owned();
    }
    let candidates = NAMES.map(|name| path.join(name));
    // With none of them there, opening the first gives the error that names what was looked for.
    candidates.iter().find(|file| file.is_file()).unwrap_or(&candidates[0]).clone()
}

/// Keys as they stand in a file, and what they mean.
type ParsedKeys = Vec<(String, Parsed)>;

/// The file that `path` means, its format, and its keys understood.
fn open(path: &Path) -> Result<(TensorFile, Format, ParsedKeys)> {
    let file = TensorFile::open(weights_file(path))?;
    let names: Vec<String> = file.names().map(str::to_owned).collect();
    let (format, parsed) = recognize(file.path(), &names)?;
    Ok((file, format, parsed))
}

/// The format of most keys, and all keys understood.
fn recognize(path: &Path, names: &[String]) -> Result<(Format, ParsedKeys)> {
    if let Some((kind, advice)) = names.iter().find_map(|name| known_and_unsupported(name)) {
        return Err(LoraError::Unsupported { path: path.to_owned(), kind, advice });
    }
    let parsed: Vec<_> = names.iter().map(|name| (name, parse(name))).collect();
    let mut counts: BTreeMap<Format, usize> = BTreeMap::new();
    for format in parsed.iter().filter_map(|(_, parsed)| parsed.as_ref().map(|parsed| parsed.format)) {
        *counts.entry(format).or_default() += 1;
    }
    let Some((&format, _)) = counts.iter().max_by_key(|(_, count)| **count) else {
        let keys = names.iter().take(4).map(|name| format!("`{name}`")).collect();
        return Err(LoraError::UnknownFormat { path: path.to_owned(), total: names.len(), keys });
    };
    let (known, unknown): (Vec<_>, Vec<_>) = parsed
        .into_iter()
        .partition(|(_, parsed)| parsed.as_ref().is_some_and(|parsed| parsed.format.mixes_with(format)));
    if !unknown.is_empty() {
        let keys = unknown.iter().map(|(name, _)| format!("`{name}`")).collect();
        return Err(LoraError::UnknownKeys { path: path.to_owned(), format, recognized: known.len(), keys });
    }
    let known = known.into_iter().filter_map(|(name, parsed)| Some((name.clone(), parsed?)));
    Ok((format, known.collect()))
}

/// What a key says about a kind of file that is known by name and not supported.
fn known_and_unsupported(key: &str) -> Option<(&'static str, &'static str)> {
    let positional = key.strip_prefix("unet:").or_else(|| key.strip_prefix("text_encoder:"));
    if positional.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        let advice = "it names layers by position (`unet:0:up`); convert it to diffusers' or kohya's format";
        return Some(("cloneofsimo's lora", advice));
    }
    const MARKS: [(&str, &str); 6] = [
        (".hada_w", "LyCORIS LoHa"),
        (".lokr_w", "LyCORIS LoKr"),
        (".lora_mid.", "LyCORIS LoCon with a Tucker core"),
        (".dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lora_embedding_", "LoRA on embeddings"),
    ];
    let (_, kind) = MARKS.iter().find(|(mark, _)| key.contains(mark))?;
    Some((kind, "its layers are not the product of two factors that plain LoRA adds"))
}

/// The keys of one module's tensors.
#[derive(Debug, Default)]
struct Keys {
    a: Option<String>,
    b: Option<String>,
    alpha: Option<String>,
}

fn group(parsed: Vec<(String, Parsed)>) -> BTreeMap<ModuleKey, Keys> {
    let mut modules: BTreeMap<ModuleKey, Keys> = BTreeMap::new();
    for (key, parsed) in parsed {
        let keys = modules.entry(parsed.module).or_default();
        let place = match parsed.factor {
            Factor::A => &mut keys.a,
            Factor::B => &mut keys.b,
            Factor::Alpha => &mut keys.alpha,
        };
        *place = Some(key);
    }
    modules
}

fn read_module(
    file: &TensorFile,
    module: &ModuleKey,
    keys: &Keys,
    settings: Option<&PeftConfig>,
) -> Result<LoraWeights> {
    let missing = |missing| LoraError::MissingFactor { module: module.to_string(), missing };
    let a_key = keys.a.as_ref().ok_or_else(|| missing("A (down)"))?;
    let b_key = keys.b.as_ref().ok_or_else(|| missing("B (up)"))?;
    let ([rank, in_features], kernel, a) =
        read_factor(file, a_key, "[rank, in] or [rank, in, kernel, kernel]", |_, _| true)?;
    // B of a convolution has one pixel, and four dimensions as A has, or two.
    let of_b = |columns, kernel: Option<[usize; 2]>| columns == rank && matches!(kernel, None | Some([1, 1]));
    let ([out_features, _], _, b) =
        read_factor(file, b_key, &format!("[out, {rank}] or [out, {rank}, 1, 1]"), of_b)?;
    let mut alpha = rank as f64;
    if let Some(settings) = settings {
        let (expected, of_settings) = settings.of(module.name.as_str());
        if expected != rank {
            let expected = format!("[{expected}, in] by the adapter's settings");
            return Err(LoraError::FactorShape {
                key: a_key.clone(),
                expected,
                found: vec![rank, in_features],
            });
        }
        alpha = of_settings;
    }
    if let Some(key) = &keys.alpha {
        alpha = read_scalar(file, key)?;
    }
    Ok(LoraWeights { rank, in_features, out_features, kernel, alpha, a, b })
}

/// A factor's `[rows, columns]`, its kernel if it has four dimensions, and its values.
type FactorData = ([usize; 2], Option<[usize; 2]>, Vec<f32>);

/// Reads a factor of two dimensions or four; `fits` says what columns and kernel may be.
fn read_factor(
    file: &TensorFile,
    key: &str,
    expected: &str,
    fits: impl FnOnce(usize, Option<[usize; 2]>) -> bool,
) -> Result<FactorData> {
    let tensor = file.read(key)?;
    let wrong = || LoraError::FactorShape {
        key: key.to_owned(),
        expected: expected.to_owned(),
        found: tensor.shape.clone(),
    };
    let (shape, kernel) = match tensor.shape[..] {
        [rows, columns] => ([rows, columns], None),
        [rows, columns, height, width] => ([rows, columns], Some([height, width])),
        _ => return Err(wrong()),
    };
    if tensor.shape.contains(&0) || !fits(shape[1], kernel) {
        return Err(wrong());
    }
    let values = tensor.to_f32()?;
    if !values.iter().all(|value| value.is_finite()) {
        return Err(LoraError::NotFinite { what: key.to_owned() });
    }
    Ok((shape, kernel, values))
}

fn read_scalar(file: &TensorFile, key: &str) -> Result<f64> {
    let tensor = file.read(key)?;
    // diffusers' converter to kohya's format writes alpha as an integer.
    let values: Vec<f64> = if tensor.dtype.is_float() {
        tensor.to_f32()?.into_iter().map(f64::from).collect()
    } else {
        tensor.to_i64()?.into_iter().map(|value| value as f64).collect()
    };
    match values[..] {
        [value] if value.is_finite() => Ok(value),
        [_] => Err(LoraError::NotFinite { what: key.to_owned() }),
        _ => Err(LoraError::FactorShape {
            key: key.to_owned(),
            expected: "a single value".to_owned(),
            found: tensor.shape,
        }),
    }
}

/// What a file is written from: its tensors by key, and its header.
type Contents = (Vec<(String, RawTensor)>, BTreeMap<String, String>);

/// The tensors of an adapter under the keys that `name` makes of module and factor, and the header.
fn tensors(
    adapter: &Adapter,
    format: Format,
    with_alpha: bool,
    mut name: impl FnMut(&ModuleKey, Factor) -> Result<String>,
) -> Result<Contents> {
    let mut tensors = Vec::new();
    for (module, weights) in &adapter.modules {
        let (mut a, mut b) =
            (vec![weights.rank, weights.in_features], vec![weights.out_features, weights.rank]);
        if let Some(kernel) = weights.kernel {
            a.extend(kernel);
            b.extend([1, 1]);
        }
        tensors.push((name(module, Factor::A)?, RawTensor::from_f32(a, weights.a.clone())));
        tensors.push((name(module, Factor::B)?, RawTensor::from_f32(b, weights.b.clone())));
        if with_alpha {
            tensors.push((
                name(module, Factor::Alpha)?,
                RawTensor::from_f32(Vec::new(), vec![weights.alpha as f32]),
            ));
        }
    }
    let keys: std::collections::BTreeSet<&String> = tensors.iter().map(|(key, _)| key).collect();
    if keys.len() != tensors.len() {
        let reason = "two modules get the same key";
        return Err(LoraError::CannotWrite { module: "adapter".to_owned(), format, reason });
    }
    let what = "provenance";
    let json = serde_json::to_string(&adapter.provenance)
        .map_err(|source| LoraError::Json { what: what.to_owned(), source })?;
    let header = [("format".to_owned(), "pt".to_owned()), (PROVENANCE_KEY.to_owned(), json)];
    Ok((tensors, header.into()))
}

/// The path of a module, which a flattened name is not.
fn path_of(module: &ModuleKey, format: Format) -> Result<&str> {
    match &module.name {
        ModuleName::Path(path) => Ok(path),
        ModuleName::Flattened(name) => Err(LoraError::CannotWrite {
            module: name.clone(),
            format,
            reason: "the name has underscores for dots; resolve the adapter against the model first",
        }),
    }
}

fn save(path: &Path, tensors: &[(String, RawTensor)], header: &BTreeMap<String, String>) -> Result<()> {
    write_safetensors(path, tensors, header)?;
    Ok(())
}

#[cfg(test)]
mod tests;
