//! `prepare` as a person runs it, on collections made on the spot.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cxr::dataset::synthetic::{Shape, write_indiana};
use cxr::dataset::{Collection, ReadOptions, Split};
use serde_json::Value;

/// `cargo test` builds the examples beside its own binaries.
fn prepare(data: &Path, out: &Path, arguments: &[&str]) -> Output {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap().join("examples");
    let mut command = Command::new(folder.join("prepare"));
    command.arg("--data").arg(data).arg("--out").arg(out).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs, and returns what was printed.
fn succeeds(data: &Path, out: &Path, arguments: &[&str]) -> String {
    let run = prepare(data, out, arguments);
    assert!(run.status.success(), "{arguments:?}: {}", text(&run.stderr));
    text(&run.stdout)
}

/// One line on standard error with `words` in it, and nothing in the folder.
fn fails(data: &Path, arguments: &[&str], words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let found = prepare(data, &out, arguments);
    let message = text(&found.stderr);
    assert!(!found.status.success(), "{arguments:?} succeeded");
    let errors: Vec<&str> = message.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: no {word:?} in {message}");
    }
    assert_eq!(out.read_dir().map_or(0, |entries| entries.count()), 0, "{arguments:?} left files");
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn indiana() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_indiana(folder.path(), Shape { reports: 130, images: 252, side: 48 }, 3).unwrap();
    folder
}

#[test]
fn a_collection_is_prepared_and_can_be_read_again() {
    let data = indiana();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("deep/out");
    let cache = folder.path().join("cache");
    let arguments = ["--size", "32", "--cache", cache.to_str().unwrap(), "--quiet"];
    let printed = succeeds(data.path(), &out, &arguments);
    assert!(printed.ends_with(&format!("{}\n", out.display())), "{printed}");

    let report = json(&out.join("report.json"));
    let of = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"));
    let filter = &report["token_filter"];
    let (empty, long) = (filter["empty"].as_u64().unwrap(), filter["too_long"].as_u64().unwrap());
    assert!(empty > 0 && long > 0, "{filter}");
    assert_eq!((of("rows_read"), of("kept")), (252, 252 - empty - long));
    for (name, count) in [("read", 252), ("  empty", empty), ("  too long", long), ("kept", of("kept"))] {
        let line = printed
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("{name}: {printed}"));
        assert!(line.split_whitespace().any(|word| word == count.to_string()), "{line}");
    }
    for word in
        ["view Frontal", "view Lateral", "label Cardiomegaly", "split by_group", "0 group(s) stand on both"]
    {
        assert!(printed.contains(word), "no {word:?} in {printed}");
    }
    assert_eq!((report["source"].as_str(), report["images"]["size"].as_u64()), (Some("kaggle"), Some(32)));
    assert_eq!(report["leakage"]["shared_groups"], 0);
    assert_eq!(report["leakage"]["test_pairs_with_identical_image"], 0);
    for (name, (width, height)) in [("tokens.png", (900, 480)), ("sheet.png", (1020, 1404))] {
        let picture = image::open(out.join(name)).unwrap().into_rgb8();
        assert_eq!(picture.dimensions(), (width, height), "{name}");
        let colours: std::collections::BTreeSet<[u8; 3]> = picture.pixels().map(|pixel| pixel.0).collect();
        assert!(colours.len() > 8, "{name} is blank");
    }

    // The table of pairs is a collection of its own, which the split fits.
    let pairs = Collection::open(&out.join("pairs.csv"), &ReadOptions::default()).unwrap();
    let split = Split::read(&out.join("split.json"), &pairs).unwrap();
    assert_eq!((split.train.len() + split.test.len()) as u64, of("kept"));
    let original = Collection::open(data.path(), &ReadOptions::default()).unwrap();
    for (position, pair) in pairs.pairs.iter().enumerate() {
        let own = original.pairs.iter().find(|own| own.name == pair.name).unwrap();
        assert_eq!(
            (&pair.text, &pair.group, &pair.view, &pair.labels),
            (&own.text, &own.group, &own.view, &own.labels)
        );
        assert_eq!(std::fs::canonicalize(&pair.image).unwrap(), std::fs::canonicalize(&own.image).unwrap());
        let side = if split.test.contains(&position) { "test" } else { "train" };
        assert_eq!((pair.extra["side"].as_str(), &pair.extra["MeSH"]), (side, &own.extra["MeSH"]));
    }

    // The same again: the same files, and nothing decoded.
    let read = |name: &str| std::fs::read(out.join(name)).unwrap();
    let names = ["pairs.csv", "split.json", "report.json", "tokens.png", "sheet.png"];
    let before = names.map(read);
    let printed = succeeds(data.path(), &out, &arguments);
    assert!(printed.contains("cache: 0 made"), "{printed}");
    assert_eq!(names.map(read), before);
    assert_eq!(out.read_dir().unwrap().count(), names.len(), "nothing is left beside them");
}

