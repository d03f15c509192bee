//! Makes pictures from prompts, with the embedded model or any Stable Diffusion 1.x model.
//!
//! Every picture is written as soon as its batch is finished, and stays there if the program is stopped (Ctrl-C); the
//! same command then goes on where it ended.

mod folder;
mod prompts;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use cxr::Synthesizer;
use cxr::core::metadata::MetadataRow;
use cxr::core::progress::Progress;
use cxr::dataset::contact_sheet;
use cxr::ldm::pipeline::{Image, InitialImage, LoadOptions, PngColor, Request};
use cxr::ldm::scheduler::Sampler;
use cxr::tokenizer::{ClipTokenizer, LENGTH};
use cxr_examples::backend::{DtypeArg, RunArgs, exit};
use cxr_examples::demo;
use cxr_examples::progress::{Terminal, interrupted, show_warnings, stop_on_interrupt};
use image::RgbImage;

use self::folder::Folder;
use self::prompts::Item;

/// What a contact sheet shows at most.
const SHEET: usize = 64;

/// Makes synthetic chest radiographs from prompts: PNG files that carry their settings, and metadata.jsonl. For
/// research; not for diagnosis.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// What a picture shows, e.g. "Cardiomegaly."; may be given several times.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// More prompts: .txt (one on each line), .csv or .jsonl with a column `text`, `prompt` or `impression`, and maybe
    /// `seed`, `count`, `labels`, `view`, `uid`, which travel along.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Column of the prompts file that holds the prompt.
    #[arg(long, value_name = "NAME", requires = "prompts")]
    text_col: Option<String>,
    /// Take the first N prompts only.
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    limit: Option<NonZeroUsize>,
    /// What the pictures do not show.
    #[arg(long, value_name = "TEXT", default_value = "")]
    negative: String,
    /// Denoising steps, 1 to the model's training timesteps (1000): 20 to 30 are enough for dpmpp-2m, 50 for the rest.
    #[arg(long, value_name = "N", default_value_t = 30)]
    steps: usize,
    /// Classifier-free guidance: 1 is none and halves the time; more follows the prompt more closely.
    #[arg(long, value_name = "G", default_value_t = 7.5)]
    guidance: f64,
    /// Noise levels between which guidance applies, e.g. 0.3:5 (Stable Diffusion's run from 0.03 to 14.6) [default:
    /// all].
    #[arg(long, value_name = "LOW:HIGH")]
    guidance_interval: Option<Interval>,
    /// Sampler: ddim, pndm, euler, euler-a or dpmpp-2m [default: the one that the model's configuration names].
    #[arg(long, value_name = "NAME")]
    scheduler: Option<Sampler>,
    /// Seed of the first picture; picture i has seed + i.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Side in pixels, or width and height as in 512x384 [default: what the model was made for].
    #[arg(long, value_name = "SIDE|WxH")]
    size: Option<Size>,
    /// Pictures of each prompt.
    #[arg(long, value_name = "N", default_value = "1", value_parser = one_or_more)]
    images_per_prompt: NonZeroUsize,
    /// Pictures that go through the model at once: memory and speed, not the result.
    #[arg(long, value_name = "N", default_value = "1", value_parser = one_or_more)]
    batch: NonZeroUsize,
    /// LoRA adapter file, and how much of it is added [default scale: 1]; may be given several times.
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<Lora>,
    /// Start from this picture (PNG or JPEG) instead of noise alone.
    #[arg(long, value_name = "FILE")]
    initial: Option<PathBuf>,
    /// Part of the steps that are made of an initial picture: 1 keeps next to nothing of it.
    #[arg(long, value_name = "S", default_value_t = 0.8, requires = "initial")]
    strength: f64,
    /// Folder in diffusers' layout, single-file checkpoint (.safetensors, .ckpt), or repository (owner/name) [default:
    /// the embedded model].
    #[arg(long, value_name = "DIR|FILE|REPO")]
    model: Option<String>,
    /// Revision of a repository: branch, tag or commit [default: main].
    #[arg(long, value_name = "NAME", requires = "model")]
    revision: Option<String>,
    /// Check the weight files against the published SHA-256 sums of Stable Diffusion 1.4 and 1.5.
    #[arg(long, requires = "model")]
    verify: bool,
    /// Dtype of weights and activations: half the memory with f16 and bf16, on the CPU no more speed.
    #[arg(long, default_value = "f32")]
    dtype: DtypeArg,
    /// Decode pictures one by one: less memory for a batch.
    #[arg(long)]
    vae_slicing: bool,
    /// Decode large pictures in overlapping tiles: less memory, and pictures that differ a little.
    #[arg(long)]
    vae_tiling: bool,
    /// Folder for the pictures. Those that are there with the same settings are not made again.
    #[arg(long, value_name = "DIR", default_value = "out/synthesize")]
    out: PathBuf,
    /// Overwrite pictures that were made with other settings.
    #[arg(long)]
    force: bool,
    /// One channel instead of three.
    #[arg(long)]
    gray: bool,
    /// Write a contact sheet of the pictures to this PNG file.
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// A prompt of more than 77 tokens is an error; it is cut with a warning otherwise.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    run: RunArgs,
}

