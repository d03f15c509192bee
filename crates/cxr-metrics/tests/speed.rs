//! How long a comparison takes at the sizes of a report, and that its figures carry what they must.

use std::time::Instant;

use cxr_core::progress::Silent;
use cxr_core::random::Stream;
use cxr_metrics::{Evaluation, Extraction, ExtractorId, FeatureSet, ImageSize};

/// Features of `cxr-small-v1`.
const WIDTH: usize = 128;

/// Correlated features, as a network's are: each mixes in half of its left neighbour.
fn extraction(name: &str, n: usize, shift: f32) -> Extraction {
    let noise = Stream::new(1, name, n as u64).normals(n * WIDTH);
    let values = (0..n * WIDTH)
        .map(|i| if i % WIDTH == 0 { noise[i] } else { noise[i] + 0.5 * noise[i - 1] } + shift)
        .collect();
    let features = FeatureSet::new(values, WIDTH).unwrap();
    Extraction { features, logits: None, resolution: ImageSize::square(64) }
}

#[test]
#[ignore = "cargo test --release -p cxr-metrics --test speed -- --ignored --nocapture"]
fn a_comparison_takes_seconds() {
    let extractor = ExtractorId {
        name: "cxr-small-v1".into(),
        hash: "0".repeat(64),
        feature_dim: WIDTH,
        input_size: ImageSize::square(64),
        resize: None,
    };
    for n in [200, 400, 800] {
        let (real, fake) = (extraction("real", n, 0.0), extraction("fake", n, 0.1));
        let started = Instant::now();
        let card = Evaluation::default().compare(&real, &fake, &extractor, &Silent).unwrap();
        let seconds = started.elapsed().as_secs_f64();
        println!("N = {n}: {seconds:.2} s\n{}", card.markdown());
        // All sizes together take 7 s of CPU time; the rest of the room is for a busy machine.
        assert!(seconds < 60.0, "N = {n}: {seconds} s, meant to be a few");
        for figure in &card.figures {
            assert_eq!((figure.n_real, figure.n_fake), (n, n));
            assert_eq!(figure.extractor.as_ref(), Some(&extractor));
            assert_eq!(figure.resolution, ImageSize::square(64));
            assert!(figure.interval.as_ref().is_some_and(|i| i.low < i.high), "{figure:?}");
            assert!(figure.floor.as_ref().is_some_and(|f| f.n == n / 2 && f.splits > 1), "{figure:?}");
        }
    }
}
