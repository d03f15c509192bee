//! Against numpy, scipy, torch and pillow: `generate.py` beside this file made `reference.json`.

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData};
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_metrics::small::{SmallConfig, multi_label_loss};
use cxr_metrics::{
    FeatureSet, FeatureStatistics, ImageSize, KernelMatrices, auroc, frechet_distance,
    frechet_distance_of_sets, kernel_distance, kernel_distance_on, resize_antialiased,
};
use serde_json::Value;

/// n numbers in [-1, 1): FNV-1a of "name:i", its upper 24 bits after one multiplication.
fn unit(name: &str, n: usize) -> Vec<f32> {
    let one = |i| {
        let fnv = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let h = format!("{name}:{i}").bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
        let h = (h ^ (h >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (h >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(one).collect()
}

/// Correlated features: each adds `mix` times its left neighbour.
fn features(name: &str, n: usize, d: usize, mix: f32, shift: f32) -> FeatureSet {
    let x = unit(name, n * d);
    let values = (0..n * d).map(|i| if i % d == 0 { x[i] } else { x[i] + mix * x[i - 1] } + shift);
    FeatureSet::new(values.collect(), d).unwrap()
}

fn sets(kind: &str, n: usize, m: usize, d: usize) -> (FeatureSet, FeatureSet) {
    (features(&format!("{kind} x"), n, d, 0.5, 0.0), features(&format!("{kind} y"), m, d, -0.8, 0.25))
}

fn reference() -> Value {
    serde_json::from_str(include_str!("reference.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn assert_close(what: &str, found: f64, expected: &Value, tolerance: f64) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() <= tolerance * expected.abs(), "{what}: {found}, expected {expected}");
}

fn assert_all_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "{what} {i}: {found}, expected {expected}");
    }
}

#[test]
fn frechet_distance_is_scipys_in_both_forms() {
    for (kind, n, m, d) in [("tall", 60, 45, 8), ("short", 12, 9, 16)] {
        let (x, y) = sets(kind, n, m, d);
        let expected = &reference()["frechet"][kind];
        let moments = frechet_distance(&FeatureStatistics::of(&x), &FeatureStatistics::of(&y)).unwrap();
        assert_close(&format!("{kind}, covariances"), moments, expected, 1e-6);
        assert_close(&format!("{kind}, sets"), frechet_distance_of_sets(&x, &y).unwrap(), expected, 1e-6);
    }
}

#[test]
fn kernel_distance_is_numpys_whole_and_on_the_same_subsets() {
    for (kind, n, m, d) in [("tall", 60, 45, 8), ("short", 12, 9, 16)] {
        let (x, y) = sets(kind, n, m, d);
        assert_close(kind, kernel_distance(&x, &y).unwrap(), &reference()["kernel"][kind], 1e-9);
    }
    let (x, y) = sets("tall", 60, 45, 8);
    let reference = &reference()["subsets"];
    let indices = |v: &Value| v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize).collect();
    let subsets: Vec<(Vec<usize>, Vec<usize>)> =
        reference["indices"].as_array().unwrap().iter().map(|p| (indices(&p[0]), indices(&p[1]))).collect();
    let found = kernel_distance_on(&x, &y, &subsets).unwrap();
    assert_close("mean", found.mean, &reference["mean"], 1e-9);
    assert_close("deviation", found.standard_deviation, &reference["std"], 1e-9);
    let matrices = KernelMatrices::new(&x, &y).unwrap();
    let sum: f64 = subsets.iter().map(|(a, b)| matrices.distance_on(a, b).unwrap()).sum();
    assert_close("mean from matrices", sum / subsets.len() as f64, &reference["mean"], 1e-9);
}

#[test]
fn auroc_is_scipys_mann_whitney() {
    // numpy rounds halves to even; none of these scores is one.
    let scores: Vec<f32> = unit("scores", 40).iter().map(|v| (v * 5.0).round() / 5.0).collect();
    let labels: Vec<bool> = unit("labels", 40).iter().zip(&scores).map(|(l, s)| l + s > 0.3).collect();
    assert_close("auroc", auroc(&scores, &labels).unwrap().value, &reference()["auroc"], 1e-12);
}

#[test]
fn resizing_is_pillows() {
    for (name, expected) in reference()["resize"].as_object().unwrap() {
        let (width, height) = name.split_once('x').unwrap();
        let to = ImageSize { width: width.parse().unwrap(), height: height.parse().unwrap() };
        let found = resize_antialiased(&unit("picture", 13 * 11), ImageSize { width: 13, height: 11 }, to);
        assert_all_close(name, &found, &numbers(expected), 1e-6);
    }
}

#[test]
fn small_network_and_its_loss_are_torchs() {
    type B = Autodiff<Flex>;
    let device = Default::default();
    let config = SmallConfig {
        channels: vec![8, 12],
        groups: 4,
        input_size: 16,
        ..SmallConfig::v1(["a", "b", "c"].map(String::from).to_vec())
    };
    let network = parameters::map_data(config.init::<B>(&device).unwrap(), |path, shape| {
        let fan_in = shape[1..].iter().product::<usize>() as f32;
        let (gain, offset) = match shape.len() {
            4 => ((3.0 / fan_in).sqrt(), 0.0),
            2 => (1.0, 0.0),
            _ if path.contains("norms") && path.ends_with("weight") => (0.5, 1.0),
            _ => (0.5, 0.0),
        };
        let values = unit(path, shape.iter().product()).iter().map(|v| v * gain + offset).collect();
        Ok::<_, std::convert::Infallible>(Some(TensorData::new::<f32, _>(values, shape.to_vec())))
    })
    .unwrap();
    let pixels = Tensor::<B, 4>::from_data(TensorData::new(unit("pixels", 768), [3, 1, 16, 16]), &device);
    let output = network.forward(pixels);
    let targets = unit("targets", 9).iter().map(|v| f32::from(u8::from(*v > 0.0))).collect::<Vec<_>>();
    let targets = Tensor::<B, 2>::from_data(TensorData::new(targets, [3, 3]), &device);
    let weights = Tensor::<B, 1>::from_floats([2.0, 0.5, 3.0], &device);
    let loss = multi_label_loss(output.logits.clone(), targets, None, Some(weights)).into_scalar();
    let reference = &reference()["small"];
    let values = |t: Tensor<B, 2>| t.into_data().to_vec::<f32>().unwrap();
    assert_all_close("feature", &values(output.features), &numbers(&reference["features"]), 2e-5);
    assert_all_close("logit", &values(output.logits), &numbers(&reference["logits"]), 2e-5);
    assert_close("loss", f64::from(loss), &reference["loss"], 1e-5);
}
