//! Folders: written, read, and refused.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;

use burn::tensor::{FloatDType, TensorData};
use cxr_core::progress::Progress;
use cxr_core::tensor_file::{Dtype, RawTensor, TensorFile, write_safetensors};
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::pipeline::{LoadOptions, ModelFolder, ModelParts, Request, SaveDtype, StableDiffusion};

use crate::pipeline::{model, relative};

type Tensors = Vec<(String, RawTensor)>;

const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const TEXT: &str = "text_encoder/model.safetensors";

fn saved(dtype: SaveDtype) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    model(21).save(&path, dtype).unwrap();
    (folder, path)
}

fn load(path: &Path) -> Result<StableDiffusion<Flex>, cxr_ldm::Error> {
    StableDiffusion::load(path, LoadOptions::default(), &Default::default())
}

fn refusal(path: &Path) -> String {
    // no `expect_err`: it would print the model
    let Err(error) = load(path) else { panic!("this folder is broken") };
    error.to_string()
}

/// Changes the tensors of a file in place.
fn edit(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let file = TensorFile::open(path).unwrap();
    let names: Vec<String> = file.names().map(|name| name.to_string()).collect();
    let mut tensors: Tensors =
        names.into_iter().map(|name| (name.clone(), file.read(&name).unwrap())).collect();
    change(&mut tensors);
    drop(file);
    fs::remove_file(path).unwrap();
    write_safetensors(path, &tensors, &BTreeMap::new()).unwrap();
}

fn rename(tensors: &mut Tensors, of: impl Fn(&str) -> String) {
    for (name, _) in tensors {
        *name = of(name);
    }
}

fn request() -> Request {
    Request::new("Edema.").steps(2).seed(1)
}

#[test]
fn what_is_saved_comes_back_bit_for_bit() {
    let (_guard, path) = saved(SaveDtype::F32);
    let (original, loaded) = (model(21), load(&path).unwrap());
    let list = |sd: &StableDiffusion<Flex>| {
        let mut all = Vec::new();
        let mut keep = |path: &str, data: burn::tensor::TensorData| {
            all.push((path.to_string(), data.to_vec::<f32>().unwrap()));
        };
        parameters::read(&sd.parts().text, &mut keep);
        parameters::read(&sd.parts().unet, &mut keep);
        parameters::read(&sd.parts().vae, &mut keep);
        all
    };
    assert_eq!(list(&loaded), list(&original));
    assert_eq!(loaded.generate(&request()).unwrap()[0].rgb, original.generate(&request()).unwrap()[0].rgb);
    // ids are the same in every process, so that optimizer state finds its parameter
    let ids = |sd: &StableDiffusion<Flex>| {
        parameters::list(&sd.parts().unet).into_iter().map(|p| p.id).collect::<Vec<_>>()
    };
    assert_eq!(ids(&loaded), ids(&load(&path).unwrap()));
    assert_ne!(ids(&loaded), ids(&original));
    // the hash is that of the weights
    assert_eq!(loaded.parts().hash.len(), 64);
    assert_eq!(loaded.parts().hash, load(&path).unwrap().parts().hash);
    let files = cxr_ldm::weights::ModelFiles::locate(&path.clone().into(), &LoadOptions::default()).unwrap();
    let hash = files.hash::<Flex>(&LoadOptions::default(), &Default::default()).unwrap();
    assert_eq!(hash, loaded.parts().hash, "without loading");
    edit(&path.join(VAE), |tensors| {
        tensors[3].1 = RawTensor::from_f32(tensors[3].1.shape.clone(), {
            let mut values = tensors[3].1.to_f32().unwrap();
            values[0] += 1e-3;
            values
        })
    });
    assert_ne!(loaded.parts().hash, load(&path).unwrap().parts().hash);
}

