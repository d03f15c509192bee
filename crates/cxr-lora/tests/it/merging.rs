//! Adapters in the weights, and out again.

use burn::tensor::DType;
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_lora::{DEFAULT_NAME, LoraConfig, LoraError, UNET};

use crate::peft::{Fixture, path};
use crate::toy::Toy;
use crate::{assert_close, bits, values};

fn adapted(fixture: &Fixture, dtype: DType) -> Toy<Flex> {
    let mut model = Toy::with_dtype(fixture, dtype);
    let (adapter, _) = cxr_lora::read(path("adapter")).unwrap();
    cxr_lora::load_adapter(&mut model, &adapter, 1.0).unwrap();
    model
}

/// Every parameter's dtype, bytes, id and flag.
fn state(model: &Toy<Flex>) -> Vec<(parameters::ParameterInfo, burn::tensor::TensorData)> {
    let mut data = Vec::new();
    parameters::read::<Flex, _>(model, |_, values| data.push(values));
    parameters::list::<Flex, _>(model).into_iter().zip(data).collect()
}

#[test]
fn a_merged_model_computes_the_same_and_unmerges_to_the_bit() {
    let fixture = Fixture::open();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut model = adapted(&fixture, dtype);
        let (before, output) = (state(&model), model.output(&fixture));
        let merged = cxr_lora::merge(&mut model).unwrap();
        assert_eq!(merged.layers(), 16);
        assert!(model.layer("blocks.0.attn1.to_q").is_merged() && !model.layer("head").is_merged());
        let of_merged = model.output(&fixture);
        assert_eq!(of_merged.dtype(), dtype);
        assert_ne!(bits(of_merged.clone()), bits(output.clone()));
        if dtype == DType::F32 {
            assert_close("merged", &values(of_merged), &values(output.clone()), 1e-5);
        }
        cxr_lora::unmerge(&mut model, merged).unwrap();
        assert_eq!(state(&model), before);
        assert_eq!(bits(model.output(&fixture)), bits(output));
    }
}

