use cxr_core::progress::Silent;
use cxr_dataset::synthetic::{Shape, write_indiana};
use cxr_dataset::{
    Collection, Deidentified, ImageCache, ImageLoader, ImageOptions, LeakageReport, OnProblem, ReadOptions,
    Split, SplitConfig, SplitRule, TokenFilter,
};
use cxr_tokenizer::ClipTokenizer;

/// A small folder of the generator goes all the way; what is asked of it is counted here by other means.
#[test]
fn a_generated_collection_goes_all_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape { reports: 130, images: 252, side: 40 };
    write_indiana(folder.path(), shape, 5).unwrap();
    let mut all = super::open(folder.path()).unwrap();
    assert_eq!((all.source.as_str(), all.rows_read, all.len()), ("kaggle", 252, 252));
    let empty = all.pairs.iter().filter(|pair| pair.text.is_empty()).count();
    let marked = all.pairs.iter().filter(|pair| pair.text.contains("XXXX")).count();
    assert!(empty > 0 && marked > 20, "{empty} {marked}");
    let report = TokenFilter::default().apply(&mut all, &ClipTokenizer::embedded()).unwrap();
    assert_eq!((report.read, report.empty), (252, empty));
    assert!(report.too_long > 0 && report.longest() > 77);
    assert_eq!(report.kept, 252 - empty - report.too_long);

    let cache = ImageCache::on_disk(folder.path().join("cache")).unwrap();
    let images = ImageLoader::new(ImageOptions::new(16)).with_cache(cache.into());
    all.load_images(&images, OnProblem::Stop, &Silent).unwrap();
    assert_eq!(images.cache.unwrap().counts().made, all.len() as u64);
    for rule in [SplitRule::ByGroup, SplitRule::PairLevel, SplitRule::ByPrompt] {
        let split = Split::new(&all, &SplitConfig { rule, ..SplitConfig::default() }).unwrap();
        let leakage = LeakageReport::measure(&all, &split, true).unwrap();
        match rule {
            SplitRule::ByGroup => assert_eq!(leakage.shared_groups, 0),
            SplitRule::ByPrompt => assert_eq!(leakage.repeated_impressions, 0),
            SplitRule::PairLevel => assert!(leakage.shared_groups > 0 && leakage.repeated_impressions > 0),
        }
        assert_eq!(leakage.test_pairs_with_identical_image, Some(0), "every image is one of its own");
    }

    let dropping = ReadOptions { deidentified: Deidentified::Drop, ..ReadOptions::default() };
    let dropped = Collection::open(folder.path(), &dropping).unwrap();
    assert_eq!((dropped.dropped_deidentified, dropped.len()), (marked, 252 - marked));
}

#[test]
fn the_generator_gives_the_same_bytes_again() {
    let [a, b] = [0, 1].map(|_| {
        let folder = tempfile::tempdir().unwrap();
        write_indiana(folder.path(), Shape { reports: 9, images: 20, side: 24 }, 1).unwrap();
        folder
    });
    let names: Vec<String> = super::open(a.path()).unwrap().pairs.into_iter().map(|pair| pair.name).collect();
    assert_eq!(names.len(), 20);
    let files = names.iter().map(|name| format!("images/images_normalized/{name}"));
    for file in files.chain(["indiana_reports.csv".into(), "indiana_projections.csv".into()]) {
        let read = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(&file)).unwrap();
        assert_eq!(read(&a), read(&b), "{file}");
    }
}