#[test]
fn half_precision_is_close_and_half_the_size() {
    let (_guard, path) = saved(SaveDtype::F16);
    let (_guard32, path32) = saved(SaveDtype::F32);
    let size = |path: &Path| fs::metadata(path.join(UNET)).unwrap().len() as f64;
    assert!((size(&path) / size(&path32) - 0.5).abs() < 0.1);
    // read as the fp16 variant as well
    fs::rename(path.join(VAE), path.join("vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    let pixels = |sd: StableDiffusion<Flex>| {
        sd.generate(&request()).unwrap()[0].rgb.iter().map(|&v| v as f32).collect::<Vec<_>>()
    };
    let error = relative(&pixels(load(&path).unwrap()), &pixels(model(21)));
    assert!(error < 2e-2, "{error}");
    let variant = LoadOptions::default().with_variant("fp16");
    let error = StableDiffusion::<Flex>::load(&path, variant, &Default::default()).unwrap_err().to_string();
    assert!(error.contains("fp16") && error.contains("unet") || error.contains("text_encoder"), "{error}");
}

#[test]
fn bfloat16_is_written_and_read_as_it_is() {
    let (_guard, path) = saved(SaveDtype::BF16);
    let file = TensorFile::open(path.join(UNET)).unwrap();
    assert!(file.names().all(|name| file.info(name).unwrap().dtype == Dtype::BF16));
    let options = LoadOptions::default().with_dtype(FloatDType::BF16);
    let sd = StableDiffusion::<Flex>::load(&path, options, &Default::default()).unwrap();
    // rounded once, when it was written
    let mut expected = BTreeMap::new();
    parameters::read(&model(21).parts().unet, |path, data| {
        expected.insert(path.to_string(), data.convert_dtype(burn::tensor::DType::BF16));
    });
    parameters::read(&sd.parts().unet, |path, data| assert_eq!(data, expected[path], "{path}"));
}

#[test]
fn weights_in_half_precision_stay_so_and_make_pictures() {
    let (_guard, path) = saved(SaveDtype::F32);
    let options = LoadOptions::default().with_dtype(FloatDType::BF16);
    let sd = StableDiffusion::<Flex>::load(&path, options, &Default::default()).unwrap();
    parameters::read(&sd.parts().unet, |path, data| {
        assert_eq!(data.dtype, burn::tensor::DType::BF16, "{path}")
    });
    let floats = |rgb: &[u8]| rgb.iter().map(|&v| v as f32).collect::<Vec<_>>();
    let found = floats(&sd.generate(&request()).unwrap()[0].rgb);
    let expected = floats(&load(&path).unwrap().generate(&request()).unwrap()[0].rgb);
    let error = relative(&found, &expected);
    assert!(error < 0.15, "{error}");
}

#[test]
fn older_spellings_are_read() {
    let (_guard, path) = saved(SaveDtype::F32);
    let expected = load(&path).unwrap();
    let mut renamed = 0;
    edit(&path.join(VAE), |tensors| {
        for (name, _) in tensors.iter_mut() {
            for (new, old) in [
                (".to_q.", ".query."),
                (".to_k.", ".key."),
                (".to_v.", ".value."),
                (".to_out.0.", ".proj_attn."),
            ] {
                if name.contains(new) {
                    *name = name.replace(new, old);
                    renamed += 1;
                }
            }
        }
    });
    assert_eq!(renamed, 16, "two blocks of four layers of two tensors");
    edit(&path.join(TEXT), |tensors| {
        rename(tensors, |name| {
            name.strip_prefix("text_model.").expect("published names have it").to_string()
        });
        tensors.push(("embeddings.position_ids".into(), RawTensor::from_i64(vec![1, 77], (0..77).collect())));
    });
    let found = load(&path).unwrap();
    assert_eq!(found.parts().hash, expected.parts().hash);
}

#[test]
fn every_wrong_tensor_is_in_one_error() {
    let (_guard, path) = saved(SaveDtype::F32);
    let mut gone = String::new();
    edit(&path.join(UNET), |tensors| {
        gone = tensors.remove(5).0;
        let wrong = RawTensor::from_f32(vec![3, 2], vec![0.0; 6]);
        let at = tensors.iter().position(|(name, _)| name == "conv_in.weight").unwrap();
        tensors[at].1 = wrong;
        tensors.push(("class_embedding.weight".into(), RawTensor::from_f32(vec![1], vec![0.0])));
    });
    let error = refusal(&path);
    assert!(error.contains(UNET), "{error}");
    assert!(error.contains(&gone) && error.contains("missing"), "{error}");
    assert!(error.contains("conv_in.weight") && error.contains("[3, 2]"), "{error}");
    assert!(error.contains("class_embedding.weight: unexpected"), "{error}");
    assert!(!error.contains('\n'), "one line: {error}");
}

#[test]
fn two_spellings_of_one_tensor_are_refused() {
    let (_guard, path) = saved(SaveDtype::F32);
    edit(&path.join(TEXT), |tensors| {
        let (name, tensor) = tensors[0].clone();
        tensors.push((name.strip_prefix("text_model.").unwrap().to_string(), tensor));
    });
    assert!(refusal(&path).contains("unexpected"));
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let (_guard, path) = saved(SaveDtype::F32);
    let poison = |value: f32| {
        edit(&path.join(VAE), |tensors| {
            let (_, tensor) = tensors.iter_mut().find(|(name, _)| name == "decoder.conv_in.bias").unwrap();
            let mut values = tensor.to_f32().unwrap();
            values[1] = value;
            *tensor = RawTensor::from_f32(tensor.shape.clone(), values);
        });
    };
    for value in [f32::NAN, f32::INFINITY] {
        poison(value);
        let error = refusal(&path);
        assert!(error.contains("decoder.conv_in.bias") && error.contains(VAE), "{error}");
    }
    poison(1e6);
    load(&path).unwrap();
    let half = LoadOptions::default().with_dtype(FloatDType::F16);
    let error = StableDiffusion::<Flex>::load(&path, half, &Default::default()).unwrap_err().to_string();
    assert!(error.contains("decoder.conv_in.bias"), "f16 cannot hold it: {error}");
}

#[test]
fn a_truncated_file_is_named() {
    let (_guard, path) = saved(SaveDtype::F32);
    let file = path.join(UNET);
    let bytes = fs::read(&file).unwrap();
    for length in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&file, &bytes[..length]).unwrap();
        let error = refusal(&path);
        assert!(error.contains("diffusion_pytorch_model.safetensors"), "{length}: {error}");
    }
}

