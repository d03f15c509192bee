//! Latents and embeddings, once.

use std::ops::ControlFlow;

use burn::tensor::{FloatDType, Tensor, TensorData};
use cxr_core::progress::{Progress, Silent};
use cxr_dataset::{Batch, Collection, ImageLoader, ImageOptions, ReadOptions};
use cxr_kernels::Flex;
use cxr_ldm::text::ClipTextConfig;
use cxr_ldm::vae::{AutoencoderKl, AutoencoderKlConfig};
use cxr_tokenizer::ClipTokenizer;
use cxr_trainer::{TrainError, encode, initialize};

/// Three small pictures with captions.
fn collection(folder: &std::path::Path) -> Collection {
    let mut rows = String::new();
    for (i, text) in ["Edema.", "Clear.", "Edema."].iter().enumerate() {
        let mut encoder =
            png::Encoder::new(std::fs::File::create(folder.join(format!("{i}.png"))).unwrap(), 20, 16);
        encoder.set_color(png::ColorType::Grayscale);
        let pixels: Vec<u8> = (0..320_usize).map(|at| (at * (i + 3)) as u8).collect();
        encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
        rows += &format!("{{\"file_name\": \"{i}.png\", \"text\": \"{text}\"}}\n");
    }
    std::fs::write(folder.join("metadata.jsonl"), rows).unwrap();
    Collection::open(folder, &ReadOptions::default()).unwrap()
}

fn autoencoder() -> AutoencoderKl<Flex> {
    initialize(AutoencoderKlConfig::tiny().init(&Default::default()), 3)
}

fn images() -> ImageLoader {
    ImageLoader::new(ImageOptions::new(16))
}

#[test]
fn moments_are_the_autoencoders_scaled() {
    let folder = tempfile::tempdir().unwrap();
    let (collection, vae, device) = (collection(folder.path()), autoencoder(), Default::default());
    let encode = |positions: &[usize], batch| {
        encode::moments(
            || Ok(vae.clone()),
            FloatDType::F32,
            0.5,
            (&collection, positions),
            &images(),
            batch,
            None,
            &device,
            &Silent,
        )
        .unwrap()
    };
    let (all, [c, h, w]) = encode(&[2, 0], 2);
    assert_eq!(all.len(), 2);
    for (found, position) in all.iter().zip([2, 0]) {
        let batch = Batch::load(&collection, &[position], images()).unwrap();
        let pixels = Tensor::<Flex, 4>::from_data(TensorData::new(batch.pixels, batch.shape), &device);
        let moments = vae.encode(pixels);
        assert_eq!(moments.mean.dims(), [1, c, h, w]);
        let values = |tensor: Tensor<Flex, 4>| tensor.into_data().to_vec::<f32>().unwrap();
        for (found, expected) in
            [(&found.mean, values(moments.mean.clone())), (&found.std, values(moments.std()))]
        {
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found - 0.5 * expected).abs() <= 1e-5 * expected.abs().max(1.0),
                    "{found} {expected}"
                );
            }
        }
    }
    assert_ne!(all[0], all[1]);
}

#[test]
fn each_prompt_is_embedded_once_and_the_empty_one_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (collection, device) = (collection(folder.path()), Default::default());
    let config = ClipTextConfig { vocab_size: 49408, ..ClipTextConfig::tiny() };
    let text = initialize(config.init::<Flex>(&device), 3);
    let calls = std::cell::Cell::new(0);
    let prompts = || collection.pairs.iter().map(|pair| pair.text.as_str());
    let embed = |ids: Tensor<Flex, 2, burn::tensor::Int>| {
        calls.set(calls.get() + ids.dims()[0]);
        text.forward(ids)
    };
    let found = encode::embeddings(
        || Ok(embed),
        FloatDType::F32,
        &ClipTokenizer::embedded(),
        prompts(),
        None,
        &device,
        &Silent,
    )
    .unwrap();
    assert_eq!((found.len(), calls.get()), (3, 3));
    assert!(found.contains_key("") && found["Edema."].0 != found["Clear."].0);
    let [tokens, width] = found["Edema."].1;
    assert_eq!((tokens, found["Edema."].0.len()), (77, 77 * width));

    let moments = (0..3).map(|i| encode::ScaledMoments { mean: vec![i as f32], std: vec![1.0] }).collect();
    let samples = encode::pair_up(moments, prompts(), &found);
    assert_eq!(samples[2].mean, [2.0]);
    assert!(std::sync::Arc::ptr_eq(&samples[0].condition.0, &samples[2].condition.0));
}

