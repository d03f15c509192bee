//! The bound of all packed weights, which is one for a process: so this test is alone in its own.

use burn::tensor::{Tensor, TensorData};
use cxr_kernels::{DEFAULT_PACK_MEMORY, Flex, nn, packed_memory, set_pack_memory};

fn layer() -> nn::Conv2d<Flex> {
    let mut layer = nn::Conv2dConfig::new(32, 32, 3).with_padding(1).init(&Default::default());
    let values: Vec<f32> = (0..32 * 32 * 9).map(|i| (i as f32 * 0.7).sin()).collect();
    layer.weight = layer.weight.map(|weight| {
        Tensor::from_data(TensorData::new(values, [32, 32, 3, 3]), &weight.device()).require_grad()
    });
    layer
}

fn bits(layer: &nn::Conv2d<Flex>) -> Vec<u32> {
    let values: Vec<f32> = (0..2 * 32 * 81).map(|i| (i as f32 * 0.3).cos()).collect();
    let x = Tensor::from_data(TensorData::new(values, [2, 32, 9, 9]), &Default::default());
    layer.forward(x).into_data().iter::<f32>().map(f32::to_bits).collect()
}

#[test]
fn packed_weights_stay_within_the_bound_and_change_no_bit() {
    let layers = [layer(), layer()];
    let expected = bits(&layers[0]);
    assert_eq!(packed_memory(), 0, "a layer that ran once");
    assert_eq!(bits(&layers[0]), expected);
    let one = packed_memory();
    assert!(
        one >= 4 * 32 * 32 * 9 * size_of::<f32>(),
        "Winograd's weights are four times the layer's: {one}"
    );
    let held = |bound: usize| {
        set_pack_memory(bound);
        for _ in 0..3 {
            for layer in &layers {
                assert!(bits(layer) == expected, "with a bound of {bound}");
            }
        }
        packed_memory()
    };
    assert_eq!(held(DEFAULT_PACK_MEMORY), 2 * one);
    assert_eq!(held(one), one);
    assert_eq!(held(2 * one - 1), one);
    assert_eq!(held(0), 0);
    assert_eq!(held(2 * one), 2 * one);
    let [first, second] = layers;
    drop(first);
    assert_eq!(packed_memory(), one);
    drop(second);
    assert_eq!(packed_memory(), 0);
}
