//! The examples for programs that embed the pipeline, as a person runs them, with the embedded model.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cxr::core::metadata::read_jsonl;

/// `cargo test` builds the examples beside its own binaries.
fn run(name: &str, arguments: &[&str], out: &Path) -> Output {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    Command::new(folder.join(name)).args(arguments).arg("--out").arg(out).output().unwrap()
}

fn succeeds(name: &str, arguments: &[&str], out: &Path) -> String {
    let found = run(name, arguments, out);
    let [stdout, stderr] =
        [found.stdout, found.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(found.status.success(), "{name} {arguments:?}: {stderr}");
    stdout
}

/// Files below a folder, sorted.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        match path.is_dir() {
            true => found.extend(files(&path).into_iter().map(|below| format!("{name}/{below}"))),
            false => found.push(name),
        }
    }
    found.sort();
    found
}

fn pixels(file: PathBuf) -> Vec<u8> {
    image::open(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display())).to_luma8().into_raw()
}

#[test]
fn generate_makes_several_pictures_of_each_prompt() {
    let out = tempfile::tempdir().unwrap();
    succeeds("generate", &["Edema.", "Normal chest.", "--steps", "3"], out.path());
    let mut expected: Vec<String> =
        [0, 1].iter().flat_map(|prompt| (7..11).map(move |seed| format!("{prompt}-{seed}.png"))).collect();
    expected.sort();
    assert_eq!(files(out.path()), expected);
    let all: Vec<Vec<u8>> = expected.iter().map(|name| pixels(out.path().join(name))).collect();
    for (i, one) in all.iter().enumerate() {
        assert_eq!(one.len(), 64 * 64);
        assert!(all[..i].iter().all(|other| other != one), "{} is there twice", expected[i]);
    }
}

#[test]
fn preview_shows_every_step_and_stops_on_demand() {
    let out = tempfile::tempdir().unwrap();
    let whole = out.path().join("whole");
    succeeds("preview", &["--steps", "4"], &whole);
    assert_eq!(
        files(&whole),
        ["picture.png", "step-001.png", "step-002.png", "step-003.png", "step-004.png"]
    );
    let step = |folder: &Path, number: usize| pixels(folder.join(format!("step-{number:03}.png")));
    assert_ne!(step(&whole, 1), step(&whole, 4));
    assert_eq!(step(&whole, 4), pixels(whole.join("picture.png")), "the last step predicts the picture");

    let part = out.path().join("part");
    let said = succeeds("preview", &["--steps", "4", "--stop-after", "2"], &part);
    assert!(said.contains("stopped"), "{said}");
    assert_eq!(files(&part), ["step-001.png", "step-002.png"]);
    assert_eq!(step(&part, 2), step(&whole, 2));

    let some = out.path().join("some");
    succeeds("preview", &["--steps", "4", "--every", "3"], &some);
    assert_eq!(files(&some), ["picture.png", "step-003.png"]);
}

#[test]
fn augment_fills_classes_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("out"));
    for class in ["Pleural_Thickening", "Edema"] {
        std::fs::create_dir_all(data.join(class)).unwrap();
    }
    let data_argument = data.to_str().unwrap();
    let arguments = ["--data", data_argument, "--steps", "2", "--batch", "2", "--quiet", "--device", "flex"];
    let with = |more: &[&'static str]| [&arguments[..], more].concat();
    succeeds("augment", &with(&["--per-class", "3"]), &out);
    let names: Vec<String> = (0..6)
        .map(|seed| {
            format!("{}/synthetic-{seed:06}.png", if seed < 3 { "Edema" } else { "Pleural_Thickening" })
        })
        .collect();
    let mut expected = names.clone();
    expected.push("metadata.jsonl".into());
    expected.sort();
    assert_eq!(files(&out), expected);
    let rows = read_jsonl(out.join("metadata.jsonl")).unwrap();
    assert_eq!(rows.iter().map(|row| row.file_name.clone()).collect::<Vec<_>>(), names);
    assert_eq!((rows[5].text.as_str(), rows[5].seed), ("Pleural Thickening.", Some(5)));
    assert_eq!(rows[5].labels, ["Pleural_Thickening"]);
    assert!(files(&data).is_empty(), "the data are left alone");

    // what is there is kept, what is missing is made again
    let untouched = out.join(&names[1]);
    let before = std::fs::metadata(&untouched).unwrap().modified().unwrap();
    let again = pixels(out.join(&names[4]));
    std::fs::remove_file(out.join(&names[4])).unwrap();
    succeeds("augment", &with(&["--per-class", "3"]), &out);
    assert_eq!(std::fs::metadata(&untouched).unwrap().modified().unwrap(), before);
    assert_eq!(pixels(out.join(&names[4])), again);
    assert_eq!(read_jsonl(out.join("metadata.jsonl")).unwrap().len(), 6);

    for (more, words) in [
        (&["--per-class", "3", "--guidance", "5"][..], "other settings"),
        (&["--per-class", "0"][..], "--per-class is 0"),
        (&["--template", "a chest"][..], "{class}"),
        (&["--lora", "nowhere.safetensors"][..], "nowhere.safetensors"),
    ] {
        let found = run("augment", &with(more), &out);
        let message = String::from_utf8_lossy(&found.stderr).into_owned();
        assert!(!found.status.success() && message.contains(words), "{more:?}: {message}");
        assert!(!message.contains("panicked"), "{message}");
    }
    let found = run("augment", &["--data", data.join("Edema").to_str().unwrap()], &out);
    let message = String::from_utf8_lossy(&found.stderr).into_owned();
    assert!(!found.status.success() && message.contains("no subfolders"), "{message}");
}