#[test]
fn folders_of_another_kind_are_refused() {
    let (guard, path) = saved(SaveDtype::F32);
    let file = guard.path().join("a-file");
    fs::write(&file, "x").unwrap();
    let refused = |path: &Path, word: &str| {
        let error = refusal(path);
        assert!(error.contains(word), "{word}: {error}");
    };
    refused(&file, "expected a safetensors file or what torch.save writes");
    refused(&guard.path().join("nothing"), "nothing: no such file or folder");
    // what is no part of the model is left alone
    for other in ["safety_checker", "feature_extractor"] {
        fs::create_dir(path.join(other)).unwrap();
        fs::write(path.join(other).join("config.json"), "{").unwrap();
    }
    load(&path).unwrap();

    let index = path.join("model_index.json");
    fs::write(&index, r#"{"_class_name": "StableDiffusionXLPipeline"}"#).unwrap();
    refused(&path, "StableDiffusionXLPipeline");
    fs::write(&index, "{").unwrap();
    refused(&path, "model_index.json");
    fs::remove_file(&index).unwrap();
    load(&path).unwrap(); // it is optional

    let schedule = path.join("scheduler/scheduler_config.json");
    fs::write(&schedule, r#"{"beta_start": -1}"#).unwrap();
    refused(&path, "beta_start");
    fs::remove_file(&schedule).unwrap();
    refused(&path, "scheduler_config.json");
    fs::remove_dir_all(path.join("vae")).unwrap();
    refused(&path, "no subfolder vae");
}

#[test]
fn the_folders_own_vocabulary_is_used() {
    use cxr_tokenizer::vocabulary::{MERGES_TXT, VOCAB_JSON};
    let (_guard, path) = saved(SaveDtype::F32);
    let ids = || load(&path).unwrap().parts().tokenizer.encode("pleural effusion").ids;
    let embedded = ids();
    // saved with the model
    let folder = path.join("tokenizer");
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::remove_file(folder.join(name)).unwrap();
    }
    assert_eq!(ids(), embedded, "an empty folder is none");
    fs::write(folder.join("vocab.json"), VOCAB_JSON).unwrap();
    let error = refusal(&path);
    assert!(error.contains("merges.txt"), "{error}");
    fs::write(folder.join("merges.txt"), MERGES_TXT).unwrap();
    assert_eq!(ids(), embedded);

    // a vocabulary that merges nothing spells words out
    fs::write(folder.join("merges.txt"), "#version: 0.2\n").unwrap();
    assert_ne!(ids(), embedded);
    assert_eq!(ids().iter().position(|&id| id == 49407), Some(1 + "pleuraleffusion".len()));
    fs::write(folder.join("vocab.json"), "{").unwrap();
    let error = refusal(&path);
    assert!(error.contains("vocab.json"), "{error}");

    // newer exports have one file in place of both
    fs::remove_file(folder.join("vocab.json")).unwrap();
    fs::remove_file(folder.join("merges.txt")).unwrap();
    let vocab: serde_json::Value = serde_json::from_str(VOCAB_JSON).unwrap();
    let whole = serde_json::json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}}).to_string();
    fs::write(folder.join("tokenizer.json"), whole).unwrap();
    assert_eq!(ids().iter().position(|&id| id == 49407), Some(1 + "pleuraleffusion".len()));
    fs::write(folder.join("tokenizer.json"), "{").unwrap();
    let error = refusal(&path);
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[test]
fn configurations_that_are_given_count() {
    let (_guard, path) = saved(SaveDtype::F32);
    fs::remove_file(path.join("unet/config.json")).unwrap();
    let options = LoadOptions::default().with_config(crate::pipeline::config());
    let sd = StableDiffusion::<Flex>::load(&path, options, &Default::default()).unwrap();
    assert_eq!(sd.parts().config, crate::pipeline::config());
    assert_eq!(sd.commit(), None);
    let mut other = crate::pipeline::config();
    other.unet.norm_num_groups = 7;
    let options = LoadOptions::default().with_config(other);
    let error = StableDiffusion::<Flex>::load(&path, options, &Default::default()).unwrap_err().to_string();
    assert!(error.contains("block_out_channels"), "{error}");
}

