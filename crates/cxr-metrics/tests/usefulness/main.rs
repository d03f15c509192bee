//! Against scikit-learn's `LogisticRegression`: `generate.py` beside this file made `reference.json`.

use cxr_metrics::FeatureSet;
use cxr_metrics::usefulness::{LinearHead, LogisticConfig};
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

/// Each feature adds half of its left neighbour, and has a size of its own; the label is a noisy sum.
fn data(name: &str, n: usize, d: usize) -> (FeatureSet, Vec<bool>) {
    let (x, noise) = (unit(name, n * d), unit(&format!("{name} noise"), n));
    let value = |i: usize| {
        let mixed = if i.is_multiple_of(d) { x[i] } else { x[i] + 0.5 * x[i - 1] };
        mixed * (1.0 + (i % d % 4) as f32)
    };
    let label = |i: usize| x[i * d] - x[i * d + 1] + x[i * d + 2] + 1.5 * noise[i] > 0.25;
    (FeatureSet::new((0..n * d).map(value).collect(), d).unwrap(), (0..n).map(label).collect())
}

fn references() -> Vec<Value> {
    serde_json::from_str(include_str!("reference.json")).unwrap()
}

struct Case {
    features: FeatureSet,
    labels: Vec<bool>,
    config: LogisticConfig,
}

fn case(reference: &Value) -> Case {
    let size = |key: &str| reference[key].as_u64().unwrap() as usize;
    let (features, labels) = data(reference["name"].as_str().unwrap(), size("n"), size("d"));
    assert_eq!(labels.iter().filter(|l| **l).count(), size("positives"), "the same labels as in Python");
    let config = LogisticConfig {
        c: reference["c"].as_f64().unwrap(),
        standardize: reference["standardize"].as_bool().unwrap(),
        ..LogisticConfig::default()
    };
    Case { features, labels, config }
}

/// Largest difference of a coefficient or the intercept.
fn error(reference: &Value, head: &LinearHead) -> f64 {
    let expected = reference["coefficients"].as_array().unwrap();
    assert_eq!(head.coefficients.len(), expected.len());
    let pairs = head.coefficients.iter().zip(expected).chain([(&head.intercept, &reference["intercept"])]);
    pairs.map(|(f, e)| (f - e.as_f64().unwrap()).abs()).fold(0.0, f64::max)
}

#[test]
fn coefficients_are_scikit_learns() {
    for reference in references() {
        let Case { features, labels, config } = case(&reference);
        let rows: Vec<usize> = (0..labels.len()).collect();
        let head = LinearHead::fit(&features, &rows, &labels, &config).unwrap();
        let error = error(&reference, &head);
        println!("{}: {error:.1e}", reference["name"]);
        assert!(error < 1e-6, "{}: {error}", reference["name"]);
        assert_eq!(head, LinearHead::fit(&features, &rows, &labels, &config).unwrap(), "and always the same");
    }
}

#[test]
fn another_penalty_or_scale_is_another_head() {
    for reference in references() {
        let Case { features, labels, config } = case(&reference);
        let rows: Vec<usize> = (0..labels.len()).collect();
        for other in [
            LogisticConfig { c: 1.2 * config.c, ..config.clone() },
            LogisticConfig { standardize: !config.standardize, ..config.clone() },
        ] {
            let head = LinearHead::fit(&features, &rows, &labels, &other).unwrap();
            let error = error(&reference, &head);
            assert!(error > 1e-3, "{} with {other:?}: {error}", reference["name"]);
        }
    }
}
