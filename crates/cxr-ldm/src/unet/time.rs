use burn::module::Module;
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use cxr_kernels::{DiffusionBackend, ops};
use cxr_lora::{LayerMut, LayerRef, LoraLinear, LoraLinearConfig};

use super::UNetConfig;

/// The two layers over the sinusoids: diffusers' `TimestepEmbedding`.
#[derive(Module, Debug)]
pub(crate) struct TimeEmbedding<B: Backend> {
    linear_1: LoraLinear<B>,
    linear_2: LoraLinear<B>,
    flip_sin_to_cos: bool,
    freq_shift: f64,
}

impl<B: Backend> TimeEmbedding<B> {
    pub(crate) fn new(config: &UNetConfig, device: &B::Device) -> Self {
        let (sinusoids, width) = (config.block_out_channels[0], config.time_width());
        Self {
            linear_1: LoraLinearConfig::new(sinusoids, width).init(device),
            linear_2: LoraLinearConfig::new(width, width).init(device),
            flip_sin_to_cos: config.flip_sin_to_cos,
            freq_shift: config.freq_shift,
        }
    }

    pub(crate) fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        visit(&format!("{path}.linear_1"), LayerRef::Linear(&self.linear_1));
        visit(&format!("{path}.linear_2"), LayerRef::Linear(&self.linear_2));
    }

    pub(crate) fn visit_layers_mut(&mut self, path: &str, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        visit(&format!("{path}.linear_1"), LayerMut::Linear(&mut self.linear_1));
        visit(&format!("{path}.linear_2"), LayerMut::Linear(&mut self.linear_2));
    }
}

impl<B: DiffusionBackend> TimeEmbedding<B> {
    /// Timesteps `[n]`, f32, to `[n, 4 * channels]` in `dtype`.
    pub(crate) fn forward(&self, timesteps: Tensor<B, 1>, dtype: DType) -> Tensor<B, 2> {
        assert_eq!(timesteps.dtype(), DType::F32, "dtype of timesteps");
        let channels = self.linear_1.in_features();
        let x = sinusoids(timesteps, channels, self.flip_sin_to_cos, self.freq_shift).cast(dtype);
        self.linear_2.forward(ops::silu(self.linear_1.forward(x)))
    }
}

/// `[n] -> [n, channels]`, f32: sines and cosines of frequencies from 1 down to nearly 1/10000.
///
/// In f32 throughout, as diffusers' `get_timestep_embedding`: models were trained with its rounding.
fn sinusoids<B: Backend>(
    timesteps: Tensor<B, 1>,
    channels: usize,
    flip_sin_to_cos: bool,
    freq_shift: f64,
) -> Tensor<B, 2> {
    let half = channels / 2;
    let device = timesteps.device();
    let frequencies = frequencies(half, freq_shift);
    let frequencies =
        Tensor::<B, 2>::from_data(TensorData::new(frequencies, [1, half]), (&device, DType::F32));
    let n = timesteps.dims()[0];
    let phase = timesteps.reshape([n, 1]) * frequencies;
    let (sin, cos) = (phase.clone().sin(), phase.cos());
    Tensor::cat(if flip_sin_to_cos { vec![cos, sin] } else { vec![sin, cos] }, 1)
}

fn frequencies(half: usize, freq_shift: f64) -> Vec<f32> {
    let slope = -(10000.0_f64.ln() as f32);
    (0..half).map(|i| (slope * i as f32 / (half as f64 - freq_shift) as f32).exp()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cxr_kernels::Flex;

    #[test]
    fn the_formula_with_cosines_first() {
        let timesteps = [0.0_f32, 1.0, 500.0, 981.0, 20.5];
        let tensor = Tensor::<Flex, 1>::from_data(TensorData::from(timesteps), &Default::default());
        for (flip, shift) in [(true, 0.0), (false, 0.0), (true, 1.0)] {
            let found = sinusoids(tensor.clone(), 10, flip, shift).into_data().to_vec::<f32>().unwrap();
            for (row, &t) in found.chunks_exact(10).zip(&timesteps) {
                for (i, pair) in (0..5).map(|i| (i, [row[i], row[5 + i]])) {
                    let phase = t as f64 * (-10000.0_f64.ln() * i as f64 / (5.0 - shift)).exp();
                    let [cos, sin] = if flip { pair } else { [pair[1], pair[0]] };
                    // a phase near 1000 has an f32 error of 6e-5
                    assert!((cos as f64 - phase.cos()).abs() < 2e-4, "t {t}, frequency {i}");
                    assert!((sin as f64 - phase.sin()).abs() < 2e-4, "t {t}, frequency {i}");
                }
            }
        }
    }
}
