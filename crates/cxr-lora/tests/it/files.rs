//! Adapter files: what PEFT, diffusers and kohya's scripts write, and what is written here.

use std::collections::BTreeMap;
use std::path::Path;

use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr_kernels::Flex;
use cxr_lora::{
    Adapter, Format, LoraError, LoraWeights, ModuleKey, ModuleName, Provenance, TEXT_ENCODER, UNET, read,
    write,
};
use serde_json::Value;

use crate::peft::{Fixture, path};
use crate::toy::Toy;
use crate::{assert_close, values};

pub(crate) type Tensors = BTreeMap<String, RawTensor>;

pub(crate) fn tensors(path: &Path) -> Tensors {
    let file = TensorFile::open(path).unwrap();
    file.names().map(|name| (name.to_owned(), file.read(name).unwrap())).collect()
}

pub(crate) fn save(path: &Path, tensors: &Tensors, header: &[(&str, &str)]) {
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    let header = header.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    write_safetensors(path, &tensors, &header).unwrap();
}

fn pefts() -> Adapter {
    let (adapter, format) = read(path("adapter")).unwrap();
    assert_eq!(format, Format::Peft);
    adapter
}

/// The adapter by its paths in the toy model.
fn resolved(adapter: &Adapter) -> Adapter {
    let paths = Toy::<Flex>::new(&Fixture::open()).paths();
    adapter.resolve(UNET, &paths.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
}

/// As [`resolved`], with the alpha that a file without one means.
fn with_alpha_of_rank(mut adapter: Adapter) -> Adapter {
    adapter.modules.values_mut().for_each(|weights| weights.alpha = weights.rank as f64);
    adapter
}

/// An adapter of two components, with ranks and alphas of many values, and everything known of its origin.
fn of_two_components() -> Adapter {
    let mut stream = cxr_core::random::Stream::new(1, "test", 0);
    let mut weights = |rank, in_features, out_features, alpha| LoraWeights {
        rank,
        in_features,
        out_features,
        kernel: None,
        alpha,
        a: stream.normals(rank * in_features),
        b: stream.normals(out_features * rank),
    };
    let modules = [
        (ModuleKey::path(UNET, "mid_block.attentions.0.proj_in"), weights(3, 4, 5, 0.75)),
        (ModuleKey::path(UNET, "proj_in"), weights(2, 4, 5, 3.0)),
        (ModuleKey::path(UNET, "up_blocks.0.attn1.to_out.0"), weights(3, 2, 6, 3.0)),
        (ModuleKey::path(TEXT_ENCODER, "text_model.encoder.layers.0.mlp.fc1"), weights(1, 3, 2, -2.0)),
        (
            ModuleKey::path(TEXT_ENCODER, "text_model.encoder.layers.1.self_attn.q_proj"),
            weights(7, 3, 2, 0.5),
        ),
    ];
    let provenance = Provenance {
        base_model: Some("ab".repeat(32)),
        dataset: Some("cd".repeat(32)),
        split: Some("ef".repeat(32)),
        rank: Some(3),
        alpha: Some(0.1),
        targets: Some("all_attention".to_owned()),
        steps: Some(1000),
        seed: Some(u64::MAX),
        crate_version: Some("0.1.0".to_owned()),
    };
    Adapter { modules: modules.into(), provenance }
}

#[test]
fn the_same_adapter_from_peft_diffusers_and_kohya() {
    let expected = pefts();
    assert_eq!((expected.modules.len(), expected.components()), (16, vec![UNET]));
    let (diffusers, format) = read(path("diffusers.safetensors")).unwrap();
    assert_eq!(format, Format::Diffusers);
    assert_eq!(diffusers, expected);

    let (kohya, format) = read(path("kohya.safetensors")).unwrap();
    assert_eq!(format, Format::Kohya);
    assert!(kohya.modules.keys().all(|key| matches!(key.name, ModuleName::Flattened(_))));
    // diffusers' converter knows no alpha and writes the rank.
    assert_eq!(resolved(&kohya), with_alpha_of_rank(expected.clone()));

    // Loading resolves the names by itself.
    let fixture = Fixture::open();
    let mut model = Toy::<Flex>::new(&fixture);
    let mut kohya = kohya;
    for (flattened, weights) in &mut kohya.modules {
        let path = expected
            .modules
            .keys()
            .find(|key| key.name.as_str().replace('.', "_") == flattened.name.as_str());
        weights.alpha = expected.modules[path.unwrap()].alpha;
    }
    assert_eq!(cxr_lora::load_adapter(&mut model, &kohya, 1.0).unwrap(), 16);
    assert_close("kohya", &values(model.output(&fixture)), &fixture.values("output.adapted"), 1e-5);
}

#[test]
fn the_keys_of_a_file_by_module() {
    for name in ["diffusers.safetensors", "kohya.safetensors", "adapter"] {
        let (adapter, _) = read(path(name)).unwrap();
        let keys = cxr_lora::factor_keys(path(name)).unwrap();
        assert!(keys.keys().eq(adapter.modules.keys()), "{name}");
        let file = tensors(&cxr_lora::weights_file(path(name)));
        for (module, [a, b]) in keys {
            let weights = &adapter.modules[&module];
            assert_eq!(file[&a].to_f32().unwrap(), weights.a, "{a}");
            assert_eq!(file[&b].to_f32().unwrap(), weights.b, "{b}");
        }
    }
}

#[test]
fn pickled_files_of_pytorch() {
    // A `.bin` has no header, so that alpha is the rank.
    let (diffusers, format) = read(path("diffusers.bin")).unwrap();
    assert_eq!((diffusers, format), (with_alpha_of_rank(pefts()), Format::Diffusers));
    let kohya = read(path("kohya.safetensors")).unwrap();
    assert_eq!(read(path("kohya.pt")).unwrap(), kohya);
}

#[test]
fn what_is_written_has_the_tensors_that_the_others_write() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let adapter = pefts();

    write(at("diffusers.safetensors"), &adapter, Format::Diffusers).unwrap();
    assert!(tensors(&at("diffusers.safetensors")) == tensors(&path("diffusers.safetensors")));
    let settings = |path: &Path| -> Value {
        serde_json::from_str(&TensorFile::open(path).unwrap().metadata()["lora_adapter_metadata"]).unwrap()
    };
    let (ours, theirs) = (settings(&at("diffusers.safetensors")), settings(&path("diffusers.safetensors")));
    for key in ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"] {
        let key = format!("unet.{key}");
        assert!(same_json(&ours[&key], &theirs[&key]), "{key}: {} and {}", ours[&key], theirs[&key]);
    }

    write(at("peft"), &adapter, Format::Peft).unwrap();
    let file = "adapter_model.safetensors";
    assert!(tensors(&at("peft").join(file)) == tensors(&path("adapter").join(file)));
    let settings = |folder: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
    };
    let (ours, theirs) = (settings(&at("peft")), settings(&path("adapter")));
    for key in
        ["peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "task_type"]
    {
        assert!(same_json(&ours[key], &theirs[key]), "{key}: {} and {}", ours[key], theirs[key]);
    }

    write(at("kohya.safetensors"), &with_alpha_of_rank(adapter), Format::Kohya).unwrap();
    let (ours, theirs) = (tensors(&at("kohya.safetensors")), tensors(&path("kohya.safetensors")));
    assert!(ours.keys().eq(theirs.keys()));
    for (key, theirs) in theirs {
        if key.ends_with(".alpha") {
            assert_eq!(ours[&key].to_f32().unwrap(), [theirs.to_i64().unwrap()[0] as f32], "{key}");
        } else {
            assert!(ours[&key] == theirs, "{key}");
        }
    }
}

