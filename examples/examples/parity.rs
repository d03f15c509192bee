//! Runs one component of a model on tensors from a file, so that anyone can hold it against a reference.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use clap::{Parser, ValueEnum};
use cxr::core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::pipeline::{LoadOptions, ModelSource};
use cxr::ldm::scheduler::{NoiseSchedule, NoiseScheduleConfig, Sampler, Steps, sample};
use cxr::ldm::unet::UNet2dCondition;
use cxr::ldm::weights::{ModelConfig, ModelFiles};
use cxr::lora::{self, Adaptable, TEXT_ENCODER, UNET};
use cxr::trainer::{Diffusion, DrawnSample, LearningRate, Objective, Sample, TrainConfig, train};
use cxr_examples::arguments::Lora;
use cxr_examples::backend::{DtypeArg, Job, RunArgs, exit, run};
use cxr_examples::exit::EXIT_CODES;
use cxr_examples::progress::{Terminal, show_log};

/// Runs one component of a model on the tensors of a safetensors file, and writes what it makes of them.
///
/// text: `input_ids` [n, 77] to `last_hidden_state` [n, 77, d].
/// unet: `sample` [n, 4, h, w], `timestep` [n], `context` [n, 77, d] to `sample`.
/// vae-encode: `pixels` [n, 3, h, w] in [-1, 1] to `mean` and `std`, unscaled.
/// vae-decode: unscaled `latents` [n, 4, h, w] to `pixels`.
/// scheduler: `sample` [n, 4, h, w] (unit noise) and `model_outputs` [calls, n, 4, h, w] to `timesteps` and
/// `samples`, the latents after every call.
/// train-step: `latents` [n, 4, h, w] (scaled), `noise` likewise, `timestep` [n], `context` [n, 77, d] to `loss`, the
/// mean squared error of the predicted noise, and one gradient under the name of each tensor of the one `--lora`.
/// train-run: the same with a first dimension more, [steps, ...]: that many steps of the trainer's loop with Adam, to
/// `loss` [steps], and what has become of each tensor of the one `--lora` under its name.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, verbatim_doc_comment)]
struct Args {
    /// Folder in diffusers' layout, single-file checkpoint, or repository; the scheduler alone does without, and is
    /// then that of Stable Diffusion 1.5.
    #[arg(long, value_name = "DIR|FILE|REPO", required_if_eq_any([
        ("component", "text"), ("component", "unet"), ("component", "vae-encode"), ("component", "vae-decode"),
        ("component", "train-step"), ("component", "train-run"),
    ]))]
    model: Option<String>,
    /// Which component.
    #[arg(long, value_enum)]
    component: Component,
    /// Tensors that go in.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// File for the tensors that come out, in f32.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Sampler, for the component scheduler: ddim, pndm, euler, euler-a, dpmpp-2m or lcm [default: the model's own].
    #[arg(long, value_name = "NAME")]
    scheduler: Option<Sampler>,
    /// Denoising steps, for the component scheduler.
    #[arg(long, value_name = "N", default_value_t = 30)]
    steps: usize,
    /// Adapter for the components text and unet, and how much of it is added, 1 unless given; repeat it to add several.
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<Lora>,
    /// Learning rate, for the component train-run.
    #[arg(long, value_name = "RATE", default_value_t = 5e-5)]
    learning_rate: f64,
    /// Dtype of weights and activations.
    #[arg(long, default_value = "f32")]
    dtype: DtypeArg,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Component {
    Text,
    Unet,
    VaeEncode,
    VaeDecode,
    Scheduler,
    TrainStep,
    TrainRun,
}

fn main() -> ExitCode {
    let args = cxr_examples::arguments::parse::<Args>();
    show_log(args.run.verbose);
    let run_args = args.run.clone();
    exit(run(&run_args, Parity(args)))
}

struct Parity(Args);

impl Job for Parity {
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()> {
        match self.0.component {
            Component::TrainStep | Component::TrainRun => self.write(self.training::<B>(&device)?),
            _ => self.write(self.tensors::<B::InnerBackend>(&device)?),
        }
    }
}

type Outputs = Vec<(String, RawTensor)>;

