//! With the published weights and real thumbnails, where the larger reference data are.

use std::path::PathBuf;

use cxr_core::progress::Silent;
use cxr_metrics::inception::{NAME, ResizeMode};
use cxr_metrics::{
    FeatureExtractor, FeatureSet, FeatureStatistics, ImageSize, Picture, frechet_distance,
    frechet_distance_of_sets, kernel_distance_on,
};
use serde_json::Value;

use super::{error, fixture, open, tensor};

fn data() -> Option<PathBuf> {
    let data = match std::env::var_os("CXR_TEST_DATA") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
    };
    data.join("inception/inception_fid_pool3.safetensors").is_file().then_some(data)
}

/// The first files of a side, as `generate.py` took them.
fn pictures(data: &std::path::Path, reference: &Value, side: &str, n: usize) -> Vec<Picture> {
    let files = reference["files"][side].as_array().unwrap().iter().take(n);
    files
        .map(|file| {
            let path = data.join("nih-chest-64").join(file.as_str().unwrap());
            let image = image::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).to_rgb8();
            let size = ImageSize { width: image.width() as usize, height: image.height() as usize };
            Picture::new(size, 3, image.into_raw()).unwrap()
        })
        .collect()
}

fn close(what: &str, found: f64, expected: &Value, tolerance: f64) {
    let expected = expected.as_f64().unwrap();
    println!("{what}: {found}, expected {expected}, relative {:.1e}", (found / expected - 1.0).abs());
    assert!((found - expected).abs() <= tolerance * expected.abs(), "{what}: {found}, expected {expected}");
}

#[test]
fn features_and_figures_are_those_of_pytorch_fid_and_torch_fidelity() {
    let Some(data) = data() else {
        println!("skipped: no inception/inception_fid_pool3.safetensors in ../shared/data or CXR_TEST_DATA");
        return;
    };
    let reference: Value = serde_json::from_str(include_str!("published.json")).unwrap();
    let features = fixture("published.safetensors");
    let weights = data.join("inception/inception_fid_pool3.safetensors");
    let extractor = open(&weights, ResizeMode::PytorchFid).unwrap();
    println!("hash {}", extractor.hash());
    assert_eq!(extractor.name(), NAME);
    let n = reference["images"].as_u64().unwrap() as usize;
    let [train, test] = ["train", "test"].map(|side| pictures(&data, &reference, side, n));
    for mode in [ResizeMode::PytorchFid, ResizeMode::TorchFidelity] {
        let extractor = extractor.clone().with_resize(mode);
        let [x, y] = [&train, &test].map(|images| extractor.features(images, &Silent).unwrap());
        if mode == ResizeMode::PytorchFid {
            for (side, set) in [("train", &x), ("test", &y)] {
                let off =
                    error(&set.select(&[0, 1, 2, 3]), &tensor(&features, &format!("pytorch-fid/{side}")));
                println!("features of {side}: {off:.1e}");
                assert!(off < 1e-5, "{side}: {off}");
            }
        } else {
            let subsets = subsets(&reference["kid"]["indices"]);
            let kid = kernel_distance_on(&y, &x, &subsets).unwrap();
            close("KID", kid.mean, &reference["kid"]["mean"], 1e-3);
            close("its deviation", kid.standard_deviation, &reference["kid"]["std"], 1e-3);
        }
        let expected = &reference[mode.name()];
        close(mode.name(), frechet_distance_of_sets(&x, &y).unwrap(), expected, 1e-3);
        if mode == ResizeMode::PytorchFid {
            let [a, b] = [&x, &y].map(FeatureStatistics::of);
            close("from covariances", frechet_distance(&a, &b).unwrap(), expected, 1e-3);
            assert!(frechet_distance_of_sets(&x, &x).unwrap() < 1e-6);
            assert!(frechet_distance(&a, &a).unwrap() < 1e-6);
        }
    }
    let clean = extractor.with_resize(ResizeMode::Clean).features(&test[..2].to_vec(), &Silent).unwrap();
    let off = error(&clean, &tensor(&features, "clean/test"));
    println!("features, clean: {off:.1e}");
    assert!(off < 1e-5, "clean: {off}");
    assert!(matches!(FeatureSet::new(clean.values().to_vec(), 2048), Ok(set) if set == clean));
}

fn subsets(indices: &Value) -> Vec<(Vec<usize>, Vec<usize>)> {
    let list = |v: &Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize).collect();
    // torch-fidelity draws for its first input, then for its second.
    indices.as_array().unwrap().iter().map(|pair| (list(&pair[1]), list(&pair[0]))).collect()
}