/// Equal with 6 and 6.0 being one number, as Python sees it.
fn same_json(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one.as_f64() == other.as_f64(),
        (Value::Object(one), Value::Object(other)) => {
            one.keys().eq(other.keys()) && one.iter().all(|(key, value)| same_json(value, &other[key]))
        }
        _ => one == other,
    }
}

#[test]
fn what_is_written_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = of_two_components();
    let at = |name: &str| folder.path().join(name);

    write(at("d.safetensors"), &adapter, Format::Diffusers).unwrap();
    assert_eq!(read(at("d.safetensors")).unwrap(), (adapter.clone(), Format::Diffusers));

    write(at("k.safetensors"), &adapter, Format::Kohya).unwrap();
    let (kohya, format) = read(at("k.safetensors")).unwrap();
    assert_eq!(format, Format::Kohya);
    let paths = |component: &str| -> Vec<&str> {
        adapter.modules.keys().filter(|key| key.component == component).map(|key| key.name.as_str()).collect()
    };
    let resolved = kohya.resolve(UNET, &paths(UNET)).unwrap();
    assert_eq!(resolved.resolve(TEXT_ENCODER, &paths(TEXT_ENCODER)).unwrap(), adapter);
    // It can be written again without its paths.
    write(at("k2.safetensors"), &kohya, Format::Kohya).unwrap();
    assert_eq!(read(at("k2.safetensors")).unwrap().0, kohya);

    // A PEFT folder is for one model and does not say which.
    for component in [UNET, TEXT_ENCODER] {
        let mut one = adapter.clone();
        one.modules.retain(|key, _| key.component == component);
        write(at(component), &one, Format::Peft).unwrap();
        let (read, format) = read(at(component)).unwrap();
        assert_eq!((read.with_component(component), format), (one, Format::Peft));
    }
}

