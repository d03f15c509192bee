//! Makes pictures from prompts, with the embedded model or any Stable Diffusion 1.x folder.
//!
//! Every picture is written as soon as its batch is finished, and stays there if the program is stopped (Ctrl-C).

use std::fs::File;
use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use cxr::core::progress::Progress;
use cxr::dataset::contact_sheet;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::pipeline::{Image, LoadOptions, Request, StableDiffusion};
use cxr::ldm::scheduler::Sampler;
use cxr::tokenizer::{ClipTokenizer, LENGTH};
use cxr_examples::backend::{Job, RunArgs, exit, run};
use cxr_examples::demo;
use cxr_examples::progress::{Terminal, interrupted, stop_on_interrupt};
use image::RgbImage;
use serde::Deserialize;

/// What a contact sheet shows at most.
const SHEET: usize = 64;

/// Makes synthetic chest radiographs from prompts: PNG files that carry their settings, metadata.jsonl, and a
/// contact sheet. For research; not for diagnosis.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// What a picture shows, e.g. "Cardiomegaly."; may be given several times.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts_file")]
    prompt: Vec<String>,
    /// More prompts: a .txt file with one on each line, or a .jsonl file with a "text" in each line's object.
    #[arg(long, value_name = "FILE")]
    prompts_file: Option<PathBuf>,
    /// What the pictures do not show.
    #[arg(long, value_name = "TEXT", default_value = "")]
    negative: String,
    /// Seed of the first picture; picture i has seed + i.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Denoising steps, 1 to the model's training timesteps (1000): 20 to 30 are enough for dpmpp-2m, 50 for ddim.
    #[arg(long, value_name = "N", default_value_t = 30)]
    steps: usize,
    /// Classifier-free guidance: 1 is none and halves the time; more follows the prompt more closely.
    #[arg(long, value_name = "G", default_value_t = 7.5)]
    guidance: f64,
    /// Sampler: ddim or dpmpp-2m.
    #[arg(long, value_name = "NAME", default_value = "dpmpp-2m")]
    sampler: Sampler,
    /// Pictures in all; picture i has prompt i, and the first again after the last [default: one of each prompt].
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    count: Option<NonZeroUsize>,
    /// Pictures that go through the model at once: memory and speed, not the result.
    #[arg(long, value_name = "N", default_value = "4", value_parser = one_or_more)]
    batch: NonZeroUsize,
    /// LoRA adapter file, and how much of it is added [default weight: 1]; may be given several times.
    #[arg(long, value_name = "FILE[:WEIGHT]")]
    lora: Vec<Lora>,
    /// Model folder in diffusers' layout [default: the embedded model].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Width and height in pixels, e.g. 512x512 [default: the model's own].
    #[arg(long, value_name = "WxH")]
    size: Option<Size>,
    /// Folder for the pictures; one that holds a metadata.jsonl is refused.
    #[arg(long, value_name = "DIR", default_value = "out/synthesize")]
    out: PathBuf,
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
        let sides = text.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
        let (width, height) = sides.ok_or("expected width and height in pixels, e.g. 512x512")?;
        Ok(Self { width, height })
    }
}

#[derive(Debug, Clone)]
struct Lora {
    file: PathBuf,
    weight: f64,
}

impl std::str::FromStr for Lora {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let weighted =
            text.rsplit_once(':').and_then(|(file, weight)| Some((file, weight.parse::<f64>().ok()?)));
        // a file may have a colon and a number in its name
        let (file, weight) = weighted.filter(|_| !Path::new(text).exists()).unwrap_or((text, 1.0));
        if file.is_empty() || !weight.is_finite() {
            return Err(
                "expected a file, or a file, a colon and a number, e.g. cxr.safetensors:0.8".to_string()
            );
        }
        Ok(Self { file: file.into(), weight })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    stop_on_interrupt();
    let run_args = args.run.clone();
    exit(args.prompts().and_then(|prompts| run(&run_args, Synthesize { args, prompts })))
}

impl Args {
    /// All prompts, and everything else checked that needs no model.
    fn prompts(&self) -> Result<Vec<String>> {
        let mut prompts = self.prompt.clone();
        if let Some(file) = &self.prompts_file {
            prompts.extend(read_prompts(file).with_context(|| format!("--prompts-file {}", file.display()))?);
        }
        let tokenizer = ClipTokenizer::embedded();
        for (flag, text) in
            prompts.iter().map(|prompt| ("prompt", prompt)).chain([("--negative", &self.negative)])
        {
            let length = tokenizer.length(text);
            ensure!(
                length <= LENGTH,
                "{flag} of {length} tokens, at most {LENGTH} are read: {text:?}; shorten it"
            );
        }
        ensure!(self.guidance.is_finite(), "--guidance is {}, expected a finite number", self.guidance);
        for Lora { file, .. } in &self.lora {
            ensure!(file.exists(), "--lora: there is no {}", file.display());
        }
        let metadata = self.metadata();
        ensure!(
            !metadata.exists(),
            "{} is there already: choose another folder with --out, or remove this one",
            metadata.display()
        );
        Ok(prompts)
    }

    fn metadata(&self) -> PathBuf {
        self.out.join("metadata.jsonl")
    }

    fn request(&self, prompts: &[String]) -> Request {
        let request = Request::each(prompts)
            .negative(&self.negative)
            .seed(self.seed)
            .steps(self.steps)
            .guidance(self.guidance)
            .sampler(self.sampler)
            .batch(self.batch.get())
            .strict_prompt(true);
        match self.size {
            Some(Size { width, height }) => request.size(width, height),
            None => request,
        }
    }
}

