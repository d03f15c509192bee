//! Attaching, training flags, several adapters at once, taking them off.

use std::collections::BTreeSet;

use burn::backend::Autodiff;
use burn::module::{AutodiffModule, Module};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, Tensor};
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_lora::{
    Adaptable, DEFAULT_NAME, LayerRef, LoraConfig, LoraLinear, LoraLinearConfig, TargetSet, UNET,
};

use crate::peft::{Fixture, gradients};
use crate::toy::Toy;
use crate::{assert_close, bits, values};

fn attached<B: Backend>(fixture: &Fixture, config: &LoraConfig, seed: u64) -> Toy<B> {
    let mut model = Toy::new(fixture);
    cxr_lora::attach(&mut model, config, seed).unwrap();
    model
}

/// Attaches an adapter and gives it a `B` that is not zero.
fn add(model: &mut Toy<Flex>, name: &str, seed: u64) {
    let config = LoraConfig::new(2).with_name(name);
    let mut scratch = model.clone();
    cxr_lora::attach(&mut scratch, &config, seed).unwrap();
    let mut adapter = cxr_lora::export(&scratch, name, UNET).unwrap();
    for (i, weights) in adapter.modules.values_mut().enumerate() {
        let mut stream = cxr_core::random::Stream::new(seed, "test", i as u64);
        weights.b.iter_mut().for_each(|value| *value = 0.3 * stream.normal());
    }
    cxr_lora::load_named(&mut [(UNET, model)], &adapter, name, 1.0).unwrap();
}

#[test]
fn before_the_first_step_the_output_is_the_bases_to_the_bit() {
    let fixture = Fixture::open();
    let base = bits(Toy::<Flex>::new(&fixture).output(&fixture));
    for rank in [1, 3, 8] {
        let model = attached::<Flex>(&fixture, &LoraConfig::new(rank).with_alpha(16.0), 5);
        assert_eq!(bits(model.output(&fixture)), base);
    }
    for dtype in [DType::F16, DType::BF16] {
        let mut model = Toy::<Flex>::with_dtype(&fixture, dtype);
        let base = bits(model.output(&fixture));
        cxr_lora::attach(&mut model, &LoraConfig::new(3), 5).unwrap();
        assert_eq!(bits(model.output(&fixture)), base, "{dtype:?}");
    }
}

#[test]
fn before_the_first_step_the_gradient_is_zero_for_a_and_not_for_b() {
    type B = Autodiff<Flex>;
    let fixture = Fixture::open();
    let model = attached::<B>(&fixture, &LoraConfig::new(3), 5);
    let loss = (model.output(&fixture) * fixture.tensor("projection")).sum();
    let found = gradients(&model, &loss.backward());
    assert_eq!(found.len(), 32);
    for (name, gradient) in found {
        let zero = gradient.iter().all(|value| *value == 0.0);
        assert_eq!(zero, name.ends_with("lora_a"), "{name}: {gradient:?}");
    }
}

#[test]
fn the_factors_alone_are_trainable_and_f32() {
    type B = Autodiff<Flex>;
    let fixture = Fixture::open();
    for dtype in [DType::F32, DType::BF16] {
        let mut model = Toy::<B>::with_dtype(&fixture, dtype);
        cxr_lora::attach(&mut model, &LoraConfig::new(3), 5).unwrap();
        let trainable = |model: &Toy<B>, part: &str| {
            let list = parameters::list::<B, _>(model);
            assert_eq!(list.iter().filter(|p| p.path.contains(".adapters.")).count(), 32);
            list.iter().filter(|p| p.trainable && p.path.contains(part)).count()
        };
        assert_eq!((trainable(&model, ""), trainable(&model, ".adapters.0.")), (32, 32));
        model.visit_layers(&mut |_, layer| {
            for branch in layer.adapters() {
                let dtypes = [branch.lora_a.val().dtype(), branch.lora_b.val().dtype()];
                assert_eq!(dtypes, [DType::F32; 2]);
            }
        });
        // A second adapter takes the flags over, and gives them back.
        cxr_lora::attach(
            &mut model,
            &LoraConfig::new(2).with_name("second").with_targets(TargetSet::CrossAttention),
            6,
        )
        .unwrap();
        let list = parameters::list::<B, _>(&model);
        let names: Vec<&str> = list.iter().filter(|p| p.trainable).map(|p| p.path.as_str()).collect();
        assert_eq!(names.len(), 16);
        assert!(
            names.iter().all(|name| name.contains(".attn2.") && name.contains(".adapters.1.")),
            "{names:?}"
        );
        assert_eq!(cxr_lora::train_only(&mut model, DEFAULT_NAME).unwrap(), 16);
        let list = parameters::list::<B, _>(&model);
        assert_eq!(list.iter().filter(|p| p.trainable && p.path.contains(".adapters.0.")).count(), 32);
        assert_eq!(list.iter().filter(|p| p.trainable).count(), 32);
    }
}

