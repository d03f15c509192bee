//! The random numbers of pictures: one stream per picture, on the CPU.

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use cxr_core::random::TorchGenerator;

/// One of PyTorch's generators per picture, which diffusers would be given as
/// `[torch.Generator().manual_seed(seed + i) for i in pictures]`.
///
/// The numbers are made on the CPU, picture by picture, so they depend neither on the batch nor on the device.
#[derive(Debug)]
pub struct ImageNoise {
    generators: Vec<TorchGenerator>,
}

impl ImageNoise {
    /// A stream for each of the seeds.
    pub fn new(seeds: impl IntoIterator<Item = u64>) -> Self {
        Self { generators: seeds.into_iter().map(TorchGenerator::new).collect() }
    }

    /// The next standard normal numbers of every picture, `[pictures, c, h, w]` in f32.
    pub fn next<B: Backend>(&mut self, [c, h, w]: [usize; 3], device: &B::Device) -> Tensor<B, 4> {
        let values: Vec<f32> =
            self.generators.iter_mut().flat_map(|generator| generator.randn(c * h * w)).collect();
        let data = TensorData::new(values, [self.generators.len(), c, h, w]);
        Tensor::from_data(data, (device, DType::F32))
    }
}
