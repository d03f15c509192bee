//! `finetune` as a person runs it: the embedded model on the embedded thumbnails.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cxr::lora::{self, Format};
use cxr_examples::demo;

/// `cargo test` builds the examples beside its own binaries.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples/finetune")
}

fn command(arguments: &[&str], out: &Path) -> Command {
    let mut command = Command::new(program());
    command.args(["--device", "flex", "--quiet", "--out"]).arg(out);
    command.arg("--data").arg(demo::data_folder()).args(arguments);
    command
}

fn run(arguments: &[&str], out: &Path) -> Output {
    command(arguments, out).output().unwrap()
}

/// A short run on pictures of the embedded model's size.
fn short<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let settings = [
        "image_size=64",
        "checkpoint_every=2",
        "lora.rank=2",
        "learning_rate.peak=1e-3",
        "validation.pairs=2",
        "validation.every=2",
        "samples.every=0",
    ];
    let mut arguments: Vec<&str> = settings.into_iter().flat_map(|setting| ["--set", setting]).collect();
    arguments.extend(more);
    arguments
}

#[track_caller]
fn fails(arguments: &[&str], words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let found = run(arguments, &folder.path().join("out"));
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(!found.status.success() && errors.len() == 1 && !message.contains("panicked"), "{message}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: no {word:?} in {message}");
    }
    assert!(!folder.path().join("out").join("adapter.safetensors").exists());
}

#[test]
fn a_run_that_goes_on_ends_as_one_that_was_not_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    let finetune = |steps: &str, out: &PathBuf| {
        let found = run(&short(&["--max-steps", steps, "--kohya"]), out);
        assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    };
    finetune("5", &out("whole"));
    finetune("3", &out("parts"));
    finetune("5", &out("parts"));
    let read = |folder: &str, name: &str| std::fs::read(out(folder).join(name)).unwrap();
    assert_eq!(read("whole", "adapter.safetensors"), read("parts", "adapter.safetensors"));

    let (adapter, format) = lora::read(out("whole").join("adapter.safetensors")).unwrap();
    assert_eq!(format, Format::Diffusers);
    assert!(adapter.modules.values().all(|weights| weights.rank == 2 && weights.b.iter().any(|b| *b != 0.0)));
    let provenance = &adapter.provenance;
    assert_eq!((provenance.steps, provenance.seed, provenance.rank), (Some(5), Some(0), Some(2)));
    for hash in [&provenance.base_model, &provenance.dataset, &provenance.split] {
        assert_eq!(hash.as_ref().map(String::len), Some(64));
    }
    let (kohya, format) = lora::read(out("whole").join("adapter_kohya.safetensors")).unwrap();
    assert_eq!((kohya.modules.len(), format), (adapter.modules.len(), Format::Kohya));
    let card = String::from_utf8(read("whole", "README.md")).unwrap();
    assert!(
        card.contains("Not for diagnosis") && card.contains(provenance.split.as_ref().unwrap()),
        "{card}"
    );
    assert!(card.contains("image_size = 64"), "{card}");
    for name in ["config.toml", "split.json", "metrics.jsonl", "loss.png"] {
        assert!(!read("whole", name).is_empty(), "{name}");
    }

    // The folder of another run is not overwritten, nor gone on with.
    let found = run(&short(&["--max-steps", "5", "--set", "seed=1"]), &out("whole"));
    assert!(!found.status.success());
    assert!(String::from_utf8_lossy(&found.stderr).contains("other settings"));
    let found = run(&short(&["--max-steps", "9", "--resume", "no"]), &out("whole"));
    assert!(!found.status.success() && String::from_utf8_lossy(&found.stderr).contains("--resume"));
    assert_eq!(read("whole", "adapter.safetensors"), read("parts", "adapter.safetensors"));
}

