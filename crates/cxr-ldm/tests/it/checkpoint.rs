//! Single-file checkpoints. Names and the Lightning file: `fixtures/ldm_generate.py`, by diffusers' converters.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::FloatDType;
use cxr_core::tensor_file::{RawTensor, TensorFile, write_safetensors};
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::pipeline::{
    LoadOptions, ModelConfig, ModelFiles, ModelSource, Request, SaveDtype, StableDiffusion,
};
use cxr_ldm::scheduler::NoiseScheduleConfig;
use cxr_ldm::text::ClipTextConfig;
use cxr_ldm::unet::{Heads, UNetConfig};
use cxr_ldm::vae::AutoencoderKlConfig;
use cxr_ldm::weights::{Component, canonical};

use crate::fixture::path as fixture;
use crate::pipeline::{config, model};

type Names = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;
type Tensors = BTreeMap<String, RawTensor>;

/// The LDM name of every tensor and diffusers' name of it, by size of model and network.
fn names() -> Names {
    serde_json::from_str(&fs::read_to_string(fixture("ldm_names.json")).unwrap()).unwrap()
}

fn read_all(path: &Path) -> Tensors {
    let file = TensorFile::open(path).unwrap();
    file.names().map(|name| (name.to_string(), file.read(name).unwrap())).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let tensors: Vec<_> = tensors.clone().into_iter().collect();
    write_safetensors(path, &tensors, &BTreeMap::new()).unwrap();
}

/// A folder and the tensors of a single file with the same weights.
fn tiny() -> (tempfile::TempDir, PathBuf, Tensors) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    model(31).save(&path, SaveDtype::F32).unwrap();
    let mut tensors = Tensors::new();
    for component in Component::ALL {
        let file = path.join(component.folder()).join(format!("{}.safetensors", component.file_stem()));
        let mut published: Tensors = read_all(&file)
            .into_iter()
            .map(|(name, tensor)| (canonical(component, &name).unwrap(), tensor))
            .collect();
        for (ldm, diffusers) in &names()["tiny"][component.folder()] {
            let mut tensor =
                published.remove(diffusers).unwrap_or_else(|| panic!("{component}: {diffusers}"));
            if ldm.contains(".mid.attn_1.") && tensor.shape.len() == 2 {
                tensor.shape.extend([1, 1]);
            }
            tensors.insert(ldm.clone(), tensor);
        }
        assert!(published.is_empty(), "{component}: {:?}", published.keys());
    }
    (folder, path, tensors)
}

fn load(path: &Path, config: ModelConfig) -> Result<StableDiffusion<Flex>, cxr_ldm::Error> {
    StableDiffusion::load(path, LoadOptions::default().with_config(config), &Default::default())
}

fn refusal(tensors: &Tensors) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.safetensors");
    write(&path, tensors);
    // no `expect_err`: it would print the model
    let Err(error) = load(&path, config()) else { panic!("this file is wrong") };
    let error = error.to_string();
    assert!(error.contains("wrong.safetensors") && !error.contains('\n'), "{error}");
    error
}

#[test]
fn every_tensor_of_stable_diffusion_has_its_name_in_a_single_file() {
    let device = Default::default();
    let (names, config) = (names(), ModelConfig::sd15());
    let parts = config.init::<Flex>(&device).unwrap();
    fn paths<M: Module<Flex>>(component: Component, module: &M) -> Vec<(String, Vec<usize>)> {
        let list = parameters::list::<Flex, M>(module).into_iter();
        list.map(|p| (canonical(component, &p.path).unwrap(), p.shape)).collect()
    }
    let mut tensors = Vec::new();
    for (component, expected, count) in [
        (Component::Unet, paths(Component::Unet, &parts.unet), 686),
        (Component::Vae, paths(Component::Vae, &parts.vae), 248),
        (Component::TextEncoder, paths(Component::TextEncoder, &parts.text), 196),
    ] {
        let pairs = &names["sd15"][component.folder()];
        let back: BTreeMap<&String, &String> =
            pairs.iter().map(|(ldm, diffusers)| (diffusers, ldm)).collect();
        assert_eq!((expected.len(), pairs.len(), back.len()), (count, count, count), "{component}");
        for (path, shape) in expected {
            let ldm = back.get(&path).unwrap_or_else(|| panic!("{component}: {path}"));
            tensors.push((ldm.to_string(), shape));
        }
    }
    // a sparse file of full size: all names and shapes match, and then the zeros are read
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v1-5-pruned-emaonly.safetensors");
    sparse(&path, &tensors);
    let files = ModelFiles::locate(&ModelSource::from(&path), &LoadOptions::default()).unwrap();
    assert_eq!((files.config().unwrap(), files.commit()), (ModelConfig::sd15(), None));
    let vae = files.load_vae::<Flex>(&LoadOptions::default(), &device).unwrap();
    assert_eq!(parameters::count::<Flex, _>(&vae).0, 83_653_863);
    // one less, and it does not load
    tensors.pop();
    sparse(&path, &tensors);
    let error = files.load_vae::<Flex>(&LoadOptions::default(), &device).unwrap_err().to_string();
    assert!(error.contains("1 problems") && error.contains("missing"), "{error}");
    // nor is it taken for what was published
    let verify = LoadOptions::default().with_verify(true);
    tensors.push(("model_ema.decay".into(), vec![1]));
    assert!(files.load_vae::<Flex>(&verify, &device).is_err());
}

