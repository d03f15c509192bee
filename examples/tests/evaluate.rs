//! `evaluate` as a person runs it, with a whole Inception network of procedural weights.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use cxr::core::metadata::{MetadataRow, write_jsonl};
use cxr::core::random::Stream;
use cxr::core::tensor_file::{RawTensor, write_safetensors};
use cxr::metrics::inception::{CLASSES, FEATURES, layers};
use image::GrayImage;
use serde_json::Value;

/// All tensors of the network; `last` with the layer that makes logits, `bias` as that of the first normalization.
fn weights(last: bool, bias: f32) -> Vec<(String, RawTensor)> {
    let table = Stream::new(0, "weights", 0).normals(65_521);
    let numbers = |first: usize, shape: &[usize], scale: f32| {
        let values = table.iter().cycle().skip(first * 977 % 65_521).take(shape.iter().product());
        RawTensor::from_f32(shape.to_vec(), values.map(|v| v * scale).collect())
    };
    let mut tensors = Vec::new();
    for (number, layer) in layers().into_iter().enumerate() {
        let shape = [layer.output, layer.input, layer.kernel[0], layer.kernel[1]];
        let scale = (2.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
        tensors.push((format!("{}.conv.weight", layer.name), numbers(number, &shape, scale)));
        for (part, value) in [("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)] {
            let value = if number == 0 && part == "bias" { bias } else { value };
            let values = RawTensor::from_f32(vec![layer.output], vec![value; layer.output]);
            tensors.push((format!("{}.bn.{part}", layer.name), values));
        }
    }
    if last {
        tensors.push(("fc.weight".into(), numbers(99, &[CLASSES, FEATURES], 0.05)));
        tensors.push(("fc.bias".into(), numbers(98, &[CLASSES], 1.0)));
    }
    tensors
}

/// The weight files, made once: whole, without the last layer, and one with a weight that is no number.
fn weight_files() -> &'static [PathBuf; 3] {
    static FILES: OnceLock<(tempfile::TempDir, [PathBuf; 3])> = OnceLock::new();
    &FILES
        .get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let files = [("whole", true, 0.1), ("features", false, 0.1), ("broken", false, f32::NAN)];
            let files = files.map(|(name, last, bias)| {
                let path = folder.path().join(format!("{name}.safetensors"));
                write_safetensors(&path, &weights(last, bias), &Default::default()).unwrap();
                path
            });
            (folder, files)
        })
        .1
}