#[test]
fn settings_reach_the_report() {
    let data = indiana();
    let folder = tempfile::tempdir().unwrap();
    let report = |arguments: &[&str]| {
        let out = folder.path().join(format!("{}", arguments.len()) + arguments[0]);
        succeeds(data.path(), &out, &[arguments, &["--quiet", "--size", "16"]].concat());
        (json(&out.join("report.json")), out)
    };
    let (paper, _) =
        report(&["--split", "pair-level", "--filter", "bilinear", "--train-fraction", "0.5", "--seed", "9"]);
    let kept = paper["kept"].as_u64().unwrap();
    assert_eq!(paper["split"]["train"].as_u64().unwrap(), kept.div_ceil(2));
    assert_eq!(
        (paper["split"]["rule"].as_str(), paper["split"]["seed"].as_u64()),
        (Some("pair_level"), Some(9))
    );
    assert!(paper["leakage"]["shared_groups"].as_u64().unwrap() > 0);
    assert_eq!(paper["images"]["filter"], "bilinear");

    let (chosen, out) =
        report(&["--view", "lateral", "--label", "cardiomegaly", "--label", "Opacity", "--view-token"]);
    assert_eq!(chosen["per_view"].as_object().unwrap().keys().collect::<Vec<_>>(), ["Lateral"]);
    assert_eq!(
        chosen["per_label"].as_object().unwrap().keys().collect::<Vec<_>>(),
        ["Cardiomegaly", "Opacity"]
    );
    assert!(chosen["left_out_by_view_or_label"].as_u64().unwrap() > 126);
    let pairs = std::fs::read_to_string(out.join("pairs.csv")).unwrap();
    assert!(pairs.contains("Lateral chest radiograph. "), "{pairs}");

    let (texts, out) =
        report(&["--texts-only", "--deidentified", "drop", "--split", "by-prompt", "--max-tokens", "500"]);
    assert!(texts["dropped_deidentified"].as_u64().unwrap() > 20);
    assert_eq!(
        (texts["leakage"]["repeated_impressions"].as_u64(), &texts["images"]),
        (Some(0), &Value::Null)
    );
    assert_eq!(texts["token_filter"]["too_long"], 0);
    assert!(!out.join("sheet.png").exists());
}

#[test]
fn bad_images_and_rows_stop_or_are_counted() {
    let data = indiana();
    let pictures = data.path().join("images/images_normalized");
    let mut names: Vec<PathBuf> = pictures.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    // Of a report that has a text to keep.
    let named = |uid: &str| {
        names.iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with(uid)).unwrap()
    };
    std::fs::write(named("1_"), "no picture").unwrap();
    fails(data.path(), &["--quiet"], &["--data", "indiana_projections.csv", "row 2", "1_IM", "skip"]);
    std::fs::remove_file(named("2_")).unwrap();
    fails(data.path(), &["--quiet"], &["--data", "is missing", "2_IM"]);
    let table = data.path().join("indiana_projections.csv");
    let rows = std::fs::read_to_string(&table).unwrap();
    std::fs::write(&table, format!("{rows}99999,x.png,Frontal\n5,short\n")).unwrap();
    fails(data.path(), &["--quiet"], &["row 254", "99999"]);

    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let printed = succeeds(data.path(), &out, &["--skip", "--quiet", "--size", "16"]);
    let skipped = &json(&out.join("report.json"))["skipped"];
    for kind in ["no report", "broken row", "missing image", "undecodable image"] {
        assert_eq!(skipped[kind], 1, "{skipped}");
        assert!(printed.contains(&format!("skipped, {kind}")), "{printed}");
    }
    let rows = json(&out.join("report.json"))["skipped_rows"].to_string();
    assert!(rows.contains("row 254 of") && rows.contains("2_IM"), "{rows}");
}

#[test]
fn anybodys_table_and_what_is_wrong_with_flags() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = "path,report,patient,Mass,pose\n".to_string();
    for i in 0..12_u8 {
        image::GrayImage::from_pixel(20, 24, image::Luma([i * 20]))
            .save(folder.path().join(format!("{i}.png")))
            .unwrap();
        table += &format!("{i}.png,Text number {i}.,p{},{},PA\n", i / 2, i % 2);
    }
    let file = folder.path().join("mine.csv");
    std::fs::write(&file, table).unwrap();
    let out = folder.path().join("out");
    let columns =
        ["--image-col", "path", "--text-col", "report", "--label-cols", "Mass", "--view-col", "pose"];
    let printed = succeeds(&file, &out, &[&columns[..], &["--group-col", "patient", "--quiet"]].concat());
    assert!(printed.contains("label Mass") && printed.contains("view PA"), "{printed}");
    assert!(!printed.contains("nothing protects"), "{printed}");
    let printed = succeeds(&file, &out, &[&columns[..], &["--quiet"]].concat());
    assert!(printed.contains("nothing protects this split"), "{printed}");

    fails(&file, &[], &["--data", "lacks the column(s) file_name, text"]);
    fails(&file, &["--group-col", "nobody"], &["nobody", "patient"]);
    fails(&folder.path().join("nowhere"), &[], &["--data", "nowhere"]);
    let columns = &columns[..];
    fails(&file, &[columns, &["--label", "Hernia"]].concat(), &["--label Hernia", "Mass"]);
    fails(&file, &[columns, &["--view", "lateral"]].concat(), &["--view lateral", "PA"]);
    fails(&file, &["--size", "0"], &["--size", "8192"]);
    fails(&file, &["--train-fraction", "1"], &["--train-fraction", "between 0 and 1"]);
    fails(&file, &["--max-tokens", "2"], &["--max-tokens", "3 or more"]);
    fails(&file, &["--template", "A {sex} patient."], &["--template", "{sex}"]);
    let cache = file.join("cache");
    fails(&file, &[columns, &["--cache", cache.to_str().unwrap()]].concat(), &["--cache", "mine.csv"]);
    fails(indiana().path(), &["--text-col", "findings"], &["--text-col", "kaggle"]);
}
