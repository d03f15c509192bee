//! Any adapter, from format to format.

use std::collections::BTreeMap;

use cxr_lora::{Adapter, Format, LoraWeights, ModuleKey, Provenance, TEXT_ENCODER, UNET, read, write};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

/// Paths of which some end like others, and some differ from others in dots and underscores alone in a part.
const PATHS: [&str; 6] = [
    "proj_in",
    "mid_block.attentions.0.proj_in",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "up_blocks.3.resnets.2.conv1",
    "up_blocks.3.resnets.2.conv_shortcut",
];

fn weights() -> impl Strategy<Value = LoraWeights> {
    let kernel = prop_oneof![Just(None), Just(Some([1, 1])), Just(Some([3, 3])), Just(Some([1, 2]))];
    // kohya's alpha is a tensor of f32, so that other numbers would come back rounded.
    let alpha = prop_oneof![(1..9_u32).prop_map(f64::from), any::<f32>().prop_map(f64::from)]
        .prop_filter("finite", |alpha| alpha.is_finite());
    (1..4_usize, 1..4_usize, 1..4_usize, kernel, alpha).prop_flat_map(
        |(rank, in_features, out_features, kernel, alpha)| {
            let columns = in_features * kernel.map_or(1, |[h, w]| h * w);
            let value = || any::<f32>().prop_filter("finite", |value| value.is_finite());
            (vec(value(), rank * columns), vec(value(), out_features * rank))
                .prop_map(move |(a, b)| LoraWeights { rank, in_features, out_features, kernel, alpha, a, b })
        },
    )
}

fn modules(component: &'static str) -> impl Strategy<Value = BTreeMap<ModuleKey, LoraWeights>> {
    let key = (0..PATHS.len()).prop_map(move |i| ModuleKey::path(component, PATHS[i]));
    btree_map(key, weights(), 1..=PATHS.len())
}

fn provenance() -> impl Strategy<Value = Provenance> {
    (any::<Option<u64>>(), any::<Option<String>>()).prop_map(|(seed, text)| {
        let mut provenance = Provenance::default();
        (provenance.seed, provenance.targets, provenance.base_model) = (seed, text.clone(), text);
        provenance
    })
}

/// What comes back, the names of the modules looked up where the format has lost them.
fn through(adapter: &Adapter, format: Format) -> Adapter {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("adapter");
    write(&at, adapter, format).unwrap();
    let (read, found) = read(&at).unwrap();
    assert_eq!(found, format);
    read.resolve(UNET, &PATHS).unwrap().resolve(TEXT_ENCODER, &PATHS).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn one_component(modules in modules(UNET), provenance in provenance()) {
        let adapter = Adapter { modules, provenance };
        let formats = [Format::Diffusers, Format::Peft, Format::Kohya];
        for first in formats {
            let once = through(&adapter, first);
            prop_assert_eq!(&once, &adapter);
            for second in formats {
                prop_assert_eq!(&through(&once, second), &adapter);
            }
        }
    }

    #[test]
    fn two_components(unet in modules(UNET), text in modules(TEXT_ENCODER), provenance in provenance()) {
        let modules = unet.into_iter().chain(text).collect();
        let adapter = Adapter { modules, provenance };
        let diffusers = through(&adapter, Format::Diffusers);
        prop_assert_eq!(&diffusers, &adapter);
        prop_assert_eq!(&through(&diffusers, Format::Kohya), &adapter);
    }
}
