//! Against torch-fidelity, prdc, pytorch-msssim and pytorch-fid: `generate.py` beside this file made the references.

use std::path::Path;

use cxr_metrics::{
    FeatureSet, FeatureStatistics, ImageSize, Moments, Picture, frechet_distance_of_moments,
    frechet_distance_to_set, inception_score, kernel_distance_on, ms_ssim, ms_ssim_scales, prdc,
};
use serde_json::Value;

/// n 64-bit numbers: FNV-1a of the name as the seed of splitmix64.
fn hashes(name: &str, n: usize) -> impl Iterator<Item = u64> {
    let fnv = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    (1..=n as u64).map(move |i| {
        let h = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        h ^ (h >> 31)
    })
}

fn set(name: &str, n: usize, d: usize, change: impl Fn(f32) -> f32) -> FeatureSet {
    let unit = |h: u64| (h >> 40) as f32 / (1 << 23) as f32 - 1.0;
    FeatureSet::new(hashes(name, n * d).map(|h| change(unit(h))).collect(), d).unwrap()
}

fn x() -> FeatureSet {
    set("x", 60, 8, |v| v)
}

fn y() -> FeatureSet {
    set("y", 45, 8, |v| v * 1.2 + 0.1)
}

fn reference(name: &str) -> Value {
    let mut all: Value = serde_json::from_str(include_str!("reference.json")).unwrap();
    all[name].take()
}

fn indices(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize).collect()
}

fn close(what: &str, found: f64, expected: &Value, tolerance: f64) {
    let expected = expected.as_f64().unwrap_or_else(|| panic!("{what} is not in the reference"));
    println!("{what}: {found}, off by {:.1e}", (found - expected).abs() / expected.abs().max(1e-300));
    assert!((found - expected).abs() <= tolerance * expected.abs(), "{what}: {found}, expected {expected}");
}

#[test]
fn inception_score_is_torch_fidelitys_in_the_same_order() {
    let reference = reference("isc");
    let logits = set("logits", 43, 60, |v| 4.0 * v);
    for (name, order) in [("in order", (0..43).collect()), ("shuffled", indices(&reference["order"]))] {
        let found = inception_score(&logits, &order, 10).unwrap();
        let expected = &reference[name];
        close(name, found.mean, &expected["inception_score_mean"], 1e-10);
        close("its deviation", found.standard_deviation, &expected["inception_score_std"], 1e-9);
    }
}

#[test]
fn kernel_distance_is_torch_fidelitys_on_the_same_subsets() {
    let reference = reference("kid");
    let pairs = reference["indices"].as_array().unwrap().iter();
    let subsets: Vec<_> = pairs.map(|pair| (indices(&pair[0]), indices(&pair[1]))).collect();
    let found = kernel_distance_on(&x(), &y(), &subsets).unwrap();
    // It computes in f32.
    close("mean", found.mean, &reference["kernel_inception_distance_mean"], 1e-4);
    close("deviation", found.standard_deviation, &reference["kernel_inception_distance_std"], 1e-4);
}

#[test]
fn precision_recall_density_and_coverage_are_prdcs() {
    for (k, expected) in reference("prdc").as_object().unwrap() {
        let found = prdc(&x(), &y(), k.parse().unwrap()).unwrap();
        close(&format!("precision {k}"), found.precision, &expected["precision"], 1e-12);
        close(&format!("recall {k}"), found.recall, &expected["recall"], 1e-12);
        close(&format!("density {k}"), found.density, &expected["density"], 1e-12);
        close(&format!("coverage {k}"), found.coverage, &expected["coverage"], 1e-12);
    }
}

#[test]
fn ms_ssim_is_pytorch_msssims_at_every_number_of_scales() {
    let picture = |name: &str, size: ImageSize, noise: usize| {
        let mut random = hashes(name, size.width * size.height).map(|h| (h >> 40) as usize % noise);
        let mut pixels = Vec::new();
        for y in 0..size.height {
            pixels
                .extend((0..size.width).map(|x| ((x * x / 9 + y * 3) % 160 + random.next().unwrap()) as u8));
        }
        Picture::new(size, 1, pixels).unwrap()
    };
    for (name, expected) in reference("ms_ssim").as_object().unwrap() {
        let (width, height) = name.split_once('x').unwrap();
        let size = ImageSize { width: width.parse().unwrap(), height: height.parse().unwrap() };
        assert_eq!(Some(ms_ssim_scales(size) as u64), expected["scales"].as_u64(), "{name}");
        let (a, b) = (picture("a", size, 40), picture("bb", size, 90));
        close(name, ms_ssim(&a, &b).unwrap(), &expected["value"], 1e-9);
        assert!(expected["value"].as_f64().unwrap() > 0.1, "{name} compares nothing");
        // Three equal channels are one.
        let rgb = |p: &Picture| {
            let pixels = p.pixels().iter().flat_map(|v| [*v; 3]).collect();
            Picture::new(p.size(), 3, pixels).unwrap()
        };
        assert!((ms_ssim(&rgb(&a), &rgb(&b)).unwrap() - ms_ssim(&a, &b).unwrap()).abs() < 1e-12);
    }
}

#[test]
fn statistics_of_pytorch_fid_are_read_and_ours_are_written_as_numpy_has_them() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/figures/statistics.npz");
    let theirs = Moments::load(&path).unwrap();
    assert_eq!((theirs.count, &theirs.extractor, &theirs.resize), (None, &None, &None));
    let ours = Moments::of(&FeatureStatistics::of(&x()), None).unwrap();
    for (a, b) in theirs.mean.iter().chain(&theirs.covariance).zip(ours.mean.iter().chain(&ours.covariance)) {
        assert!((a - b).abs() < 1e-14, "{a} against {b}");
    }
    let y = y();
    close("to a set", frechet_distance_to_set(&theirs, &y).unwrap(), &reference("fid"), 1e-9);
    let of_y = Moments::of(&FeatureStatistics::of(&y), None).unwrap();
    close("of moments", frechet_distance_of_moments(&theirs, &of_y).unwrap(), &reference("fid"), 1e-9);
    // What numpy writes and what is written here: the same arrays, header and all.
    let folder = tempfile::tempdir().unwrap();
    let written = folder.path().join("ours.npz");
    theirs.save(&written).unwrap();
    for name in ["mu.npy", "sigma.npy"] {
        let [numpys, ours] = [&path, &written].map(|path| {
            let mut archive = zip::ZipArchive::new(std::fs::File::open(path).unwrap()).unwrap();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut archive.by_name(name).unwrap(), &mut bytes).unwrap();
            bytes
        });
        assert_eq!(ours, numpys, "{name}");
    }
}
