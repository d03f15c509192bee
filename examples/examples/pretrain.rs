//! Makes the embedded base model: autoencoder, text encoder and UNet, from randomized thumbnails of the training
//! patients and procedural pictures.
//!
//! Every stage writes checkpoints and goes on from them, so that the command can be stopped (Ctrl-C) and given again.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::module::AutodiffModule;
use clap::Parser;
use cxr::core::atomic;
use cxr::core::progress::Progress;
use cxr::dataset::contact_sheet;
use cxr::kernels::DiffusionAutodiff;
use cxr::kernels::nn::parameters;
use cxr::ldm::pipeline::{ModelConfig, SaveDtype};
use cxr::ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig};
use cxr::ldm::text::ClipTextConfig;
use cxr::ldm::unet::UNetConfig;
use cxr::ldm::vae::{AutoencoderKl, AutoencoderKlConfig};
use cxr::ldm::weights::{LoadOptions, ModelFiles, ModelSource, save_folder};
use cxr::tokenizer::ClipTokenizer;
use cxr::trainer::{
    Diffusion, LatentSample, LearningRate, Reconstruction, SnrWeight, TrainConfig, Trained, initialize,
    train, watch,
};
use cxr_examples::backend::{Job, RunArgs, exit, run};
use cxr_examples::demo::autoencoder::{AutoencoderPictures, reconstruct};
use cxr_examples::demo::extractor::{
    LabelledPictures, extractor_config, judge_extractor, learnable_findings, mean_auroc, train_extractor,
};
use cxr_examples::demo::joint::TextToLatent;
use cxr_examples::demo::latents::Strength;
use cxr_examples::demo::pictures::grey_image;
use cxr_examples::demo::sharpen::{JudgedAutoencoder, PatchDiscriminator, Sharpening};
use cxr_examples::demo::thumbnails::Thumbnails;
use cxr_examples::demo::{self, latents};
use cxr_examples::exit::EXIT_CODES;
use cxr_examples::memory::{self, MemoryArgs, Sizes};
use cxr_examples::progress::{Terminal, Titled, show_log, stop_on_interrupt};
use serde_json::json;

/// The parts of the work; none needs the one before it but the model the autoencoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Stage {
    /// The small feature extractor, on the thumbnails' findings.
    Extractor,
    /// The autoencoder.
    Autoencoder,
    /// Text encoder and UNet on the autoencoder's latents, and the model's folder.
    Model,
}

/// Trains the embedded base model and the small feature extractor from scratch.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Args {
    /// Where checkpoints, logs and the model go; an interrupted run in it is continued.
    #[arg(long, default_value = "out/pretrain")]
    out: PathBuf,
    /// Thumbnails in NIH's layout (labels.csv and images/); default: the embedded ones.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Begin with the autoencoder of this model folder instead of training one (diffusers' layout).
    #[arg(long)]
    autoencoder: Option<PathBuf>,
    /// Optimizer steps of the autoencoder.
    #[arg(long, default_value_t = 9000)]
    autoencoder_steps: u64,
    /// Pictures per step of the autoencoder.
    #[arg(long, default_value_t = 8)]
    autoencoder_batch: usize,
    /// Highest learning rate of the autoencoder.
    #[arg(long, default_value_t = 2e-3)]
    autoencoder_rate: f64,
    /// Begin with text encoder and UNet of this model folder instead of untrained ones: for another round of training on
    /// the same latents.
    #[arg(long)]
    start: Option<PathBuf>,
    /// Optimizer steps of the decoder alone, against a discriminator; 0 leaves it as it is.
    #[arg(long, default_value_t = 3500)]
    sharpen_steps: u64,
    /// Highest learning rate of these.
    #[arg(long, default_value_t = 1e-3)]
    sharpen_rate: f64,
    /// Weight of the discriminator's opinion; that of the absolute error is 1.
    #[arg(long, default_value_t = 0.05)]
    adversarial: f64,
    /// Weight of the difference of the discriminator's hidden layers.
    #[arg(long, default_value_t = 0.0)]
    features: f64,
    /// Optimizer steps of text encoder and UNet.
    #[arg(long, default_value_t = 5000)]
    denoiser_steps: u64,
    /// Optimizer steps of their second pass, where a bare finding stands for a picture changed beyond recognition;
    /// 0 leaves it out.
    #[arg(long, default_value_t = 1000)]
    wild_steps: u64,
    /// Pictures per step of text encoder and UNet.
    #[arg(long, default_value_t = 32)]
    denoiser_batch: usize,
    /// Highest learning rate of text encoder and UNet; half of it in the second pass.
    #[arg(long, default_value_t = 1e-3)]
    denoiser_rate: f64,
    /// Pictures in the pool that text encoder and UNet learn from; half as many in the second pass.
    #[arg(long, default_value_t = 14_400)]
    pool: usize,
    /// Run this stage alone (the model wants the autoencoder's checkpoints).
    #[arg(long, value_enum)]
    only: Option<Stage>,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Seed of every random number.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    run: RunArgs,
}

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    stop_on_interrupt();
    show_log(args.run.verbose);
    let run_args = args.run.clone();
    exit(args.check_memory().and_then(|()| run(&run_args, Pretrain(args))))
}

