//! Against pytorch-fid, torch-fidelity and clean-fid: `generate.py` beside this file made the references.

mod files;
mod published;

use std::path::{Path, PathBuf};

use cxr_core::progress::Silent;
use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr_kernels::Flex;
use cxr_metrics::inception::{CLASSES, FEATURES, InceptionExtractor, ResizeMode, layers};
use cxr_metrics::{FeatureExtractor, FeatureSet, ImageSize, Picture};

/// As the programs have it: without it, fresh pages take longer than the arithmetic.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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

/// All tensors of the published file, with procedural values.
fn procedural() -> Vec<(String, RawTensor)> {
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    for layer in layers() {
        let name = &layer.name;
        shapes.push((
            format!("{name}.conv.weight"),
            vec![layer.output, layer.input, layer.kernel[0], layer.kernel[1]],
        ));
        for part in ["weight", "bias", "running_mean", "running_var"] {
            shapes.push((format!("{name}.bn.{part}"), vec![layer.output]));
        }
    }
    shapes.extend([("fc.weight".into(), vec![CLASSES, FEATURES]), ("fc.bias".into(), vec![CLASSES])]);
    let fill = |(name, shape): (String, Vec<usize>)| {
        let fan_in = shape[1..].iter().product::<usize>() as f64;
        let (gain, offset) = match name.as_str() {
            "fc.weight" => (0.5, 0.0),
            name if name.ends_with("conv.weight") => ((6.0 / fan_in).sqrt() as f32, 0.0),
            name if name.ends_with("bn.weight") => (0.3, 1.0),
            name if name.ends_with("running_var") => (0.5, 1.0),
            _ => (0.3, 0.0),
        };
        let unit = |h: u64| (h >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let values = hashes(&name, shape.iter().product()).map(|h| unit(h) * gain + offset).collect();
        (name, RawTensor::from_f32(shape, values))
    };
    shapes.into_iter().map(fill).collect()
}

fn write(folder: &Path, tensors: &[(String, RawTensor)]) -> PathBuf {
    let path = folder.join("inception.safetensors");
    write_safetensors(&path, tensors, &Default::default()).unwrap();
    path
}

fn open(path: &Path, mode: ResizeMode) -> cxr_metrics::Result<InceptionExtractor<Flex>> {
    InceptionExtractor::load(path, mode, &Default::default())
}

/// Stripes and noise.
fn picture(name: &str, width: usize, height: usize, channels: usize) -> Picture {
    let seed = name.len();
    let mut noise = hashes(name, height * width * channels).map(|h| (h >> 58) as usize);
    let mut pixels = Vec::new();
    for y in 0..height {
        for x in 0..width {
            for c in 0..channels {
                let stripes = (x * (3 + seed) + y * (5 + 2 * seed) + c * 40) % 256 * 3 / 4;
                pixels.push((stripes + noise.next().unwrap()) as u8);
            }
        }
    }
    Picture::new(ImageSize { width, height }, channels, pixels).unwrap()
}

fn pictures() -> [Picture; 3] {
    [picture("up", 40, 56, 3), picture("down", 350, 320, 3), picture("grey1", 64, 64, 1)]
}

fn tensor(file: &TensorFile, name: &str) -> FeatureSet {
    let tensor = file.read(name).unwrap();
    FeatureSet::new(tensor.to_f32().unwrap(), tensor.shape[1]).unwrap()
}

fn fixture(name: &str) -> TensorFile {
    TensorFile::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/inception").join(name)).unwrap()
}

/// Largest distance over all rows, relative to the norm of the expected one.
fn error(found: &FeatureSet, expected: &FeatureSet) -> f64 {
    assert_eq!(found.width(), expected.width());
    let norm = |row: &mut dyn Iterator<Item = f32>| row.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let rows = found.rows().zip(expected.rows());
    rows.map(|(f, e)| norm(&mut f.iter().zip(e).map(|(f, e)| f - e)) / norm(&mut e.iter().copied()))
        .fold(0.0, f64::max)
}

#[test]
fn features_and_logits_are_those_of_the_references_in_every_mode() {
    let folder = tempfile::tempdir().unwrap();
    let extractor = open(&write(folder.path(), &procedural()), ResizeMode::PytorchFid).unwrap();
    assert!(!extractor.is_published());
    let reference = fixture("reference.safetensors");
    let mut found = Vec::new();
    for mode in ResizeMode::ALL {
        let extractor = extractor.clone().with_resize(mode);
        assert_eq!(extractor.id().resize.as_deref(), Some(mode.name()));
        let expected = tensor(&reference, mode.name());
        let mut features = Vec::new();
        for (i, picture) in pictures().into_iter().enumerate() {
            let out = extractor.extract(&vec![picture], &Silent).unwrap();
            features.push(out.features.row(0).to_vec());
            if mode == ResizeMode::TorchFidelity {
                let logits = error(&out.logits.unwrap(), &tensor(&reference, "logits").select(&[i]));
                println!("logits {i}: {logits:.1e}");
                assert!(logits < 1e-5, "logits of picture {i}: {logits}");
            }
        }
        let features = FeatureSet::from_rows(&features).unwrap();
        let off = error(&features, &expected);
        println!("{mode}: {off:.1e}");
        assert!(off < 1e-5, "{mode}: {off}");
        found.push(features);
    }
    // Another mode is far off on every picture.
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        for i in 0..3 {
            let apart = error(&found[a].select(&[i]), &found[b].select(&[i]));
            assert!(apart > 1e-3, "modes {a} and {b}, picture {i}: {apart}");
        }
    }
}

#[test]
fn pictures_do_not_depend_on_their_batch() {
    let folder = tempfile::tempdir().unwrap();
    let extractor = open(&write(folder.path(), &procedural()), ResizeMode::PytorchFid).unwrap();
    let all: Vec<Picture> = ["a", "ab", "abc"].iter().map(|name| picture(name, 30, 30, 1)).collect();
    let together = extractor.extract(&all, &Silent).unwrap();
    let alone = extractor.extract(&all[2..].to_vec(), &Silent).unwrap();
    // A product of another width sums in another order: the last bits may differ.
    assert!(error(&together.features.select(&[2]), &alone.features) < 1e-6);
    assert!(error(&together.logits.unwrap().select(&[2]), &alone.logits.unwrap()) < 1e-6);
}

#[test]
#[ignore = "cargo test --release -p cxr-metrics --test inception -- --ignored --nocapture"]
fn images_per_second() {
    let folder = tempfile::tempdir().unwrap();
    let extractor = open(&write(folder.path(), &procedural()), ResizeMode::TorchFidelity).unwrap();
    let images: Vec<Picture> = (0..64).map(|i| picture(&"x".repeat(1 + i), 128, 128, 1)).collect();
    extractor.extract(&images[..8].to_vec(), &Silent).unwrap();
    let started = std::time::Instant::now();
    let out = extractor.extract(&images, &Silent).unwrap();
    let seconds = started.elapsed().as_secs_f64();
    println!("{:.1} images a second", 64.0 / seconds);
    assert_eq!(out.features.len(), 64);
}