#[test]
fn ids_depend_on_path_factor_and_name_alone() {
    let fixture = Fixture::open();
    let ids = |config: &LoraConfig, seed| {
        let model = attached::<Flex>(&fixture, config, seed);
        let list = parameters::list::<Flex, _>(&model);
        let adapters = list.into_iter().filter(|p| p.path.contains(".adapters."));
        adapters.map(|p| (p.path, p.id)).collect::<Vec<(String, u64)>>()
    };
    let all = ids(&LoraConfig::new(2), 1);
    assert_eq!(all, ids(&LoraConfig::new(4), 2));
    assert_eq!(all.iter().map(|(_, id)| id).collect::<BTreeSet<_>>().len(), 32);
    let cross = ids(&LoraConfig::new(2).with_targets(TargetSet::CrossAttention), 1);
    assert!(cross.iter().all(|entry| all.contains(entry)) && cross.len() == 16);
    let named = ids(&LoraConfig::new(2).with_name("second"), 1);
    assert!(named.iter().all(|(_, id)| all.iter().all(|(_, other)| id != other)));
    // From SHA-256 of the name, so it is the same in every release and on every machine.
    let known = cxr_core::hash::stable_hash(b"blocks.0.attn1.to_q.lora_A.default.weight");
    assert_eq!(
        all.iter().find(|(path, _)| path == "blocks.0.attn1.to_q.adapters.0.lora_a").unwrap().1,
        known
    );
}

#[test]
fn a_starts_normal_with_deviation_one_over_rank_and_b_at_zero() {
    #[derive(Module, Debug)]
    struct One<B: Backend> {
        layer: LoraLinear<B>,
    }
    impl<B: Backend> Adaptable<B> for One<B> {
        fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
            visit("to_q", LayerRef::Linear(&self.layer));
        }
        fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, cxr_lora::LayerMut<'_, B>)) {
            visit("to_q", cxr_lora::LayerMut::Linear(&mut self.layer));
        }
    }
    for (rank, seed) in [(1, 3), (4, 4), (16, 5)] {
        let mut model =
            One::<Flex> { layer: LoraLinearConfig::new(65536 / rank, 5).init(&Default::default()) };
        let config = LoraConfig::new(rank).with_targets(TargetSet::Patterns(vec!["to_q".to_owned()]));
        cxr_lora::attach(&mut model, &config, seed).unwrap();
        let branch = &model.layer.adapters()[0];
        assert_eq!((branch.rank(), branch.alpha(), branch.scale()), (rank, rank as f64, 1.0));
        assert!(values(branch.lora_b.val()).iter().all(|value| value.to_bits() == 0));
        let a: Vec<f64> =
            values(branch.lora_a.val()).into_iter().map(|value| f64::from(value) * rank as f64).collect();
        let moment = |power| a.iter().map(|value| value.powi(power)).sum::<f64>() / a.len() as f64;
        // Moments of a standard normal: 0, 1, 0, 3. Their standard errors with 65536 values are
        // sqrt(1, 2, 15, 96) / 256; the bars are four of them.
        for (power, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0_f64)]
        {
            let bar = 4.0 * variance.sqrt() / 256.0;
            let found = moment(power);
            assert!((found - expected).abs() < bar, "rank {rank}: moment {power} is {found}");
        }
    }
}

#[test]
fn the_start_depends_on_seed_and_path_and_not_on_the_other_targets() {
    let fixture = Fixture::open();
    let path = "blocks.1.attn2.to_v";
    let a = |model: &Toy<Flex>, path: &str| bits(model.layer(path).adapters()[0].lora_a.val());
    let all = attached(&fixture, &LoraConfig::new(3), 5);
    let only = TargetSet::Patterns(vec![path.to_owned()]);
    let alone = attached(&fixture, &LoraConfig::new(3).with_targets(only), 5);
    assert_eq!(a(&all, path), a(&alone, path));
    assert_ne!(a(&all, path), a(&all, "blocks.0.attn2.to_v"));
    assert_ne!(a(&all, path), a(&attached(&fixture, &LoraConfig::new(3), 6), path));
}