impl Parity {
    fn inputs(&self) -> Result<Inputs<'_>> {
        let path = &self.0.input;
        Ok(Inputs { file: TensorFile::open(path).context("--input")?, path })
    }

    fn write(&self, tensors: Outputs) -> Result<()> {
        let output = &self.0.output;
        write_safetensors(output, &tensors, &BTreeMap::new()).context("--output")?;
        println!("{}", output.display());
        Ok(())
    }

    fn tensors<B: DiffusionBackend>(&self, device: &B::Device) -> Result<Outputs> {
        let inputs = self.inputs()?;
        let tensors = match self.0.component {
            Component::Scheduler => self.scheduler::<B>(&inputs, device)?,
            network => self.network::<B>(network, &inputs, device)?,
        };
        Ok(tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect())
    }

    /// The trainer's own loss and its gradient by the factors of an adapter, or steps of its own loop.
    fn training<B: DiffusionAutodiff>(&self, device: &B::Device) -> Result<Outputs> {
        let [Lora { file, scale }] = self.0.lora.as_slice() else {
            bail!("--component train-step and train-run take one --lora, {} are given", self.0.lora.len());
        };
        let inputs = self.inputs()?;
        let (options, source) = (
            LoadOptions::default().with_dtype(self.0.dtype.float()),
            self.0.model.clone().unwrap_or_default(),
        );
        let files = ModelFiles::locate(&ModelSource::from(source), &options).context("--model")?;
        let config = files.config()?;
        let (mut adapter, _format) = lora::read(file).context("--lora")?;
        adapter.modules.retain(|key, _| key.component == UNET);
        let mut unet = files.load_unet::<B>(&options, device)?;
        lora::load_adapter(&mut unet, &adapter, *scale)
            .with_context(|| format!("--lora {}", file.display()))?;
        lora::train_only(&mut unet, lora::DEFAULT_NAME)?;

        let is_run = self.0.component == Component::TrainRun;
        let given = GivenSamples::read(&inputs, &config, is_run)?;
        let objective = Diffusion::<B, UNet2dCondition<B>>::new(
            &NoiseSchedule::new(config.schedule)?,
            Vec::new(),
            given.shape,
            given.conditions[0].clone(),
            String::new(),
            device,
        );
        let samples = given.drawn();
        if is_run {
            let train_config = TrainConfig {
                steps: given.steps as u64,
                batch_size: samples.len() / given.steps,
                learning_rate: LearningRate::constant(self.0.learning_rate),
                ..TrainConfig::default()
            };
            let given = Given { objective, samples, losses: RefCell::default() };
            let folder = tempfile::tempdir()?;
            let progress = Terminal::new(self.0.run.quiet);
            let trained = train(unet, &given, &train_config, folder.path(), &progress)?;
            let losses = given.losses.into_inner();
            let mut outputs = vec![("loss".to_string(), RawTensor::from_f32(vec![losses.len()], losses))];
            outputs.extend(factors(&trained.model, file, |factor| Some(raw(factor.val().inner())))?);
            return Ok(outputs);
        }
        let (loss, gradients) = objective.gradients_of(&unet, &samples);
        let mut outputs = vec![("loss".to_string(), RawTensor::from_f32(vec![1], vec![loss as f32]))];
        let gradient = |factor: &Param<Tensor<B, 2>>| gradients.get::<B::InnerBackend, 2>(factor.id).map(raw);
        outputs.extend(factors(&unet, file, gradient)?);
        Ok(outputs)
    }

    fn network<B: DiffusionBackend>(
        &self,
        component: Component,
        inputs: &Inputs<'_>,
        device: &B::Device,
    ) -> Result<Vec<(&'static str, RawTensor)>> {
        let dtype = self.0.dtype.float();
        let options = LoadOptions::default().with_dtype(dtype);
        let source = ModelSource::from(self.0.model.clone().unwrap_or_default());
        let files = ModelFiles::locate(&source, &options).context("--model")?;
        let float = |name: &str| Ok::<_, anyhow::Error>(inputs.floats::<B, 4>(name, device)?.cast(dtype));
        Ok(match component {
            Component::Text => {
                let ids = inputs.ids::<B>(device)?;
                let config = files.config()?.text;
                inputs.check(ids.dims()[1] <= config.max_position_embeddings, "input_ids", || {
                    format!("[n, {}] at most", config.max_position_embeddings)
                })?;
                let mut text = files.load_text::<B>(&options, device)?;
                self.adapt(&mut text, TEXT_ENCODER)?;
                vec![("last_hidden_state", raw(text.forward(ids)))]
            }
            Component::Unet => {
                let (sample, context) =
                    (float("sample")?, inputs.floats::<B, 3>("context", device)?.cast(dtype));
                let timesteps = inputs.floats::<B, 1>("timestep", device)?;
                let config = files.config()?.unet;
                let n = sample.dims()[0];
                inputs.check(sample.dims()[1] == config.in_channels, "sample", || {
                    format!("[n, {}, h, w]", config.in_channels)
                })?;
                inputs.check(
                    context.dims()[0] == n && context.dims()[2] == config.cross_attention_dim,
                    "context",
                    || format!("[{n}, 77, {}]", config.cross_attention_dim),
                )?;
                inputs.check(timesteps.dims()[0] == n, "timestep", || format!("[{n}]"))?;
                let mut unet = files.load_unet::<B>(&options, device)?;
                self.adapt(&mut unet, UNET)?;
                let context = unet.prepare(context);
                vec![("sample", raw(unet.forward(sample, timesteps, &context)))]
            }
            Component::VaeEncode => {
                let pixels = float("pixels")?;
                let config = files.config()?.vae;
                let [_, c, h, w] = pixels.dims();
                let fits = c == config.in_channels && h % config.factor() == 0 && w % config.factor() == 0;
                inputs.check(fits && h * w > 0, "pixels", || {
                    format!("[n, {}, h, w] with h and w multiples of {}", config.in_channels, config.factor())
                })?;
                let moments = files.load_vae::<B>(&options, device)?.encode(pixels);
                let std = moments.std();
                vec![("mean", raw(moments.mean)), ("std", raw(std))]
            }
            Component::VaeDecode => {
                let latents = float("latents")?;
                let channels = files.config()?.vae.latent_channels;
                inputs
                    .check(latents.dims()[1] == channels, "latents", || format!("[n, {channels}, h, w]"))?;
                vec![("pixels", raw(files.load_vae::<B>(&options, device)?.decode(latents)))]
            }
            Component::Scheduler | Component::TrainStep | Component::TrainRun => bail!("this is no network"),
        })
    }

    /// Adds the part of the adapters that is for this component.
    fn adapt<B: Backend, M: Adaptable<B>>(&self, model: &mut M, component: &str) -> Result<()> {
        for (index, Lora { file, scale }) in self.0.lora.iter().enumerate() {
            let (mut adapter, _format) = lora::read(file).context("--lora")?;
            adapter.modules.retain(|key, _| key.component == component);
            lora::load_named(&mut [(component, model)], &adapter, &index.to_string(), *scale)
                .with_context(|| format!("--lora {}", file.display()))?;
        }
        Ok(())
    }

    fn scheduler<B: Backend>(
        &self,
        inputs: &Inputs<'_>,
        device: &B::Device,
    ) -> Result<Vec<(&'static str, RawTensor)>> {
        let config = match &self.0.model {
            None => NoiseScheduleConfig::sd15(),
            Some(model) => {
                let source = ModelSource::from(model.clone());
                ModelFiles::locate(&source, &LoadOptions::default()).context("--model")?.config()?.schedule
            }
        };
        let sampler = self.0.scheduler.or_else(|| config.sampler()).unwrap_or(Sampler::DpmPp2m);
        let schedule = NoiseSchedule::new(config)?;
        let timesteps = sampler.timesteps(&schedule, self.0.steps)?;
        let start = inputs.floats::<B, 4>("sample", device)?;
        let outputs = inputs.floats::<B, 5>("model_outputs", device)?;
        let [n, c, h, w] = start.dims();
        let calls = timesteps.len();
        inputs.check(outputs.dims() == [calls, n, c, h, w], "model_outputs", || {
            format!("[{calls}, {n}, {c}, {h}, {w}]: {calls} calls for {} steps", self.0.steps)
        })?;
        let mut call = 0;
        let mut samples = Vec::new();
        sample(
            &sampler,
            &schedule,
            Steps::new(self.0.steps),
            start,
            |_, _| {
                call += 1;
                outputs.clone().narrow(0, call - 1, 1).squeeze_dim::<4>(0)
            },
            // fresh noise is nothing that a file could be held against
            |_, shape| Tensor::zeros(shape, device),
            |step| {
                samples.push(step.latents.clone());
                ControlFlow::Continue(())
            },
        )?;
        let timesteps: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
        let samples: Tensor<B, 5> = Tensor::stack(samples, 0);
        Ok(vec![("timesteps", RawTensor::from_f32(vec![calls], timesteps)), ("samples", raw(samples))])
    }
}

