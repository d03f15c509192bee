//! Fréchet distance at Inception's 2048 features: from two covariances, as for large sets, and from the features of
//! small ones; and what a set takes to become a covariance.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use cxr::core::random::Stream;
use cxr::metrics::{FeatureSet, FeatureStatistics, frechet_distance, frechet_distance_of_sets};
use cxr_benches as _;

const WIDTH: usize = 2048;

/// Correlated features, none below zero, as the network's are.
fn features(name: &str, n: usize) -> FeatureSet {
    let noise = Stream::new(0, name, 0).normals(n * WIDTH);
    let value = |i: usize| (noise[i] + 0.7 * noise[i / WIDTH * WIDTH + i % 64]).max(0.0);
    FeatureSet::new((0..n * WIDTH).map(value).collect(), WIDTH).expect("finite numbers")
}

fn fid(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fid");
    group.sample_size(10);
    let large = ["x", "y"].map(|name| features(name, 4096));
    group.bench_function("statistics/4096", |bencher| {
        bencher.iter(|| black_box(FeatureStatistics::of(&large[0])));
    });
    group.bench_function("distance/covariances", |bencher| {
        let [x, y] = large.each_ref().map(FeatureStatistics::of);
        bencher.iter(|| frechet_distance(&x, &y).expect("it converges"));
    });
    for n in [200, 1000] {
        let [x, y] = ["x", "y"].map(|name| features(name, n));
        group.bench_function(format!("distance/sets-{n}"), |bencher| {
            bencher.iter(|| frechet_distance_of_sets(&x, &y).expect("it converges"));
        });
    }
    group.finish();
}

criterion_group!(benches, fid);
criterion_main!(benches);