/// `cargo test` builds the examples beside its own binaries.
fn evaluate(arguments: &[&str], cache: &Path) -> Output {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    let mut command = Command::new(folder.join("evaluate"));
    command.env_remove("CXR_INCEPTION_WEIGHTS").env("CXR_CACHE", cache);
    command.args(["--device", "flex"]).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn picture(kind: u64, number: u64, side: u32) -> GrayImage {
    let mut stream = Stream::new(kind, "evaluate", number);
    // Kinds differ by more than the pictures of one kind do.
    let (step, level) = (2 + 3 * kind as u32, stream.below(12) as u32);
    GrayImage::from_fn(side, side, |x, y| {
        let wave = (x * step + y * (1 + kind as u32)) % (60 + 20 * kind as u32);
        image::Luma([(level + wave + stream.below(60) as u32) as u8])
    })
}

/// A folder of images of one kind.
fn images(root: &Path, name: &str, kind: u64, count: u64) -> PathBuf {
    let folder = root.join(name);
    std::fs::create_dir(&folder).unwrap();
    for number in 0..count {
        picture(kind, number, 48).save(folder.join(format!("{number:03}.png"))).unwrap();
    }
    folder
}

fn metadata(folder: &Path, count: u64, row: impl Fn(u64) -> (String, Option<String>)) {
    let rows: Vec<MetadataRow> = (0..count)
        .map(|number| {
            let (text, group) = row(number);
            MetadataRow { file_name: format!("{number:03}.png"), text, group, ..MetadataRow::default() }
        })
        .collect();
    write_jsonl(folder.join("metadata.jsonl"), &rows).unwrap();
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn shown(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_report_has_every_figure_with_what_it_depends_on() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let [real, fake, base, train] = [("real", 1, 12), ("fake", 2, 8), ("base", 5, 8), ("train", 1, 10)]
        .map(|(name, kind, count)| images(root, name, kind, count));
    // The training images are others of the real ones' kind, and one synthetic image is a copy of one of them.
    for number in 0..10 {
        picture(1, 100 + number, 48).save(train.join(format!("{number:03}.png"))).unwrap();
    }
    std::fs::copy(train.join("006.png"), fake.join("003.png")).unwrap();
    metadata(&fake, 8, |number| (format!("Finding {}.", number / 3), None));
    metadata(&train, 10, |number| ("No finding.".into(), Some(format!("patient {}", number / 2))));
    let (out, statistics) = (root.join("deep/out"), root.join("real.npz"));
    let [whole, features, _] = weight_files();
    let run = evaluate(
        &[
            "--real",
            shown(&real),
            "--fake",
            shown(&fake),
            "--base",
            shown(&base),
            "--train",
            shown(&train),
            "--out",
            shown(&out),
            "--inception",
            shown(whole),
            "--splits",
            "2",
            "--replicates",
            "30",
            "--floor-splits",
            "3",
            "--save-statistics",
            shown(&statistics),
            "--resize",
            "clean",
            "--seed",
            "5",
        ],
        root,
    );
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert!(text(&run.stderr).contains("warning: N = 8 for 2048 features"), "{}", text(&run.stderr));
    let (table, report) = (text(&run.stdout), json(&out.join("metrics.json")));
    assert!(table.starts_with(&std::fs::read_to_string(out.join("metrics.md")).unwrap()));
    for line in
        ["| Figure | Base | LoRA | Difference |", "Inception Score, N = 8", "resize mode clean", "## Copies"]
    {
        assert!(table.contains(line), "{line} in {table}");
    }
    let figures = report["lora"]["figures"].as_array().unwrap();
    // These weights are not the published ones: nothing is called FID.
    let network = "inception-v3-other-weights";
    let expected = [
        "frechet_distance",
        "kernel_distance",
        "precision",
        "recall",
        "density",
        "coverage",
        "inception_score",
        "ms_ssim_within_prompt_3_scales",
    ];
    let names: Vec<&str> = figures.iter().map(|figure| figure["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), expected.len(), "{names:?}");
    for (name, expected) in names.iter().zip(expected) {
        let whole = format!("{expected}/{network}");
        assert!(*name == whole || *name == expected, "{name}, expected {whole}");
    }
    for figure in figures {
        assert_eq!((&figure["n_fake"], &figure["seed"]), (&8.into(), &5.into()), "{figure}");
        assert_eq!(figure["resolution"]["width"], 48);
        assert!(
            figure["value"].as_f64().unwrap().is_finite() && !figure["notes"].as_array().unwrap().is_empty()
        );
        if !figure["name"].as_str().unwrap().starts_with("ms_ssim") {
            assert_eq!((&figure["n_real"], &figure["extractor"]["resize"]), (&12.into(), &"clean".into()));
            assert_eq!(figure["extractor"]["hash"].as_str().unwrap().len(), 64);
        }
        assert!(figure["interval"]["low"].is_number(), "{figure}");
    }
    // Real images at the same N lie nearer than these do; the floor of the four others needs more of them.
    let frechet = &figures[0];
    assert!(frechet["floor"]["mean"].as_f64().unwrap() < frechet["value"].as_f64().unwrap(), "{frechet}");
    assert_eq!(frechet["floor"]["n"], 6);
    assert_eq!(report["base_model"]["figures"].as_array().unwrap().len(), 7, "the base has no prompts");
    assert_eq!(report["base_model"]["not_available"][0]["figure"], "ms_ssim_within_prompt");
    let copies = std::fs::read_to_string(out.join("copies.csv")).unwrap();
    let copy = copies.lines().find(|line| line.contains("003.png,")).unwrap();
    assert!(copy.contains("train/006.png,patient 3,0.000000,"), "{copy}");
    // Twelve held-out images are too few to say what is near.
    let copies = &report["copies"];
    assert_eq!(
        (&copies["calibration"], &copies["entries"][3]["pixels"]["nearest"]),
        (&Value::Null, &6.into())
    );
    assert!(image::open(out.join("copies.png")).unwrap().width() > 100);

    // The statistics that were kept give the same distance, and what cannot be had of them has a reason.
    let again = root.join("again");
    let mut arguments = vec![
        "--real",
        shown(&statistics),
        "--fake",
        shown(&fake),
        "--out",
        shown(&again),
        "--inception",
        shown(features),
        "--resize",
        "clean",
        "--quiet",
    ];
    let run = evaluate(&arguments, root);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report = json(&again.join("metrics.json"));
    let figure = &report["lora"]["figures"][0];
    let [found, expected] = [figure, frechet].map(|figure| figure["value"].as_f64().unwrap());
    assert!((found - expected).abs() < 1e-6 * expected, "{found} against {expected}");
    assert_eq!(figure["n_real"], 12);
    let table = text(&run.stdout);
    assert!(table.contains("| inception_score | not available: the weights have no last layer"), "{table}");
    assert!(table.contains("kid, precision"), "{table}");
    // Statistics of another resize mode are not compared with.
    arguments[9] = "pytorch-fid";
    fails(&arguments, root, &["--real", "real.npz", "resize mode is clean", "pytorch-fid"]);
}

/// One line on standard error with `words` in it.
fn fails(arguments: &[&str], cache: &Path, words: &[&str]) {
    let found = evaluate(arguments, cache);
    let message = text(&found.stderr);
    assert!(!found.status.success(), "{arguments:?} succeeded");
    let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: no {word:?} in {message}");
    }
}

#[test]
fn bad_input_says_what_is_wrong_and_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let good = images(root, "good", 1, 6);
    let [whole, features, broken] = weight_files();
    let out = root.join("out");
    let fails_with = |real: &Path, fake: &Path, weights: &Path, more: &[&str], words: &[&str]| {
        let mut arguments = vec![
            "--real",
            shown(real),
            "--fake",
            shown(fake),
            "--inception",
            shown(weights),
            "--out",
            shown(&out),
            "--replicates",
            "0",
            "--floor-splits",
            "0",
        ];
        arguments.extend(more);
        fails(&arguments, root, words);
        assert!(!out.exists(), "{arguments:?} left files");
    };
    let with = |fake: &Path, words: &[&str]| fails_with(&good, fake, features, &[], words);

    let empty = images(root, "empty", 1, 0);
    with(&empty, &["--fake", "no images", ".png"]);
    with(&root.join("none"), &["--fake", "none", "cannot be read"]);
    let cut = images(root, "cut", 2, 4);
    std::fs::write(cut.join("002.png"), &std::fs::read(cut.join("001.png")).unwrap()[..100]).unwrap();
    with(&cut, &["--fake", "002.png"]);
    let mixed = images(root, "mixed", 2, 5);
    picture(2, 9, 40).save(mixed.join("004.png")).unwrap();
    with(&mixed, &["004.png is 40x40", "48x48", "--size N"]);
    let one = images(root, "one", 2, 1);
    with(&one, &["--fake", "1 image", "at least 2"]);
    fails_with(&one, &good, features, &[], &["--real", "1 image", "at least 2"]);
    fails_with(
        &good,
        &good,
        whole,
        &[],
        &["Inception Score in 10 splits holds 6", "at least 20", "--splits"],
    );
    fails_with(&good, &good, broken, &[], &["--inception", "Conv2d_1a_3x3.bn.bias", "NaN"]);
    // Statistics that are none, and those of another network.
    let text = root.join("text.npz");
    std::fs::write(&text, "no archive").unwrap();
    fails_with(&text, &good, features, &[], &["--real", "text.npz", "no .npz archive"]);
    let narrow =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cxr-metrics/tests/figures/statistics.npz");
    fails_with(&narrow, &good, features, &[], &["--real", "number of features is 8", "2048"]);
    // Weights that are none.
    fails_with(&good, &good, &text, &[], &["--inception", "text.npz"]);
    fails_with(&good, &good, features, &["--pairs", "0"], &["--pairs is 0"]);
    // And none at all: where they are to be had.
    let arguments = ["--real", shown(&good), "--fake", shown(&good), "--out", shown(&out)];
    fails(&arguments, root, &["https://", "6726825d", "CXR_INCEPTION_WEIGHTS", "--inception"]);
}