#[test]
fn files_that_nobody_published_do_not_verify() {
    let (_guard, path) = saved(SaveDtype::F32);
    let options = || LoadOptions::default().with_verify(true);
    let refused =
        |options| StableDiffusion::<Flex>::load(&path, options, &Default::default()).unwrap_err().to_string();
    let error = refused(options());
    assert!(error.contains(TEXT) && error.contains("492265874 bytes") && error.contains("found "), "{error}");
    for file in [TEXT, UNET, VAE] {
        fs::rename(path.join(file), path.join(file.replace(".safetensors", ".mine.safetensors"))).unwrap();
    }
    let error = refused(options().with_variant("mine"));
    assert!(error.contains("no SHA-256") && error.contains("text_encoder/model.mine.safetensors"), "{error}");
}

#[test]
fn progress_is_told_in_bytes_and_stops() {
    #[derive(Default)]
    struct Log(Mutex<(Option<u64>, u64, usize)>, bool);
    impl Progress for &'static Log {
        fn begin(&self, _stage: &str, total: Option<u64>) {
            self.0.lock().unwrap().0 = total;
        }
        fn advance(&self, done: u64, _message: &str) -> ControlFlow<()> {
            self.0.lock().unwrap().1 = done;
            if self.1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
        fn end(&self, _message: &str) {
            self.0.lock().unwrap().2 += 1;
        }
    }
    let (_guard, path) = saved(SaveDtype::F32);
    for stops in [false, true] {
        let log: &'static Log = Box::leak(Box::new(Log(Default::default(), stops)));
        let options = LoadOptions::default().with_progress(log);
        let loaded = StableDiffusion::<Flex>::load(&path, options, &Default::default());
        let (total, done, ends) = *log.0.lock().unwrap();
        assert_eq!(ends, 1);
        match stops {
            false => assert_eq!(total, Some(done)),
            true => assert!(matches!(loaded, Err(cxr_ldm::Error::Stopped)) && done < total.unwrap()),
        }
    }
}

#[test]
fn missing_weights_name_the_files_that_would_do() {
    let (_guard, path) = saved(SaveDtype::F32);
    fs::remove_file(path.join(TEXT)).unwrap();
    let error = refusal(&path);
    assert!(error.contains("text_encoder") && error.contains("model.safetensors"), "{error}");
    assert!(error.contains("pytorch_model.bin"), "{error}");
}

#[test]
fn saving_replaces_a_model_and_nothing_else() {
    let (guard, path) = saved(SaveDtype::F32);
    let hash = || load(&path).unwrap().parts().hash.clone();
    let before = hash();
    model(22).save(&path, SaveDtype::F32).unwrap();
    assert_ne!(hash(), before);

    let other = guard.path().join("thesis");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("chapter.txt"), "years of work").unwrap();
    let error = model(22).save(&other, SaveDtype::F32).unwrap_err().to_string();
    assert!(error.contains("thesis") && error.contains("no model"), "{error}");
    assert_eq!(fs::read_to_string(other.join("chapter.txt")).unwrap(), "years of work");
    assert_eq!(fs::read_dir(guard.path()).unwrap().count(), 2, "nothing is left behind");
    ModelFolder::open(&path).unwrap();
}

#[test]
fn weights_that_are_not_finite_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let parts = model(23).into_parts();
    let poison = |path: &str, shape: &[usize]| -> Result<_, std::convert::Infallible> {
        let values = vec![f32::NAN; shape.iter().product()];
        Ok((path == "conv_in.bias").then(|| TensorData::new(values, shape.to_vec())))
    };
    let Ok(unet) = parameters::map_data(parts.unet, poison);
    let sd = StableDiffusion::new(ModelParts { unet, ..parts }, &Default::default()).unwrap();
    let error = sd.save(&path, SaveDtype::F32).unwrap_err().to_string();
    assert!(error.contains("unet") && error.contains("conv_in.bias"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing half-written");
}
