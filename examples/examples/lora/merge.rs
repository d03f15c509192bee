use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cxr::ldm::pipeline::{LoadOptions, SaveDtype};
use cxr_examples::arguments::Lora;
use cxr_examples::backend::{DtypeArg, RunArgs};
use cxr_examples::progress::Terminal;

#[derive(Debug, clap::Args)]
pub(crate) struct MergeArgs {
    /// Model: a folder in diffusers' layout, a single-file checkpoint, or a repository.
    #[arg(long, value_name = "DIR|FILE|REPO")]
    model: String,
    /// Adapter and how much of it is added, 1 unless given; repeat it to add several.
    #[arg(long, value_name = "FILE[:SCALE]", required = true)]
    lora: Vec<Lora>,
    /// Folder for the model, in diffusers' layout. An older model there is replaced.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How the weights are written. The sum is taken in f32 in any case.
    #[arg(long, default_value = "f32")]
    dtype: DtypeArg,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

pub(crate) fn merge(args: MergeArgs) -> Result<()> {
    for Lora { file, .. } in &args.lora {
        ensure!(file.exists(), "--lora: there is no {}", file.display());
    }
    ensure!(!same(&args.out, Path::new(&args.model)), "--out is the folder of --model; choose another");
    let options = LoadOptions::default().with_progress(Terminal::new(args.run.quiet));
    let mut model =
        cxr::open(&args.run.device.to_string(), args.model.as_str(), options).context("--model")?;
    for Lora { file, scale } in &args.lora {
        model.add_lora(file, *scale).context("--lora")?;
    }
    let layers = model.fuse_lora()?;
    let dtype = match args.dtype {
        DtypeArg::F32 => SaveDtype::F32,
        DtypeArg::F16 => SaveDtype::F16,
        DtypeArg::Bf16 => SaveDtype::BF16,
    };
    model.save(&args.out, dtype).context("--out")?;
    println!("{}: {layers} layers with their adapters merged in", args.out.display());
    Ok(())
}

/// Whether both are the same folder.
fn same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}