struct Pretrain(Args);

impl Job for Pretrain {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        let args = &self.0;
        let progress = Terminal::new(args.run.quiet);
        std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
        let data = args.data.clone().unwrap_or_else(demo::data_folder);
        let thumbnails = Thumbnails::open(&data)?;
        let (train, test) = (&thumbnails.split.train, &thumbnails.split.test);
        eprintln!("{} thumbnails to train on, {} of other patients held out", train.len(), test.len());

        let wanted = |stage| args.only.is_none_or(|only| only == stage);
        if wanted(Stage::Extractor) {
            args.extractor::<B>(&thumbnails, &device, &progress)?;
        }
        if !(wanted(Stage::Autoencoder) || wanted(Stage::Model)) {
            return Ok(());
        }
        let started = Instant::now();
        let vae = args.autoencoder::<B>(&thumbnails, &device, &progress)?;
        let autoencoder_seconds = started.elapsed().as_secs_f64();
        let psnr = args.judge_autoencoder::<B>(&vae, "autoencoder", &thumbnails, &device)?;
        let started = Instant::now();
        let (vae, sharp_psnr) = match args.sharpen_steps {
            0 => (vae, psnr),
            _ => {
                let vae = args.sharpen::<B>(vae, &thumbnails, &device, &progress)?;
                let psnr = args.judge_autoencoder::<B>(&vae, "sharpened", &thumbnails, &device)?;
                (vae, psnr)
            }
        };
        let sharpen_seconds = started.elapsed().as_secs_f64();
        if !wanted(Stage::Model) {
            return Ok(());
        }

        let mut config = model_config()?;
        let started = Instant::now();
        let model = args.denoiser::<B>(&vae, &mut config, &thumbnails, &device, &progress)?;
        let denoiser_seconds = started.elapsed().as_secs_f64();

        let folder = args.out.join("model");
        let model = model.valid();
        save_folder(&folder, &config, &model.text_encoder, &model.unet, &vae.valid(), None, SaveDtype::F16)?;
        let count = |(all, _): (usize, usize)| all;
        let log = json!({
            "command": args.command(),
            "version": env!("CARGO_PKG_VERSION"),
            "seed": args.seed,
            "train_thumbnails": train.len(),
            "held_out_thumbnails": test.len(),
            "autoencoder": match &args.autoencoder {
                Some(folder) => json!({ "from": folder, "held_out_psnr_db": psnr }),
                None => json!({
                    "steps": args.autoencoder_steps, "batch": args.autoencoder_batch, "rate": args.autoencoder_rate,
                    "parameters": count(parameters::count(&vae.valid())),
                    "held_out_psnr_db": psnr, "seconds_of_last_start": autoencoder_seconds,
                }),
            },
            "decoder": {
                "steps": args.sharpen_steps, "batch": args.autoencoder_batch, "rate": args.sharpen_rate,
                "adversarial": args.adversarial, "features": args.features,
                "held_out_psnr_db": sharp_psnr, "seconds_of_last_start": sharpen_seconds,
            },
            "denoiser": {
                "from": args.start,
                "steps": args.denoiser_steps, "wild_steps": args.wild_steps, "batch": args.denoiser_batch, "rate": args.denoiser_rate,
                "pool": args.pool,
                "parameters": count(parameters::count(&model.unet)),
                "text_encoder_parameters": count(parameters::count(&model.text_encoder)),
                "seconds_of_last_start": denoiser_seconds,
            },
            "scaling_factor": config.vae.scaling_factor,
        });
        let text = serde_json::to_string_pretty(&log)? + "\n";
        atomic::write_bytes(folder.join("pretrain.json"), text.as_bytes())?;
        println!("{}", folder.display());
        Ok(())
    }
}

