//! What all programs have in common: help, exit codes, what is shown, and memory.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cxr_examples::demo;
use cxr_examples::exit::EXIT_CODES;

const PROGRAMS: [&str; 8] =
    ["evaluate", "finetune", "lora", "parity", "prepare", "pretrain", "reproduce", "synthesize"];

/// `cargo test` builds the examples beside its own binaries.
fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let folder: PathBuf = test.parent().and_then(Path::parent).unwrap().join("examples");
    Command::new(folder.join(name))
}

/// The exit code, standard output and standard error.
fn run(name: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = program(name).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn help_ends_with_the_exit_codes() {
    for name in PROGRAMS {
        let (code, help, _) = run(name, &["--help"]);
        assert_eq!(code, Some(0), "{name}");
        // The help is wrapped to the width of the terminal.
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words(&help).ends_with(&words(EXIT_CODES)), "{name}: {help}");
    }
}

#[test]
fn arguments_that_cannot_be_meant_have_a_code_of_their_own() {
    for name in PROGRAMS {
        let (code, _, message) = run(name, &["--no-such-flag"]);
        assert_eq!(code, Some(2), "{name}: {message}");
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    for (name, arguments) in [
        ("reproduce", vec!["--pictures", "2"]),
        ("reproduce", vec!["-q", "-v"]),
        ("finetune", vec!["--data", "nowhere", "--preset", "paper"]),
        ("prepare", vec!["--data", "nowhere", "--train-fraction", "2"]),
        ("evaluate", vec!["--real", "a", "--fake", "b", "--pairs", "0"]),
        ("synthesize", vec!["--prompt", "Effusion.", "--steps", "0"]),
    ] {
        let (code, _, message) = run(name, &[arguments.as_slice(), &["--out", out]].concat());
        assert_eq!(code, Some(2), "{name} {arguments:?}: {message}");
    }
    // What is wrong with a file is no matter of arguments.
    let (code, _, message) = run("prepare", &["--data", "/nowhere/at/all", "--out", out]);
    assert_eq!(code, Some(1), "{message}");
}

#[test]
fn what_has_no_room_is_not_begun() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let data = demo::data_folder();
    let data = data.to_str().unwrap();
    let cases: [(&str, &[&str], &str); 4] = [
        (
            "synthesize",
            &["--prompt", "Effusion.", "--size", "8192", "--images-per-prompt", "64", "--batch", "64"],
            "--batch",
        ),
        (
            "finetune",
            &["--data", data, "--set", "image_size=64", "--set", "batch_size=1000000"],
            "batch_size",
        ),
        ("reproduce", &["--smoke", "--lora-batch", "1000000"], "--lora-batch"),
        ("pretrain", &["--pool", "1000000000"], "--pool"),
    ];
    for (name, arguments, advice) in cases {
        let place = ["--device", "flex", "--out", out.to_str().unwrap()];
        let (code, _, message) = run(name, &[arguments, &place].concat());
        assert_eq!(code, Some(3), "{name}: {message}");
        let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{message}");
        for word in ["GB", "free", "--ignore-memory", advice] {
            assert!(errors[0].contains(word), "{name}: no {word:?} in {message}");
        }
        assert!(!out.exists(), "{name} has begun");
    }
}

#[test]
fn what_is_shown_is_what_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let picture = |more: &[&str], name: &str| {
        let out = folder.path().join(name);
        let arguments = ["--device", "flex", "--prompt", "Effusion.", "--steps", "1", "--out"];
        run("synthesize", &[&arguments[..], &[out.to_str().unwrap()], more].concat())
    };
    let (code, result, usual) = picture(&[], "usual");
    assert_eq!(code, Some(0), "{usual}");
    assert_eq!(result, format!("{}\n", folder.path().join("usual").display()));
    for line in ["model: the embedded one", "--features hub", "memory: about 0.", "device: flex"] {
        assert!(usual.contains(line), "no {line:?} in {usual}");
    }
    assert!(!usual.contains("info: "), "{usual}");
    let (_, _, quiet) = picture(&["-q"], "quiet");
    assert_eq!(quiet, "");
    let (_, _, verbose) = picture(&["-v"], "verbose");
    assert!(verbose.contains("info: unet: ") && verbose.contains("safetensors"), "{verbose}");
}
