//! LoRA adapter files: what one is, another format of it, a model with it merged in.

mod convert;
mod inspect;
mod merge;
mod names;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use cxr_examples::exit::{EXIT_CODES, exit};
use cxr_examples::progress::show_log;

/// Looks into LoRA adapter files, converts them, merges them into a model.
///
/// Reads the files of diffusers (three generations), PEFT and kohya's scripts (with diffusers' or the original block
/// names), as safetensors or pickled by PyTorch, in which nothing is run.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what a file is: format, modules, ranks, alphas, how much each block changes, where it comes from.
    Inspect(inspect::InspectArgs),
    /// Writes an adapter in another format.
    Convert(convert::ConvertArgs),
    /// Adds adapters into the weights of a model and writes it as a folder that diffusers loads.
    Merge(merge::MergeArgs),
}

impl Command {
    /// How much is shown of what the libraries report.
    fn verbose(&self) -> u8 {
        match self {
            Self::Inspect(args) => args.talk.verbose,
            Self::Convert(args) => args.talk.verbose,
            Self::Merge(args) => args.run.verbose,
        }
    }
}

/// The adapter that comes in.
#[derive(Debug, clap::Args)]
struct Input {
    /// Adapter: a file, or a folder as PEFT or diffusers writes it.
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
}

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    show_log(args.command.verbose());
    exit(run(args.command))
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Merge(args) => merge::merge(args),
    }
}
