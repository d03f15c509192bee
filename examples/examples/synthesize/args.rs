//! The command line, and what can be checked of it without a model.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use cxr::Synthesizer;
use cxr::ldm::pipeline::{InitialImage, LoadOptions, ModelSource, PngColor, Request};
use cxr::ldm::scheduler::Sampler;
use cxr::ldm::weights::ModelFiles;
use cxr::tokenizer::{ClipTokenizer, LENGTH};
use cxr_examples::arguments::Lora;
use cxr_examples::backend::{DtypeArg, RunArgs};
use cxr_examples::demo;
use cxr_examples::exit::EXIT_CODES;
use cxr_examples::memory::{self, MemoryArgs, PictureBatch, Sizes};
use cxr_examples::progress::Terminal;
use cxr_examples::ranks::Shard;

use crate::Planned;
use crate::prompts::{self, Item};

/// Makes synthetic chest radiographs from prompts: PNG files that carry their settings, and metadata.jsonl. For
/// research; not for diagnosis.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// What a picture shows, e.g. "Cardiomegaly."; may be given several times.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    pub(crate) prompt: Vec<String>,
    /// More prompts: .txt (one on each line), .csv or .jsonl with a column `text`, `prompt` or `impression`, and maybe
    /// `seed`, `count`, `labels`, `view`, `uid`, which travel along.
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts: Option<PathBuf>,
    /// Column of the prompts file that holds the prompt.
    #[arg(long, value_name = "NAME", requires = "prompts")]
    pub(crate) text_col: Option<String>,
    /// Take the first N prompts only.
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    pub(crate) limit: Option<NonZeroUsize>,
    /// What the pictures do not show.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) negative: String,
    /// Denoising steps, 1 to the model's training timesteps (1000; lcm: 50): 12 to 20 are enough for dpmpp-2m, 4 to 8
    /// for lcm, 50 for the rest.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) steps: usize,
    /// Classifier-free guidance: 1 is none and halves the time; more follows the prompt more closely. With lcm 1 to 2.
    #[arg(long, value_name = "G", default_value_t = 7.5)]
    pub(crate) guidance: f64,
    /// Noise levels between which guidance applies, e.g. 0.3:5 (Stable Diffusion's run from 0.03 to 14.6) [default:
    /// all].
    #[arg(long, value_name = "LOW:HIGH")]
    pub(crate) guidance_interval: Option<Interval>,
    /// Sampler: ddim, pndm, euler, euler-a, dpmpp-2m, or lcm, which needs an LCM-LoRA adapter or a model distilled for it
    /// [default: the one that the model's configuration names].
    #[arg(long, value_name = "NAME")]
    pub(crate) scheduler: Option<Sampler>,
    /// Seed of the first picture; picture i has seed + i.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Side in pixels, or width and height as in 512x384 [default: what the model was made for].
    #[arg(long, value_name = "SIDE|WxH")]
    pub(crate) size: Option<Size>,
    /// Pictures of each prompt.
    #[arg(long, value_name = "N", default_value = "1", value_parser = one_or_more)]
    pub(crate) images_per_prompt: NonZeroUsize,
    /// Pictures that go through the model at once: memory and speed, not the result.
    #[arg(long, value_name = "N", default_value = "1", value_parser = one_or_more)]
    pub(crate) batch: NonZeroUsize,
    /// LoRA adapter file, and how much of it is added [default scale: 1]; may be given several times.
    #[arg(long, value_name = "FILE[:SCALE]")]
    pub(crate) lora: Vec<Lora>,
    /// Start from this picture (PNG or JPEG) instead of noise alone.
    #[arg(long, value_name = "FILE")]
    pub(crate) initial: Option<PathBuf>,
    /// Part of the steps that are made of an initial picture: 1 keeps next to nothing of it.
    #[arg(long, value_name = "S", default_value_t = 0.8, requires = "initial")]
    pub(crate) strength: f64,
    /// Folder in diffusers' layout, single-file checkpoint (.safetensors, .ckpt), or repository (owner/name) [default:
    /// the embedded model].
    #[arg(long, value_name = "DIR|FILE|REPO")]
    pub(crate) model: Option<String>,
    /// Revision of a repository: branch, tag or commit [default: main].
    #[arg(long, value_name = "NAME", requires = "model")]
    pub(crate) revision: Option<String>,
    /// Check the weight files against the published SHA-256 sums of Stable Diffusion 1.4 and 1.5.
    #[arg(long, requires = "model")]
    pub(crate) verify: bool,
    /// Dtype of weights and activations: half the memory with f16 and bf16. On a CPU bf16 is faster if the processor
    /// multiplies it (AMX, AVX-512 BF16), otherwise both are as fast as f32.
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: DtypeArg,
    /// Decode pictures one by one: less memory for a batch.
    #[arg(long)]
    pub(crate) vae_slicing: bool,
    /// Decode large pictures in overlapping tiles: less memory, and pictures that differ a little.
    #[arg(long)]
    pub(crate) vae_tiling: bool,
    /// Folder for the pictures. Those that are there with the same settings are not made again.
    #[arg(long, value_name = "DIR", default_value = "out/synthesize")]
    pub(crate) out: PathBuf,
    /// Overwrite pictures that were made with other settings.
    #[arg(long)]
    pub(crate) force: bool,
    /// Make part I of N, from 0: started N times with the same --out, they make one set, the same pictures as one process
    /// would [default: as mpirun, a step of srun or an array of Slurm jobs say].
    #[arg(long, value_name = "I/N")]
    pub(crate) shard: Option<Shard>,
    /// One channel instead of three.
    #[arg(long)]
    pub(crate) gray: bool,
    /// Write a contact sheet of the pictures to this PNG file.
    #[arg(long, value_name = "FILE")]
    pub(crate) sheet: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
    /// A prompt of more than 77 tokens is an error; it is cut with a warning otherwise.
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What is said where no model was named.
const EMBEDDED: &str = "model: the embedded one, which draws grey pictures of 64 x 64 pixels, for demonstration; --model \
                        stable-diffusion-v1-5/stable-diffusion-v1-5 takes the full one (4 GB) from a folder or Hugging \
                        Face's cache, and fetches it where this was built with --features hub";

