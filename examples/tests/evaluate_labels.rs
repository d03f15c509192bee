//! `evaluate` on images with labels: copies, findings and usefulness, with whole networks of procedural weights.

use std::path::{Path, PathBuf};
use std::process::Command;

use cxr::core::metadata::{MetadataRow, write_jsonl};
use cxr::core::random::Stream;
use cxr::core::tensor_file::{RawTensor, write_safetensors};
use cxr::metrics::densenet::DenseNetConfig;
use cxr::metrics::inception::layers;
use image::GrayImage;
use serde_json::Value;

/// Inception without its last layer.
fn inception(path: &Path) {
    let mut tensors = Vec::new();
    for (number, layer) in layers().into_iter().enumerate() {
        let shape = vec![layer.output, layer.input, layer.kernel[0], layer.kernel[1]];
        let scale = (2.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
        let mut values = Stream::new(0, "inception", number as u64).normals(shape.iter().product());
        values.iter_mut().for_each(|v| *v *= scale);
        tensors.push((format!("{}.conv.weight", layer.name), RawTensor::from_f32(shape, values)));
        for (part, value) in [("weight", 1.0), ("bias", 0.1), ("running_mean", 0.0), ("running_var", 1.0)] {
            let values = RawTensor::from_f32(vec![layer.output], vec![value; layer.output]);
            tensors.push((format!("{}.bn.{part}", layer.name), values));
        }
    }
    write_safetensors(path, &tensors, &Default::default()).unwrap();
}

fn densenet(path: &Path) {
    let config = DenseNetConfig::torchxrayvision("densenet121-res224-all").unwrap();
    let mut tensors = Vec::new();
    for (number, (name, shape)) in config.tensors().into_iter().enumerate() {
        let count = shape.iter().product();
        let values = match name.as_str() {
            _ if shape.len() > 1 => {
                let scale = (2.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
                let values = Stream::new(0, "densenet", number as u64).normals(count);
                values.iter().map(|v| v * scale).collect()
            }
            "features.norm0.running_var" => vec![4e5; count],
            _ if name.ends_with("weight") || name.ends_with("running_var") => vec![1.0; count],
            _ => vec![0.0; count],
        };
        tensors.push((name, RawTensor::from_f32(shape, values)));
    }
    write_safetensors(path, &tensors, &Default::default()).unwrap();
}

/// Every other image has an effusion, which is a bright lower half.
fn shows(number: u64) -> bool {
    number % 2 == 1
}

fn picture(kind: &str, number: u64) -> GrayImage {
    let mut stream = Stream::new(1, kind, number);
    let waves: Vec<f32> = stream.normals(12);
    GrayImage::from_fn(48, 48, |x, y| {
        let (u, v) = (x as f32 / 48.0, y as f32 / 48.0);
        let wave: f32 =
            (0..6).map(|i| waves[i] * (3.0 * (i as f32 + 1.0) * u + 6.0 * waves[i + 6] * v).sin()).sum();
        let fluid = if shows(number) && v > 0.5 { 70.0 } else { 0.0 };
        image::Luma([(90.0 + 20.0 * wave + fluid).clamp(0.0, 255.0) as u8])
    })
}

fn images(root: &Path, name: &str, count: u64) -> PathBuf {
    let folder = root.join(name);
    std::fs::create_dir(&folder).unwrap();
    let rows: Vec<MetadataRow> = (0..count)
        .map(|number| {
            let file_name = format!("{number:03}.png");
            picture(name, number).save(folder.join(&file_name)).unwrap();
            let (text, label) = if shows(number) {
                ("Pleural effusion.", "Effusion")
            } else {
                ("No effusion.", "No Finding")
            };
            MetadataRow {
                file_name,
                text: text.into(),
                labels: vec![label.into()],
                view: Some("PA".into()),
                group: (name != "fake").then(|| format!("{name} {number}")),
                ..MetadataRow::default()
            }
        })
        .collect();
    write_jsonl(folder.join("metadata.jsonl"), &rows).unwrap();
    folder
}

/// metrics.json and metrics.md.
fn evaluate(arguments: &[&str], out: &Path) -> (Value, String) {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    let mut command = Command::new(folder.join("evaluate"));
    command.env_remove("CXR_INCEPTION_WEIGHTS").args(["--device", "flex", "--quiet", "--floor-splits", "0"]);
    command.args(["--replicates", "20", "--out"]).arg(out);
    let found = command.args(arguments).output().unwrap();
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    let json = serde_json::from_slice(&std::fs::read(out.join("metrics.json")).unwrap()).unwrap();
    (json, std::fs::read_to_string(out.join("metrics.md")).unwrap())
}

fn row<'a>(report: &'a Value, finding: &str) -> &'a Value {
    report["rows"].as_array().unwrap().iter().find(|row| row["finding"] == finding).unwrap()
}

