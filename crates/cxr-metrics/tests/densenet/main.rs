//! Against torchxrayvision: `generate.py` beside this file made `reference.json`, `whole.pt` and `state.pt`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cxr_core::progress::Silent;
use cxr_core::tensor_file::{RawTensor, write_safetensors};
use cxr_kernels::Flex;
use cxr_metrics::densenet::{DenseNetConfig, DenseNetExtractor, centre_and_resize};
use cxr_metrics::{FeatureExtractor, ImageSize, MetricsError, Picture};
use serde_json::Value;

/// n numbers in [-1, 1): SplitMix64 from the FNV-1a of the name, upper 24 bits.
fn unit(name: &str, n: usize) -> Vec<f32> {
    let fnv = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let start = name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    let one = |i: u64| {
        let z = start.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let z = z ^ (z >> 31);
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n as u64).map(one).collect()
}

fn tensor(name: &str, shape: &[usize]) -> RawTensor {
    let spread = (6.0 / shape[1..].iter().product::<usize>().max(1) as f64).sqrt() as f32;
    let change = |u: f32| match name {
        _ if name.ends_with("running_var") => {
            (1.0 + 0.5 * u) * if name.contains("norm0") { 400_000.0 } else { 1.0 }
        }
        "classifier.weight" => 0.2 * u,
        _ if shape.len() == 4 => spread * u,
        _ if name.ends_with("norm1.weight") || name.ends_with("norm.weight") => 0.7 + 0.25 * u,
        _ if name.ends_with("weight") => 1.0 + 0.25 * u,
        _ => 0.2 * u,
    };
    let values = unit(name, shape.iter().product()).into_iter().map(change).collect();
    RawTensor::from_f32(shape.to_vec(), values)
}

/// A smooth picture with some noise.
fn picture(name: &str, height: usize, width: usize, channels: usize) -> Picture {
    let noise = unit(name, height * width * channels);
    let byte = |i: usize| {
        let (x, y) = (i / channels % width, i / channels / width);
        let wave = (x as f64 * (7.0 / width as f64)).sin() * (y as f64 * (9.0 / height as f64)).cos();
        (128.0 + 90.0 * wave + 30.0 * f64::from(noise[i])).floor().clamp(0.0, 255.0) as u8
    };
    Picture::new(ImageSize { width, height }, channels, (0..noise.len()).map(byte).collect()).unwrap()
}

fn config() -> DenseNetConfig {
    DenseNetConfig::torchxrayvision("densenet121-res224-all").unwrap()
}

type Tensors = Vec<(String, RawTensor)>;

fn tensors() -> Tensors {
    config().tensors().into_iter().map(|(name, shape)| (name.clone(), tensor(&name, &shape))).collect()
}

fn write(folder: &Path, tensors: &Tensors) -> PathBuf {
    let path = folder.join("weights.safetensors");
    write_safetensors(&path, tensors, &BTreeMap::new()).unwrap();
    path
}

fn load(tensors: &Tensors) -> DenseNetExtractor<Flex> {
    let folder = tempfile::tempdir().unwrap();
    DenseNetExtractor::load(&write(folder.path(), tensors), config(), &Default::default()).unwrap()
}

struct Reference {
    picture: Picture,
    value: Value,
}