/// One training of text encoder and UNet.
struct Pass {
    /// The folder of its checkpoints.
    name: &'static str,
    steps: u64,
    rate: f64,
    pool: usize,
}

/// Token ids of a caption.
fn ids(tokenizer: &ClipTokenizer, text: &str) -> Arc<Vec<i64>> {
    Arc::new(tokenizer.encode(text).ids.iter().map(|id| i64::from(*id)).collect())
}

/// The sizes of the embedded model; the autoencoder's scaling factor comes later.
fn model_config() -> Result<ModelConfig> {
    let config = ModelConfig {
        text: ClipTextConfig::from_json(demo::TEXT_CONFIG)?,
        unet: UNetConfig::from_json(demo::UNET_CONFIG)?,
        vae: AutoencoderKlConfig::from_json(demo::VAE_CONFIG)?,
        schedule: NoiseScheduleConfig::from_json(demo::SCHEDULER_CONFIG)?,
    };
    config.validate()?;
    Ok(config)
}

impl Args {
    /// That training the larger part has room.
    fn check_memory(&self) -> Result<()> {
        let config = model_config()?;
        let side = config.unet.sample_size * config.vae.factor();
        let needed = Sizes::of(&config)?.pretraining(side, self.denoiser_batch, self.pool);
        let advice = "a smaller --denoiser-batch or --pool takes less";
        memory::check(needed, self.run.device, self.memory, self.run.quiet, advice)
    }

    /// The command that makes the same files, wherever it puts them.
    fn command(&self) -> String {
        let from = [("autoencoder", &self.autoencoder), ("start", &self.start)];
        let from =
            from.iter().filter_map(|(flag, path)| Some(format!(" --{flag} {}", path.as_ref()?.display())));
        let from: String = from.collect();
        format!(
            "pretrain{from} --autoencoder-steps {} --autoencoder-batch {} --autoencoder-rate {} --sharpen-steps {} \
             --sharpen-rate {} --adversarial {} --features {} --denoiser-steps {} \
             --wild-steps {} --denoiser-batch {} --denoiser-rate {} --pool {} --seed {}",
            self.autoencoder_steps,
            self.autoencoder_batch,
            self.autoencoder_rate,
            self.sharpen_steps,
            self.sharpen_rate,
            self.adversarial,
            self.features,
            self.denoiser_steps,
            self.wild_steps,
            self.denoiser_batch,
            self.denoiser_rate,
            self.pool,
            self.seed
        )
    }

