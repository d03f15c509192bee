//! `synthesize` and `parity` as a person runs them, with the embedded model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cxr::core::metadata::read_jsonl;
use cxr::core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr::dataset::{Collection, ReadOptions};
use cxr_examples::demo;

/// `cargo test` builds the examples beside its own binaries.
fn program(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    let mut command = Command::new(folder.join(name));
    command.env_remove("HF_TOKEN").env("HF_HUB_OFFLINE", "1");
    command
}

fn synthesize(arguments: &[&str], out: &Path) -> Output {
    let mut command = program("synthesize");
    if !arguments.contains(&"--device") {
        command.args(["--device", "flex"]);
    }
    command.args(["--quiet", "--out"]).arg(out).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One line on standard error with `words` in it, and nothing in the folder.
fn fails(arguments: &[&str], words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let found = synthesize(arguments, &out);
    let message = text(&found.stderr);
    assert!(!found.status.success(), "{arguments:?} succeeded");
    assert!(found.stdout.is_empty());
    let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: no {word:?} in {message}");
    }
    let left = out.read_dir().map_or(0, |entries| entries.count());
    assert_eq!(left, 0, "{arguments:?} left files");
}

/// A copy of the embedded model with one file changed.
fn model_with(name: &str, change: impl Fn(&mut Vec<u8>)) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    for part in ["text_encoder", "unet", "vae", "scheduler"] {
        std::fs::create_dir(folder.path().join(part)).unwrap();
        for entry in demo::model_folder().join(part).read_dir().unwrap() {
            let file = entry.unwrap().path();
            std::fs::copy(&file, folder.path().join(part).join(file.file_name().unwrap())).unwrap();
        }
    }
    let file = folder.path().join(name);
    let mut bytes = std::fs::read(&file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
    let path = folder.path().display().to_string();
    (folder, path)
}

#[test]
fn a_folder_is_a_data_set_and_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.csv");
    std::fs::write(
        &prompts,
        "uid,impression,seed,count,labels,view\n1,Edema.,7,2,Edema|Effusion,PA\n2,,,,,\n3,\"Normal, clear.\",,,,\n",
    )
    .unwrap();
    let out = folder.path().join("out");
    let arguments =
        ["--prompts", prompts.to_str().unwrap(), "--steps", "2", "--guidance", "2", "--seed", "100"];
    let run = synthesize(&arguments, &out);
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert_eq!(text(&run.stdout).trim(), out.display().to_string());
    assert!(text(&run.stderr).contains("1 rows"), "{}", text(&run.stderr));

    let rows = read_jsonl(out.join("metadata.jsonl")).unwrap();
    let facts: Vec<_> =
        rows.iter().map(|row| (row.file_name.as_str(), row.text.as_str(), row.seed)).collect();
    let expected = [
        ("00000.png", "Edema.", Some(7)),
        ("00001.png", "Edema.", Some(8)),
        ("00002.png", "Normal, clear.", Some(102)),
    ];
    assert_eq!(facts, expected);
    assert_eq!(
        (rows[0].labels.len(), rows[0].view.as_deref(), rows[1].group.as_deref()),
        (2, Some("PA"), Some("1"))
    );
    let collection = Collection::open(&out, &ReadOptions::default()).unwrap();
    assert_eq!(collection.len(), 3);
    assert_eq!(collection.pairs[2].text, "Normal, clear.");

    // the same command makes what is missing, and nothing else
    let bytes = |name: &str| std::fs::read(out.join(name)).unwrap();
    let first = bytes("00000.png");
    let written = |name: &str| std::fs::metadata(out.join(name)).unwrap().modified().unwrap();
    let (before, last) = (written("00000.png"), bytes("00002.png"));
    std::fs::remove_file(out.join("00002.png")).unwrap();
    // a row that broke off, as when the machine stops
    let metadata = std::fs::read_to_string(out.join("metadata.jsonl")).unwrap();
    std::fs::write(out.join("metadata.jsonl"), &metadata[..metadata.len() - 20]).unwrap();
    let again = synthesize(&arguments, &out);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert!(text(&again.stderr).contains("2 of 3"), "{}", text(&again.stderr));
    assert_eq!((bytes("00000.png"), written("00000.png"), bytes("00002.png")), (first, before, last));
    assert_eq!(read_jsonl(out.join("metadata.jsonl")).unwrap(), rows);

    // other settings are not overwritten unasked
    let other: Vec<&str> = arguments.iter().map(|&a| if a == "100" { "101" } else { a }).collect();
    let refused = synthesize(&other, &out);
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("00002.png") && text(&refused.stderr).contains("--force"));
    assert_eq!(read_jsonl(out.join("metadata.jsonl")).unwrap(), rows);
    let forced = synthesize(&[&other[..], &["--force"]].concat(), &out);
    assert!(forced.status.success(), "{}", text(&forced.stderr));
    let rows = read_jsonl(out.join("metadata.jsonl")).unwrap();
    assert_eq!(rows.iter().map(|row| row.seed.unwrap()).collect::<Vec<_>>(), [7, 8, 103]);
}

