//! Published files, where they are at hand. What they show of the reader is also tested without them.

use std::collections::BTreeMap;

use cxr_lora::{Adapter, Format, LoraError, ModuleKey, UNET, read, write};

use crate::files::{Tensors, save, tensors};
use crate::shared;

/// The attention projections of Stable Diffusion 1.x's UNet, `[out, in]` of each.
fn projections() -> BTreeMap<String, [usize; 2]> {
    // Blocks with attentions, their number, their width: the published `unet/config.json`.
    let blocks = [
        ("down_blocks.0", 2, 320),
        ("down_blocks.1", 2, 640),
        ("down_blocks.2", 2, 1280),
        ("mid_block", 1, 1280),
        ("up_blocks.1", 3, 1280),
        ("up_blocks.2", 3, 640),
        ("up_blocks.3", 3, 320),
    ];
    let mut found = BTreeMap::new();
    for (block, count, width) in blocks {
        for attention in 0..count {
            for (name, context) in [("attn1", width), ("attn2", 768)] {
                let path = |projection| {
                    format!("{block}.attentions.{attention}.transformer_blocks.0.{name}.{projection}")
                };
                found.extend([(path("to_q"), [width, width]), (path("to_out.0"), [width, width])]);
                found.extend([(path("to_k"), [width, context]), (path("to_v"), [width, context])]);
            }
        }
    }
    found
}

/// Every module is a projection of the model by name and shape, and every projection is there.
fn assert_all_attention(adapter: &Adapter) {
    let found: BTreeMap<String, [usize; 2]> = adapter
        .modules
        .iter()
        .map(|(key, weights)| {
            assert_eq!(*key, ModuleKey::path(UNET, key.name.as_str()));
            (key.name.as_str().to_owned(), [weights.out_features, weights.in_features])
        })
        .collect();
    assert_eq!(found, projections());
}

#[test]
fn attention_processors_of_diffusers() {
    let Some(path) = shared("lora/diffusers_attn_processor_rank4.safetensors") else { return };
    let (adapter, format) = read(&path).unwrap();
    assert_eq!(format, Format::AttnProcessor);
    assert_eq!(adapter.modules.len(), 128);
    assert!(adapter.modules.values().all(|weights| (weights.rank, weights.alpha) == (4, 4.0)));
    assert_all_attention(&adapter);
    assert_eq!(
        adapter.parameters(),
        projections().values().map(|[out, input]| 4 * (out + input)).sum::<usize>()
    );

    let folder = tempfile::tempdir().unwrap();
    let projections = projections();
    let paths: Vec<&str> = projections.keys().map(String::as_str).collect();
    for format in [Format::Diffusers, Format::Peft, Format::Kohya] {
        let at = folder.path().join(format!("{format:?}"));
        write(&at, &adapter, format).unwrap();
        let (again, found) = read(&at).unwrap();
        assert_eq!(found, format);
        assert_eq!(again.resolve(UNET, &paths).unwrap(), adapter);
    }
    // The block names of the original code, of which no file is at hand.
    let renamed = folder.path().join("ldm.safetensors");
    let kohya = tensors(&folder.path().join("Kohya"));
    save(&renamed, &kohya.into_iter().map(|(key, tensor)| (ldm(&key), tensor)).collect::<Tensors>(), &[]);
    let (again, found) = read(&renamed).unwrap();
    assert_eq!(found, Format::KohyaLdm);
    assert_eq!(again.resolve(UNET, &paths).unwrap(), adapter);
}

/// kohya's key with the block names of the original code.
fn ldm(key: &str) -> String {
    if key.contains("mid_block_attentions_0") {
        return key.replace("mid_block_attentions_0", "middle_block_1");
    }
    for stage in 0..4 {
        for attention in 0..3 {
            let (down, up) = (1 + 3 * stage + attention, 3 * stage + attention);
            let names = [
                (format!("down_blocks_{stage}_attentions_{attention}_"), format!("input_blocks_{down}_1_")),
                (format!("up_blocks_{stage}_attentions_{attention}_"), format!("output_blocks_{up}_1_")),
            ];
            for (diffusers, ldm) in names {
                if key.contains(&diffusers) {
                    return key.replace(&diffusers, &ldm);
                }
            }
        }
    }
    panic!("`{key}` is in no attention");
}

#[test]
fn a_format_that_is_known_and_not_supported() {
    let Some(path) = shared("lora/cloneofsimo_rank4.safetensors") else { return };
    let error = read(&path).unwrap_err();
    assert!(matches!(&error, LoraError::Unsupported { kind, .. } if kind.contains("cloneofsimo")), "{error}");
    assert!(error.to_string().contains("cloneofsimo_rank4.safetensors"));
}