/// The formats that are only read, made of the fixture by renaming its keys.
#[test]
fn older_formats() {
    let folder = tempfile::tempdir().unwrap();
    let expected = with_alpha_of_rank(pefts());
    let source = tensors(&path("diffusers.safetensors"));
    let renamed = |rename: &dyn Fn(&str) -> String| -> Tensors {
        source.iter().map(|(key, tensor)| (rename(key), tensor.clone())).collect()
    };
    let factor = |key: &str, down: &str, up: &str| key.replace(".lora_A.", down).replace(".lora_B.", up);
    let processor = |key: &str| {
        let key = key.strip_prefix("unet.").unwrap().replace(".to_out.0.", ".to_out.");
        factor(&key.replace(".to_", ".processor.to_"), "_lora.down.", "_lora.up.")
    };
    let cases = [
        (Format::Diffusers, renamed(&|key| key.strip_prefix("unet.").unwrap().to_owned())),
        (Format::DiffusersLora, renamed(&|key| factor(key, ".lora.down.", ".lora.up."))),
        (Format::AttnProcessor, renamed(&|key| processor(key))),
    ];
    for (format, tensors) in cases {
        let file = folder.path().join("adapter.safetensors");
        save(&file, &tensors, &[]);
        assert_eq!(read(&file).unwrap(), (expected.clone(), format));
        // The name of a file in a folder of diffusers'.
        std::fs::rename(file, folder.path().join("pytorch_lora_weights.safetensors")).unwrap();
        assert_eq!(read(folder.path()).unwrap().0, expected);
    }
}

/// A component without settings of its own has alpha = rank.
#[test]
fn settings_of_diffusers_without_prefix_and_for_one_component() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let source = tensors(&path("diffusers.safetensors"));
    let alphas = |header: &str| {
        save(&file, &source, &[("lora_adapter_metadata", header)]);
        let (adapter, _) = read(&file).unwrap();
        let alpha = |path: &str| adapter.modules[&ModuleKey::path(UNET, path)].alpha;
        [alpha("blocks.0.attn1.to_q"), alpha("blocks.1.attn2.to_k")]
    };
    let rank = r#""rank_pattern": {"blocks.1.attn2.to_k": 2}"#;
    assert_eq!(alphas(&format!(r#"{{"r": 3, "lora_alpha": 9, {rank}}}"#)), [9.0, 9.0]);
    assert_eq!(alphas(r#"{"text_encoder.r": 3, "text_encoder.lora_alpha": 9}"#), [3.0, 2.0]);
}

#[test]
fn convolutions_of_one_pixel_half_values_and_a_missing_alpha() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let stem = "lora_unet_mid_block_attentions_0_proj_in";
    let a = RawTensor::from_f32(vec![2, 3, 1, 1], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.5]);
    let b = RawTensor::from_f32(vec![4, 2, 1, 1], vec![0.5; 8]);
    let mut tensors: Tensors = [
        (format!("{stem}.lora_down.weight"), a.to_f16_raw()),
        (format!("{stem}.lora_up.weight"), b.to_f16_raw()),
    ]
    .into();
    let expected = |alpha| LoraWeights {
        rank: 2,
        in_features: 3,
        out_features: 4,
        kernel: Some([1, 1]),
        alpha,
        a: a.to_f32().unwrap(),
        b: b.to_f32().unwrap(),
    };
    let only = |tensors: &Tensors| {
        save(&file, tensors, &[]);
        read(&file).unwrap().0.modules.into_values().next().unwrap()
    };
    assert_eq!(only(&tensors), expected(2.0));
    for alpha in
        [RawTensor::from_f32(vec![], vec![0.5]), RawTensor::from_f32(vec![1], vec![0.5]).to_f16_raw()]
    {
        tensors.insert(format!("{stem}.alpha"), alpha);
        assert_eq!(only(&tensors), expected(0.5));
    }
    tensors.insert(format!("{stem}.alpha"), RawTensor::from_i64(vec![], vec![3]));
    assert_eq!(only(&tensors), expected(3.0));
}

#[test]
fn a_file_for_two_components_is_loaded_into_both() {
    let fixture = Fixture::open();
    let unet = pefts();
    let mut both = unet.clone();
    both.modules.extend(unet.with_component(TEXT_ENCODER).modules);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("both.safetensors");
    write(&file, &both, Format::Diffusers).unwrap();
    let (read, _) = read(&file).unwrap();
    assert_eq!(read.components(), [TEXT_ENCODER, UNET]);

    let (mut one, mut two) = (Toy::<Flex>::new(&fixture), Toy::<Flex>::new(&fixture));
    // With one of the components only, the rest of the file has no place.
    let error = cxr_lora::load_adapter(&mut one, &read, 1.0).unwrap_err();
    assert!(matches!(&error, LoraError::Unmatched { matched: 16, total: 32, .. }), "{error}");
    assert!(cxr_lora::attached(&one).is_empty());
    let components: &mut [(&str, &mut dyn cxr_lora::Adaptable<Flex>)] =
        &mut [(UNET, &mut one), (TEXT_ENCODER, &mut two)];
    assert_eq!(cxr_lora::load_named(components, &read, "both", 1.0).unwrap(), 32);
    for model in [one, two] {
        assert_close("component", &values(model.output(&fixture)), &fixture.values("output.adapted"), 1e-5);
    }
}
