//! Shows a picture while it is made, and stops on demand: after a step that is named, or at Ctrl-C.
//!
//! A window, a web page or a chat would take the place of the folder; the loop is the same.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use cxr::prelude::*;
use cxr_examples::progress::{interrupted, stop_on_interrupt};
use cxr_examples::{arguments, backend, demo};

/// Writes what each step of a picture predicts, and the picture. Ctrl-C stops it within a step and keeps what is there.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// What the picture shows.
    #[arg(long, value_name = "TEXT", default_value = "Cardiomegaly.")]
    prompt: String,
    /// Seed of the picture.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Denoising steps.
    #[arg(long, value_name = "N", default_value_t = 15)]
    steps: usize,
    /// Steps from one preview to the next: each takes a run of the decoder.
    #[arg(long, value_name = "N", default_value_t = 1)]
    every: usize,
    /// Stop after this step, from 1, as somebody would who has seen enough [default: none].
    #[arg(long, value_name = "N")]
    stop_after: Option<usize>,
    /// Folder for previews and picture.
    #[arg(long, value_name = "DIR", default_value = "out/preview")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let args = arguments::parse();
    stop_on_interrupt();
    backend::exit(preview(&args))
}

fn preview(args: &Args) -> Result<()> {
    ensure!(args.every > 0, "--every is 0, expected 1 or more");
    let model = cxr::open("auto", demo::model_folder(), LoadOptions::default())?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
    let request = Request::new(args.prompt.as_str()).seed(args.seed).steps(args.steps);

    // an error cannot leave the callback: it is kept, and ends the loop
    let mut outcome = Ok(());
    let images = model.generate_with(&request, &Silent, &mut |step| {
        let made = step.index + 1;
        if made.is_multiple_of(args.every) {
            outcome = show(args, &step, made);
        }
        if outcome.is_err() || interrupted() || args.stop_after == Some(made) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    outcome?;
    match images.first() {
        Some(image) => {
            let file = args.out.join("picture.png");
            image.save_png(&file)?;
            println!("{}", file.display());
        }
        // stopped before the last step: there is no picture, the previews are what is kept
        None => println!("stopped; the previews are in {}", args.out.display()),
    }
    Ok(())
}

/// Writes the picture as a step predicts it.
fn show(args: &Args, step: &StepView<'_>, made: usize) -> Result<()> {
    for image in step.preview()? {
        let file = args.out.join(format!("step-{made:03}.png"));
        image.save_png(&file)?;
        println!("{} (step {made} of {}, timestep {:.0})", file.display(), step.total, step.timestep);
    }
    Ok(())
}