#[test]
fn images_with_labels_are_asked_what_they_copy_show_and_teach() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let [real, fake, train] =
        [("real", 100), ("fake", 24), ("train", 40)].map(|(name, count)| images(root, name, count));
    // A mirrored copy: of an image with the same label.
    let copied = image::open(train.join("009.png")).unwrap().fliph();
    copied.save(fake.join("003.png")).unwrap();
    let weights = root.join("inception.safetensors");
    inception(&weights);
    let shown = |path: &Path| path.to_str().unwrap().to_owned();
    let common = ["--fake", &shown(&fake), "--inception", &shown(&weights)].map(str::to_owned);
    let with = |more: &[&str], out: &str| {
        let all: Vec<&str> = common.iter().map(String::as_str).chain(more.iter().copied()).collect();
        evaluate(&all, &root.join(out))
    };

    let (report, text) = with(&["--real", &shown(&real), "--train", &shown(&train)], "all");
    let copies = &report["copies"];
    assert_eq!(copies["calibration"]["held_out"], 100);
    assert_eq!(copies["calibration"]["flagged"], 0);
    let entries = copies["entries"].as_array().unwrap();
    let flagged: Vec<&Value> =
        entries.iter().filter(|e| !e["evidence"].as_array().unwrap().is_empty()).collect();
    let copy = flagged.iter().find(|e| e["image"] == 3).expect("the copy is flagged");
    assert_eq!(
        (copy["pixels"]["nearest"].as_u64(), &copy["view"]["mirrored"]),
        (Some(9), &Value::Bool(true))
    );
    assert!(flagged.len() <= 3, "{flagged:?}");
    assert_eq!(copies["prompts"]["training_prompts"], 24);
    let table = std::fs::read_to_string(root.join("all/copies.csv")).unwrap();
    assert!(table.lines().nth(1).unwrap().contains("003.png"), "the strongest first: {table}");
    assert!(image::open(root.join("all/copies.png")).unwrap().width() >= 256);

    // Linear heads that the training images taught: the label is plain to see.
    let findings = row(&report["findings"], "Effusion");
    assert!(findings["synthetic"]["auroc"]["value"].as_f64().unwrap() > 0.9, "{findings}");
    assert!(findings["real"]["auroc"]["value"].as_f64().unwrap() > 0.9, "{findings}");
    assert_eq!(
        (findings["synthetic"]["positives"].as_u64(), findings["real"]["n"].as_u64()),
        (Some(12), Some(100))
    );
    let denied =
        report["findings"]["rows"].as_array().unwrap().iter().find(|row| row["slice"] == "denied").unwrap();
    assert_eq!(denied["synthetic"]["negatives"], 12);
    let usefulness = row(&report["usefulness"], "Effusion");
    for side in ["real", "synthetic", "both"] {
        assert!(usefulness[side]["auroc"]["value"].as_f64().unwrap() > 0.8, "{side}: {usefulness}");
    }
    assert_eq!(report["not_available"], Value::Array(vec![]));
    for words in ["look like copies", "Does an image show its findings?", "| Effusion | all |", "linear head"]
    {
        assert!(text.contains(words), "{words} in {text}");
    }
    assert!(!text.contains("NaN"), "{text}");
}

#[test]
fn what_cannot_be_had_is_said_with_the_reason() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let [real, fake, train] =
        [("real", 12), ("fake", 8), ("train", 12)].map(|(name, count)| images(root, name, count));
    let (weights, domain) = (root.join("inception.safetensors"), root.join("densenet.safetensors"));
    inception(&weights);
    densenet(&domain);
    let shown = |path: &Path| path.to_str().unwrap().to_owned();
    let arguments = [
        ("--real", &real),
        ("--fake", &fake),
        ("--train", &train),
        ("--inception", &weights),
        ("--densenet", &domain),
    ];
    let arguments: Vec<String> =
        arguments.iter().flat_map(|(flag, path)| [flag.to_string(), shown(path)]).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (report, text) = evaluate(&arguments, &root.join("out"));
    // Too few held-out images: neighbours, and no flags.
    assert_eq!(report["copies"]["calibration"], Value::Null);
    assert_eq!(report["copies"]["entries"].as_array().unwrap().len(), 8);
    assert!(report["copies"]["notes"][0].as_str().unwrap().contains("99"));
    assert_eq!(report["copies"]["extractor"]["name"], "xrv-densenet121-res224-all");
    // The network's own outputs; of too few images, their number.
    let effusion = row(&report["findings"], "Effusion");
    assert_eq!(effusion["synthetic"]["auroc"]["state"], "too_few");
    assert_eq!(effusion["synthetic"]["auroc"]["found"], 4);
    assert!(text.contains("| Effusion | all | N = 4 | N = 6 |"), "{text}");
    // No finding has ten training images with it and ten without.
    let lacking = report["not_available"].as_array().unwrap();
    assert!(
        lacking.iter().any(|l| l["figure"] == "usefulness" && l["why"].as_str().unwrap().contains("--train"))
    );
    assert!(text.contains("usefulness: not available"), "{text}");
}
