//! What is refused, and what the error names. Nothing refused changes the model.

use std::path::Path;

use cxr_core::tensor_file::RawTensor;
use cxr_kernels::Flex;
use cxr_lora::{
    Adapter, DEFAULT_NAME, Format, LoraConfig, LoraError, ModuleKey, ModuleName, TEXT_ENCODER, TargetSet,
    UNET, read, write,
};

use crate::files::{Tensors, save, tensors};
use crate::peft::{Fixture, path};
use crate::toy::Toy;

fn toy() -> Toy<Flex> {
    Toy::new(&Fixture::open())
}

fn pefts() -> Adapter {
    read(path("adapter")).unwrap().0
}

#[track_caller]
fn refuses_to_load(adapter: &Adapter) -> LoraError {
    let mut model = toy();
    let error = cxr_lora::load_adapter(&mut model, adapter, 1.0).unwrap_err();
    assert!(cxr_lora::attached(&model).is_empty());
    error
}

/// The error of reading the diffusers fixture after a change to its tensors.
#[track_caller]
fn refuses_to_read(header: &[(&str, &str)], change: impl FnOnce(&mut Tensors)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let mut tensors = tensors(&path("diffusers.safetensors"));
    change(&mut tensors);
    save(&file, &tensors, header);
    read(&file).unwrap_err().to_string()
}

#[track_caller]
fn assert_names(error: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| error.contains(part)), "`{error}` lacks one of {parts:?}");
}

#[test]
fn keys_that_match_no_layer_are_listed() {
    let mut adapter = pefts();
    let weights = adapter.modules.values().next().unwrap().clone();
    adapter.modules.insert(ModuleKey::path(UNET, "blocks.7.attn1.to_q"), weights.clone());
    let flattened = ModuleName::Flattened("blocks_8_attn1_to_q".to_owned());
    adapter.modules.insert(ModuleKey { component: UNET.to_owned(), name: flattened }, weights);
    let error = refuses_to_load(&adapter);
    assert!(matches!(error, LoraError::Unmatched { matched: 16, total: 18, .. }), "{error}");
    assert_names(&error.to_string(), &["16 of 18", "unet.blocks.7.attn1.to_q", "unet.blocks_8_attn1_to_q"]);

    let paths = toy().paths();
    let error = adapter.resolve(UNET, &paths.iter().map(String::as_str).collect::<Vec<_>>()).unwrap_err();
    assert_names(&error.to_string(), &["16 of 18", "unet.blocks.7.attn1.to_q", "unet.blocks_8_attn1_to_q"]);
}

#[test]
fn what_matches_nothing_never_loads() {
    let error = refuses_to_load(&pefts().with_component(TEXT_ENCODER));
    assert!(matches!(error, LoraError::Unmatched { matched: 0, total: 16, .. }), "{error}");
    assert_names(&error.to_string(), &["0 of 16", "text_encoder.blocks.0.attn1.to_q"]);
    let error = refuses_to_load(&Adapter::default());
    assert!(matches!(error, LoraError::Unmatched { matched: 0, total: 0, .. }), "{error}");
}

/// A path and its flattened spelling are the same layer.
#[test]
fn two_modules_for_one_layer() {
    let mut adapter = pefts();
    let weights = adapter.modules.values().next().unwrap().clone();
    let flattened = ModuleName::Flattened("blocks_0_attn1_to_k".to_owned());
    adapter.modules.insert(ModuleKey { component: UNET.to_owned(), name: flattened }, weights);
    let error = refuses_to_load(&adapter);
    assert!(matches!(error, LoraError::AmbiguousLayer { .. }), "{error}");
    assert_names(&error.to_string(), &["blocks_0_attn1_to_k"]);
}

