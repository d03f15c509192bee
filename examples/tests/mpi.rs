//! `finetune` in several processes under `mpirun`, on this machine.
//!
//! `cargo build --release --workspace --features cxr-examples/mpi --example finetune`, then
//! `cargo test --release --workspace --features cxr-examples/mpi --test mpi`.
#![cfg(feature = "mpi")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cxr::kernels::Flex;
use cxr::ldm::pipeline::{LoadOptions, ModelFolder};
use cxr::lora::{self, Adapter, LoraConfig, UNET};
use cxr_examples::demo;

const PAIRS: usize = 37;

/// Some of the embedded thumbnails, each of a patient of its own.
fn data(folder: &Path) -> PathBuf {
    let data = folder.join("data");
    std::fs::create_dir(&data).unwrap();
    let mut names: Vec<PathBuf> = walk(&demo::data_folder())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "png"))
        .collect();
    names.sort();
    let mut rows = String::new();
    for (i, path) in names.iter().take(PAIRS).enumerate() {
        std::fs::copy(path, data.join(format!("{i}.png"))).unwrap();
        rows += &format!(
            "{{\"file_name\": \"{i}.png\", \"text\": \"Finding {}.\", \"group\": \"{i}\"}}\n",
            i % 5
        );
    }
    std::fs::write(data.join("metadata.jsonl"), rows).unwrap();
    data
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples/finetune")
}

fn arguments(data: &Path, out: &Path, batch: usize) -> Vec<String> {
    let settings = [
        format!("batch_size={batch}"),
        "image_size=64".to_owned(),
        "lora.rank=2".to_owned(),
        "learning_rate.peak=1e-3".to_owned(),
        "max_steps=20".to_owned(),
        "checkpoint_every=3".to_owned(),
        "samples.every=0".to_owned(),
        "validation.pairs=2".to_owned(),
    ];
    let mut arguments = vec!["--device".to_owned(), "flex".to_owned(), "--quiet".to_owned()];
    for (flag, path) in [("--data", data), ("--out", out)] {
        arguments.extend([flag.to_owned(), path.display().to_string()]);
    }
    arguments.extend(settings.into_iter().flat_map(|setting| ["--set".to_owned(), setting]));
    arguments
}

/// `mpirun` with one process for each of `ranks`.
fn mpirun(ranks: &[Vec<String>]) -> Command {
    let mut command = Command::new("mpirun");
    // As root and on few cores, as in a container; bound to a core each, the kernels' threads would starve.
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.args(["--oversubscribe", "--bind-to", "none"]).stdin(Stdio::null());
    for (i, arguments) in ranks.iter().enumerate() {
        if i > 0 {
            command.arg(":");
        }
        command.args(["-n", "1"]).arg(program()).args(arguments);
    }
    command
}

#[track_caller]
fn succeeds(output: Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What a run made of the adapter that it started with.
fn change(out: &Path) -> Vec<f64> {
    let parts = ModelFolder::open(demo::model_folder())
        .unwrap()
        .load::<Flex>(&LoadOptions::default(), &Default::default())
        .unwrap();
    let mut unet = parts.unet;
    lora::attach(&mut unet, &LoraConfig::new(2), 0).unwrap();
    let start = values(&lora::export(&unet, lora::DEFAULT_NAME, UNET).unwrap());
    let (end, _) = lora::read(out.join("adapter.safetensors")).unwrap();
    values(&end).iter().zip(start).map(|(end, start)| end - start).collect()
}

fn values(adapter: &Adapter) -> Vec<f64> {
    let modules = adapter.modules.values();
    modules.flat_map(|weights| weights.a.iter().chain(&weights.b)).map(|value| f64::from(*value)).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// Ends every process that has `text` on its command line, but this one.
fn kill_all(text: &str) {
    for entry in Path::new("/proc").read_dir().unwrap().filter_map(Result::ok) {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if id != std::process::id() && String::from_utf8_lossy(&line).contains(text) {
            Command::new("kill").args(["-9", &id.to_string()]).status().unwrap();
        }
    }
}

#[test]
fn two_ranks_are_one_with_batches_twice_as_large_and_go_on_when_killed() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (data(folder.path()), |name: &str| folder.path().join(name));
    succeeds(Command::new(program()).args(arguments(&data, &out("one"), 8)).output().unwrap());
    succeeds(mpirun(&vec![arguments(&data, &out("two"), 4); 2]).output().unwrap());
    let train = std::fs::read_to_string(out("one").join("split.json")).unwrap();
    let split: serde_json::Value = serde_json::from_str(&train).unwrap();
    let trained_on = split["train"].as_array().unwrap().len();
    assert!(
        !trained_on.is_multiple_of(8) && trained_on < 20 * 8,
        "an epoch ends, and with a smaller step: {trained_on}"
    );
    let (one, two) = (change(&out("one")), change(&out("two")));
    let error = norm(one.iter().zip(&two).map(|(a, b)| a - b)) / norm(one.iter().copied());
    println!("two ranks against one, {trained_on} pairs, 20 steps: {error:.1e}");
    assert!(norm(one.iter().copied()) > 0.0 && error < 1e-3, "{error}");

    let killed = out("killed");
    let mut child = mpirun(&vec![arguments(&data, &killed, 4); 2])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !killed.join("checkpoint-6").exists() {
        assert!(begun.elapsed() < Duration::from_secs(300), "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_all(&killed.display().to_string());
    child.wait().unwrap();
    assert!(!killed.join("adapter.safetensors").exists(), "it was killed before its end");
    succeeds(mpirun(&vec![arguments(&data, &killed, 4); 2]).output().unwrap());
    let again = change(&killed);
    let error = norm(two.iter().zip(&again).map(|(a, b)| a - b)) / norm(two.iter().copied());
    println!("killed and gone on against not: {error:.1e}");
    assert!(error < 1e-6, "{error}");
    let lines = std::fs::read_to_string(killed.join("metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");

    // as another number of processes it is another run
    let found = mpirun(&vec![arguments(&data, &killed, 4); 3]).output().unwrap();
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(!found.status.success() && message.contains("other settings"), "{message}");
}

#[test]
fn a_rank_that_fails_ends_the_run_with_its_message() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let fails = |second: Vec<String>, word: &str| {
        let ranks = [arguments(&data, &folder.path().join("out"), 4), second];
        let begun = Instant::now();
        let found = mpirun(&ranks).output().unwrap();
        let message = String::from_utf8_lossy(&found.stderr).into_owned();
        assert!(!found.status.success() && message.contains(word), "{word}: {message}");
        assert!(begun.elapsed() < Duration::from_secs(120), "the others do not wait");
        assert!(!folder.path().join("out/adapter.safetensors").exists());
    };
    fails(arguments(Path::new("/nowhere"), &folder.path().join("out"), 4), "/nowhere");
    let mut other = arguments(&data, &folder.path().join("out"), 4);
    other.extend(["--set".to_owned(), "seed=1".to_owned()]);
    fails(other, "same command");
}
