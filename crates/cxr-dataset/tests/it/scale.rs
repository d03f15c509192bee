use std::time::Instant;

use cxr_core::progress::Silent;
use cxr_dataset::synthetic::{Shape, write_indiana};
use cxr_dataset::{
    Collection, Deidentified, ImageCache, ImageLoader, ImageOptions, LeakageReport, OnProblem, ReadOptions,
    Split, SplitConfig, SplitRule, TokenFilter,
};
use cxr_tokenizer::ClipTokenizer;
use rayon::prelude::*;

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

/// Resident memory in MiB, where the system says it.
fn resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1024.0)
}

/// The full shape: keeping images on disk costs little beside decoding and resizing them, and no memory.
#[test]
#[ignore = "cargo test --release -p cxr-dataset --test it scale -- --ignored --nocapture (a minute, 0.5 GB of disk)"]
fn preparing_the_full_shape_costs_what_decoding_costs() {
    let folder = tempfile::tempdir().unwrap();
    write_indiana(folder.path(), Shape::INDIANA, 0).unwrap();
    let all = super::open(folder.path()).unwrap();
    assert_eq!(all.len(), 7466);
    let options = ImageOptions::new(128);
    let alone = || -> usize {
        let load = |pair: &cxr_dataset::Pair| {
            cxr_dataset::image::load_square(&pair.image, &options).unwrap().bytes()
        };
        all.pairs.par_iter().map(load).sum()
    };
    let prepared = |round: usize, images: usize| {
        let mut some = all.clone();
        some.pairs.truncate(images);
        let cache = ImageCache::on_disk(folder.path().join(format!("cache-{round}-{images}"))).unwrap();
        let images = ImageLoader::new(options.clone()).with_cache(cache.into());
        some.load_images(&images, OnProblem::Stop, &Silent).unwrap();
    };
    // Memory first: what the allocator keeps of the one run is there for the other.
    prepared(0, 2000);
    if let Some(before) = resident() {
        prepared(0, 7466);
        let grown = resident().unwrap() - before;
        println!(
            "memory: {before:.0} MiB after 2,000 images, {grown:+.1} MiB after 7,466 (of 117 MiB of pixels)"
        );
        assert!(grown < 20.0, "{grown} MiB");
    } else {
        println!("skipped: this system does not say how much memory a process has");
    }
    // A first time, to have the files in memory; then in turns, so that both see the machine in the same state.
    alone();
    let mut ratios: Vec<f64> = (1..=7)
        .map(|round| {
            let start = Instant::now();
            assert_eq!(alone(), 7466 * 128 * 128);
            let alone = start.elapsed().as_secs_f64();
            let start = Instant::now();
            prepared(round, 7466);
            let prepared = start.elapsed().as_secs_f64();
            println!(
                "decoding and resizing {alone:.2} s, preparing {prepared:.2} s, {:.2} of its rate",
                alone / prepared
            );
            alone / prepared
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("median {:.2}", ratios[3]);
    assert!(ratios[3] > 0.9, "preparing has {:.2} of the rate of decoding and resizing alone", ratios[3]);
}
