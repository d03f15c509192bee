//! `reproduce` as a person runs it, every stage at its smallest.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use cxr::dataset::synthetic::{Shape, write_indiana};
use serde_json::Value;

const STAGES: [&str; 8] =
    ["prepare", "base-pictures", "finetune", "lora-pictures", "distances", "audit", "findings", "report"];

/// `cargo test` builds the examples beside its own binaries. What weights this machine has changes nothing here.
fn command(out: &Path, arguments: &[&str]) -> Command {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("examples/reproduce");
    let mut command = Command::new(program);
    command.args(["--device", "flex", "--out"]).arg(out).args(arguments);
    command.env_remove("CXR_INCEPTION_WEIGHTS").env("CXR_CACHE", out);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs, and returns what was said on standard error.
#[track_caller]
fn succeeds(out: &Path, arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = command(out, arguments).output().unwrap();
    assert!(status.success(), "{arguments:?}: {}", text(&stderr));
    text(&stderr)
}

/// One line of error with `words` in it.
#[track_caller]
fn fails(out: &Path, arguments: &[&str], words: &[&str]) {
    let Output { status, stderr, .. } = command(out, arguments).output().unwrap();
    let message = text(&stderr);
    let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(!status.success() && errors.len() == 1 && !message.contains("panicked"), "{message}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: no {word:?} in {message}");
    }
}

/// The stages that were found done.
fn skipped(said: &str) -> Vec<&str> {
    let done = |stage: &&str| said.contains(&format!("\n{stage}: done before"));
    STAGES.into_iter().filter(done).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn written(path: &Path) -> std::time::SystemTime {
    path.metadata().unwrap().modified().unwrap()
}

/// A collection in the layout of Indiana's.
fn indiana() -> tempfile::TempDir {
    let data = tempfile::tempdir().unwrap();
    write_indiana(data.path(), Shape { reports: 40, images: 60, side: 64 }, 3).unwrap();
    data
}

/// Arguments for a run on it that takes seconds, but for its pictures.
fn tiny<'a>(data: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments =
        vec!["--smoke", "--lora-steps", "2", "--sampling-steps", "2", "--data", data.to_str().unwrap()];
    arguments.extend(more);
    arguments
}

#[test]
fn the_report_has_every_part_and_what_is_done_is_not_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("deep/out");
    let first = succeeds(&out, &["--smoke"]);
    assert_eq!(skipped(&first), [""; 0], "{first}");
    let markdown = std::fs::read_to_string(out.join("report.md")).unwrap();
    for part in [
        "| frechet_distance/cxr-small-v1 |",
        "| kernel_distance/cxr-small-v1 |",
        "They are not FID or KID",
        "smoke run",
        "](grids/real.png)",
        "](grids/base.png)",
        "](grids/adapted.png)",
        "](lora/loss.png)",
        "of 8 pictures, against all 800 training radiographs",
        "## Does a picture show its findings?",
        "| Effusion |",
        "## What does a classifier learn",
        "| leakage |",
        "| fine-tuning: lora.rank | 8 |",
        "| fine-tuning: learning_rate.peak | 0.001 |",
        "| sampler | DPM-Solver++ 2M, 3 steps |",
        "| the embedded model |",
    ] {
        assert!(markdown.contains(part), "no {part:?} in {markdown}");
    }
    assert!(!markdown.contains("fid/") && !markdown.contains("kid/"), "{markdown}");
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.matches("data:image/png;base64,").count() >= 4);
    assert!(!html.contains("http") && html.contains("Finding"), "the page is to stand alone");
    for file in
        ["lora/adapter.safetensors", "lora/README.md", "lora/config.toml", "data/split.json", "copies.csv"]
    {
        assert!(out.join(file).is_file(), "{file}");
    }
    // Held-out radiographs with effusion are enough for a figure of the classifier on them.
    let findings = json(&out.join("findings.json"));
    let rows = findings["result"]["adapted"]["findings"]["rows"].as_array().unwrap();
    let effusion = rows.iter().find(|row| row["finding"] == "Effusion" && row["slice"] == "all").unwrap();
    let auroc = effusion["real"]["auroc"]["value"].as_f64().unwrap();
    assert!((0.5..1.0).contains(&auroc), "{effusion}");
    assert!(rows.iter().all(|row| row["finding"] != "No Finding"));

    let page = written(&out.join("report.html"));
    let again = succeeds(&out, &["--smoke"]);
    assert_eq!(skipped(&again), STAGES, "{again}");
    assert_eq!(written(&out.join("report.html")), page);

    // Other settings: what does not depend on them stays, and nothing is lost.
    let other = succeeds(&out, &["--smoke", "--guidance", "3"]);
    assert_eq!(skipped(&other), ["prepare", "finetune"], "{other}");
    let adapter = written(&out.join("lora/adapter.safetensors"));
    let back = succeeds(&out, &["--smoke"]);
    assert_eq!(skipped(&back), ["prepare", "base-pictures", "finetune", "lora-pictures"], "{back}");
    let resampled = succeeds(&out, &["--smoke", "--replicates", "10"]);
    let unchanged = ["prepare", "base-pictures", "finetune", "lora-pictures", "audit"];
    assert_eq!(skipped(&resampled), unchanged, "{resampled}");
    assert_eq!(written(&out.join("lora/adapter.safetensors")), adapter);
    let trained = succeeds(&out, &["--smoke", "--replicates", "10", "--rank", "2"]);
    assert_eq!(skipped(&trained), ["prepare", "base-pictures"], "{trained}");
    assert_ne!(written(&out.join("lora/adapter.safetensors")), adapter);
}

