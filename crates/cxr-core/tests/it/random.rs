use cxr_core::random::TorchGenerator;

const TOLERANCE: f32 = 1e-6;

/// Single calls of 5 to 1000 values, and calls after each other, which share the twister and the spare value.
#[test]
fn torch_randn() {
    let reference = crate::json("randn.json");
    let cases = reference["randn"].as_array().unwrap();
    assert_eq!(cases.len(), 18);
    let mut largest = 0.0_f32;
    for case in cases {
        let mut generator = TorchGenerator::new(case["seed"].as_u64().unwrap());
        for call in case["calls"].as_array().unwrap() {
            let expected: Vec<f32> = serde_json::from_value(call.clone()).unwrap();
            let found = generator.randn(expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                largest = largest.max((found - expected).abs());
            }
            assert_eq!(found.len(), expected.len());
        }
        assert!(largest < TOLERANCE, "seed {}: difference {largest}", case["seed"]);
    }
    // the tolerance tells seeds apart: another one is far away
    assert!((TorchGenerator::new(0).randn(64)[0] - TorchGenerator::new(1).randn(64)[0]).abs() > 0.01);
}