#[test]
fn what_goes_wrong_is_said_before_anything_is_loaded() {
    fails(&["--preset", "paper"], &["--preset", "paper_128, clinical_512"]);
    fails(&["--set", "batchsize=2"], &["--set", "batch_size"]);
    fails(&["--set", "image_size=100"], &["image_size"]);
    fails(&["--config", "absent.toml"], &["--config", "absent.toml"]);
    fails(&["--split", "absent.json"], &["--split", "absent.json"]);
    fails(&["--set", "image_size=64", "--model", "/nowhere/at/all"], &["--model"]);
    fails(&["--set", "validation.pairs=0"], &["validation.pairs"]);
    fails(&["--set", "samples.prompts=[]"], &["samples.prompts"]);
    // thumbnails of 64 pixels, and a preset of 128
    fails(&[], &["800 of 800 pictures", "64 x 64", "image_size", "--enlarge"]);
    // an empty list of pairs
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("metadata.jsonl");
    std::fs::write(&empty, "").unwrap();
    let found = Command::new(program()).arg("--data").arg(folder.path()).output().unwrap();
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(!found.status.success() && message.contains("error: --data"), "{message}");
    // a denoiser for other latents than the autoencoder's
    let model = folder.path().join("model");
    copy(&demo::model_folder(), &model);
    let config = model.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let channels: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut other = channels.clone();
    other["in_channels"] = serde_json::Value::from(9);
    std::fs::write(&config, other.to_string()).unwrap();
    fails(&["--set", "image_size=64", "--model", model.to_str().unwrap()], &["--model", "in_channels", "9"]);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

#[test]
fn a_run_can_be_watched() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let prompts = "samples.prompts=[\"Edema.\", \"Cardiomegaly.\"]";
    let settings = ["samples.every=2", prompts, "samples.steps=2", "block_checkpointing=true"];
    let more: Vec<&str> = settings.into_iter().flat_map(|setting| ["--set", setting]).collect();
    let found = run(&short(&[&more[..], &["--max-steps", "4"]].concat()), &out);
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    let lines = |name: &str| -> Vec<serde_json::Value> {
        read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let metrics = lines("metrics.jsonl");
    for key in [
        "step",
        "epoch",
        "loss",
        "smoothed",
        "learning_rate",
        "gradient_norm",
        "samples_per_second",
        "peak_memory",
    ] {
        assert!(metrics[0].get(key).is_some_and(serde_json::Value::is_number), "{key}: {}", metrics[0]);
    }
    let validations = lines("validation.jsonl");
    assert_eq!(validations.len(), 2);
    assert_eq!(validations[1]["bins"].as_array().unwrap().len(), 4);
    // the best checkpoint's adapter lies beside the last one's
    let best = if validations[1]["loss"].as_f64() < validations[0]["loss"].as_f64() { 4 } else { 2 };
    let (adapter, _) = lora::read(out.join("adapter_best.safetensors")).unwrap();
    assert_eq!(adapter.provenance.steps, Some(best));
    assert!(out.join(format!("checkpoint-{best}")).is_dir());
    for step in [2, 4] {
        let grid = image::open(out.join(format!("samples/step-{step:07}.png"))).unwrap();
        assert_eq!((grid.width(), grid.height()), (2 * 66 + 2, 66 + 2));
    }
    let card = read("README.md");
    for words in ["samples/step-0000004.png", "1. Edema.", "Lowest validation loss", "loss.png"] {
        assert!(card.contains(words), "{words}: {card}");
    }
    // The same pictures as `synthesize` makes with the adapter.
    let made = folder.path().join("made");
    let synthesize = Command::new(program().with_file_name("synthesize"))
        .args(["--device", "flex", "--quiet", "--prompt", "Edema.", "--steps", "2", "--lora"])
        .arg(out.join("adapter.safetensors"))
        .arg("--out")
        .arg(&made)
        .output()
        .unwrap();
    assert!(synthesize.status.success(), "{}", String::from_utf8_lossy(&synthesize.stderr));
    let picture = image::open(made.join("00000.png")).unwrap().to_rgb8();
    let grid = image::open(out.join("samples/step-0000004.png")).unwrap().to_rgb8();
    for (x, y, pixel) in picture.enumerate_pixels() {
        let [a, b] = [pixel[0], grid.get_pixel(x + 2, y + 2)[0]];
        assert!(a.abs_diff(b) <= 1, "{x} {y}: {a} {b}");
    }
}

/// Processes that were not built to train together say so, instead of each doing all of the work.
#[cfg(not(feature = "mpi"))]
#[test]
fn one_of_several_processes_needs_mpi() {
    let folder = tempfile::tempdir().unwrap();
    let found = command(&[], folder.path()).env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(!found.status.success() && message.contains("--features mpi"), "{message}");
}

/// A signal ends a run after its step, with a checkpoint; so does a full disk, without one.
#[cfg(unix)]
#[test]
fn a_run_that_is_ended_from_outside_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let long = short(&["--max-steps", "400"]);
    let child = command(&long, &out).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let begun = std::time::Instant::now();
    while !out.join("checkpoint-2").exists() {
        assert!(begun.elapsed().as_secs() < 300, "no checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let found = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(!found.status.success() && message.contains("the same command goes on from there"), "{message}");
    let kept = message.split("checkpoint-").nth(1).unwrap().split(';').next().unwrap();
    let step: u64 = kept.parse().unwrap();
    assert!(message.contains(&format!("stopped at step {step} of 400")), "{message}");
    assert!(out.join(format!("checkpoint-{step}")).join("optimizer.bin").is_file());

    // No file may be longer than the lines about the run: the next checkpoint cannot be written.
    let shell = format!(
        "trap '' XFSZ; ulimit -f 8; exec {} {}",
        program().display(),
        command(&long, &out)
            .get_args()
            .map(|argument| format!("'{}'", argument.to_string_lossy()))
            .collect::<Vec<_>>()
            .join(" ")
    );
    let found = Command::new("bash").args(["-c", &shell]).output().unwrap();
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(!found.status.success() && !message.contains("panicked"), "{message}");
    assert!(message.contains("error: ") && message.contains("out/"), "{message}");
    let names: Vec<String> = out
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(names.contains(&format!("checkpoint-{step}")), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with(".tmp-")), "{names:?}");
}
