//! The text encoder against transformers.

use burn::tensor::Tensor;
use cxr_kernels::Flex;

use crate::fixture::{
    Reference, assert_every_parameter_counts, assert_meets, assert_misses, relative, text, values,
};

#[test]
fn last_hidden_state() {
    let reference = Reference::open();
    let model = text::<Flex>();
    let expected = reference.values("text.hidden");
    let ids = || reference.int::<Flex, 2>("text.ids");
    assert_meets("text encoder", &values(model.forward(ids())), &expected);
    let swapped = Tensor::cat(vec![ids().slice(1..3), ids().slice(0..1)], 0);
    assert_misses("text encoder, other prompts", &values(model.forward(swapped)), &expected);
}

#[test]
fn every_parameter_counts() {
    let reference = Reference::open();
    let ids = reference.int::<Flex, 2>("text.ids");
    let forward = |model: &_| values(cxr_ldm::text::ClipTextModel::forward(model, ids.clone()));
    assert_every_parameter_counts::<Flex, _>(&text(), &reference.values("text.hidden"), forward);
}

#[test]
fn a_token_sees_those_before_it_and_no_other() {
    let reference = Reference::open();
    let model = text::<Flex>();
    let ids = reference.int::<Flex, 2>("text.ids").slice(2..3);
    let whole = values(model.forward(ids.clone()));
    let width = whole.len() / 77;
    let part = values(model.forward(ids.slice([0..1, 0..30])));
    assert!(relative(&part, &whole[..30 * width]) < 1e-5);
}
