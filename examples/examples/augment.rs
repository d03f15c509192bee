//! Adds synthetic pictures to a folder of classes, as a classifier's training set has it: `DIR/CLASS/picture.png`.
//!
//! Whether the classifier gets better by it has to be measured on real pictures that it has not seen: `evaluate
//! --usefulness` does so.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use cxr::core::metadata::{read_jsonl, write_jsonl};
use cxr::ldm::pipeline::{PngColor, read_settings_hash};
use cxr::prelude::*;
use cxr_examples::arguments::{self, Lora};
use cxr_examples::progress::{Terminal, interrupted, stop_on_interrupt};
use cxr_examples::{backend, demo};

/// Makes synthetic pictures of every class of a folder: DIR/CLASS/*.png, the classes being the subfolders' names.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Folder with a subfolder for each class; nothing in it is changed.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Folder for the synthetic pictures, with the same subfolders and a metadata.jsonl; those that are there are not made
    /// again.
    #[arg(long, value_name = "DIR", default_value = "out/augment")]
    out: PathBuf,
    /// Pictures of each class.
    #[arg(long, value_name = "N", default_value_t = 16)]
    per_class: u64,
    /// The prompt of a class; {class} stands for its name, underscores as spaces.
    #[arg(long, value_name = "TEXT", default_value = "{class}.")]
    template: String,
    /// Model: folder, single-file checkpoint or repository [default: the embedded model].
    #[arg(long, value_name = "DIR|FILE|REPO")]
    model: Option<String>,
    /// LoRA adapter file, and how much of it is added [default scale: 1]; may be given several times.
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<Lora>,
    /// Denoising steps.
    #[arg(long, value_name = "N", default_value_t = 15)]
    steps: usize,
    /// Classifier-free guidance: 1 is none. More makes the pictures of a class more alike.
    #[arg(long, value_name = "G", default_value_t = 2.0)]
    guidance: f64,
    /// Pictures that go through the model at once: memory and speed, not the result.
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Seed of the first picture; the others have the next seeds, class by class.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    run: backend::RunArgs,
}

fn main() -> ExitCode {
    let args = arguments::parse();
    stop_on_interrupt();
    backend::exit(augment(&args))
}

fn augment(args: &Args) -> Result<()> {
    ensure!(args.per_class > 0, "--per-class is 0, expected 1 or more");
    ensure!(args.template.contains("{class}"), "--template {:?} has no {{class}} in it", args.template);
    let classes = classes(&args.data).with_context(|| format!("--data {}", args.data.display()))?;
    let mut model = match &args.model {
        Some(model) => cxr::open(&args.run.device.to_string(), model.as_str(), LoadOptions::default()),
        None => cxr::open(&args.run.device.to_string(), demo::model_folder(), LoadOptions::default()),
    }
    .context("--device, --model")?;
    for Lora { file, scale } in &args.lora {
        model.add_lora(file, *scale).context("--lora")?;
    }

    let metadata = args.out.join("metadata.jsonl");
    let mut rows = if metadata.is_file() { read_jsonl(&metadata)? } else { Vec::new() };
    let progress = Terminal::new(args.run.quiet);
    for (index, class) in classes.iter().enumerate() {
        std::fs::create_dir_all(args.out.join(class))?;
        let prompt = args.template.replace("{class}", &class.replace('_', " "));
        let first = args.seed + index as u64 * args.per_class;
        let seeds: Vec<u64> = (first..first + args.per_class).collect();
        for seeds in seeds.chunks(args.batch.max(1)) {
            let made = make(args, model.as_ref(), &progress, class, &prompt, seeds)?;
            rows.retain(|row| made.iter().all(|new| new.file_name != row.file_name));
            rows.extend(made);
            // after every batch, so that what is there has its rows
            write_jsonl(&metadata, &rows)?;
            if interrupted() {
                bail!("stopped; the same command goes on");
            }
        }
    }
    println!("{}: {} pictures of {} classes", args.out.display(), rows.len(), classes.len());
    Ok(())
}

/// The pictures of one batch that are not there yet, and the rows of all that are made now.
fn make(
    args: &Args,
    model: &dyn Synthesizer,
    progress: &dyn Progress,
    class: &str,
    prompt: &str,
    seeds: &[u64],
) -> Result<Vec<MetadataRow>> {
    let request = |seeds: Vec<u64>| {
        let request = Request::new(prompt).images_per_prompt(seeds.len()).batch(seeds.len()).seeds(seeds);
        request.steps(args.steps).guidance(args.guidance)
    };
    let mut missing = Vec::new();
    for (settings, &seed) in model.settings(&request(seeds.to_vec()))?.iter().zip(seeds) {
        let file = args.out.join(name_of(class, seed));
        match file.is_file() {
            false => missing.push(seed),
            true if read_settings_hash(&file)?.is_some_and(|(hash, _)| hash == settings.hash()) => {}
            true => {
                bail!("{} was made with other settings: choose another folder with --out", file.display())
            }
        }
    }
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    let images =
        model.generate_with(&request(missing), progress, &mut |_| std::ops::ControlFlow::Continue(()))?;
    let mut rows = Vec::new();
    for image in images {
        let name = name_of(class, image.settings.seed);
        image.save_png_as(args.out.join(&name), PngColor::Gray)?;
        rows.push(MetadataRow { labels: vec![class.to_owned()], ..image.metadata_row(name) });
    }
    Ok(rows)
}

/// Its place in the folder: a name that no real picture has, should both end up in one folder.
fn name_of(class: &str, seed: u64) -> String {
    format!("{class}/synthetic-{seed:06}.png")
}

/// The subfolders' names, sorted.
fn classes(folder: &Path) -> Result<Vec<String>> {
    let mut classes = Vec::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        if entry.path().is_dir() {
            let name = entry.file_name().into_string();
            classes.push(name.map_err(|name| anyhow::anyhow!("{} is no UTF-8", name.display()))?);
        }
    }
    ensure!(!classes.is_empty(), "no subfolders: expected one for each class, with its pictures");
    classes.sort();
    Ok(classes)
}