fn read_prompts(file: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Row {
        text: String,
    }
    let content = std::fs::read_to_string(file)?;
    let lines = content.trim_start_matches('\u{feff}').lines().map(str::trim).enumerate();
    let lines = lines.filter(|(_, line)| !line.is_empty());
    let prompts: Vec<String> = match file.extension().and_then(|extension| extension.to_str()) {
        Some("txt") => lines.map(|(_, line)| line.to_string()).collect(),
        Some("jsonl") => lines
            .map(|(index, line)| {
                let expected = || format!("line {}: expected an object with \"text\"", index + 1);
                Ok(serde_json::from_str::<Row>(line).with_context(expected)?.text)
            })
            .collect::<Result<_>>()?,
        _ => bail!("expected a name that ends in .txt or .jsonl"),
    };
    ensure!(!prompts.is_empty(), "there is no prompt in it");
    Ok(prompts)
}

struct Synthesize {
    args: Args,
    prompts: Vec<String>,
}

impl Job for Synthesize {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        let args = &self.args;
        let model = self.load::<B::InnerBackend>(&device)?;
        let steps = self.check(&model)?;
        std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
        let metadata = args.metadata();
        let file =
            File::create_new(&metadata).with_context(|| format!("cannot make {}", metadata.display()))?;
        let mut folder =
            Folder { path: &args.out, metadata: file, written: 0, sheet: Vec::new(), first: None };

        let terminal = Terminal::new(args.run.quiet);
        let (count, batch) = (self.count(), args.batch.get());
        terminal.begin("pictures", Some((count.div_ceil(batch) * steps) as u64));
        for start in (0..count).step_by(batch) {
            let prompts: Vec<String> = (start..count.min(start + batch)).map(|i| self.prompt(i)).collect();
            let request = args.request(&prompts).seed(args.seed.wrapping_add(start as u64));
            let message = format!("{start} of {count} pictures finished");
            let progress = Offset { progress: &terminal, done: (start / batch * steps) as u64, message };
            let images = model.generate_with(&request, &progress, &mut |_| ControlFlow::Continue(()))?;
            images.iter().try_for_each(|image| folder.add(image))?;
            if interrupted() {
                break;
            }
        }
        terminal.end(&format!("{} of {count} in {}", folder.written, args.out.display()));
        let written = folder.finish()?;
        if written < count {
            bail!("stopped: {written} of {count} pictures are in {}", args.out.display());
        }
        println!("{}", args.out.display());
        Ok(())
    }
}

impl Synthesize {
    fn count(&self) -> usize {
        self.args.count.map_or(self.prompts.len(), NonZeroUsize::get)
    }

    fn prompt(&self, index: usize) -> String {
        self.prompts[index % self.prompts.len()].clone()
    }

    fn load<B: DiffusionBackend>(&self, device: &B::Device) -> Result<StableDiffusion<B>> {
        let path = self.args.model.clone().unwrap_or_else(demo::model_folder);
        let mut model =
            StableDiffusion::load(path, LoadOptions::default(), device).context("the model (--model)")?;
        for Lora { file, weight } in &self.args.lora {
            model = model.with_lora(file, *weight).context("--lora")?;
        }
        Ok(model)
    }

    /// What can be wrong with the request for this model; how often the UNet is called for each batch.
    fn check<B: DiffusionBackend>(&self, model: &StableDiffusion<B>) -> Result<usize> {
        if let Some(Size { width, height }) = self.args.size {
            let unit = model.size_unit();
            let fits = [width, height].iter().all(|side| *side > 0 && side % unit == 0);
            ensure!(
                fits,
                "--size {width}x{height}: for this model both must be multiples of {unit}, and not 0"
            );
        }
        Ok(self.args.sampler.timesteps(&model.parts().schedule, self.args.steps)?.len())
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

/// The pictures of a run, written one by one.
struct Folder<'a> {
    path: &'a Path,
    metadata: File,
    written: usize,
    /// The first of them, for the contact sheet.
    sheet: Vec<RgbImage>,
    first: Option<Image>,
}

impl Folder<'_> {
    /// Writes a picture, then its row: a row stands for a file that is whole.
    fn add(&mut self, image: &Image) -> Result<()> {
        let name = format!("{:05}.png", self.written);
        image.save_png(self.path.join(&name))?;
        let line = serde_json::to_string(&image.metadata_row(name))? + "\n";
        self.metadata.write_all(line.as_bytes()).context("cannot write metadata.jsonl")?;
        self.written += 1;
        if self.sheet.len() < SHEET {
            let (width, height) = (image.width as u32, image.height as u32);
            self.sheet.extend(RgbImage::from_raw(width, height, image.rgb.clone()));
        }
        self.first.get_or_insert_with(|| image.clone());
        Ok(())
    }

    /// Writes the contact sheet, marked as synthetic like the pictures; says how many pictures there are.
    fn finish(self) -> Result<usize> {
        if self.written == 0 {
            // the next run may have the folder
            std::fs::remove_file(self.path.join("metadata.jsonl"))?;
        }
        if let Some(mut grid) = self.first.filter(|_| self.written > 1) {
            let columns = (self.sheet.len() as f64).sqrt().ceil() as usize;
            let sheet = contact_sheet(&self.sheet, columns);
            grid.settings.prompt = format!(
                "Contact sheet of {} pictures, the first of: {}",
                self.sheet.len(),
                grid.settings.prompt
            );
            (grid.width, grid.height) = (sheet.width() as usize, sheet.height() as usize);
            grid.rgb = sheet.into_raw();
            grid.save_png(self.path.join("grid.png"))?;
        }
        Ok(self.written)
    }
}