/// A file of zeros that takes no room.
fn sparse(path: &Path, tensors: &[(String, Vec<usize>)]) {
    let mut header = serde_json::Map::new();
    let mut start = 0;
    for (name, shape) in tensors {
        let end = start + 4 * shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
        start = end;
    }
    let header = serde_json::to_vec(&header).unwrap();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len((8 + header.len() + start) as u64).unwrap();
}

#[test]
fn a_single_file_is_the_folder_with_the_same_weights() {
    let (folder, path, mut tensors) = tiny();
    let from_folder: StableDiffusion<Flex> =
        StableDiffusion::load(&path, LoadOptions::default(), &Default::default()).unwrap();
    let single = folder.path().join("single.safetensors");
    write(&single, &tensors);
    let from_file = load(&single, config()).unwrap();
    assert_eq!(from_file.parts().hash, from_folder.parts().hash);
    assert_eq!(from_file.parts().config, config());
    let picture = |model: &StableDiffusion<Flex>| {
        model.generate(&Request::new("Edema.").steps(2).seed(1)).unwrap()[0].rgb.clone()
    };
    assert_eq!(picture(&from_file), picture(&from_folder));

    // as other programs write it: without `text_model.`, the attention linear, and much beside it
    let one = RawTensor::from_f32(vec![1], vec![f32::NAN]);
    let mut other = Tensors::new();
    for (name, mut tensor) in std::mem::take(&mut tensors) {
        if name.contains(".mid.attn_1.") {
            tensor.shape.truncate(2);
        }
        other.insert(name.replace(".transformer.text_model.", ".transformer."), tensor);
    }
    for name in [
        "betas",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef2",
        "logvar",
        "scale_factor",
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "first_stage_model.loss.discriminator.main.0.weight",
        "safety_checker.special_care_embeds",
    ] {
        other.insert(name.into(), one.clone());
    }
    let ids = RawTensor::from_i64(vec![1, 77], (0..77).collect());
    other.insert("cond_stage_model.transformer.embeddings.position_ids".into(), ids);
    write(&single, &other);
    assert_eq!(load(&single, config()).unwrap().parts().hash, from_folder.parts().hash);
    // in half precision, by the name alone
    let options = LoadOptions::default().with_config(config()).with_dtype(FloatDType::F16);
    let half = StableDiffusion::<Flex>::load(single.to_str().unwrap(), options, &Default::default()).unwrap();
    assert_eq!(half.parts().dtype, FloatDType::F16);
    assert_eq!(half.parts().hash, from_folder.parts().hash, "the hash is that of the file's weights");
}

#[test]
fn everything_wrong_with_a_single_file_is_in_one_error() {
    let (_folder, _, mut tensors) = tiny();
    tensors.remove("model.diffusion_model.time_embed.0.weight").unwrap();
    tensors.remove("first_stage_model.decoder.mid.attn_1.k.bias").unwrap();
    let shape = RawTensor::from_f32(vec![2], vec![0.0; 2]);
    tensors.insert("cond_stage_model.transformer.text_model.final_layer_norm.bias".into(), shape.clone());
    tensors.insert("first_stage_model.encoder.mid.attn_1.q.weight".into(), shape.clone());
    tensors.insert("model.diffusion_model.zero_convs.0.weight".into(), shape.clone());
    tensors.insert("loss_weights".into(), shape);
    let error = refusal(&tensors);
    for part in [
        "6 problems",
        "time_embedding.linear_1.weight: expected [128, 32], missing",
        "decoder.mid_block.attentions.0.to_k.bias: expected [64], missing",
        "final_layer_norm.bias: expected [32], found [2]",
        "encoder.mid.attn_1.q.weight: expected [64, 64], found [2]",
        "model.diffusion_model.zero_convs.0.weight: unexpected",
        "loss_weights: unexpected",
    ] {
        assert!(error.contains(part), "expected {part:?} in {error}");
    }
}