fn one_or_more(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "expected a whole number, 1 or more".to_string())
}

#[derive(Debug, Clone, Copy)]
struct Size {
    width: usize,
    height: usize,
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (width, height) = text.split_once('x').unwrap_or((text, text));
        match (width.parse(), height.parse()) {
            (Ok(width), Ok(height)) => Ok(Self { width, height }),
            _ => Err("expected a side in pixels, e.g. 512, or width and height, e.g. 512x384".into()),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Interval {
    low: f64,
    high: f64,
}

impl std::str::FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ends = text.split_once(':').and_then(|(low, high)| Some((low.parse().ok()?, high.parse().ok()?)));
        match ends {
            Some((low, high)) if 0.0 <= low && low <= high => Ok(Self { low, high }),
            _ => Err("expected two noise levels, the lower first, e.g. 0.3:5".into()),
        }
    }
}

#[derive(Debug, Clone)]
struct Lora {
    file: PathBuf,
    scale: f64,
}

impl std::str::FromStr for Lora {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scaled = text.rsplit_once(':').and_then(|(file, scale)| Some((file, scale.parse::<f64>().ok()?)));
        // a file may have a colon and a number in its name
        let (file, scale) = scaled.filter(|_| !Path::new(text).exists()).unwrap_or((text, 1.0));
        if file.is_empty() || !scale.is_finite() {
            return Err(
                "expected a file, or a file, a colon and a number, e.g. cxr.safetensors:0.8".to_string()
            );
        }
        Ok(Self { file: file.into(), scale })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    stop_on_interrupt();
    show_warnings();
    exit(args.items().and_then(|items| synthesize(&args, &items)))
}

impl Args {
    /// All prompts, and everything else checked that needs no model.
    fn items(&self) -> Result<Vec<Item>> {
        let mut items: Vec<Item> =
            self.prompt.iter().map(|text| Item { text: text.clone(), ..Item::default() }).collect();
        if let Some(file) = &self.prompts {
            let found = prompts::read(file, self.text_col.as_deref())
                .with_context(|| format!("--prompts {}", file.display()))?;
            if found.empty > 0 {
                eprintln!("warning: {} rows of {} have no prompt", found.empty, file.display());
            }
            items.extend(found.items);
        }
        items.truncate(self.limit.map_or(usize::MAX, NonZeroUsize::get));
        self.check_lengths(&items)?;
        ensure!(self.guidance.is_finite(), "--guidance is {}, expected a finite number", self.guidance);
        ensure!(self.steps > 0, "--steps is 0, expected 1 or more");
        for Lora { file, .. } in &self.lora {
            ensure!(file.exists(), "--lora: there is no {}", file.display());
        }
        Ok(items)
    }

    /// That no prompt is too long, if none must be; the library warns of those that it cuts.
    fn check_lengths(&self, items: &[Item]) -> Result<()> {
        if !self.strict {
            return Ok(());
        }
        let tokenizer = ClipTokenizer::embedded();
        let negative = std::iter::once(("--negative", self.negative.as_str()));
        for (what, text) in items.iter().map(|item| ("prompt", item.text.as_str())).chain(negative) {
            let length = tokenizer.length(text);
            ensure!(
                length <= LENGTH,
                "--strict: {what} of {length} tokens, at most {LENGTH} are read: {text:?}; shorten it"
            );
        }
        Ok(())
    }

    fn color(&self) -> PngColor {
        if self.gray { PngColor::Gray } else { PngColor::Rgb }
    }

    fn load(&self) -> Result<Box<dyn Synthesizer + Send + Sync>> {
        let mut options = LoadOptions::default()
            .with_dtype(self.dtype.float())
            .with_verify(self.verify)
            .with_progress(Terminal::new(self.run.quiet));
        if let Some(revision) = &self.revision {
            options = options.with_revision(revision);
        }
        let device = self.run.device.to_string();
        let model = match &self.model {
            Some(model) => cxr::open(&device, model.as_str(), options),
            None => cxr::open(&device, demo::model_folder(), options),
        };
        let mut model = model.map_err(|error| match error {
            error @ cxr::Error::Device(_) => anyhow::Error::from(error).context("--device"),
            error => anyhow::Error::from(error).context("--model"),
        })?;
        if !self.run.quiet {
            eprintln!("device: {} (this binary has: {})", model.device(), cxr::device::built().join(", "));
        }
        for Lora { file, scale } in &self.lora {
            model.add_lora(file, *scale).context("--lora")?;
        }
        Ok(model)
    }