/// Something of each factor of the adapter in a UNet, in the shape and under the name that the factor has in the file.
fn factors<B: DiffusionAutodiff>(
    unet: &UNet2dCondition<B>,
    file: &Path,
    of: impl Fn(&Param<Tensor<B, 2>>) -> Option<RawTensor>,
) -> Result<Outputs> {
    let keys: BTreeMap<String, [String; 2]> = lora::factor_keys(file)?
        .into_iter()
        .filter(|(module, _)| module.component == UNET)
        .map(|(module, keys)| (module.name.as_str().replace('.', "_"), keys))
        .collect();
    let mut outputs = Outputs::new();
    unet.visit_layers(&mut |path, layer| {
        let (Some(keys), [branch]) = (keys.get(&path.replace('.', "_")), layer.adapters()) else {
            return;
        };
        let kernel = layer.kernel();
        for (key, factor, is_a) in [(&keys[0], &branch.lora_a, true), (&keys[1], &branch.lora_b, false)] {
            let Some(mut tensor) = of(factor) else { continue };
            if let Some([kh, kw]) = kernel {
                let [rows, columns] = [tensor.shape[0], tensor.shape[1]];
                tensor.shape =
                    if is_a { vec![rows, columns / (kh * kw), kh, kw] } else { vec![rows, columns, 1, 1] };
            }
            outputs.push((key.clone(), tensor));
        }
    });
    Ok(outputs)
}