#[test]
fn targets_overrides_and_rank_stabilized_scaling() {
    let fixture = Fixture::open();
    let config = LoraConfig::new(4).with_alpha(8.0).with_override("attn2.*", 2, 6.0).with_override(
        "blocks.1.attn2.to_k",
        1,
        5.0,
    );
    let model = attached::<Flex>(&fixture, &config, 1);
    let settings = |model: &Toy<Flex>, path: &str| {
        model.layer(path).adapters().iter().map(|branch| (branch.rank(), branch.scale())).collect::<Vec<_>>()
    };
    assert_eq!(settings(&model, "blocks.0.attn1.to_out.0"), [(4, 2.0)]);
    assert_eq!(settings(&model, "blocks.1.attn2.to_q"), [(2, 3.0)]);
    // The last that matches counts.
    assert_eq!(settings(&model, "blocks.1.attn2.to_k"), [(1, 5.0)]);
    assert_eq!(settings(&model, "head"), []);

    let model = attached::<Flex>(&fixture, &config.with_rank_stabilized(true), 1);
    assert_eq!(settings(&model, "blocks.0.attn1.to_q"), [(4, 8.0 / 4.0_f64.sqrt())]);
}

#[test]
fn several_adapters_add_up_by_their_weights() {
    let device = Default::default();
    let fixture = Fixture::open();
    let path = "blocks.0.attn2.to_k";
    let mut model = Toy::<Flex>::new(&fixture);
    let x = Tensor::<Flex, 2>::random([7, 6], Distribution::Normal(0.0, 1.0), &device);
    let of = |model: &Toy<Flex>| values(model.layer(path).forward(x.clone()));
    let base = of(&model);
    add(&mut model, "first", 1);
    let first = of(&model);
    cxr_lora::set_enabled(&mut model, "first", false).unwrap();
    assert_eq!(of(&model), base);
    add(&mut model, "second", 2);
    let second = of(&model);
    assert_eq!(cxr_lora::attached(&model), ["first", "second"]);

    cxr_lora::set_enabled(&mut model, "first", true).unwrap();
    for (w1, w2) in [(1.0, 1.0), (0.5, -2.0), (0.0, 1.5)] {
        assert_eq!(cxr_lora::set_weight(&mut model, "first", w1).unwrap(), 16);
        assert_eq!(cxr_lora::set_weight(&mut model, "second", w2).unwrap(), 16);
        let expected: Vec<f32> = (0..base.len())
            .map(|i| {
                let [b, f, s] = [base[i], first[i], second[i]].map(f64::from);
                (b + w1 * (f - b) + w2 * (s - b)) as f32
            })
            .collect();
        assert_close(&format!("weights {w1} and {w2}"), &of(&model), &expected, 1e-6);
    }

    // What takes no part costs no rounding.
    cxr_lora::set_weight(&mut model, "second", 0.0).unwrap();
    assert_eq!(of(&model), base);
    cxr_lora::set_weight(&mut model, "second", 1.0).unwrap();
    assert_eq!(of(&model), second);
    assert_eq!(cxr_lora::detach(&mut model, "first").unwrap(), 16);
    assert_eq!((of(&model), cxr_lora::attached(&model)), (second, vec!["second".to_owned()]));
    cxr_lora::detach(&mut model, "second").unwrap();
    assert_eq!(of(&model), base);
    assert!(cxr_lora::attached(&model).is_empty());
}

#[test]
fn export_and_load_give_the_same_output_to_the_bit() {
    let fixture = Fixture::open();
    let mut model = Toy::<Flex>::new(&fixture);
    add(&mut model, "mine", 3);
    cxr_lora::set_weight(&mut model, "mine", 0.7).unwrap();
    let adapter = cxr_lora::export(&model, "mine", UNET).unwrap();
    assert_eq!(adapter.modules.len(), 16);
    assert_eq!(adapter.provenance.crate_version.as_deref(), Some(env!("CARGO_PKG_VERSION")));
    let mut other = Toy::<Flex>::new(&fixture);
    cxr_lora::load_named(&mut [(UNET, &mut other)], &adapter, "yours", 0.7).unwrap();
    assert_eq!(bits(other.output(&fixture)), bits(model.output(&fixture)));
}

