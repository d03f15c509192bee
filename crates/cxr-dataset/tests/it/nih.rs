use std::collections::BTreeMap;

use cxr_dataset::impression::NIH_FINDINGS;
use cxr_dataset::{
    Batches, Collection, ImageCheck, ImageOptions, LeakageReport, PromptTemplate, ReadOptions, Split,
    SplitConfig, TokenFilter, Wording, contact_sheet,
};
use cxr_tokenizer::ClipTokenizer;

use super::{shared, workspace, write, write_image};

fn thumbnails(options: &ReadOptions) -> Collection {
    Collection::open(&workspace("examples/data/nih-chest-64"), options).unwrap()
}

#[test]
fn the_thumbnails_are_whole_and_split_by_patient() {
    let options = ReadOptions { images: ImageCheck::Decode, ..ReadOptions::default() };
    let mut all = thumbnails(&options);
    assert_eq!((all.source.as_str(), all.len(), all.rows_read, all.skipped.len()), ("nih", 1000, 1000, 0));
    let filter = TokenFilter::default().apply(&mut all, &ClipTokenizer::embedded()).unwrap();
    assert_eq!((filter.kept, filter.empty, filter.too_long), (1000, 0, 0));

    let split = Split::new(&all, &SplitConfig::default()).unwrap();
    let leakage = LeakageReport::measure(&all, &split, true).unwrap();
    assert_eq!((leakage.shared_groups, leakage.ungrouped_pairs), (0, 0));
    assert_eq!(leakage.test_pairs_with_identical_image, Some(0));
    let report = all.preparation_report(Some(&split), Some(leakage));
    assert_eq!(report.groups, 264);
    assert_eq!(report.per_view, BTreeMap::from([("AP".to_owned(), 363), ("PA".to_owned(), 637)]));
    assert_eq!(
        (report.per_label["Effusion"], report.per_label["Hernia"], report.per_label.len()),
        (170, 9, 14)
    );
    let sizes = report.split.unwrap();
    // The data card quotes these four.
    assert_eq!((sizes.train, sizes.train_groups, sizes.test, sizes.test_groups), (800, 215, 200, 49));
    // Every finding that can be judged is on both sides.
    for label in ["Effusion", "Infiltration", "Atelectasis", "Cardiomegaly"] {
        assert!(sizes.train_per_label[label] > 0 && sizes.test_per_label[label] > 0, "{label}");
    }
}

#[test]
fn images_may_be_sorted_into_folders() {
    let folder = tempfile::tempdir().unwrap();
    let rows = "a.png,Mass,1,PA\nb.png,No Finding,2,AP\nc.png,Hernia,3,AP\n";
    let table = format!("Image Index,Finding Labels,Patient ID,View Position\n{rows}");
    write(folder.path(), "labels.csv", &table);
    let places = ["a.png", "train/b.png", "test/1_abnormal/c.png"];
    for (i, place) in places.iter().enumerate() {
        write_image(folder.path(), place, i as u8);
    }
    let all = super::open(folder.path()).unwrap();
    let found: Vec<_> = all.pairs.iter().map(|pair| pair.image.clone()).collect();
    assert_eq!(found, places.map(|place| folder.path().join(place)));
}

#[test]
fn the_thumbnails_are_the_same_in_the_folders_they_came_in() {
    let Some(folder) = shared("nih-chest-64") else { return };
    let came = Collection::open(&folder, &ReadOptions::default()).unwrap();
    let ours = thumbnails(&ReadOptions::default());
    assert_eq!(came.metadata_rows(), ours.metadata_rows());
    for (came, ours) in came.pairs.iter().zip(&ours.pairs).step_by(50) {
        let pixels = |pair: &cxr_dataset::Pair| cxr_dataset::image::load(&pair.image, &ImageOptions::new(64));
        assert_eq!(pixels(came).unwrap(), pixels(ours).unwrap(), "{}", ours.name);
    }
}

#[test]
fn impressions_state_the_labels_and_nothing_else() {
    let all = thumbnails(&ReadOptions::default());
    for pair in &all.pairs {
        for finding in NIH_FINDINGS {
            let stated = finding.phrases.iter().any(|phrase| sentences(&pair.impression).contains(phrase));
            let labelled = pair.labels.contains(finding.label)
                || (pair.labels.is_empty() && finding.label == "No Finding");
            assert_eq!(stated, labelled, "row {}: {} / {:?}", pair.row, finding.label, pair.impression);
        }
    }
    let first = &all.pairs[0];
    assert_eq!((first.name.as_str(), first.row, first.group.as_deref()), ("00000001_000.png", 2, Some("1")));
    assert_eq!((first.extra["age"].as_str(), first.extra["sex"].as_str()), ("57", "M"));
    assert_eq!(all, thumbnails(&ReadOptions::default()), "reading is deterministic");

    let options = ReadOptions {
        wording: Wording::Single,
        prompt: PromptTemplate::with_view(),
        ..ReadOptions::default()
    };
    let single = thumbnails(&options);
    assert_eq!(single.pairs[0].text, "Frontal chest radiograph, PA view. Cardiomegaly.");
    assert_eq!(single.pairs[0].impression, "Cardiomegaly.");
    assert!(single.pairs.iter().zip(&all.pairs).any(|(a, b)| a.impression != b.impression));
}

/// `A. B. C.` -> `A.`, `B.`, `C.`
fn sentences(text: &str) -> Vec<&str> {
    text.split_inclusive('.').map(str::trim).collect()
}

#[test]
fn batches_hold_the_thumbnails_as_they_are() {
    let all = thumbnails(&ReadOptions::default());
    let positions: Vec<usize> = (0..37).collect();
    let batches = Batches::new(&all, &positions, ImageOptions::new(64), 8, 5).unwrap();
    let first = batches.epoch(0, 0).next().unwrap().unwrap();
    assert_eq!(first.shape, [8, 3, 64, 64]);
    let plane = 64 * 64;
    for (i, &index) in first.indices.iter().enumerate() {
        let own = &first.pixels[i * 3 * plane..(i + 1) * 3 * plane];
        assert_eq!(own[..plane], own[2 * plane..]);
        let file = image::open(&all.pairs[index].image).unwrap().into_luma8();
        let back = own[..plane].iter().map(|v| ((v + 1.0) * 127.5).round() as u8);
        assert!(back.eq(file.into_raw()), "no pixel changes at the stored size");
    }

    let pictures: Vec<_> = positions[..4]
        .iter()
        .map(|&i| cxr_dataset::image::load(&all.pairs[i].image, &ImageOptions::new(32)).unwrap().to_rgb())
        .collect();
    assert_eq!(contact_sheet(&pictures, 2).dimensions(), (70, 70));
}