    /// Trains the extractor, and judges it on held-out patients.
    fn extractor<B: DiffusionAutodiff>(
        &self,
        thumbnails: &Thumbnails,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<()> {
        let findings = learnable_findings(thumbnails);
        let pick = |positions: &[usize]| LabelledPictures::pick(thumbnails, positions, &findings);
        let config = TrainConfig { seed: self.seed, ..extractor_config() };
        let run = self.out.join("extractor");
        let titled = Titled { progress, title: "extractor" };
        let extractor = train_extractor::<B>(pick(&thumbnails.split.train), &config, &run, device, &titled)?;
        let table = judge_extractor(&extractor, &pick(&thumbnails.split.test), progress)?;
        let folder = self.out.join("cxr-small-extractor");
        extractor.save(&folder)?;
        let log = json!({
            "command": self.command(), "version": env!("CARGO_PKG_VERSION"), "settings": config,
            "mean_held_out_auroc": mean_auroc(&table), "held_out_auroc": table,
        });
        let text = serde_json::to_string_pretty(&log)? + "\n";
        atomic::write_bytes(folder.join("pretrain.json"), text.as_bytes())?;
        eprintln!(
            "held-out AUROC of the extractor, mean over findings: {:.3}",
            mean_auroc(&table).unwrap_or(f64::NAN)
        );
        println!("{}", folder.display());
        Ok(())
    }

    fn autoencoder<B: DiffusionAutodiff>(
        &self,
        thumbnails: &Thumbnails,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<AutoencoderKl<B>> {
        if let Some(folder) = &self.autoencoder {
            return self.made_autoencoder(folder, device);
        }
        let config = TrainConfig {
            steps: self.autoencoder_steps,
            batch_size: self.autoencoder_batch,
            learning_rate: LearningRate::cosine(self.autoencoder_rate, self.autoencoder_steps / 40),
            clip_norm: Some(1.0),
            ema: Some(0.998),
            seed: self.seed,
            ..TrainConfig::default()
        };
        let objective = Reconstruction::<B, _> {
            images: AutoencoderPictures {
                thumbnails: thumbnails.pick(&thumbnails.split.train),
                sharp: false,
            },
            edges: 1.0,
            kl: 1e-4,
            device: device.clone(),
        };
        let vae = model_config()?.vae.init::<B>(device);
        let vae = parameters::set_trainable(initialize(vae, self.seed), |_| true);
        let folder = self.out.join("autoencoder");
        let trained = train(vae, &objective, &config, &folder, &Titled { progress, title: "autoencoder" })?;
        self.finish(trained, &folder, "Autoencoder: loss")
    }

    /// Trains the decoder on against a discriminator; the encoder stays.
    fn sharpen<B: DiffusionAutodiff>(
        &self,
        vae: AutoencoderKl<B>,
        thumbnails: &Thumbnails,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<AutoencoderKl<B>> {
        let config = TrainConfig {
            steps: self.sharpen_steps,
            batch_size: self.autoencoder_batch,
            learning_rate: LearningRate::cosine(self.sharpen_rate, self.sharpen_steps / 40),
            // A norm over both would let the discriminator's gradient, which is far larger, shrink the decoder's.
            clip_norm: None,
            ema: Some(0.998),
            seed: self.seed,
            ..TrainConfig::default()
        };
        let objective = Sharpening::<B, _> {
            images: AutoencoderPictures { thumbnails: thumbnails.pick(&thumbnails.split.train), sharp: true },
            edges: 1.0,
            adversarial: self.adversarial,
            features: self.features,
            device: device.clone(),
        };
        let discriminator = initialize(PatchDiscriminator::new(device), self.seed);
        let model = JudgedAutoencoder { vae, discriminator };
        let model = parameters::set_trainable(model, JudgedAutoencoder::<B>::learns);
        let folder = self.out.join("decoder");
        let trained = train(model, &objective, &config, &folder, &Titled { progress, title: "decoder" })?;
        Ok(self.finish(trained, &folder, "Decoder: loss")?.vae)
    }

    /// The autoencoder of a model folder, if it is one of the embedded model's sizes.
    fn made_autoencoder<B: DiffusionAutodiff>(
        &self,
        folder: &Path,
        device: &B::Device,
    ) -> Result<AutoencoderKl<B>> {
        let options = LoadOptions::default();
        let files = ModelFiles::locate(&ModelSource::from(folder), &options)?;
        let (its, ours) = (files.config()?.vae, model_config()?.vae);
        ensure!(
            AutoencoderKlConfig { scaling_factor: ours.scaling_factor, ..its } == ours,
            "--autoencoder {}: its vae/config.json has other sizes than the embedded model's",
            folder.display()
        );
        Ok(files.load_vae(&options, device)?)
    }

    /// Held-out PSNR, and a sheet of originals and reconstructions to look at.
    fn judge_autoencoder<B: DiffusionAutodiff>(
        &self,
        vae: &AutoencoderKl<B>,
        name: &str,
        thumbnails: &Thumbnails,
        device: &B::Device,
    ) -> Result<f64> {
        let held_out = thumbnails.pick(&thumbnails.split.test);
        let reconstructions = reconstruct(&vae.valid(), &held_out, device);
        let pairs: Vec<_> = held_out
            .iter()
            .zip(&reconstructions.pixels)
            .step_by(8)
            .take(16)
            .flat_map(|(original, made)| [grey_image(original), grey_image(made)])
            .collect();
        let sheet = self.out.join(format!("{name}.png"));
        contact_sheet(&pairs, 8).save(&sheet).with_context(|| format!("cannot write {}", sheet.display()))?;
        eprintln!("held-out reconstructions: {:.2} dB, {}", reconstructions.psnr, sheet.display());
        Ok(reconstructions.psnr)
    }

    fn denoiser<B: DiffusionAutodiff>(
        &self,
        vae: &AutoencoderKl<B>,
        config: &mut ModelConfig,
        thumbnails: &Thumbnails,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<TextToLatent<B>> {
        let mut samples = self.samples(vae, thumbnails, Strength::Rising, self.pool, device, progress)?;
        config.vae.scaling_factor = latents::scaling_factor(&samples);
        latents::scale(&mut samples, config.vae.scaling_factor);
        let model = self.untrained(config, device)?;
        let first =
            Pass { name: "denoiser", steps: self.denoiser_steps, rate: self.denoiser_rate, pool: self.pool };
        let model = self.pass(model, samples, config, &first, device, progress)?;

        if self.wild_steps == 0 {
            return Ok(model);
        }
        let pool = self.pool / 2;
        let mut samples = self.samples(vae, thumbnails, Strength::Wild, pool, device, progress)?;
        latents::scale(&mut samples, config.vae.scaling_factor);
        let (steps, rate) = (self.wild_steps, 0.5 * self.denoiser_rate);
        self.pass(
            model,
            samples,
            config,
            &Pass { name: "denoiser-wild", steps, rate, pool },
            device,
            progress,
        )
    }

    /// Text encoder and UNet as they are before the first step.
    fn untrained<B: DiffusionAutodiff>(
        &self,
        config: &ModelConfig,
        device: &B::Device,
    ) -> Result<TextToLatent<B>> {
        let Some(folder) = &self.start else {
            let (text_encoder, unet) = (config.text.init::<B>(device), config.unet.init::<B>(device));
            return Ok(initialize(TextToLatent { text_encoder, unet }, self.seed));
        };
        let options = LoadOptions::default();
        let files = ModelFiles::locate(&ModelSource::from(folder), &options)?;
        let its = files.config()?;
        ensure!(
            its.text == config.text && its.unet == config.unet,
            "--start {}: its text encoder or UNet has other sizes than the embedded model's",
            folder.display()
        );
        Ok(TextToLatent {
            text_encoder: files.load_text(&options, device)?,
            unet: files.load_unet(&options, device)?,
        })
    }

    /// Latents and captions of a pool of pictures.
    fn samples<B: DiffusionAutodiff>(
        &self,
        vae: &AutoencoderKl<B>,
        thumbnails: &Thumbnails,
        strength: Strength,
        count: usize,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<Vec<LatentSample<Arc<Vec<i64>>>>> {
        let tokenizer = ClipTokenizer::embedded();
        let pictures: Vec<_> = latents::pool(thumbnails, strength, count, self.seed)
            .into_iter()
            .map(|picture| (picture.pixels, ids(&tokenizer, &picture.caption)))
            .collect();
        latents::encode(&vae.valid(), &pictures, device, progress)
    }

    /// Trains text encoder and UNet on some samples.
    fn pass<B: DiffusionAutodiff>(
        &self,
        model: TextToLatent<B>,
        samples: Vec<LatentSample<Arc<Vec<i64>>>>,
        config: &ModelConfig,
        pass: &Pass,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<TextToLatent<B>> {
        let side = config.unet.sample_size;
        let schedule = NoiseSchedule::new(config.schedule.clone())?;
        let shape = [config.vae.latent_channels, side, side];
        let unconditional = ids(&ClipTokenizer::embedded(), "");
        let fingerprint = format!("pool {} scaled by {}", pass.pool, config.vae.scaling_factor);
        let plain = Diffusion::<B, TextToLatent<B>>::new(
            &schedule,
            samples,
            shape,
            unconditional,
            fingerprint,
            device,
        );
        let objective = Diffusion { weight: SnrWeight::MinSnr(5.0), dropout: 0.1, ..plain };
        let train_config = TrainConfig {
            steps: pass.steps,
            batch_size: self.denoiser_batch,
            learning_rate: LearningRate::cosine(pass.rate, pass.steps / 40),
            clip_norm: Some(1.0),
            ema: Some(0.998),
            seed: self.seed,
            ..TrainConfig::default()
        };
        let model = parameters::set_trainable(model, |_| true);
        let folder = self.out.join(pass.name);
        let titled = Titled { progress, title: pass.name };
        let trained = train(model, &objective, &train_config, &folder, &titled)?;
        self.finish(trained, &folder, "Text encoder and UNet: loss")
    }

    /// The averaged model of a finished run, its loss curve beside it.
    fn finish<M>(&self, trained: Trained<M>, folder: &Path, title: &str) -> Result<M> {
        if trained.stopped {
            bail!("stopped at step {}; the same command goes on from there", trained.step);
        }
        let records = watch::read(&folder.join("metrics.jsonl"))?;
        watch::plot_loss(&records, &[], title, &folder.join("loss.png"))?;
        Ok(trained.averaged.unwrap_or(trained.model))
    }
}