#[test]
fn other_models_are_refused_by_name() {
    let (_folder, _, tensors) = tiny();
    let one = || RawTensor::from_f32(vec![1], vec![0.0]);
    let with = |name: &str, tensor: RawTensor| {
        let mut tensors = tensors.clone();
        tensors.insert(name.into(), tensor);
        refusal(&tensors)
    };
    let zeros = |shape: &[usize]| RawTensor::from_f32(shape.to_vec(), vec![0.0; shape.iter().product()]);
    let to_k = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight";
    for (found, expected) in [
        (with("cond_stage_model.model.ln_final.bias", one()), "Stable Diffusion 2.x"),
        (with(to_k, zeros(&[32, 1024])), "Stable Diffusion 2.x"),
        (with("conditioner.embedders.0.transformer.x", one()), "Stable Diffusion XL"),
        (with("model.diffusion_model.joint_blocks.0.x", one()), "Stable Diffusion 3"),
        (with("model.diffusion_model.input_blocks.0.0.weight", zeros(&[32, 9, 3, 3])), "inpainting"),
        (with("control_model.time_embed.0.weight", one()), "ControlNet"),
    ] {
        assert!(found.contains(expected) && found.contains("expected Stable Diffusion 1.x"), "{found}");
    }
    let only = |prefix: &str| -> Tensors {
        tensors.clone().into_iter().filter(|(name, _)| name.starts_with(prefix)).collect()
    };
    let error = refusal(&only("model.diffusion_model."));
    assert!(error.contains("not a whole model: no keys first_stage_model.*, cond_stage_model"), "{error}");
    let error = refusal(&Tensors::from([("lora_unet_x.lora_down.weight".to_string(), one())]));
    assert!(error.contains("a LoRA adapter"), "{error}");
    let error = refusal(&Tensors::from([("conv_in.weight".to_string(), one())]));
    assert!(error.contains("no single-file checkpoint") && error.contains("conv_in.weight"), "{error}");
}

#[test]
fn values_of_a_single_file_that_are_not_finite_are_named() {
    let (_folder, _, mut tensors) = tiny();
    let name = "first_stage_model.decoder.norm_out.bias";
    let tensor = tensors.get_mut(name).unwrap();
    let mut values = tensor.to_f32().unwrap();
    values[3] = f32::NAN;
    *tensor = RawTensor::from_f32(tensor.shape.clone(), values);
    assert!(refusal(&tensors).contains(name));
}

/// `procedural` of the generator: FNV-1a of the name and Weyl's sequence.
fn procedural(name: &str, index: u64) -> f32 {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let bits = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (bits >> 56) as f32 / 256.0 - 0.5
}

#[test]
fn a_checkpoint_that_lightning_saved_is_read() {
    let mini = ModelConfig {
        text: ClipTextConfig {
            vocab_size: 40,
            hidden_size: 8,
            intermediate_size: 16,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            ..ClipTextConfig::sd15()
        },
        unet: UNetConfig {
            block_out_channels: vec![8, 16],
            cross_attention_dim: 8,
            attention_head_dim: Heads::Same(2),
            norm_num_groups: 4,
            ..UNetConfig::tiny()
        },
        vae: AutoencoderKlConfig {
            block_out_channels: vec![8, 16],
            norm_num_groups: 4,
            ..AutoencoderKlConfig::tiny()
        },
        schedule: NoiseScheduleConfig::sd15(),
    };
    let sd = load(&fixture("ldm.ckpt"), mini.clone()).unwrap();
    fn check<M: Module<Flex>>(component: Component, module: &M) -> usize {
        let mut count = 0;
        parameters::read::<Flex, M>(module, |path, data| {
            count += 1;
            let name = format!("{component}/{}", canonical(component, path).unwrap());
            for (index, found) in data.iter::<f32>().enumerate() {
                assert_eq!(found, procedural(&name, index as u64), "{name}, element {index}");
            }
        });
        count
    }
    let names = &names()["mini"];
    assert_eq!(check(Component::TextEncoder, &sd.parts().text), names["text_encoder"].len());
    assert_eq!(check(Component::Unet, &sd.parts().unet), names["unet"].len());
    assert_eq!(check(Component::Vae, &sd.parts().vae), names["vae"].len());
    // every f16 is exact in f32, and the other way
    let options = LoadOptions::default().with_config(mini).with_dtype(FloatDType::F16);
    let half = StableDiffusion::<Flex>::load(fixture("ldm.ckpt"), options, &Default::default()).unwrap();
    check(Component::Unet, &half.parts().unet);
    assert_eq!(half.parts().hash, sd.parts().hash);
}
