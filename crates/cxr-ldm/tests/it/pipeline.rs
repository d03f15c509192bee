//! The whole way from a prompt to pictures, on a tiny model of random weights.

use std::ops::ControlFlow;
use std::sync::Mutex;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use cxr_core::progress::{Progress, Silent};
use cxr_core::random::{Stream, TorchGenerator};
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::pipeline::{ModelConfig, ModelParts, Request, StableDiffusion};
use cxr_ldm::scheduler::{NoiseScheduleConfig, Sampler};
use cxr_ldm::text::ClipTextConfig;
use cxr_ldm::unet::UNetConfig;
use cxr_ldm::vae::AutoencoderKlConfig;

/// Weights from a stream named after the parameter: unit gain, so that signals neither die nor explode.
pub(crate) fn fill<M: Module<Flex>>(module: M, seed: u64) -> M {
    let values = |path: &str, shape: &[usize]| -> Result<Option<TensorData>, std::convert::Infallible> {
        let count = shape.iter().product();
        let mut values = Stream::new(seed, path, 0).normals(count);
        let gain = 1.0 / (shape[1..].iter().product::<usize>() as f32).sqrt();
        for value in &mut values {
            *value = match (shape.len(), path.ends_with("bias")) {
                (1, true) => 0.1 * *value,
                (1, false) => 1.0 + 0.1 * *value,
                _ => gain * *value,
            };
        }
        Ok(Some(TensorData::new(values, shape.to_vec())))
    };
    let Ok(module) = parameters::map_data(module, values);
    module
}

pub(crate) fn config() -> ModelConfig {
    ModelConfig {
        text: ClipTextConfig::tiny(),
        unet: UNetConfig::tiny(),
        vae: AutoencoderKlConfig::tiny(),
        // a sampler with as many calls as steps
        schedule: NoiseScheduleConfig {
            class_name: "DPMSolverMultistepScheduler".into(),
            ..NoiseScheduleConfig::sd15()
        },
    }
}

pub(crate) fn parts(seed: u64) -> ModelParts<Flex> {
    let parts = config().init::<Flex>(&Default::default()).unwrap();
    ModelParts {
        text: fill(parts.text, seed),
        unet: fill(parts.unet, seed),
        vae: fill(parts.vae, seed),
        hash: "00ff".into(),
        ..parts
    }
}

pub(crate) fn model(seed: u64) -> StableDiffusion<Flex> {
    StableDiffusion::new(parts(seed), &Default::default()).unwrap()
}

pub(crate) fn values<const D: usize>(tensor: Tensor<Flex, D>) -> Vec<f32> {
    tensor.into_data().to_vec().unwrap()
}

pub(crate) fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| (a - b) as f64))
        / norm(&mut expected.iter().map(|&b| b as f64))
}

fn request() -> Request {
    Request::new("Cardiomegaly. Small left pleural effusion.").steps(3).seed(11)
}

