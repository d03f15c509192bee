//! Loads a model once and makes many pictures: the least that an embedding program does.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use cxr::prelude::*;
use cxr_examples::{arguments, backend, demo};

/// Loads a model once and makes a few pictures of each prompt.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// What the pictures show.
    #[arg(value_name = "PROMPT", default_values = ["Cardiomegaly.", "No acute disease."])]
    prompts: Vec<String>,
    /// Denoising steps.
    #[arg(long, value_name = "N", default_value_t = 15)]
    steps: usize,
    /// Folder for the pictures.
    #[arg(long, value_name = "DIR", default_value = "out/generate")]
    out: PathBuf,
}

fn main() -> ExitCode {
    backend::exit(generate(&arguments::parse()))
}

fn generate(args: &Args) -> anyhow::Result<()> {
    let model = cxr::open("auto", demo::model_folder(), LoadOptions::default())?;
    std::fs::create_dir_all(&args.out)?;
    for (index, prompt) in args.prompts.iter().enumerate() {
        let request = Request::new(prompt).steps(args.steps).seed(7).images_per_prompt(4).batch(4);
        for image in model.generate(&request)? {
            let file = args.out.join(format!("{index}-{}.png", image.settings.seed));
            image.save_png(&file)?;
            println!("{}", file.display());
        }
    }
    Ok(())
}