#[test]
fn a_picture_that_is_gone_and_a_wish_to_stop() {
    struct Impatient;
    impl Progress for Impatient {
        fn begin(&self, _: &str, _: Option<u64>) {}
        fn advance(&self, _: u64, _: &str) -> ControlFlow<()> {
            ControlFlow::Break(())
        }
        fn end(&self, _: &str) {}
    }
    let folder = tempfile::tempdir().unwrap();
    let (collection, vae) = (collection(folder.path()), autoencoder());
    let encode = |progress: &dyn Progress| {
        let data = (&collection, &[0, 1, 2][..]);
        encode::moments(
            || Ok(vae.clone()),
            FloatDType::F32,
            1.0,
            data,
            &images(),
            1,
            None,
            &Default::default(),
            progress,
        )
    };
    assert!(matches!(encode(&Impatient), Err(TrainError::Stopped { .. })));
    std::fs::remove_file(folder.path().join("1.png")).unwrap();
    let error = encode(&Silent).unwrap_err().to_string();
    assert!(error.contains("1.png") && error.contains("metadata.jsonl"), "{error}");
}

/// Another autoencoder under the same name shows what comes from the cache.
#[test]
fn what_is_kept_is_not_made_again_unless_something_changed() {
    let folder = tempfile::tempdir().unwrap();
    let collection = collection(folder.path());
    let kept = folder.path().join("cache");
    let [first, second] =
        [3, 4].map(|seed| initialize(AutoencoderKlConfig::tiny().init::<Flex>(&Default::default()), seed));
    let encode = |vae: &AutoencoderKl<Flex>, model: &str, size: u32, cached: bool| {
        let cache = encode::EncodeCache { folder: &kept, model };
        let images = ImageLoader::new(ImageOptions::new(size));
        let (data, cache) = ((&collection, &[0, 1, 2][..]), cached.then_some(&cache));
        encode::moments(
            || Ok(vae.clone()),
            FloatDType::F32,
            1.0,
            data,
            &images,
            2,
            cache,
            &Default::default(),
            &Silent,
        )
        .unwrap()
    };
    let plain = encode(&first, "a", 16, false);
    assert_eq!(encode(&first, "a", 16, true), plain);
    assert_eq!(encode(&second, "a", 16, true), plain, "kept");
    let other = encode(&second, "b", 16, true);
    assert_ne!(other, plain, "another model");
    assert_eq!(other, encode(&second, "b", 16, false));
    assert_ne!(encode(&second, "a", 32, true).1, plain.1, "another size");

    // What is all there needs no autoencoder.
    let cache = encode::EncodeCache { folder: &kept, model: "a" };
    let never = || -> Result<AutoencoderKl<Flex>, cxr_ldm::Error> { panic!("it is not loaded") };
    let (data, images) = ((&collection, &[0, 1, 2][..]), ImageLoader::new(ImageOptions::new(16)));
    let found = encode::moments(
        never,
        FloatDType::F32,
        1.0,
        data,
        &images,
        2,
        Some(&cache),
        &Default::default(),
        &Silent,
    );
    assert_eq!(found.unwrap(), plain);

    // A bit turned, a file cut off: made again, by the model at hand.
    for damage in [
        |bytes: &mut Vec<u8>| {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        },
        |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2),
        |bytes: &mut Vec<u8>| bytes.clear(),
    ] {
        encode(&first, "c", 16, true);
        for entry in kept.read_dir().unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            damage(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
        }
        assert_eq!(encode(&second, "c", 16, true), other, "damaged");
        assert_eq!(encode(&first, "c", 16, true), other, "and kept again");
        std::fs::remove_dir_all(&kept).unwrap();
    }

    // A picture that was written again.
    assert_eq!(encode(&first, "a", 16, true), plain);
    let image = folder.path().join("1.png");
    let later = std::fs::metadata(&image).unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
    std::fs::File::options().write(true).open(&image).unwrap().set_modified(later).unwrap();
    assert_eq!(encode(&second, "a", 16, true), other);
}

#[test]
fn embeddings_are_kept_too() {
    let folder = tempfile::tempdir().unwrap();
    let (kept, device) = (folder.path().join("cache"), Default::default());
    let config = ClipTextConfig { vocab_size: 49408, ..ClipTextConfig::tiny() };
    let text = initialize(config.init::<Flex>(&device), 3);
    let calls = std::cell::Cell::new(0);
    let embed = |prompts: &[&'static str], model: &str| {
        let cache = encode::EncodeCache { folder: &kept, model };
        let embed = |ids: Tensor<Flex, 2, burn::tensor::Int>| {
            calls.set(calls.get() + 1);
            text.forward(ids)
        };
        let (tokenizer, prompts) = (ClipTokenizer::embedded(), prompts.iter().copied());
        encode::embeddings(|| Ok(embed), FloatDType::F32, &tokenizer, prompts, Some(&cache), &device, &Silent)
            .unwrap()
    };
    let first = embed(&["Edema.", "Clear."], "a");
    assert_eq!(calls.get(), 1);
    assert_eq!(embed(&["Clear.", "Edema.", "Edema."], "a"), first);
    assert_eq!(calls.get(), 1);
    embed(&["Clear.", "Edema."], "b");
    embed(&["Clear."], "a");
    assert_eq!(calls.get(), 3);
}