#[test]
fn factors_that_do_not_fit_or_are_not_finite() {
    let key = ModuleKey::path(UNET, "blocks.0.attn2.to_k");
    let change = |change: &dyn Fn(&mut cxr_lora::LoraWeights)| {
        let mut adapter = pefts();
        change(adapter.modules.get_mut(&key).unwrap());
        refuses_to_load(&adapter).to_string()
    };
    let of_another = pefts().modules[&ModuleKey::path(UNET, "blocks.0.attn1.to_k")].clone();
    let error = change(&|weights| *weights = of_another.clone());
    assert_names(&error, &["unet.blocks.0.attn2.to_k", "[8, 8]", "[8, 6]"]);
    assert_names(
        &change(&|weights| weights.a[3] = f32::NAN),
        &["unet.blocks.0.attn2.to_k.lora_A", "not finite"],
    );
    assert_names(&change(&|weights| weights.alpha = f64::INFINITY), &["unet.blocks.0.attn2.to_k.alpha"]);
    assert_names(&change(&|weights| weights.b.truncate(5)), &["unet.blocks.0.attn2.to_k.lora_B", "8 x 3"]);
}

#[test]
fn targets_that_match_nothing() {
    let attach = |config: LoraConfig| {
        let mut model = toy();
        let error = cxr_lora::attach(&mut model, &config, 1).unwrap_err();
        assert!(cxr_lora::attached(&model).is_empty());
        error
    };
    let patterns = |patterns: &[&str]| {
        let patterns = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        LoraConfig::new(2).with_targets(TargetSet::Patterns(patterns))
    };
    for config in [patterns(&["to_q", "attn3.*"]), LoraConfig::new(2).with_override("attn3.*", 1, 1.0)] {
        let error = attach(config);
        assert!(matches!(&error, LoraError::NoTarget { pattern, .. } if pattern == "attn3.*"), "{error}");
        assert_names(&error.to_string(), &["`attn3.*`", "`blocks.0.attn1.to_"]);
    }
    assert!(matches!(attach(patterns(&[])), LoraError::NoTarget { .. }));
    // An override of a layer that is there and is no target.
    let error = attach(LoraConfig::new(2).with_override("head", 1, 1.0));
    assert!(matches!(&error, LoraError::NoTarget { pattern, .. } if pattern == "head"), "{error}");
}

#[test]
fn settings_that_no_adapter_can_have() {
    let configs = [
        (LoraConfig::new(0), "rank"),
        (LoraConfig::new(2).with_alpha(f64::NAN), "alpha"),
        (LoraConfig::new(2).with_override("attn1.*", 0, 1.0), "rank"),
        (LoraConfig::new(2).with_override("attn1.*", 1, f64::INFINITY), "alpha"),
        (LoraConfig::new(2).with_name(""), "name"),
    ];
    for (config, expected) in configs {
        let error = cxr_lora::attach(&mut toy(), &config, 1).unwrap_err();
        assert!(matches!(&error, LoraError::Setting { setting, .. } if setting == expected), "{error}");
    }
    let mut model = toy();
    let error = cxr_lora::load_adapter(&mut model, &pefts(), f64::NAN).unwrap_err();
    assert_names(&error.to_string(), &["weight", "NaN"]);
    cxr_lora::load_adapter(&mut model, &pefts(), 1.0).unwrap();
    assert!(cxr_lora::set_weight(&mut model, DEFAULT_NAME, f64::INFINITY).is_err());
    assert_eq!(model.layer("blocks.0.attn1.to_q").adapters()[0].weight(), 1.0);
}