#[test]
fn stages_run_alone_and_say_what_they_lack() {
    let data = indiana();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let only = |stage| tiny(data.path(), &["--pictures", "4", "--only", stage]);
    fails(&out, &only("lora-pictures"), &["--only lora-pictures", "prepare", "run --only prepare first"]);
    succeeds(&out, &only("prepare"));
    assert!(out.join("data/split.json").is_file() && !out.join("base").exists());
    fails(&out, &only("audit"), &["--only audit", "finetune"]);
    succeeds(&out, &only("finetune"));
    fails(&out, &only("findings"), &["--only findings", "base-pictures"]);
    fails(&out, &only("audit"), &["--only audit", "lora-pictures"]);
    succeeds(&out, &only("lora-pictures"));
    assert!(!out.join("base").exists(), "no stage but the one that was asked for");
    succeeds(&out, &only("audit"));
    succeeds(&out, &only("base-pictures"));
    fails(&out, &only("report"), &["--only report"]);
    succeeds(&out, &only("distances"));
    succeeds(&out, &only("findings"));
    succeeds(&out, &only("report"));
    assert_eq!(skipped(&succeeds(&out, &tiny(data.path(), &["--pictures", "4"]))), STAGES);

    // Too few held-out radiographs to calibrate the audit, and reports without enough of any finding: said, not made up.
    let markdown = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert!(markdown.contains("| layout | kaggle |"), "{markdown}");
    assert!(markdown.contains("not available") || markdown.contains("too few"), "{markdown}");
    // What is prepared with other settings is not taken for this.
    let mut other = only("finetune");
    other.extend(["--set", "image_size=32"]);
    fails(&out, &other, &["--only finetune", "prepare"]);
}

#[test]
#[cfg(unix)]
fn a_run_that_was_stopped_goes_on() {
    let data = indiana();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let only = |stage| tiny(data.path(), &["--pictures", "400", "--batch", "1", "--only", stage]);
    succeeds(&out, &only("prepare"));
    let arguments = only("base-pictures");

    let mut child = command(&out, &arguments).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    let third = out.join("base/00002.png");
    while !third.is_file() {
        assert!(begun.elapsed() < Duration::from_secs(300), "no third picture");
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        std::thread::sleep(Duration::from_millis(10));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let message = text(&stderr);
    assert!(status.code() == Some(130) && message.contains("stopped"), "{status:?} {message}");
    let before = written(&third);
    let last: PathBuf = out.join("base/00399.png");
    assert!(!last.exists(), "it was stopped before its end");
    succeeds(&out, &arguments);
    assert!(last.is_file());
    assert_eq!(written(&third), before, "a picture that was there was made again");
    let rows = std::fs::read_to_string(out.join("base/metadata.jsonl")).unwrap();
    assert_eq!(rows.lines().count(), 400);
}

#[test]
fn what_goes_wrong_is_said_first() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    fails(&out, &["--pictures", "3"], &["--pictures", "4 or more"]);
    fails(&out, &["--rank", "0"], &["--rank"]);
    fails(&out, &["--preset", "paper"], &["--preset", "paper_128, clinical_512"]);
    fails(&out, &["--set", "batchsize=2"], &["--set", "batch_size"]);
    fails(&out, &["--caption-dropout", "1"], &["--caption-dropout"]);
    fails(&out, &["--model", "/nowhere/at/all"], &["--model"]);
    fails(&out, &["--data", "/nowhere/at/all"], &["--data"]);
    fails(&out, &["--inception", "/nowhere.pth"], &["--inception", "/nowhere.pth"]);
    // The Inception network's figures are what --full is for: no other stand in for them.
    fails(&out, &["--full"], &["--full", "CXR_INCEPTION_WEIGHTS", "https://"]);
    // thumbnails of 64 pixels, and a preset of 128
    fails(&out, &["--smoke", "--preset", "paper_128"], &["64 x 64", "--enlarge"]);
    assert!(!out.join("report.html").exists());
}
