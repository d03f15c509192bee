use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use cxr::lora::{self, Format, TEXT_ENCODER, UNET};

use cxr_examples::backend::Talk;

use crate::Input;
use crate::names::{Names, is_flattened};

#[derive(Debug, clap::Args)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    input: Input,
    /// Where it goes: a file, for `peft` a folder that does not exist yet.
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// The format.
    #[arg(long, value_enum)]
    to: To,
    /// Model whose layers the names are looked up in, where the adapter has underscores for dots: a folder in
    /// diffusers' layout, a single-file checkpoint or a repository [default: Stable Diffusion 1.x].
    #[arg(long, value_name = "DIR|FILE|REPO")]
    model: Option<String>,
    /// The component that the adapter is for, where its file does not say so, as PEFT's do not.
    #[arg(long, value_enum)]
    component: Option<Component>,
    /// Replace OUT if it is a file.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(crate) talk: Talk,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum To {
    /// `unet.M.lora_A.weight` with rank and alpha in the header: what diffusers writes today.
    Diffusers,
    /// A folder with `adapter_model.safetensors` and `adapter_config.json`.
    Peft,
    /// `lora_unet_M.lora_down.weight` with an alpha of each module: what most other programs read.
    Kohya,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Component {
    Unet,
    #[value(name = "text_encoder")]
    TextEncoder,
}

pub(crate) fn convert(args: &ConvertArgs) -> Result<()> {
    let out = args.out.display();
    ensure!(args.force || !args.out.exists(), "{out} exists; remove it, choose another, or give --force");
    let (mut adapter, from) = lora::read(&args.input.adapter)?;
    if let Some(component) = args.component {
        adapter = adapter.with_component(match component {
            Component::Unet => UNET,
            Component::TextEncoder => TEXT_ENCODER,
        });
    }
    let format = match args.to {
        To::Diffusers => Format::Diffusers,
        To::Peft => Format::Peft,
        To::Kohya => Format::Kohya,
    };
    // kohya's names need no look-up, unless somebody asks for it by naming a model.
    if args.model.is_some() || (is_flattened(&adapter) && format != Format::Kohya) {
        let names = Names::of(args.model.as_deref())?;
        let of = args.model.as_deref().unwrap_or("Stable Diffusion 1.x; --model names another");
        adapter = names.resolve(&adapter).with_context(|| format!("against the layers of {of}"))?;
    }
    lora::write(&args.out, &adapter, format)?;
    println!("{out}: {} modules, from {from} to {format}", adapter.modules.len());
    Ok(())
}
