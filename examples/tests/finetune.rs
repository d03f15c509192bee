//! `finetune` as a person runs it: the embedded model on the embedded thumbnails.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cxr::lora::{self, Format};
use cxr_examples::demo;

fn run(arguments: &[&str], out: &Path) -> Output {
    // `cargo test` builds the examples beside its own binaries.
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    let mut command = Command::new(folder.join("finetune"));
    command.args(["--device", "flex", "--quiet", "--out"]).arg(out);
    command.arg("--data").arg(demo::data_folder()).args(arguments).output().unwrap()
}

/// A short run on pictures of the embedded model's size.
fn short<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let settings = ["image_size=64", "checkpoint_every=2", "lora.rank=2", "learning_rate.peak=1e-3"];
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
    fails(&["--model", "/nowhere/at/all"], &["--model"]);
}