/// The latents after the last step of every picture.
fn latents(sd: &StableDiffusion<Flex>, request: &Request) -> Vec<Vec<f32>> {
    let mut found = Vec::new();
    sd.generate_with(request, &Silent, &mut |preview| {
        if preview.step.index + 1 == preview.step.total {
            let all = values(preview.step.latents.clone());
            found.extend(all.chunks(all.len() / preview.images.len()).map(<[f32]>::to_vec));
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    found
}

#[test]
fn a_picture_depends_on_what_it_should() {
    let sd = model(1);
    let make = |request: &Request| {
        let images = sd.generate(request).unwrap();
        assert_eq!(images.len(), 1);
        images.into_iter().next().unwrap()
    };
    let base = make(&request());
    let side = sd.default_side();
    assert_eq!((base.width, base.height, base.rgb.len()), (side, side, 3 * side * side));
    assert!(base.rgb.iter().any(|&v| v != base.rgb[0]), "a picture of one colour tests nothing");
    assert_eq!(make(&request()), base, "same settings, same picture");
    for (other, what) in [
        (request().seed(12), "seed"),
        (request().guidance(2.0), "guidance"),
        (request().negative("Normal chest."), "negative prompt"),
        (request().steps(4), "steps"),
        (request().sampler(Sampler::ddim()), "sampler"),
        (request().sampler(Sampler::Ddim { eta: 1.0 }), "eta"),
        (Request::new("No acute disease.").steps(3).seed(11), "prompt"),
    ] {
        assert_ne!(make(&other).rgb, base.rgb, "{what}");
    }
}

#[test]
fn each_picture_has_its_own_prompt() {
    let sd = model(12);
    let prompts = ["Edema.", "Normal.", "Edema.", "Cardiomegaly."];
    let request = Request::each(prompts).steps(2).seed(4);
    for batch in [1, 3] {
        let found = sd.generate(&request.clone().batch(batch).images_per_prompt(2)).unwrap();
        assert_eq!(found.len(), 8);
        for (i, image) in found.iter().enumerate() {
            let prompt = prompts[i / 2];
            assert_eq!((image.settings.prompt.as_str(), image.settings.seed), (prompt, 4 + i as u64));
            let alone = sd.generate(&Request::new(prompt).steps(2).seed(4 + i as u64)).unwrap().remove(0);
            let floats = |rgb: &[u8]| rgb.iter().map(|&v| v as f32).collect::<Vec<_>>();
            let error = relative(&floats(&image.rgb), &floats(&alone.rgb));
            assert!(error < 2e-3, "picture {i}, batch {batch}: {error:e}");
        }
    }
}

#[test]
fn a_batch_equals_one_by_one() {
    let sd = model(2);
    for sampler in [Sampler::DpmPp2m, Sampler::Ddim { eta: 0.7 }] {
        let request = request().sampler(sampler).images_per_prompt(3);
        let single = latents(&sd, &request);
        assert_eq!(single.len(), 3);
        assert!(relative(&single[1], &single[0]) > 0.1, "each has its own seed");
        for batch in [2, 3, 8] {
            for (found, expected) in latents(&sd, &request.clone().batch(batch)).iter().zip(&single) {
                let error = relative(found, expected);
                assert!(error < 1e-5, "batch {batch}: {error:e}");
            }
        }
        // and picture i is the first picture of seed + i
        let second = latents(&sd, &request.clone().images_per_prompt(1).seed(12));
        assert!(relative(&second[0], &single[1]) < 1e-5);
    }
}

#[test]
fn the_start_is_pytorchs_noise() {
    let sd = model(3);
    let mut noise = cxr_ldm::pipeline::ImageNoise::new([5, 6]);
    let start = values(noise.next::<Flex>([4, 8, 8], &Default::default()));
    assert_eq!(start[..256], TorchGenerator::new(5).randn(256)[..]);
    assert_eq!(start[256..], TorchGenerator::new(6).randn(256)[..]);
    // with a prediction that is the sample itself, the loop is a known multiple of it: see the scheduler's tests
    assert_eq!(sd.parts().schedule.train_timesteps(), 1000);
}

#[test]
fn guidance_is_the_formula() {
    let sd = model(4);
    let device = Default::default();
    // The first of four steps, which is linear in the model's output and large: unguided latents of prompt and of
    // negative prompt, combined by hand, give the guided step.
    let step = |guidance: f64, prompt: &str| {
        let request = Request::new(prompt).negative("Normal.").steps(4).seed(3).guidance(guidance);
        let mut found = Vec::new();
        sd.generate_with(&request.sampler(Sampler::ddim()), &Silent, &mut |preview| {
            found = values(preview.step.latents.clone());
            ControlFlow::Break(())
        })
        .unwrap();
        found
    };
    let (conditional, unconditional) = (step(1.0, "Edema."), step(1.0, "Normal."));
    assert!(relative(&unconditional, &conditional) > 1e-3, "the prompt has to matter");
    for guidance in [0.0, 1.0 + 1e-9, 3.0, 7.5] {
        let expected: Vec<f32> = unconditional
            .iter()
            .zip(&conditional)
            .map(|(&u, &c)| (u as f64 + guidance * (c as f64 - u as f64)) as f32)
            .collect();
        let error = relative(&step(guidance, "Edema."), &expected);
        assert!(error < 1e-5, "guidance {guidance}: {error:e}");
    }
    let hidden = sd.encode_prompts(&["Edema.", "Normal."], false).unwrap();
    assert_eq!(hidden.dims()[..2], [2, 77]);
    assert_eq!(hidden.device(), device);
}

#[test]
fn stopping_returns_the_finished_pictures() {
    let sd = model(5);
    let request = request().images_per_prompt(5).batch(2);
    let whole = sd.generate(&request).unwrap();
    assert_eq!(whole.len(), 5);
    // 3 batches of 3 steps; the step to stop in (from 0) and the pictures that are finished by then
    for (stop, finished) in [(0, 0), (2, 2), (3, 2), (5, 4), (7, 4), (8, 5)] {
        let mut calls = 0;
        let images = sd
            .generate_with(&request, &Silent, &mut |_| {
                calls += 1;
                if calls == stop + 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        assert_eq!(calls, stop + 1, "it ends within the step");
        assert_eq!(images, whole[..finished]);
    }
}

#[derive(Default)]
struct Recorder {
    seen: Mutex<Vec<String>>,
    stop_at: Option<u64>,
}

impl Progress for Recorder {
    fn begin(&self, stage: &str, total: Option<u64>) {
        self.seen.lock().unwrap().push(format!("begin {stage} {total:?}"));
    }
    fn advance(&self, done: u64, _message: &str) -> ControlFlow<()> {
        self.seen.lock().unwrap().push(format!("{done}"));
        if self.stop_at == Some(done) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
    fn end(&self, message: &str) {
        self.seen.lock().unwrap().push(format!("end {message}"));
    }
}

#[test]
fn progress_counts_steps_and_can_stop() {
    let sd = model(6);
    let request = request().images_per_prompt(2);
    let recorder = Recorder::default();
    sd.generate_with(&request, &recorder, &mut |_| ControlFlow::Continue(())).unwrap();
    let expected = ["begin pictures Some(6)", "1", "2", "3", "4", "5", "6", "end 2/2 pictures"];
    assert_eq!(*recorder.seen.lock().unwrap(), expected);

    let recorder = Recorder { stop_at: Some(4), ..Recorder::default() };
    let images = sd.generate_with(&request, &recorder, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(images.len(), 1);
    let expected = ["begin pictures Some(6)", "1", "2", "3", "4", "end 1/2 pictures"];
    assert_eq!(*recorder.seen.lock().unwrap(), expected);
}

#[test]
fn other_sizes_and_sizes_that_do_not_fit() {
    let sd = model(7);
    let unit = sd.size_unit();
    let image = sd.generate(&request().size(2 * unit, unit)).unwrap().remove(0);
    assert_eq!((image.width, image.height, image.rgb.len()), (2 * unit, unit, 6 * unit * unit));
    for (width, height) in [(2 * unit + 1, unit), (unit, unit / 2), (0, unit)] {
        let error = sd.generate(&request().size(width, height)).unwrap_err().to_string();
        assert!(error.contains(&format!("{width}x{height}")) && error.contains(&unit.to_string()), "{error}");
    }
}

#[test]
fn requests_that_cannot_be_met_are_errors() {
    let sd = model(8);
    let long = "pleural effusion ".repeat(60);
    for (request, word) in [
        (request().steps(0), "steps: 0"),
        (request().steps(1001), "1001"),
        (request().images_per_prompt(0), "images per prompt"),
        (request().batch(0), "batch"),
        (request().guidance(f64::NAN), "guidance"),
        (request().sampler(Sampler::Ddim { eta: 2.0 }), "eta"),
        (Request::new(long.clone()).steps(1).strict_prompt(true), "77"),
    ] {
        let error = sd.generate(&request).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    // not strict: cut, as diffusers does, so that what follows is not seen
    let make = |prompt: &str| sd.generate(&Request::new(prompt).steps(1)).unwrap().remove(0).rgb;
    assert_eq!(make(&long), make(&format!("{long} and a pneumothorax")));
}

#[test]
fn a_picture_of_nan_is_an_error() {
    let parts = parts(9);
    let poisoned = |path: &str, shape: &[usize]| -> Result<Option<TensorData>, std::convert::Infallible> {
        let bad = path.ends_with("conv_out.bias");
        Ok(bad.then(|| TensorData::new(vec![f32::NAN; shape.iter().product()], shape.to_vec())))
    };
    let Ok(unet) = parameters::map_data(parts.unet, poisoned);
    let sd = StableDiffusion::new(ModelParts { unet, ..parts }, &Default::default()).unwrap();
    let error = sd.generate(&request()).unwrap_err().to_string();
    assert!(error.contains("not finite"), "{error}");
}

#[test]
fn two_threads_use_one_model() {
    fn shared<T: Send + Sync>() {}
    shared::<StableDiffusion<Flex>>();
    let sd = model(10);
    let alone = sd.generate(&request()).unwrap();
    let both: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| sd.generate(&request()).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(both, [alone.clone(), alone]);
}

#[test]
fn settings_make_the_picture_again() {
    let sd = model(11);
    let image = sd.generate(&request().images_per_prompt(2).negative("Normal.")).unwrap().remove(1);
    let settings = &image.settings;
    assert_eq!((settings.seed, settings.model_hash.as_str()), (12, "00ff"));
    let again = Request::new(settings.prompt.clone())
        .negative(settings.negative_prompt.clone())
        .steps(settings.steps)
        .guidance(settings.guidance)
        .sampler(settings.sampler.parse().unwrap())
        .seed(settings.seed)
        .size(image.width, image.height);
    assert_eq!(sd.generate(&again).unwrap(), [image]);
}

#[test]
fn a_decoder_that_overflows_in_half_precision_is_run_in_f32() {
    let folder = tempfile::tempdir().unwrap();
    let parts = parts(13);
    // beyond f16's 65504 before the last norm, which makes it harmless
    let loud = |path: &str, shape: &[usize]| -> Result<Option<TensorData>, std::convert::Infallible> {
        let loud = path == "decoder.conv_in.bias";
        Ok(loud.then(|| TensorData::new(vec![60000.0_f32; shape[0]], shape.to_vec())))
    };
    let Ok(vae) = parameters::map_data(parts.vae, loud);
    let sd = StableDiffusion::new(ModelParts { vae, ..parts }, &Default::default()).unwrap();
    let path = folder.path().join("model");
    sd.save(&path, cxr_ldm::pipeline::SaveDtype::F32).unwrap();
    let load = |dtype| {
        let options = cxr_ldm::pipeline::LoadOptions::default().with_dtype(dtype);
        StableDiffusion::<Flex>::load(path.as_path(), options, &Default::default()).unwrap()
    };
    let (whole, half) = (load(burn::tensor::FloatDType::F32), load(burn::tensor::FloatDType::F16));
    let z = Tensor::<Flex, 4>::from_data(
        TensorData::new(TorchGenerator::new(1).randn(256), [1, 4, 8, 8]),
        &Default::default(),
    );
    let in_half = half.parts().vae.decode(z.clone().cast(burn::tensor::DType::F16));
    let finite = |data: TensorData| data.iter::<f32>().all(f32::is_finite);
    assert!(!finite(in_half.into_data()), "nothing overflows here");
    let (found, expected) = (half.decode(z.clone()).unwrap(), whole.decode(z).unwrap());
    assert!(finite(found.clone()));
    let values = |data: TensorData| data.iter::<f32>().collect::<Vec<_>>();
    // the weights are those of f16
    assert!(relative(&values(found), &values(expected)) < 2e-2);
}