#[test]
fn names_that_are_taken_or_not_there() {
    let mut model = toy();
    cxr_lora::load_named(&mut [(UNET, &mut model)], &pefts(), "first", 1.0).unwrap();
    let twice = [
        cxr_lora::load_named(&mut [(UNET, &mut model)], &pefts(), "first", 1.0),
        cxr_lora::attach(&mut model, &LoraConfig::new(2).with_name("first"), 1),
    ];
    for attempt in twice {
        let error = attempt.unwrap_err();
        assert!(matches!(&error, LoraError::AlreadyAttached { name, .. } if name == "first"), "{error}");
    }
    assert_eq!(model.layer("blocks.0.attn1.to_q").adapters().len(), 1);
    let absent = [
        cxr_lora::train_only(&mut model, "second"),
        cxr_lora::detach(&mut model, "second"),
        cxr_lora::set_weight(&mut model, "second", 1.0),
        cxr_lora::set_enabled(&mut model, "second", true),
        cxr_lora::export(&model, "second", UNET).map(|_| 0),
    ];
    for attempt in absent {
        assert_names(&attempt.unwrap_err().to_string(), &["`second`", "[first]"]);
    }
}

#[test]
fn files_that_are_not_whole() {
    let a = "unet.blocks.0.attn1.to_q.lora_A.weight";
    let b = "unet.blocks.0.attn1.to_q.lora_B.weight";
    let error = refuses_to_read(&[], |tensors| drop(tensors.remove(a)));
    assert_names(&error, &["unet.blocks.0.attn1.to_q", "A (down)"]);
    let error = refuses_to_read(&[], |tensors| drop(tensors.remove(b)));
    assert_names(&error, &["unet.blocks.0.attn1.to_q", "B (up)"]);

    let shaped = |key: &str, shape: Vec<usize>| {
        let count = shape.iter().product();
        refuses_to_read(&[], |tensors| {
            tensors.insert(key.to_owned(), RawTensor::from_f32(shape, vec![0.5; count]));
        })
    };
    assert_names(&shaped(b, vec![8, 2]), &[b, "[8, 2]", "[out, 3]"]);
    assert_names(&shaped(b, vec![8, 3, 3, 3]), &[b, "[8, 3, 3, 3]"]);
    assert_names(&shaped(a, vec![3, 8, 3]), &[a, "[3, 8, 3]"]);
    assert_names(&shaped(a, vec![24]), &[a, "[24]"]);
    assert_names(&shaped(a, vec![0, 8]), &[a, "[0, 8]"]);
    let error = refuses_to_read(&[], |tensors| {
        let mut values = vec![0.0; 24];
        values[7] = f32::NEG_INFINITY;
        tensors.insert(a.to_owned(), RawTensor::from_f32(vec![3, 8], values));
    });
    assert_names(&error, &[a, "not finite"]);
    let error = refuses_to_read(&[], |tensors| {
        tensors.insert(a.to_owned(), RawTensor::from_i64(vec![3, 8], vec![1; 24]));
    });
    assert_names(&error, &["[3, 8]"]);
}

#[test]
fn keys_of_no_scheme_or_of_another() {
    let value = || RawTensor::from_f32(vec![1], vec![1.0]);
    for stray in ["unet.conv_in.weight", "lora_unet_to_q.alpha", "unet.blocks.0.attn1.to_q.lora_A.bias"] {
        let error = refuses_to_read(&[], |tensors| drop(tensors.insert(stray.to_owned(), value())));
        assert_names(&error, &[stray, "32 keys", "diffusers' LoRA format"]);
    }
    let error = refuses_to_read(&[], |tensors| {
        tensors.clear();
        tensors.insert("model.weight".to_owned(), value());
    });
    assert_names(&error, &["none of the 1 keys", "`model.weight`"]);
    assert_names(&refuses_to_read(&[], Tensors::clear), &["none of the 0 keys"]);
    for (mark, kind) in [
        ("lora_unet_to_q.hada_w1_a", "LoHa"),
        ("lora_unet_to_q.lokr_w1", "LoKr"),
        ("lora_unet_to_q.lora_mid.weight", "Tucker"),
        ("lora_unet_to_q.dora_scale", "DoRA"),
        ("unet.to_q.lora_magnitude_vector", "DoRA"),
        ("unet:0:up", "cloneofsimo"),
    ] {
        let error = refuses_to_read(&[], |tensors| drop(tensors.insert(mark.to_owned(), value())));
        assert_names(&error, &[kind, "not supported"]);
    }
}