fn references() -> Vec<Reference> {
    let all: Vec<Value> = serde_json::from_str(include_str!("reference.json")).unwrap();
    let one = |value: Value| {
        let size: Vec<usize> =
            value["size"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
        let picture = picture(value["name"].as_str().unwrap(), size[0], size[1], size[2]);
        Reference { picture, value }
    };
    all.into_iter().map(one).collect()
}

impl Reference {
    /// Largest difference to a list of the reference, which must be as long.
    fn error(&self, what: &str, found: &[f32]) -> f32 {
        let expected = self.value[what].as_array().unwrap();
        assert_eq!(found.len(), expected.len(), "{what}");
        let pairs = found.iter().zip(expected);
        pairs.map(|(f, e)| (f - e.as_f64().unwrap() as f32).abs()).fold(0.0, f32::max)
    }
}

#[test]
fn features_and_logits_are_torchxrayvisions() {
    let mut tensors = tensors();
    let mut points: Vec<f32> = unit("op_threshs", 18).iter().map(|u| 0.5 + 0.3 * u).collect();
    points[4] = f32::NAN;
    tensors.push(("op_threshs".into(), RawTensor::from_f32(vec![18], points)));
    tensors.push(("features.norm0.num_batches_tracked".into(), RawTensor::from_i64(vec![], vec![7])));
    let extractor = load(&tensors);
    assert_eq!((extractor.feature_dim(), extractor.logit_names().len()), (1024, 18));
    for reference in references() {
        let picture = &reference.picture;
        let every: Vec<f32> = centre_and_resize(picture, 224).into_iter().step_by(499).collect();
        // Of values up to 1024.
        let prepared = reference.error("prepared", &every);
        let out = extractor.extract_batch(&[Cow::Borrowed(picture)]).unwrap();
        let (features, logits) =
            (reference.error("features", &out.features), reference.error("logits", &out.logits));
        let calibrated = reference.error("calibrated", &extractor.calibrated(&out.logits));
        println!(
            "{}: prepared {prepared:.1e}, features {features:.1e}, logits {logits:.1e}, calibrated {calibrated:.1e}",
            reference.value["name"]
        );
        assert!(prepared < 1e-3 && features < 1e-5 && logits < 1e-5 && calibrated < 1e-5);
    }
    // A logit at its operating point is 0.5 by definition.
    let points = extractor.operating_logits();
    assert_eq!(points[4], None);
    let at: Vec<f32> = points.iter().map(|p| p.unwrap_or(0.0)).collect();
    assert!(extractor.calibrated(&at).iter().all(|p| (p - 0.5).abs() < 1e-6));
}

#[test]
fn without_one_part_the_tolerance_is_missed_by_far() {
    let reference = &references()[2];
    let flat = |tensor: &RawTensor, value: f32| {
        RawTensor::from_f32(tensor.shape.clone(), vec![value; tensor.to_f32().unwrap().len()])
    };
    // Each leaves one thing out of a network of 121 layers.
    let parts: [(&str, &str, f32); 5] = [
        ("a running mean", "features.denseblock3.denselayer20.norm1.running_mean", 0.0),
        ("a running variance", "features.denseblock2.denselayer7.norm2.running_var", 1.0),
        ("the last normalization's bias", "features.norm5.bias", 0.0),
        ("a transition's weight", "features.transition2.norm.weight", 1.0),
        ("the first normalization's mean", "features.norm0.bias", 0.0),
    ];
    for (what, name, value) in parts {
        let mut tensors = tensors();
        let (_, tensor) = tensors.iter_mut().find(|(n, _)| n == name).unwrap();
        *tensor = flat(tensor, value);
        let out = load(&tensors).extract_batch(&[Cow::Borrowed(&reference.picture)]).unwrap();
        let error = reference.error("features", &out.features);
        println!("without {what}: {error:.1e}");
        assert!(error > 1e-3, "{what}: {error}");
    }
    // The range: pictures in [-1, 1] instead of [-1024, 1024] are as if the first layer's weights were smaller.
    let mut tensors = tensors();
    let (_, first) = tensors.iter_mut().find(|(n, _)| n == "features.conv0.weight").unwrap();
    *first = RawTensor::from_f32(
        first.shape.clone(),
        first.to_f32().unwrap().iter().map(|w| w / 1024.0).collect(),
    );
    let out = load(&tensors).extract_batch(&[Cow::Borrowed(&reference.picture)]).unwrap();
    assert!(reference.error("features", &out.features) > 0.1);
}

#[test]
fn a_batch_and_a_hash_say_what_they_should() {
    let extractor = load(&tensors());
    let pictures: Vec<Picture> = (0..3).map(|i| picture(&format!("p{i}"), 40, 40, 1)).collect();
    let all = extractor.extract(&pictures, &Silent).unwrap();
    let alone = extractor.extract(&pictures[1..2].to_vec(), &Silent).unwrap();
    let error =
        alone.features.row(0).iter().zip(all.features.row(1)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error < 1e-5, "{error}");
    assert_eq!(extractor.operating_logits().iter().flatten().count(), 18, "the published operating points");
    let mut other = tensors();
    other[0].1 = tensor("something else", &other[0].1.shape.clone());
    assert_ne!(load(&other).hash(), extractor.hash());
    // Outputs without a name are left out.
    let folder = tempfile::tempdir().unwrap();
    let rsna = DenseNetConfig::torchxrayvision("densenet121-res224-rsna").unwrap();
    let rsna = DenseNetExtractor::<Flex>::load(&write(folder.path(), &tensors()), rsna, &Default::default())
        .unwrap();
    assert_eq!(rsna.logit_names(), ["Pneumonia", "Lung Opacity"]);
    let logits = rsna.extract(&pictures, &Silent).unwrap().logits.unwrap();
    let full = all.logits.unwrap();
    for i in 0..3 {
        assert_eq!(logits.row(i), [full.row(i)[8], full.row(i)[16]]);
    }
}

#[test]
fn a_pickled_state_dict_is_read_with_its_operating_points() {
    let tiny = DenseNetConfig {
        input_size: 32,
        growth: 1,
        blocks: vec![1],
        first_channels: 1,
        bottleneck: 1,
        outputs: vec![Some("Effusion".into())],
        operating_points: vec![None],
        ..config()
    };
    let state = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/densenet/state.pt");
    let extractor = DenseNetExtractor::<Flex>::load(&state, tiny, &Default::default()).unwrap();
    assert!((extractor.operating_logits()[0].unwrap() - (0.25f32 / 0.75).ln()).abs() < 1e-6);
    let out = extractor.extract(&vec![picture("tiny", 40, 32, 1); 2], &Silent).unwrap();
    assert_eq!((out.features.len(), out.features.width(), out.logits.unwrap().width()), (2, 2, 1));
}

#[test]
fn loading_is_strict_and_a_pickled_model_says_how_to_convert_it() {
    let folder = tempfile::tempdir().unwrap();
    let error = |tensors: &Tensors| {
        let path = write(folder.path(), tensors);
        DenseNetExtractor::<Flex>::load(&path, config(), &Default::default()).unwrap_err()
    };
    let mut short = tensors();
    let removed = short.remove(5).0;
    assert!(matches!(error(&short), MetricsError::TensorNames { missing, .. } if missing == [removed]));
    let mut more = tensors();
    more.push(("features.norm6.weight".into(), RawTensor::from_f32(vec![1], vec![0.0])));
    assert!(
        matches!(error(&more), MetricsError::TensorNames { unused, .. } if unused == ["features.norm6.weight"])
    );
    let mut other = tensors();
    other[0].1 = RawTensor::from_f32(vec![64, 3, 7, 7], vec![0.0; 64 * 147]);
    let message = error(&other).to_string();
    assert!(message.contains("features.conv0.weight") && message.contains("[64, 3, 7, 7]"), "{message}");
    let mut points = tensors();
    points.push(("op_threshs".into(), RawTensor::from_f32(vec![2], vec![0.5; 2])));
    assert!(matches!(error(&points), MetricsError::TensorShape { .. }));

    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/densenet/whole.pt");
    let error = DenseNetExtractor::<Flex>::load(&whole, config(), &Default::default()).unwrap_err();
    assert!(matches!(error, MetricsError::PickledModel { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("whole.pt") && message.contains("state_dict()"), "{message}");
    let none = DenseNetExtractor::<Flex>::load(&folder.path().join("none.pt"), config(), &Default::default());
    assert!(matches!(none, Err(MetricsError::TensorFile { .. })));
}
