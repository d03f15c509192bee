//! Makes pictures from prompts, with the embedded model or any Stable Diffusion 1.x model.
//!
//! Every picture is written as soon as its batch is finished, and stays there if the program is stopped (Ctrl-C); the
//! same command then goes on where it ended.

mod args;
mod folder;
mod prompts;

use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use cxr::Synthesizer;
use cxr::core::metadata::MetadataRow;
use cxr::core::progress::Progress;
use cxr::ldm::pipeline::Image;
use cxr_examples::exit::{Code, OrExit, exit};
use cxr_examples::progress::{Terminal, interrupted, show_log, stop_on_interrupt};
use cxr_examples::ranks::{Shard, device_of_rank};
use cxr_examples::sheet::Sheet;

use self::args::{Args, Size};
use self::folder::Folder;
use self::prompts::Item;

fn main() -> ExitCode {
    let mut args = cxr_examples::arguments::parse::<Args>();
    if args.shard.is_none() {
        args.run.device = device_of_rank(args.run.device);
    }
    stop_on_interrupt();
    show_log(args.run.verbose);
    let checked = args.check().or_exit(Code::Arguments);
    exit(checked.and_then(|()| args.items()).and_then(|items| synthesize(&args, &items)))
}

/// A picture that is to be there in the end.
struct Planned<'a> {
    name: String,
    item: &'a Item,
    seed: u64,
}

/// All pictures, in order.
fn plan<'a>(args: &Args, items: &'a [Item]) -> Vec<Planned<'a>> {
    let mut planned = Vec::new();
    for item in items {
        for copy in 0..item.count.unwrap_or(args.images_per_prompt.get()) {
            let index = planned.len();
            let seed = match item.seed {
                Some(seed) => seed.wrapping_add(copy as u64),
                None => args.seed.wrapping_add(index as u64),
            };
            planned.push(Planned { name: format!("{index:05}.png"), item, seed });
        }
    }
    planned
}

fn synthesize(args: &Args, items: &[Item]) -> Result<()> {
    let planned = plan(args, items);
    ensure!(!planned.is_empty(), "no picture to make: every count in --prompts is 0");
    let initial = args.initial_image()?;
    let model = args.load(planned.len())?;
    check_size(args, model.as_ref())?;
    let request = args.request(&planned.iter().collect::<Vec<_>>(), initial.as_ref());
    let settings = model.settings(&request)?;
    let steps = model.steps_per_batch(&request)?;

    let shard = args.shard.or_else(Shard::of_environment);
    let all: Vec<(String, String)> = planned
        .iter()
        .zip(&settings)
        .map(|(picture, settings)| (picture.name.clone(), settings.hash()))
        .collect();
    let is_own = |place: usize| shard.is_none_or(|shard| shard.has(place));
    let own: Vec<usize> = (0..planned.len()).filter(|place| is_own(*place)).collect();
    if let Some(Shard { index, count }) = shard {
        eprintln!("part {index} of {count}: {} of {} pictures", own.len(), planned.len());
    }
    let mut folder = Folder::open(&args.out, shard)?;
    let mut missing = Vec::new();
    for &place in &own {
        let (name, hash) = &all[place];
        if !folder.has(name, hash, args.color(), args.force)? {
            missing.push(&planned[place]);
        }
    }
    folder.start()?;
    let there = own.len() - missing.len();
    if there > 0 {
        eprintln!("{there} of {} pictures are there already", own.len());
    }

    let terminal = Terminal::new(args.run.quiet);
    let batches = missing.len().div_ceil(args.batch.get());
    terminal.begin("pictures", Some((batches * steps) as u64));
    let mut made = 0;
    let mut sheet = Sheet::default();
    for (index, batch) in missing.chunks(args.batch.get()).enumerate() {
        let request = args.request(batch, initial.as_ref());
        let message = format!("{made} of {} pictures finished", missing.len());
        let progress = Offset { progress: &terminal, done: (index * steps) as u64, message };
        let images = model.generate_with(&request, &progress, &mut |_| ControlFlow::Continue(()))?;
        for (image, picture) in images.iter().zip(batch) {
            folder.add(image, row(image, picture), args.color())?;
            sheet.add(image);
            made += 1;
        }
        if interrupted() {
            break;
        }
    }
    terminal.end(&format!("{made} in {}", args.out.display()));
    if let Some(file) = &args.sheet {
        sheet.save(file).context("--sheet")?;
    }
    if made < missing.len() {
        bail!(
            "stopped: {} of {} pictures are in {}; the same command goes on",
            there + made,
            own.len(),
            args.out.display()
        );
    }
    if !folder.finish(&all, args.color())? {
        eprintln!("the other parts are not finished; the last one writes metadata.jsonl");
    }
    println!("{}", args.out.display());
    Ok(())
}

/// The size is checked here too, so that the error can name the flag.
fn check_size(args: &Args, model: &dyn Synthesizer) -> Result<()> {
    if let Some(Size { width, height }) = args.size {
        let unit = model.size_unit();
        let fits = [width, height].iter().all(|side| *side > 0 && side % unit == 0);
        ensure!(fits, "--size {width}x{height}: for this model both must be multiples of {unit}, and not 0");
    }
    Ok(())
}

/// A picture's row, with what its prompt brought along.
fn row(image: &Image, picture: &Planned<'_>) -> MetadataRow {
    let Item { labels, view, uid, .. } = picture.item;
    MetadataRow {
        labels: labels.clone(),
        view: view.clone(),
        group: uid.clone(),
        ..image.metadata_row(picture.name.as_str())
    }
}

/// Counts on where the batches before ended.
struct Offset<'a> {
    progress: &'a Terminal,
    done: u64,
    message: String,
}

impl Progress for Offset<'_> {
    fn advance(&self, done: u64, _: &str) -> ControlFlow<()> {
        self.progress.advance(self.done + done, &self.message)
    }
}