#[test]
fn settings_in_files_that_do_not_hold() {
    let with = |json: &str| refuses_to_read(&[("lora_adapter_metadata", json)], |_| ());
    assert_names(&with("{"), &["lora_adapter_metadata"]);
    assert_names(&with("[]"), &["lora_adapter_metadata"]);
    assert_names(&with(r#"{"unet.r": 3}"#), &["lora_adapter_metadata", "`unet`", "lora_alpha"]);
    // One layer of the fixture has rank 2.
    let error = with(r#"{"unet.r": 3, "unet.lora_alpha": 6}"#);
    assert_names(&error, &["unet.blocks.1.attn2.to_k.lora_A.weight", "[3, in]", "[2, 6]"]);
    let error = refuses_to_read(&[("cxr_provenance", "7")], |_| ());
    assert_names(&error, &["cxr_provenance"]);

    let folder = tempfile::tempdir().unwrap();
    let weights = "adapter_model.safetensors";
    std::fs::copy(path("adapter").join(weights), folder.path().join(weights)).unwrap();
    assert_names(&read(folder.path()).unwrap_err().to_string(), &["adapter_config.json"]);
    std::fs::write(folder.path().join("adapter_config.json"), "{").unwrap();
    assert_names(&read(folder.path()).unwrap_err().to_string(), &["adapter_config.json"]);
}

#[test]
fn files_and_folders_that_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    for (at, name) in
        [(folder.path(), "adapter_model.safetensors"), (Path::new("/absent/file"), "/absent/file")]
    {
        assert_names(&read(at).unwrap_err().to_string(), &[name]);
    }
}

#[test]
fn what_a_format_cannot_hold() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("out");
    let refused = |adapter: &Adapter, format| {
        let error = write(&at, adapter, format).unwrap_err();
        assert!(!at.exists(), "something was written");
        error.to_string()
    };
    let adapter = pefts();
    for format in [Format::DiffusersLora, Format::AttnProcessor, Format::KohyaLdm] {
        assert_names(&refused(&adapter, format), &["read only"]);
    }
    for format in [Format::Diffusers, Format::Peft, Format::Kohya] {
        assert_names(&refused(&Adapter::default(), format), &["no modules"]);
        let mut broken = adapter.clone();
        broken.modules.values_mut().next().unwrap().b[0] = f32::NAN;
        assert_names(&refused(&broken, format), &["unet.blocks.0.attn1.to_k.lora_B"]);
    }
    let (flattened, _) = read(path("kohya.safetensors")).unwrap();
    for format in [Format::Diffusers, Format::Peft] {
        assert_names(&refused(&flattened, format), &["blocks_0_attn1_to_k", "resolve"]);
    }
    let other = adapter.clone().with_component("text_encoder_2");
    for format in [Format::Diffusers, Format::Kohya] {
        assert_names(&refused(&other, format), &["text_encoder_2"]);
    }
    let mut both = adapter.clone();
    both.modules.extend(adapter.clone().with_component(TEXT_ENCODER).modules);
    assert_names(&refused(&both, Format::Peft), &["one model"]);
    // Two paths that kohya's spelling makes one.
    let mut alike = adapter.clone();
    let weights = alike.modules.values().next().unwrap().clone();
    alike.modules.insert(ModuleKey::path(UNET, "blocks.0.attn1.to.k"), weights);
    assert_names(&refused(&alike, Format::Kohya), &["same key"]);

    // A folder that is there is not written over.
    std::fs::create_dir(&at).unwrap();
    std::fs::write(at.join("mine"), "text").unwrap();
    assert_names(&write(&at, &adapter, Format::Peft).unwrap_err().to_string(), &["exists"]);
    assert!(at.join("mine").exists());
}