/// Loading freezes; `valid()` and a clone are the same model.
#[test]
fn the_inner_model_keeps_adapters_and_their_settings() {
    type B = Autodiff<Flex>;
    let fixture = Fixture::open();
    let mut model = Toy::<B>::new(&fixture);
    let (adapter, _) = cxr_lora::read(crate::peft::path("adapter")).unwrap();
    cxr_lora::load_adapter(&mut model, &adapter, 0.5).unwrap();
    assert!(parameters::list::<B, _>(&model).iter().all(|p| !p.path.contains(".adapters.") || !p.trainable));
    let expected = bits(model.output(&fixture));
    assert_eq!(bits(model.valid().output(&fixture)), expected);
    assert_eq!(cxr_lora::attached(&model.valid()), [DEFAULT_NAME]);
    let before = model.clone();
    cxr_lora::set_enabled(&mut model, DEFAULT_NAME, false).unwrap();
    assert_ne!(bits(model.output(&fixture)), expected);
    assert_eq!(bits(before.output(&fixture)), expected);
}

/// f32 factors on a half base: nothing is rounded but the base's output and the sum.
#[test]
fn a_half_base_with_an_f32_adapter() {
    let fixture = Fixture::open();
    let device = Default::default();
    for (dtype, bits) in [(DType::F16, 11), (DType::BF16, 8)] {
        let mut model = Toy::<Flex>::with_dtype(&fixture, dtype);
        add(&mut model, "first", 1);
        add(&mut model, "second", 2);
        cxr_lora::set_weight(&mut model, "second", -0.3).unwrap();
        let x = Tensor::<Flex, 2>::random([7, 6], Distribution::Normal(0.0, 1.0), &device).cast(dtype);
        let layer = model.layer("blocks.0.attn2.to_k");
        let y = layer.forward(x.clone());
        assert_eq!(y.dtype(), dtype);

        let base = product(&values(x.clone()), &values(layer.weight.val()), 6);
        let mut sum = base.clone();
        for branch in layer.adapters() {
            let inner: Vec<f32> = product(&values(x.clone()), &values(branch.lora_a.val()), 6)
                .into_iter()
                .map(|value| value as f32)
                .collect();
            let delta = product(&inner, &values(branch.lora_b.val()), 2);
            sum.iter_mut().zip(delta).for_each(|(sum, delta)| *sum += branch.scale() * delta);
        }
        // Half a unit in the last place for each rounding, and f32's own.
        let unit = 0.5_f64.powi(bits);
        for ((y, sum), base) in values(y).into_iter().zip(sum).zip(base) {
            let bar = unit * (base.abs() + sum.abs()) * 1.01 + 1e-5;
            assert!((f64::from(y) - sum).abs() <= bar, "{dtype:?}: {y}, expected {sum}");
        }
    }
}

/// `x` `[n, inner]` times the transpose of `w` `[out, inner]`, in f64.
fn product(x: &[f32], w: &[f32], inner: usize) -> Vec<f64> {
    let dot = |row: &[f32], column: &[f32]| {
        row.iter().zip(column).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
    };
    x.chunks(inner).flat_map(|row| w.chunks(inner).map(move |column| dot(row, column))).collect()
}

#[test]
fn layers_can_cross_threads() {
    fn check<T: Send + Sync>() {}
    check::<LoraLinear<Flex>>();
    check::<LoraLinear<Autodiff<Flex>>>();
    check::<cxr_lora::Adapter>();
    check::<cxr_lora::LoraError>();
    check::<cxr_lora::Merged<Flex>>();
}

#[test]
fn a_configuration_survives_json_and_has_no_unknown_fields() {
    let config = LoraConfig::new(4).with_override("attn2.*", 2, 6.0).with_targets(TargetSet::CrossAttention);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<LoraConfig>(&json).unwrap(), config);
    assert_eq!(serde_json::from_str::<LoraConfig>("{}").unwrap(), LoraConfig::default());
    assert!(serde_json::from_str::<LoraConfig>(r#"{"rnk": 4}"#).unwrap_err().to_string().contains("rnk"));
}