type Embedding = (Arc<Vec<f32>>, [usize; 2]);

/// Samples with everything random about them, from a file: those of all steps one after the other.
struct GivenSamples {
    steps: usize,
    /// Shape of one picture's latents.
    shape: [usize; 3],
    latents: Vec<Vec<f32>>,
    noise: Vec<Vec<f32>>,
    timesteps: Vec<usize>,
    conditions: Vec<Embedding>,
}

impl GivenSamples {
    fn read(inputs: &Inputs<'_>, config: &ModelConfig, is_run: bool) -> Result<Self> {
        let (latents, [steps, n, c, h, w]) = inputs.read_steps::<4, 5>("latents", is_run)?;
        let (noise, noise_shape) = inputs.read_steps::<4, 5>("noise", is_run)?;
        let (timesteps, timesteps_shape) = inputs.read_steps::<1, 2>("timestep", is_run)?;
        let (context, [context_steps, rows, tokens, width]) = inputs.read_steps::<3, 4>("context", is_run)?;
        let timesteps = timesteps.to_i64()?;
        let last = config.schedule.num_train_timesteps as i64 - 1;
        let before = if is_run { format!("{steps}, ") } else { String::new() };
        inputs
            .check(noise_shape == [steps, n, c, h, w], "noise", || format!("[{before}{n}, {c}, {h}, {w}]"))?;
        inputs.check(c == config.unet.in_channels, "latents", || {
            format!("[{before}n, {}, h, w]", config.unet.in_channels)
        })?;
        let fits = context_steps == steps && rows == n && width == config.unet.cross_attention_dim;
        inputs
            .check(fits, "context", || format!("[{before}{n}, 77, {}]", config.unet.cross_attention_dim))?;
        let fits = timesteps_shape == [steps, n] && timesteps.iter().all(|t| (0..=last).contains(t));
        inputs.check(fits, "timestep", || format!("[{before}{n}], integers from 0 to {last}"))?;
        let rows_of = |tensor: RawTensor, each: usize| {
            let values = tensor.to_f32()?;
            Ok::<_, anyhow::Error>(values.chunks(each).map(<[f32]>::to_vec).collect::<Vec<_>>())
        };
        let conditions = rows_of(context, tokens * width)?.into_iter();
        Ok(Self {
            steps,
            shape: [c, h, w],
            latents: rows_of(latents, c * h * w)?,
            noise: rows_of(noise, c * h * w)?,
            timesteps: timesteps.into_iter().map(|t| t as usize).collect(),
            conditions: conditions.map(|values| (Arc::new(values), [tokens, width])).collect(),
        })
    }

