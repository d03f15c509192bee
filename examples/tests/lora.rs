//! `lora` as a person runs it, on an adapter for the embedded model.

use std::path::Path;
use std::process::{Command, Output};

use cxr::core::random::Stream;
use cxr::kernels::Flex;
use cxr::ldm::pipeline::{LoadOptions, Request, StableDiffusion};
use cxr::lora::{self, Adapter, Format, LoraConfig, TEXT_ENCODER, TargetSet, UNET};
use cxr_examples::demo;

fn run(arguments: &[&str]) -> Output {
    // `cargo test` builds the examples beside its own binaries.
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    Command::new(folder.join("lora")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn succeeds(arguments: &[&str]) -> String {
    let found = run(arguments);
    assert!(found.status.success(), "{arguments:?}: {}", text(&found.stderr));
    text(&found.stdout)
}

#[track_caller]
fn fails(arguments: &[&str], words: &[&str]) {
    let found = run(arguments);
    let message = text(&found.stderr);
    assert!(!found.status.success(), "{arguments:?} succeeded");
    assert!(message.starts_with("error: ") && message.trim_end().lines().count() == 1, "{message}");
    for word in words {
        assert!(message.contains(word), "{arguments:?}: no {word:?} in {message}");
    }
}

fn model() -> StableDiffusion<Flex> {
    StableDiffusion::load(demo::model_folder(), LoadOptions::default(), &Default::default()).unwrap()
}

/// For both components of the embedded model, with factors that are not zero.
fn adapter() -> Adapter {
    let mut parts = model().into_parts();
    let config = LoraConfig::new(2).with_alpha(3.0);
    lora::attach(&mut parts.unet, &config.clone().with_targets(TargetSet::Transformer), 1).unwrap();
    let of_text = TargetSet::Patterns(vec!["q_proj".to_owned(), "mlp.*".to_owned()]);
    lora::attach(&mut parts.text, &config.with_targets(of_text), 1).unwrap();
    let mut adapter = lora::export(&parts.unet, "default", UNET).unwrap();
    adapter.modules.extend(lora::export(&parts.text, "default", TEXT_ENCODER).unwrap().modules);
    for (index, weights) in adapter.modules.values_mut().enumerate() {
        let mut stream = Stream::new(5, "test", index as u64);
        weights.b.iter_mut().for_each(|value| *value = 0.05 * stream.normal());
    }
    adapter.provenance.seed = Some(1234);
    adapter
}

fn picture(model: &StableDiffusion<Flex>) -> Vec<u8> {
    let request = Request::new("Edema.").steps(2).guidance(2.0).seed(3);
    model.generate(&request).unwrap().remove(0).rgb
}

#[test]
fn inspect_convert_and_merge() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let adapter = adapter();
    let [file, kohya, back, merged] = ["a.safetensors", "k.safetensors", "b.safetensors", "merged"].map(at);
    lora::write(&file, &adapter, Format::Diffusers).unwrap();

    let shown = succeeds(&["inspect", &file]);
    let modules = adapter.modules.len();
    for words in [
        "diffusers' LoRA format",
        &format!("modules     {modules} "),
        "rank        2",
        "alpha       3",
        "1234",
    ] {
        assert!(shown.contains(words), "no {words:?} in {shown}");
    }
    assert!(shown.contains("unet.mid_block") && shown.contains("text_encoder."), "{shown}");
    let json: serde_json::Value = serde_json::from_str(&succeeds(&["inspect", "--json", &file])).unwrap();
    let of_modules: f64 =
        json["modules"].as_array().unwrap().iter().map(|m| m["norm"].as_f64().unwrap().powi(2)).sum();
    let norm = adapter.modules.values().map(|weights| weights.norm().powi(2)).sum::<f64>();
    assert!((of_modules / norm - 1.0).abs() < 1e-9 && norm > 0.0);
    assert!((json["norm"].as_f64().unwrap().powi(2) / norm - 1.0).abs() < 1e-9);

    let embedded = demo::model_folder().display().to_string();
    succeeds(&["convert", &file, &kohya, "--to", "kohya"]);
    fails(&["convert", &kohya, &kohya, "--to", "diffusers"], &["exists", "--force"]);
    // Its layers are named as Stable Diffusion's, of which it has fewer.
    succeeds(&["convert", &kohya, &back, "--to", "diffusers", "--model", &embedded]);
    assert_eq!(lora::read(&back).unwrap().0, adapter);

    let plain = picture(&model());
    let adapted = picture(&model().with_lora(&file, 0.5).unwrap());
    succeeds(&[
        "merge",
        "--model",
        &embedded,
        "--lora",
        &format!("{file}:0.5"),
        "--out",
        &merged,
        "--device",
        "flex",
        "--quiet",
    ]);
    let loaded =
        StableDiffusion::<Flex>::load(Path::new(&merged), LoadOptions::default(), &Default::default());
    let found = picture(&loaded.unwrap());
    let far = |one: &[u8], other: &[u8]| one.iter().zip(other).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(far(&found, &adapted) <= 1, "{}", far(&found, &adapted));
    assert!(far(&plain, &adapted) > 8, "{}", far(&plain, &adapted));
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        assert!(Path::new(&merged).join("tokenizer").join(name).is_file(), "{name}");
    }
}

#[test]
fn what_goes_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let embedded = demo::model_folder().display().to_string();
    fails(&["inspect", &at("absent.safetensors")], &["absent.safetensors"]);
    std::fs::write(at("other.safetensors"), b"not a tensor file").unwrap();
    fails(&["inspect", &at("other.safetensors")], &["other.safetensors"]);
    let merge = |lora: &str, out: &str| {
        let arguments =
            ["merge", "--model", &embedded, "--lora", lora, "--out", out, "--device", "flex", "--quiet"];
        arguments.map(str::to_owned)
    };
    let fails_to_merge = |lora: &str, out: &str, words: &[&str]| {
        let arguments = merge(lora, out);
        fails(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), words);
    };
    fails_to_merge(&at("absent.safetensors"), &at("out"), &["--lora", "absent.safetensors"]);

    // Too many layers for this model.
    let mut adapter = adapter();
    let weights = adapter.modules.values().next().unwrap().clone();
    adapter.modules.insert(lora::ModuleKey::path(UNET, "up_blocks.9.attn1.to_q"), weights);
    let total = adapter.modules.len();
    lora::write(at("large.safetensors"), &adapter, Format::Diffusers).unwrap();
    let counts = format!("{} of {total}", total - 1);
    fails_to_merge(&at("large.safetensors"), &at("out"), &["--lora", &counts, "up_blocks.9.attn1.to_q"]);
    assert!(!Path::new(&at("out")).exists());
    fails_to_merge(&at("large.safetensors"), &embedded, &["--out", "--model"]);

    lora::write(at("kohya.safetensors"), &adapter, Format::Kohya).unwrap();
    let arguments = ["convert", &at("kohya.safetensors"), &at("d.safetensors"), "--to", "diffusers"];
    fails(&arguments, &["Stable Diffusion 1.x", "--model", "up_blocks_9_attn1_to_q"]);
    assert!(!Path::new(&at("d.safetensors")).exists());
}
