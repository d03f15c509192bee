//! A model behind `open` is the model that the generic pipeline is.

#![cfg(feature = "flex")]

use std::ops::ControlFlow;
use std::path::Path;

use cxr::ldm::scheduler::NoiseScheduleConfig;
use cxr::ldm::text::ClipTextConfig;
use cxr::ldm::unet::UNetConfig;
use cxr::ldm::vae::AutoencoderKlConfig;
use cxr::prelude::*;

/// A folder with a tiny model that draws something, and an adapter that changes it.
fn folder() -> tempfile::TempDir {
    let config = ModelConfig {
        text: ClipTextConfig::tiny(),
        unet: UNetConfig::tiny(),
        vae: AutoencoderKlConfig::tiny(),
        schedule: NoiseScheduleConfig::sd15(),
    };
    let parts = config.init::<Flex>(&Default::default()).unwrap();
    let mut parts = ModelParts {
        text: cxr::trainer::initialize(parts.text, 1),
        unet: cxr::trainer::initialize(parts.unet, 2),
        vae: cxr::trainer::initialize(parts.vae, 3),
        ..parts
    };
    cxr::lora::attach(&mut parts.unet, &LoraConfig::new(2), 7).unwrap();
    let mut adapter = cxr::lora::export(&parts.unet, "default", cxr::lora::UNET).unwrap();
    // a fresh adapter changes nothing: its B is zero
    for weights in adapter.modules.values_mut() {
        weights.b = weights.a.iter().cycle().take(weights.b.len()).copied().collect();
    }
    let folder = tempfile::tempdir().unwrap();
    cxr::lora::write(folder.path().join("adapter.safetensors"), &adapter, cxr::lora::Format::Diffusers)
        .unwrap();
    let whole = StableDiffusion::new(parts, &Default::default()).unwrap();
    whole.save(folder.path().join("model"), SaveDtype::F32).unwrap();
    folder
}

fn open(folder: &Path) -> Box<dyn Synthesizer + Send + Sync> {
    cxr::open("flex", folder.join("model"), LoadOptions::default()).unwrap()
}

#[test]
fn it_makes_the_pictures_of_the_generic_pipeline() {
    let folder = folder();
    let request = Request::new("Cardiomegaly.").steps(3).images_per_prompt(2).seed(5);
    let path = folder.path().join("model");
    let generic =
        StableDiffusion::<Flex>::load(path.as_path(), LoadOptions::default(), &Default::default()).unwrap();
    let model = open(folder.path());
    assert_eq!(model.generate(&request).unwrap(), generic.generate(&request).unwrap());
    assert_eq!((model.default_side(), model.size_unit()), (generic.default_side(), generic.size_unit()));
    assert_eq!(model.device(), "flex (CPU)");
    assert_eq!(model.config().unet, UNetConfig::tiny());

    let copy = folder.path().join("copy");
    model.save(&copy, SaveDtype::F32).unwrap();
    let copy = cxr::open("flex", copy.as_path(), LoadOptions::default()).unwrap();
    assert_eq!(copy.generate(&request).unwrap(), model.generate(&request).unwrap());
}

#[test]
fn an_adapter_changes_the_pictures_and_is_named_in_them() {
    let folder = folder();
    let request = Request::new("Cardiomegaly.").steps(3).seed(5);
    let base = open(folder.path()).generate(&request).unwrap().remove(0);
    let mut adapted = open(folder.path());
    adapted.add_lora(&folder.path().join("adapter.safetensors"), 0.5).unwrap();
    let names: Vec<_> = adapted.lora().iter().map(|lora| (lora.name.as_str(), lora.weight)).collect();
    assert_eq!(names, [("adapter", 0.5)]);
    let picture = adapted.generate(&request).unwrap().remove(0);
    assert_ne!(picture.rgb, base.rgb);
    assert_eq!(picture.settings.lora, adapted.lora());
}

#[test]
fn progress_stops_it() {
    struct Stop;
    impl Progress for Stop {
        fn advance(&self, done: u64, _: &str) -> ControlFlow<()> {
            if done == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let folder = folder();
    let request = Request::new("Cardiomegaly.").steps(3).images_per_prompt(3);
    let go_on = &mut |_: StepView<'_>| ControlFlow::Continue(());
    assert_eq!(open(folder.path()).generate_with(&request, &Stop, go_on).unwrap().len(), 1);
}

#[test]
fn a_step_shows_its_pictures_and_stops_it() {
    let folder = folder();
    let model = open(folder.path());
    let request = Request::new("Cardiomegaly.").steps(3).images_per_prompt(2).batch(2).seed(5);
    let mut previews = Vec::new();
    let whole = model
        .generate_with(&request, &Silent, &mut |step| {
            assert_eq!((step.images.clone(), step.total), (0..2, model.steps_per_batch(&request).unwrap()));
            previews.push(step.preview().unwrap());
            ControlFlow::Continue(())
        })
        .unwrap();
    // the last prediction is the picture
    assert!(previews.iter().all(|pictures| pictures.len() == 2));
    assert_ne!(previews[0][0].rgb, whole[0].rgb);
    let stopped = model.generate_with(&request, &Silent, &mut |_| ControlFlow::Break(())).unwrap();
    assert!(stopped.is_empty());
    // what is planned is what is made
    let planned = model.settings(&request).unwrap();
    let made: Vec<_> = whole.iter().map(|image| image.settings.clone()).collect();
    assert_eq!(planned, made);
}

#[test]
fn what_is_not_there_is_named() {
    let folder = folder();
    let missing = folder.path().join("none");
    let error = cxr::open("auto", missing.as_path(), LoadOptions::default()).unwrap_err();
    assert!(matches!(error, cxr::Error::Model(_)) && error.to_string().contains("none"), "{error}");
    let error = open(folder.path()).add_lora(&missing, 1.0).unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
    if !cxr::device::built().contains(&"tch") {
        let error = cxr::open("tch", folder.path().join("model"), LoadOptions::default());
        assert!(matches!(error, Err(cxr::Error::Device(_))), "{error:?}");
    }
}

#[test]
fn it_is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Box<dyn Synthesizer + Send + Sync>>();
    let folder = folder();
    let model = open(folder.path());
    let request = Request::new("Cardiomegaly.").steps(2);
    let alone = model.generate(&request).unwrap();
    std::thread::scope(|scope| {
        for thread in [0, 1].map(|_| scope.spawn(|| model.generate(&request).unwrap())) {
            assert_eq!(thread.join().unwrap(), alone);
        }
    });
}