    fn drawn(&self) -> Vec<DrawnSample<'_, Embedding>> {
        let rows = self.latents.iter().zip(&self.noise).zip(self.timesteps.iter().zip(&self.conditions));
        rows.map(|((latents, noise), (timestep, condition))| DrawnSample {
            latents: latents.clone(),
            noise: noise.clone(),
            timestep: *timestep,
            condition,
        })
        .collect()
    }
}

/// An objective whose draws are given: a step's are those at its positions.
struct Given<'a, B: DiffusionAutodiff> {
    objective: Diffusion<B, UNet2dCondition<B>>,
    samples: Vec<DrawnSample<'a, Embedding>>,
    losses: RefCell<Vec<f32>>,
}

impl<'a, B: DiffusionAutodiff> Given<'a, B> {
    fn at(&self, samples: &[Sample]) -> Vec<DrawnSample<'a, Embedding>> {
        samples.iter().map(|sample| self.samples[sample.position as usize].clone()).collect()
    }
}

impl<B: DiffusionAutodiff> Objective<B> for Given<'_, B> {
    type Model = UNet2dCondition<B>;

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn fingerprint(&self) -> String {
        "given".to_owned()
    }

    fn loss(&self, model: &Self::Model, samples: &[Sample], _seed: u64) -> Tensor<B, 1> {
        self.objective.loss_of(model, &self.at(samples))
    }

    fn gradients(&self, model: &Self::Model, samples: &[Sample], _seed: u64) -> (f64, GradientsParams) {
        let (loss, gradients) = self.objective.gradients_of(model, &self.at(samples));
        self.losses.borrow_mut().push(loss as f32);
        (loss, gradients)
    }
}

fn raw<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> RawTensor {
    let shape = tensor.dims().to_vec();
    RawTensor::from_f32(shape, tensor.into_data().convert::<f32>().iter::<f32>().collect())
}

/// The tensors that go in; errors name the file and the tensor.
struct Inputs<'a> {
    file: TensorFile,
    path: &'a Path,
}

impl Inputs<'_> {
    fn read<const D: usize>(&self, name: &str) -> Result<(RawTensor, [usize; D])> {
        let tensor = self.file.read(name).context("--input")?;
        let shape = tensor.shape.clone();
        let dims = shape.as_slice().try_into().map_err(|_| {
            anyhow::anyhow!("--input {}: {name} is {shape:?}, expected {D} dimensions", self.path.display())
        })?;
        ensure!(
            !tensor.shape.contains(&0),
            "--input {}: {name} is {shape:?}, expected no 0",
            self.path.display()
        );
        Ok((tensor, dims))
    }

    /// A tensor of `D` dimensions, or of one more, the steps of a run; always with the steps.
    fn read_steps<const D: usize, const E: usize>(
        &self,
        name: &str,
        is_run: bool,
    ) -> Result<(RawTensor, [usize; E])> {
        if is_run {
            return self.read::<E>(name);
        }
        let (tensor, dims) = self.read::<D>(name)?;
        let mut with_steps = [1; E];
        with_steps[1..].copy_from_slice(&dims);
        Ok((tensor, with_steps))
    }

    /// In f32, integers as well.
    fn floats<B: Backend, const D: usize>(&self, name: &str, device: &B::Device) -> Result<Tensor<B, D>> {
        let (tensor, dims) = self.read::<D>(name)?;
        let values = match tensor.dtype.is_float() {
            true => tensor.to_f32()?,
            false => tensor.to_i64()?.into_iter().map(|value| value as f32).collect(),
        };
        ensure!(
            values.iter().all(|value| value.is_finite()),
            "--input {}: {name} has a value that is not finite",
            self.path.display()
        );
        Ok(Tensor::from_data(TensorData::new(values, dims), (device, DType::F32)))
    }

    fn ids<B: Backend>(&self, device: &B::Device) -> Result<Tensor<B, 2, Int>> {
        let (tensor, dims) = self.read::<2>("input_ids")?;
        Ok(Tensor::from_data(TensorData::new(tensor.to_i64()?, dims), device))
    }

    fn check(&self, fits: bool, name: &str, expected: impl Fn() -> String) -> Result<()> {
        let found = self.file.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        ensure!(fits, "--input {}: {name} is {found:?}, expected {}", self.path.display(), expected());
        Ok(())
    }
}
