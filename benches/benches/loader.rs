//! Images on their way to a batch: decoding and resizing alone, preparing a collection, and epochs with and without a
//! cache. The collection is invented, with images of the size that the paper's loader reads; `CXR_BENCH_DATA` names
//! another folder. `benches/loader.py` puts a Python loader's times beside these.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;

use burn::data::dataloader::DataLoaderBuilder;
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use cxr::core::progress::Silent;
use cxr::dataset::synthetic::{Shape, write_indiana};
use cxr::dataset::{
    BatchResult, Batches, Collection, EpochView, ImageBatcher, ImageCache, ImageLoader, ImageOptions,
    OnProblem, ReadOptions, SampleResult, image,
};
use cxr::kernels::Flex;
use cxr_benches as _;
use rayon::prelude::*;

/// Enough for a second or two of decoding.
const IMAGES: usize = 1024;
const SIDE: u32 = 128;
const BATCH: usize = 32;

/// The folder of invented images, made once.
fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("CXR_BENCH_DATA") {
        return folder.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")), PathBuf::from);
    let folder = target.join("bench-data/indiana");
    let marker = folder.join("whole");
    if !marker.exists() {
        write_indiana(&folder, Shape { reports: IMAGES / 2, images: IMAGES, side: 256 }, 0)
            .expect("it can be written");
        std::fs::write(marker, "").expect("it can be written");
    }
    folder
}

fn group<'a>(criterion: &'a mut Criterion, images: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group("loader");
    group.sample_size(10).throughput(Throughput::Elements(images as u64));
    group
}

fn loader(criterion: &mut Criterion) {
    let all = Collection::open(&folder(), &ReadOptions::default()).expect("the folder is whole");
    let options = ImageOptions::new(SIDE);
    let positions: Vec<usize> = (0..all.len()).collect();
    let mut group = group(criterion, all.len());

    // What everything else is held against. Its first run also brings the files into the system's memory.
    let alone = || -> usize {
        all.pairs
            .par_iter()
            .map(|pair| image::load_square(&pair.image, &options).expect("it decodes").bytes())
            .sum()
    };
    assert_eq!(alone(), all.len() * (SIDE * SIDE) as usize);
    group.bench_function("decode-and-resize", |bencher| bencher.iter(|| black_box(alone())));

    let fresh = || {
        let folder = tempfile::tempdir().expect("it can be made");
        let cache = Arc::new(ImageCache::on_disk(folder.path().join("cache")).expect("it can be made"));
        (folder, ImageLoader::new(options.clone()).with_cache(cache), all.clone())
    };
    group.bench_function("prepare-to-disk", |bencher| {
        bencher.iter_batched(
            fresh,
            |(folder, images, mut all)| {
                all.load_images(&images, OnProblem::Stop, &Silent).expect("all are loaded");
                folder
            },
            criterion::BatchSize::PerIteration,
        );
    });

    let kept = tempfile::tempdir().expect("it can be made");
    let plain = ImageLoader::new(options.clone());
    let memory = plain.clone().with_cache(ImageCache::in_memory(u64::MAX).into());
    let disk = plain.clone().with_cache(ImageCache::on_disk(kept.path()).expect("it can be made").into());
    for (name, images) in [("epoch", &plain), ("epoch-memory-cache", &memory), ("epoch-disk-cache", &disk)] {
        all.clone().load_images(images, OnProblem::Stop, &Silent).expect("all are loaded");
        let batches = Batches::new(&all, &positions, images, BATCH, 0).expect("the settings are valid");
        group.bench_function(name, |bencher| {
            bencher
                .iter(|| batches.epoch(0, 0).map(|batch| batch.expect("it loads").shape[0]).sum::<usize>());
        });
    }

    // What burn's own loader makes of it: one worker, the batcher on all cores.
    let all = Arc::new(all);
    group.bench_function("epoch-burn-loader", |bencher| {
        bencher.iter(|| {
            let view = EpochView::new(all.clone(), &positions, 0, 0, 0);
            let loader =
                DataLoaderBuilder::<Flex, SampleResult, BatchResult<Flex>>::new(ImageBatcher::new(&plain))
                    .batch_size(BATCH)
                    .num_workers(1)
                    .build(view);
            loader.iter().map(|batch| batch.expect("it loads").indices.len()).sum::<usize>()
        });
    });
    group.finish();
}

criterion_group!(benches, loader);
criterion_main!(benches);