    /// A request for some pictures.
    fn request(&self, planned: &[Planned<'_>], initial: Option<&InitialImage>) -> Request {
        let mut request = Request::each(planned.iter().map(|picture| picture.item.text.as_str()))
            .seeds(planned.iter().map(|picture| picture.seed))
            .negative(&self.negative)
            .steps(self.steps)
            .guidance(self.guidance)
            .batch(self.batch.get())
            .vae_slicing(self.vae_slicing)
            .vae_tiling(self.vae_tiling)
            .strict_prompt(self.strict);
        if let Some(sampler) = self.scheduler {
            request = request.sampler(sampler);
        }
        if let Some(Interval { low, high }) = self.guidance_interval {
            request = request.guidance_interval(low, high);
        }
        if let Some(Size { width, height }) = self.size {
            request = request.size(width, height);
        }
        if let Some(image) = initial {
            request = request.initial(image.clone());
        }
        request
    }

    fn initial_image(&self) -> Result<Option<InitialImage>> {
        let Some(file) = &self.initial else { return Ok(None) };
        let wrong = || format!("--initial {}", file.display());
        let picture = image::open(file).with_context(wrong)?.to_rgb8();
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        let image =
            InitialImage::new(width, height, picture.into_raw(), self.strength).context("--strength")?;
        Ok(Some(image))
    }
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
    let model = args.load()?;
    check_size(args, model.as_ref())?;
    let request = args.request(&planned, initial.as_ref());
    let settings = model.settings(&request)?;
    let steps = model.steps_per_batch(&request)?;

    let mut folder = Folder::open(&args.out)?;
    let mut missing = Vec::new();
    for (picture, settings) in planned.iter().zip(&settings) {
        if !folder.has(&picture.name, &settings.hash(), args.color(), args.force)? {
            missing.push(picture);
        }
    }
    folder.start()?;
    let there = planned.len() - missing.len();
    if there > 0 {
        eprintln!("{there} of {} pictures are there already", planned.len());
    }

    let terminal = Terminal::new(args.run.quiet);
    let batches = missing.len().div_ceil(args.batch.get());
    terminal.begin("pictures", Some((batches * steps) as u64));
    let mut made = 0;
    let mut sheet = Sheet::default();
    for (index, batch) in missing.chunks(args.batch.get()).enumerate() {
        let batch: Vec<Planned<'_>> =
            batch.iter().map(|p| Planned { name: p.name.clone(), item: p.item, seed: p.seed }).collect();
        let request = args.request(&batch, initial.as_ref());
        let message = format!("{made} of {} pictures finished", missing.len());
        let progress = Offset { progress: &terminal, done: (index * steps) as u64, message };
        let images = model.generate_with(&request, &progress, &mut |_| ControlFlow::Continue(()))?;
        for (image, picture) in images.iter().zip(&batch) {
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
        sheet.save(file)?;
    }
    if made < missing.len() {
        bail!(
            "stopped: {} of {} pictures are in {}; the same command goes on",
            there + made,
            planned.len(),
            args.out.display()
        );
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

/// The first pictures of a run, side by side.
#[derive(Default)]
struct Sheet {
    pictures: Vec<RgbImage>,
    first: Option<Image>,
}

impl Sheet {
    fn add(&mut self, image: &Image) {
        if self.pictures.len() < SHEET {
            let (width, height) = (image.width as u32, image.height as u32);
            self.pictures.extend(RgbImage::from_raw(width, height, image.rgb.clone()));
        }
        self.first.get_or_insert_with(|| image.clone());
    }

    /// Writes it, marked as synthetic like the pictures.
    fn save(self, file: &Path) -> Result<()> {
        let Some(mut grid) = self.first else { return Ok(()) };
        let columns = (self.pictures.len() as f64).sqrt().ceil() as usize;
        let sheet = contact_sheet(&self.pictures, columns);
        grid.settings.prompt = format!(
            "Contact sheet of {} pictures, the first of: {}",
            self.pictures.len(),
            grid.settings.prompt
        );
        (grid.width, grid.height) = (sheet.width() as usize, sheet.height() as usize);
        grid.rgb = sheet.into_raw();
        grid.save_png(file).context("--sheet")
    }
}