fn one_or_more(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "expected a whole number, 1 or more".to_string())
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) width: usize,
    pub(crate) height: usize,
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
pub(crate) struct Interval {
    pub(crate) low: f64,
    pub(crate) high: f64,
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

impl Args {
    /// What can be said of the flags alone.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.guidance.is_finite(), "--guidance is {}, expected a finite number", self.guidance);
        ensure!(self.steps > 0, "--steps is 0, expected 1 or more");
        Ok(())
    }

    /// All prompts, and everything else checked that needs no model.
    pub(crate) fn items(&self) -> Result<Vec<Item>> {
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

    pub(crate) fn color(&self) -> PngColor {
        if self.gray { PngColor::Gray } else { PngColor::Rgb }
    }

    /// Opens the model, if it and so many pictures have room in memory.
    pub(crate) fn load(&self, pictures: usize) -> Result<Box<dyn Synthesizer + Send + Sync>> {
        let mut options = LoadOptions::default()
            .with_dtype(self.dtype.float())
            .with_verify(self.verify)
            .with_progress(Terminal::new(self.run.quiet));
        if let Some(revision) = &self.revision {
            options = options.with_revision(revision);
        }
        let device = self.run.device.to_string();
        let source = match &self.model {
            Some(model) => ModelSource::from(model.clone()),
            None => {
                if !self.run.quiet {
                    eprintln!("{EMBEDDED}");
                }
                ModelSource::from(demo::model_folder())
            }
        };
        self.check_memory(&source, &options, pictures)?;
        let model = cxr::open(&device, source, options);
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

    fn check_memory(&self, source: &ModelSource, options: &LoadOptions, pictures: usize) -> Result<()> {
        let files = ModelFiles::locate(source, options).context("--model")?;
        let config = files.config().context("--model")?;
        let sizes = Sizes::of(&config).context("--model")?;
        let side = config.unet.sample_size * config.vae.factor();
        let Size { width, height } = self.size.unwrap_or(Size { width: side, height: side });
        let batch = self.batch.get().min(pictures);
        let needed = sizes.pictures(&PictureBatch {
            width,
            height,
            batch,
            decoded: if self.vae_slicing { 1 } else { batch },
            tiled: self.vae_tiling,
            guided: self.guidance != 1.0,
            dtype: self.dtype.float(),
        }) + sizes.packed(self.memory);
        let advice = "a smaller --batch or --size takes less, --dtype bf16 half the weights, --vae-slicing and \
                      --vae-tiling less for decoding";
        memory::check(needed, self.run.device, self.memory, self.run.quiet, advice)
    }

    /// A request for some pictures.
    pub(crate) fn request(&self, planned: &[&Planned<'_>], initial: Option<&InitialImage>) -> Request {
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

    pub(crate) fn initial_image(&self) -> Result<Option<InitialImage>> {
        let Some(file) = &self.initial else { return Ok(None) };
        let wrong = || format!("--initial {}", file.display());
        let picture = image::open(file).with_context(wrong)?.to_rgb8();
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        let image =
            InitialImage::new(width, height, picture.into_raw(), self.strength).context("--strength")?;
        Ok(Some(image))
    }
}