/// Against sums in f64: rounded once to the weight's dtype, and nothing else.
#[test]
fn merged_weights() {
    let fixture = Fixture::open();
    for (dtype, precision) in [(DType::F32, 22), (DType::F16, 11), (DType::BF16, 8)] {
        let mut model = adapted(&fixture, dtype);
        let paths = model.paths();
        let before: Vec<_> = paths.iter().map(|path| model.layer(path)).collect();
        cxr_lora::merge(&mut model).unwrap();
        for (path, before) in paths.iter().zip(before) {
            let merged = model.layer(path).weight.val();
            assert_eq!(merged.dtype(), dtype);
            let mut expected: Vec<f64> = values(before.weight.val()).into_iter().map(f64::from).collect();
            for branch in before.adapters() {
                let (a, b) = (values(branch.lora_a.val()), values(branch.lora_b.val()));
                let (rank, width) = (branch.rank(), before.in_features());
                for (i, expected) in expected.iter_mut().enumerate() {
                    let (row, column) = (i / width, i % width);
                    let product =
                        (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * width + column]));
                    *expected += branch.scale() * product.sum::<f64>();
                }
            }
            // Half a unit in the last place, and f32's own roundings where terms cancel.
            let unit = 0.5_f64.powi(precision);
            for (merged, expected) in values(merged).into_iter().zip(expected) {
                let bar = unit * expected.abs() * 1.01 + 1e-6;
                assert!(
                    (f64::from(merged) - expected).abs() <= bar,
                    "{path} {dtype:?}: {merged}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn only_what_takes_part_is_merged_and_by_its_weight() {
    let fixture = Fixture::open();
    let mut model = adapted(&fixture, DType::F32);
    cxr_lora::attach(&mut model, &LoraConfig::new(2).with_name("idle"), 1).unwrap();
    cxr_lora::set_weight(&mut model, DEFAULT_NAME, -0.5).unwrap();
    let output = values(model.output(&fixture));
    cxr_lora::merge(&mut model).unwrap();
    assert_close("weight -0.5", &values(model.output(&fixture)), &output, 1e-5);

    let mut model = adapted(&fixture, DType::F32);
    cxr_lora::set_enabled(&mut model, DEFAULT_NAME, false).unwrap();
    assert!(matches!(cxr_lora::merge(&mut model), Err(LoraError::NothingToMerge)));
    assert!(matches!(cxr_lora::merge(&mut Toy::<Flex>::new(&fixture)), Err(LoraError::NothingToMerge)));
}

#[test]
fn nothing_changes_while_merged() {
    let fixture = Fixture::open();
    let mut model = adapted(&fixture, DType::F32);
    let adapter = cxr_lora::export(&model, DEFAULT_NAME, UNET).unwrap();
    let merged = cxr_lora::merge(&mut model).unwrap();
    let before = state(&model);
    let attempts = [
        cxr_lora::attach(&mut model, &LoraConfig::new(2).with_name("second"), 1),
        cxr_lora::load_named(&mut [(UNET, &mut model)], &adapter, "second", 1.0),
        cxr_lora::detach(&mut model, DEFAULT_NAME),
        cxr_lora::set_weight(&mut model, DEFAULT_NAME, 2.0),
        cxr_lora::set_enabled(&mut model, DEFAULT_NAME, false),
        cxr_lora::merge(&mut model).map(|merged| merged.layers()),
    ];
    for attempt in attempts {
        let error = attempt.unwrap_err();
        let first = "blocks.0.attn1.to_q";
        assert!(matches!(&error, LoraError::Merged { path } if path == first), "{error}");
    }
    assert_eq!(state(&model), before);
    // The adapter itself is still to be had.
    assert_eq!(cxr_lora::export(&model, DEFAULT_NAME, UNET).unwrap(), adapter);
    cxr_lora::unmerge(&mut model, merged).unwrap();
    assert_eq!(cxr_lora::detach(&mut model, DEFAULT_NAME).unwrap(), 16);
}

#[test]
fn unmerging_another_model_is_refused() {
    let fixture = Fixture::open();
    let mut model = adapted(&fixture, DType::F32);
    let merged = cxr_lora::merge(&mut model).unwrap();
    let mut other = adapted(&fixture, DType::F32);
    let before = state(&other);
    let error = cxr_lora::unmerge(&mut other, merged.clone()).unwrap_err();
    assert!(matches!(&error, LoraError::NotMerged { path } if path == "blocks.0.attn1.to_k"), "{error}");
    assert_eq!(state(&other), before);
    cxr_lora::unmerge(&mut model, merged.clone()).unwrap();
    assert!(matches!(cxr_lora::unmerge(&mut model, merged), Err(LoraError::NotMerged { .. })), "twice");
}

#[test]
fn a_weight_that_would_not_be_finite_is_refused() {
    let fixture = Fixture::open();
    let mut model = adapted(&fixture, DType::F16);
    cxr_lora::set_weight(&mut model, DEFAULT_NAME, 1e6).unwrap();
    let before = state(&model);
    let error = cxr_lora::merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("blocks.0.attn1.to_q.weight"), "{error}");
    assert_eq!(state(&model), before);
}

#[test]
fn merging_for_good_leaves_a_plain_model() {
    let fixture = Fixture::open();
    let mut model = adapted(&fixture, DType::F32);
    let mut merged = model.clone();
    cxr_lora::merge(&mut merged).unwrap();
    assert_eq!(cxr_lora::merge_and_detach(&mut model).unwrap(), 16);
    assert_eq!(bits(model.output(&fixture)), bits(merged.output(&fixture)));
    assert!(cxr_lora::attached(&model).is_empty());
    let plain = parameters::list::<Flex, _>(&Toy::<Flex>::new(&fixture));
    let paths = |list: Vec<parameters::ParameterInfo>| list.into_iter().map(|p| p.path).collect::<Vec<_>>();
    assert_eq!(paths(parameters::list::<Flex, _>(&model)), paths(plain));
    // A new adapter can be attached.
    assert_eq!(cxr_lora::attach(&mut model, &LoraConfig::new(2), 1).unwrap(), 16);
}
