//! From a folder of radiographs and a table to pairs that a model can be trained on, with everything a reader of the
//! results needs to know about them.

mod args;
mod files;
mod pictures;
mod summary;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use cxr::core::progress::Progress;
use cxr::dataset::{Collection, ImageCache, ImageLoader, LeakageReport, Split, TokenFilter};
use cxr::tokenizer::ClipTokenizer;
use cxr_examples::exit::{Code, OrExit, exit};
use cxr_examples::progress::{Terminal, show_log, stop_on_interrupt};

use self::args::Args;

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    stop_on_interrupt();
    show_log(args.talk.verbose);
    exit(prepare(&args))
}

fn prepare(args: &Args) -> Result<()> {
    args.check().or_exit(Code::Arguments)?;
    let options = args.read_options().or_exit(Code::Arguments)?;
    let terminal = Terminal::new(args.talk.quiet);

    let mut collection =
        Collection::open(&args.data, &options).with_context(|| format!("--data {}", args.data.display()))?;
    args.check_columns(&collection)?;
    let left_out = args.keep_chosen(&mut collection)?;
    TokenFilter { max_length: args.max_tokens }.apply(&mut collection, &ClipTokenizer::embedded())?;

    let mut images = ImageLoader::new(args.image_options());
    if let Some(folder) = &args.cache {
        images = images.with_cache(Arc::new(ImageCache::on_disk(folder).context("--cache")?));
    }
    if !args.texts_only {
        collection.load_images(&images, args.on_problem(), &terminal).context("--data")?;
    }

    let split = Split::new(&collection, &args.split_config()).context("--split, --train-fraction")?;
    terminal.begin("leakage", None);
    let leakage = LeakageReport::measure(&collection, &split, !args.texts_only)?;
    terminal.end("");
    let report = collection.preparation_report(Some(&split), Some(leakage));

    std::fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
    let out = |name: &str| args.out.join(name);
    if let Some(filter) = &report.token_filter {
        pictures::tokens(filter, &out("tokens.png"))?;
    }
    if let Some(count) = args.sheet() {
        pictures::sheet(&collection, &images, count.get(), args.seed, &out("sheet.png"))?;
    }
    files::pairs(&collection, &split, &out("pairs.csv"))?;
    split.write(&out("split.json"), &collection)?;
    // The last one: where it is, the others are too.
    files::report(args, &options, &collection, left_out, &report, &out("report.json"))?;
    print!("{}", summary::text(&report, left_out, images.cache.as_deref()));
    println!("{}", args.out.display());
    Ok(())
}
