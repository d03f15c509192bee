use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use cxr::lora::{self, Adapter, LoraWeights, ModuleKey, Provenance};
use serde::Serialize;

use cxr_examples::backend::Talk;

use crate::Input;
use crate::names::{Names, is_flattened};

#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    input: Input,
    /// Print JSON, with a line for every module.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

/// What a file is.
#[derive(Debug, Serialize)]
struct Report {
    path: PathBuf,
    format: lora::Format,
    components: BTreeMap<String, usize>,
    ranks: Vec<usize>,
    alphas: Vec<f64>,
    parameters: usize,
    /// Frobenius norm of what is added to all weights together.
    norm: f64,
    blocks: Vec<Block>,
    modules: Vec<Module>,
    provenance: Provenance,
}

/// What is added to the weights of one block.
#[derive(Debug, Serialize)]
struct Block {
    name: String,
    modules: usize,
    ranks: Vec<usize>,
    parameters: usize,
    norm: f64,
    /// The module with the largest norm.
    largest: String,
}

#[derive(Debug, Serialize)]
struct Module {
    component: String,
    name: String,
    out_features: usize,
    in_features: usize,
    kernel: Option<[usize; 2]>,
    rank: usize,
    alpha: f64,
    norm: f64,
}

pub(crate) fn inspect(args: &InspectArgs) -> Result<()> {
    let (mut adapter, format) = lora::read(&args.input.adapter)?;
    // Names with underscores for dots are shown as they are, where they are not those of the usual model.
    if is_flattened(&adapter)
        && let Ok(resolved) = Names::of(None)?.resolve(&adapter)
    {
        adapter = resolved;
    }
    let report = Report::new(args.input.adapter.clone(), format, &adapter);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{}", report.text()),
    }
    Ok(())
}

impl Report {
    fn new(path: PathBuf, format: lora::Format, adapter: &Adapter) -> Self {
        let norms: Vec<(&ModuleKey, &LoraWeights, f64)> =
            adapter.modules.iter().map(|(key, weights)| (key, weights, weights.norm())).collect();
        let mut blocks: BTreeMap<String, Vec<_>> = BTreeMap::new();
        let mut components = BTreeMap::new();
        for entry in &norms {
            blocks.entry(block(entry.0)).or_default().push(*entry);
            *components.entry(entry.0.component.clone()).or_default() += 1;
        }
        let mut alphas: Vec<f64> = norms.iter().map(|(_, weights, _)| weights.alpha).collect();
        alphas.sort_by(f64::total_cmp);
        alphas.dedup();
        Self {
            path,
            format,
            components,
            ranks: ranks(&norms),
            alphas,
            parameters: adapter.parameters(),
            norm: total(&norms),
            blocks: blocks.into_iter().map(|(name, modules)| Block::new(name, &modules)).collect(),
            modules: norms.iter().map(|(key, weights, norm)| Module::new(key, weights, *norm)).collect(),
            provenance: adapter.provenance.clone(),
        }
    }

    fn text(&self) -> String {
        let components: Vec<String> =
            self.components.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let mut lines = vec![
            self.path.display().to_string(),
            format!("format      {}", self.format),
            format!("modules     {} ({})", self.modules.len(), components.join(", ")),
            format!("rank        {}", list(&self.ranks)),
            format!("alpha       {}", list(&self.alphas)),
            format!("parameters  {}", self.parameters),
            format!("norm        {:.4}, of alpha / rank * B A over all modules", self.norm),
        ];
        lines.extend(provenance(&self.provenance));
        let width = self.blocks.iter().map(|block| block.name.len()).max().unwrap_or(0).max(5);
        lines.push(String::new());
        let head = ("block", "modules", "rank", "parameters", "norm", "largest in");
        let line = |name: &str, modules: &str, rank: &str, parameters: &str, norm: &str, largest: &str| {
            format!("{name:width$}  {modules:>7}  {rank:>6}  {parameters:>10}  {norm:>10}  {largest}")
        };
        lines.push(line(head.0, head.1, head.2, head.3, head.4, head.5));
        for block in &self.blocks {
            lines.push(line(
                &block.name,
                &block.modules.to_string(),
                &list(&block.ranks),
                &block.parameters.to_string(),
                &format!("{:.4}", block.norm),
                &block.largest,
            ));
        }
        lines.join("\n") + "\n"
    }
}

impl Block {
    fn new(name: String, modules: &[(&ModuleKey, &LoraWeights, f64)]) -> Self {
        let largest = modules.iter().max_by(|one, other| one.2.total_cmp(&other.2));
        // The block's own name is no news in its row.
        let within = |key: &ModuleKey| {
            let full = key.to_string();
            full.strip_prefix(&name)
                .map_or(full.clone(), |rest| rest.trim_start_matches(['.', '_']).to_owned())
        };
        Self {
            modules: modules.len(),
            ranks: ranks(modules),
            parameters: modules.iter().map(|(_, weights, _)| weights.parameters()).sum(),
            norm: total(modules),
            largest: largest.map(|(key, ..)| within(key)).unwrap_or_default(),
            name,
        }
    }
}

impl Module {
    fn new(key: &ModuleKey, weights: &LoraWeights, norm: f64) -> Self {
        Self {
            component: key.component.clone(),
            name: key.name.as_str().to_owned(),
            out_features: weights.out_features,
            in_features: weights.in_features,
            kernel: weights.kernel,
            rank: weights.rank,
            alpha: weights.alpha,
            norm,
        }
    }
}

/// A level of the UNet (`unet.down_blocks.0`), a layer of the text encoder (`text_encoder.layers.3`), or what stands
/// alone (`unet.conv_in`).
fn block(key: &ModuleKey) -> String {
    let name = key.name.as_str().trim_start_matches("text_model.encoder.");
    let separator = if name.contains('.') { '.' } else { '_' };
    let parts: Vec<&str> = name.split(separator).collect();
    let number = parts.iter().position(|part| part.parse::<usize>().is_ok());
    let length = match number {
        _ if name.starts_with("mid_block") => 1 + usize::from(separator == '_'),
        Some(position) => position + 1,
        None => parts.len(),
    };
    let text = if key.name.as_str() != name && separator == '.' { "text_model.encoder." } else { "" };
    format!("{}.{text}{}", key.component, parts[..length].join(&separator.to_string()))
}

fn ranks(modules: &[(&ModuleKey, &LoraWeights, f64)]) -> Vec<usize> {
    let mut ranks: Vec<usize> = modules.iter().map(|(_, weights, _)| weights.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

fn total(modules: &[(&ModuleKey, &LoraWeights, f64)]) -> f64 {
    modules.iter().map(|(.., norm)| norm * norm).sum::<f64>().sqrt()
}

/// All of a few numbers; the least and the greatest of many.
fn list<T: std::fmt::Display>(values: &[T]) -> String {
    match values {
        [first, .., last] if values.len() > 4 => format!("{first} to {last}"),
        _ => values.iter().map(T::to_string).collect::<Vec<_>>().join(", "),
    }
}

fn provenance(provenance: &Provenance) -> Vec<String> {
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    let entries = [
        ("base model", provenance.base_model.clone()),
        ("data", provenance.dataset.clone()),
        ("split", provenance.split.clone()),
        ("targets", provenance.targets.clone()),
        ("steps", number(provenance.steps)),
        ("seed", number(provenance.seed)),
        ("written by", provenance.crate_version.as_ref().map(|version| format!("cxr-lora {version}"))),
    ];
    entries.into_iter().filter_map(|(name, value)| Some(format!("{name:10}  {}", value?))).collect()
}