#[test]
fn flags_that_change_the_file_or_the_batch() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name);
    let base = ["--prompt", "Edema.", "--prompt", "Normal.", "--steps", "2"];
    let run = |name: &str, more: &[&str]| {
        let run = synthesize(&[&base[..], more].concat(), &out(name));
        assert!(run.status.success(), "{name}: {}", text(&run.stderr));
        image::open(out(name).join("00001.png")).unwrap()
    };
    let plain = run("plain", &[]);
    let off = |a: &image::DynamicImage, b: &image::DynamicImage| {
        a.to_rgb8().iter().zip(b.to_rgb8().iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
    };
    assert!(off(&run("batch", &["--batch", "2", "--vae-slicing"]), &plain) <= 1);
    let gray = run("gray", &["--gray"]);
    assert_eq!((gray.color(), plain.color()), (image::ColorType::L8, image::ColorType::Rgb8));
    let sheet = out("sheet.png");
    let half = run("half", &["--dtype", "bf16", "--sheet", sheet.to_str().unwrap()]);
    // in two guided steps a rounding can become 60 levels at some pixel, whichever way it went; on average it does not
    let (ours, theirs) = (half.to_luma8(), plain.to_luma8());
    let mean = ours.iter().zip(theirs.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>();
    assert!(half != plain && mean < 12.0 * ours.len() as f64 && off(&half, &plain) < 90, "{mean}");
    assert!(image::open(sheet).unwrap().width() > plain.width());
    for scheduler in ["ddim", "pndm", "euler", "euler-a"] {
        assert!(run(scheduler, &["--scheduler", scheduler]) != plain, "{scheduler}");
    }
    let initial = out("plain").join("00000.png");
    let from = run("from", &["--initial", initial.to_str().unwrap(), "--strength", "0.5"]);
    assert!(from != plain);
    assert_eq!(run("size", &["--size", "72x56"]).to_rgb8().dimensions(), (72, 56));
}

#[test]
fn bad_input_is_one_line_and_leaves_nothing() {
    let base = |more: &[&'static str]| [&["--prompt", "Edema."][..], more].concat();
    fails(&base(&["--steps", "0"]), &["steps", "0"]);
    fails(&base(&["--steps", "1001"]), &["steps", "1001", "1000"]);
    fails(&base(&["--size", "101"]), &["--size", "101x101"]);
    fails(&base(&["--device", "toaster"]), &["toaster", "flex"]);
    fails(&base(&["--device", "cuda:0"]), &["cuda"]);
    fails(&base(&["--scheduler", "magic"]), &["magic", "pndm"]);
    fails(&base(&["--model", "/nowhere/model"]), &["--model", "/nowhere/model"]);
    fails(&base(&["--model", "owner/name"]), &["--model", "owner/name"]);
    fails(&base(&["--lora", "/nowhere/a.safetensors"]), &["--lora", "/nowhere/a.safetensors"]);
    fails(&base(&["--initial", "/nowhere/a.png"]), &["--initial", "/nowhere/a.png"]);
    fails(&["--prompts", "/nowhere/a.csv"], &["--prompts", "/nowhere/a.csv"]);
    let long: &'static str = "pleural effusion ".repeat(60).leak();
    fails(&["--prompt", long, "--strict"], &["77", "pleural"]);
    let folder = tempfile::tempdir().unwrap();
    for (name, content, word) in [
        ("a.csv", "x,y\n1,2\n", "--text-col"),
        ("b.csv", "text\n\n", "no prompt"),
        ("c.jsonl", "{\"text\": 1}\n{", "line 2"),
        ("d.csv", "text,seed\nEdema.,minus one\n", "seed"),
        ("e.xls", "text", ".csv"),
    ] {
        let file = folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        let file: &'static str = file.display().to_string().leak();
        fails(&["--prompts", file], &[file, word]);
    }
}

#[test]
fn broken_models_are_named() {
    let weights = "unet/diffusion_pytorch_model.safetensors";
    for (name, change, word) in [
        (
            weights,
            (|bytes: &mut Vec<u8>| bytes.truncate(1000)) as fn(&mut Vec<u8>),
            "diffusion_pytorch_model",
        ),
        (weights, |bytes| bytes.truncate(bytes.len() - 2), "diffusion_pytorch_model"),
        // the last two values, in f16
        (weights, |bytes| bytes.splice(bytes.len() - 2.., [0xff, 0x7f]).for_each(drop), "not finite"),
        (
            "unet/config.json",
            |bytes| *bytes = b"{\"use_linear_projection\": true}".to_vec(),
            "use_linear_projection",
        ),
    ] {
        let (_folder, path) = model_with(name, change);
        let path: &'static str = path.leak();
        fails(&["--prompt", "Edema.", "--model", path], &["--model", word]);
    }
    let empty = tempfile::tempdir().unwrap();
    let path: &'static str = empty.path().display().to_string().leak();
    fails(&["--prompt", "Edema.", "--model", path], &["--model", path]);
}

#[test]
fn a_long_prompt_is_cut_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let long = "pleural effusion ".repeat(60);
    let run = synthesize(&["--prompt", &long, "--steps", "1"], &folder.path().join("out"));
    assert!(run.status.success());
    assert!(text(&run.stderr).contains("warning: prompt of 242 tokens cut to 77"), "{}", text(&run.stderr));
}

struct Parity {
    folder: tempfile::TempDir,
}

impl Parity {
    fn run(
        &self,
        component: &str,
        inputs: &[(&str, RawTensor)],
        more: &[&str],
    ) -> Result<TensorFile, String> {
        let file = |name: &str| -> PathBuf { self.folder.path().join(name) };
        let inputs: Vec<_> = inputs.iter().map(|(name, tensor)| (name.to_string(), tensor.clone())).collect();
        write_safetensors(file("in"), &inputs, &BTreeMap::new()).unwrap();
        let run = program("parity")
            .args(["--quiet", "--device", "flex", "--component", component, "--model"])
            .arg(demo::model_folder())
            .arg("--input")
            .arg(file("in"))
            .arg("--output")
            .arg(file("out"))
            .args(more)
            .output()
            .unwrap();
        match run.status.success() {
            true => Ok(TensorFile::open(file("out")).unwrap()),
            false => Err(text(&run.stderr)),
        }
    }
}

fn ramp(shape: &[usize]) -> RawTensor {
    let count = shape.iter().product::<usize>();
    RawTensor::from_f32(shape.to_vec(), (0..count).map(|i| (i as f32 * 0.7).sin()).collect())
}

#[test]
fn every_component_answers_in_its_own_names() {
    let parity = Parity { folder: tempfile::tempdir().unwrap() };
    let shape = |file: &TensorFile, name: &str| file.info(name).unwrap().shape.clone();
    let ids = RawTensor::from_i64(vec![1, 77], vec![49407; 77]);
    let found = parity.run("text", &[("input_ids", ids.clone())], &[]).unwrap();
    let hidden = found.read("last_hidden_state").unwrap();
    assert_eq!(hidden.shape[..2], [1, 77]);
    let inputs = [
        ("sample", ramp(&[1, 4, 8, 8])),
        ("timestep", RawTensor::from_i64(vec![1], vec![981])),
        ("context", hidden.clone()),
    ];
    assert_eq!(shape(&parity.run("unet", &inputs, &[]).unwrap(), "sample"), [1, 4, 8, 8]);
    let latents = parity.run("vae-encode", &[("pixels", ramp(&[1, 3, 32, 32]))], &[]).unwrap();
    let mean = latents.read("mean").unwrap();
    assert!(latents.read("std").unwrap().to_f32().unwrap().iter().all(|&value| value > 0.0));
    let pixels = parity.run("vae-decode", &[("latents", mean)], &["--dtype", "f16"]).unwrap();
    assert_eq!(shape(&pixels, "pixels"), [1, 3, 32, 32]);
    let inputs = [("sample", ramp(&[1, 4, 2, 2])), ("model_outputs", ramp(&[3, 1, 4, 2, 2]))];
    let found = parity.run("scheduler", &inputs, &["--scheduler", "euler", "--steps", "3"]).unwrap();
    assert_eq!((shape(&found, "timesteps"), shape(&found, "samples")), (vec![3], vec![3, 1, 4, 2, 2]));

    for (component, inputs, word) in [
        ("text", vec![("ids", ids)], "input_ids"),
        (
            "unet",
            vec![("sample", ramp(&[1, 3, 8, 8])), ("timestep", ramp(&[1])), ("context", hidden)],
            "sample is",
        ),
        ("vae-encode", vec![("pixels", ramp(&[1, 3, 33, 32]))], "pixels is [1, 3, 33, 32]"),
        ("vae-decode", vec![("latents", ramp(&[4, 8, 8]))], "4 dimensions"),
        ("scheduler", inputs.to_vec(), "calls for 30 steps"),
    ] {
        let error = parity.run(component, &inputs, &[]).unwrap_err();
        assert!(error.starts_with("error: ") && error.contains(word), "{component}: {error}");
    }
}

/// Any number of processes make one set, the same pictures as one process would.
#[test]
fn parts_make_the_set_that_one_process_makes() {
    let folder = tempfile::tempdir().unwrap();
    let (one, parts) = (folder.path().join("one"), folder.path().join("parts"));
    let arguments = ["--prompt", "Edema.", "--images-per-prompt", "5", "--steps", "2", "--seed", "3"];
    assert!(synthesize(&arguments, &one).status.success());

    let part = |index: usize| {
        let mut command = program("synthesize");
        command.args(["--device", "flex", "--out"]).arg(&parts).args(arguments);
        command.args(["--shard", &format!("{index}/3")]);
        command
    };
    // the first alone: the set is not complete, and nobody says that it is
    let first = part(0).output().unwrap();
    assert!(first.status.success(), "{}", text(&first.stderr));
    assert!(text(&first.stderr).contains("other parts are not finished"), "{}", text(&first.stderr));
    assert!(!parts.join("metadata.jsonl").exists() && parts.join("00003.png").is_file());
    assert!(!parts.join("00001.png").exists());
    // the other two at the same time, one of them told by what mpirun sets
    let mut second = part(1).spawn().unwrap();
    let mut third = program("synthesize");
    third.args(["--device", "flex", "--out"]).arg(&parts).args(arguments);
    third.env("OMPI_COMM_WORLD_RANK", "2").env("OMPI_COMM_WORLD_SIZE", "3");
    let third = third.output().unwrap();
    assert!(third.status.success() && second.wait().unwrap().success(), "{}", text(&third.stderr));

    let names = |folder: &Path| {
        let mut names: Vec<String> = folder
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&parts), names(&one));
    for name in names(&one).iter().filter(|name| name.ends_with(".png")) {
        assert_eq!(
            std::fs::read(one.join(name)).unwrap(),
            std::fs::read(parts.join(name)).unwrap(),
            "{name}"
        );
    }
    assert_eq!(
        read_jsonl(parts.join("metadata.jsonl")).unwrap(),
        read_jsonl(one.join("metadata.jsonl")).unwrap()
    );
    // again, and as one process: nothing is made anew
    let again = part(1).output().unwrap();
    assert!(
        text(&again.stderr).contains("1 of 1 pictures are there") || text(&again.stderr).contains("2 of 2")
    );
    assert!(synthesize(&arguments, &parts).status.success());
    assert_eq!(names(&parts), names(&one));
}

/// A single process takes over what parts have left.
#[test]
fn one_process_finishes_what_parts_began() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let arguments = ["--prompt", "Edema.", "--images-per-prompt", "3", "--steps", "1"];
    let part: Vec<&str> = arguments.iter().copied().chain(["--shard", "1/2"]).collect();
    assert!(synthesize(&part, &out).status.success());
    assert!(out.join("metadata.part-1-of-2.jsonl").is_file());
    assert!(synthesize(&arguments, &out).status.success());
    assert_eq!(read_jsonl(out.join("metadata.jsonl")).unwrap().len(), 3);
    assert!(!out.join("metadata.part-1-of-2.jsonl").exists());
}
