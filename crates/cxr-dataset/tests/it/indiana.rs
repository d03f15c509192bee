use std::path::Path;

use cxr_dataset::{
    Collection, Deidentified, ImageCheck, ImageOptions, LeakageReport, ReadOptions, Split, SplitConfig,
    SplitRule, TokenFilter, TokenFilterReport,
};
use cxr_tokenizer::ClipTokenizer;

use super::{shared, workspace, write_image};

fn texts(folder: &Path, deidentified: Deidentified) -> (Collection, TokenFilterReport) {
    let options = ReadOptions { images: ImageCheck::None, deidentified, ..ReadOptions::default() };
    let mut all = Collection::open(folder, &options).unwrap();
    let report = TokenFilter::default().apply(&mut all, &ClipTokenizer::embedded()).unwrap();
    (all, report)
}

#[test]
fn the_committed_tables_give_known_counts() {
    let folder = workspace("crates/cxr-dataset/tests/data/indiana");
    let (all, report) = texts(&folder, Deidentified::Keep);
    assert_eq!((report.read, report.empty, report.too_long, report.kept), (118, 6, 3, 109));
    assert_eq!((all.source.as_str(), all.rows_read), ("kaggle", 118));
    let views = all.preparation_report(None, None).per_view;
    assert_eq!((views["Frontal"], views["Lateral"]), (55, 54));

    let pair = all.pairs.iter().find(|pair| pair.name == "1_IM-0001-2001.dcm.png").unwrap();
    assert_eq!(pair.text, "Atelectasis, and an effusion.", "line breaks are white space");
    assert_eq!(pair.labels.iter().collect::<Vec<_>>(), ["Pleural Effusion", "Pulmonary Atelectasis"]);
    assert_eq!(pair.extra["MeSH"], "Pulmonary Atelectasis/base;Pleural Effusion/left");
    assert_eq!((pair.group.as_deref(), pair.row), (Some("1"), 3));
    assert_eq!(all.pairs.iter().filter(|pair| pair.text.contains("XXXX")).count(), 4);

    let (stripped, report) = texts(&folder, Deidentified::Strip);
    assert_eq!(report.kept, 109);
    assert!(stripped.pairs.iter().all(|pair| !pair.text.contains("XXXX")));
    let (dropped, report) = texts(&folder, Deidentified::Drop);
    assert_eq!((report.read, report.kept, dropped.dropped_deidentified), (114, 105, 4));
}

#[test]
fn images_are_found_in_either_folder() {
    for sub in ["images/images_normalized", "images"] {
        let folder = tempfile::tempdir().unwrap();
        for name in ["indiana_reports.csv", "indiana_projections.csv"] {
            let from = workspace("crates/cxr-dataset/tests/data/indiana").join(name);
            std::fs::copy(from, folder.path().join(name)).unwrap();
        }
        let options = ReadOptions { images: ImageCheck::None, ..ReadOptions::default() };
        for (i, pair) in Collection::open(folder.path(), &options).unwrap().pairs.iter().enumerate() {
            write_image(folder.path(), &format!("{sub}/{}", pair.name), i as u8);
        }
        let all = super::open(folder.path()).unwrap();
        assert_eq!(all.len(), 118);
        assert!(all.pairs.iter().all(|pair| pair.image.starts_with(folder.path().join(sub))));
    }
}

#[test]
fn the_real_tables_give_the_papers_pairs() {
    let Some(folder) = shared("iu-xray") else { return };
    let (all, report) = texts(&folder, Deidentified::Keep);
    assert_eq!((report.read, report.empty, report.too_long, report.kept), (7466, 52, 133, 7281));
    let summary = all.preparation_report(None, None);
    assert_eq!((summary.groups, summary.distinct_impressions), (3749, 1699));
    assert_eq!(all.pairs.iter().filter(|pair| pair.text.contains("XXXX")).count(), 1122);

    let paper = SplitConfig { rule: SplitRule::PairLevel, ..SplitConfig::default() };
    let split = Split::new(&all, &paper).unwrap();
    assert_eq!((split.train.len(), split.test.len()), (5825, 1456));
    let leakage = LeakageReport::measure(&all, &split, false).unwrap();
    let share = |part: usize| part as f64 / 1456.0;
    assert!((share(leakage.test_pairs_with_shared_group) - 0.76).abs() < 0.04, "{leakage:?}");
    assert!((share(leakage.test_pairs_with_repeated_impression) - 0.90).abs() < 0.03, "{leakage:?}");

    let groups = Split::new(&all, &SplitConfig::default()).unwrap();
    assert!(groups.train.len().abs_diff(5825) <= 2, "{}", groups.train.len());
    assert_eq!(LeakageReport::measure(&all, &groups, false).unwrap().shared_groups, 0);
}

#[test]
fn the_real_images_load() {
    let Some(folder) = shared("iu-xray") else { return };
    // Only a few of the images are there: the others are skipped and counted.
    let options = ReadOptions {
        images: ImageCheck::Decode,
        on_problem: cxr_dataset::OnProblem::Skip,
        ..ReadOptions::default()
    };
    let all = Collection::open(&folder, &options).unwrap();
    assert_eq!((all.len(), all.skipped.len()), (9, 7457));
    assert!(all.skipped.iter().all(|row| row.kind == "missing image"));
    for pair in &all.pairs {
        let pixels = cxr_dataset::image::load(&pair.image, &ImageOptions::paper(128)).unwrap();
        let mean = pixels.values.iter().sum::<f32>() / pixels.values.len() as f32;
        assert!(mean.abs() < 0.7, "{}: mean {mean}", pair.name);
    }
}
