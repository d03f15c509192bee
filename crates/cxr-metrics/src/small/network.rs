//! The small network: stages of convolution, group normalization and SiLU, a mean, and linear heads.

use burn::module::Module;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_core::hash::stable_hash;
use cxr_core::random::Stream;
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::{Conv2d, Conv2dConfig, GroupNorm, GroupNormConfig, Linear, LinearConfig, parameters};

use super::SmallConfig;
use crate::error::Result;

/// A network of [`SmallConfig`]'s sizes.
#[derive(Module, Debug)]
pub struct SmallNetwork<B: Backend> {
    stages: Vec<SmallStage<B>>,
    heads: Linear<B>,
}

/// Convolutions at one resolution, each followed by group normalization and SiLU.
#[derive(Module, Debug)]
pub struct SmallStage<B: Backend> {
    convs: Vec<Conv2d<B>>,
    norms: Vec<GroupNorm<B>>,
}

/// What the network says of a batch.
#[derive(Debug, Clone)]
pub struct SmallOutput<B: Backend> {
    /// Features `[n, d]`: the last stage's channels, averaged over the picture.
    pub features: Tensor<B, 2>,
    /// One logit per finding `[n, k]`.
    pub logits: Tensor<B, 2>,
}

impl SmallConfig {
    /// A network of zeros, to be filled from a file.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate).
    pub fn init<B: Backend>(&self, device: &B::Device) -> Result<SmallNetwork<B>> {
        self.validate()?;
        let inputs = std::iter::once(1).chain(self.channels.iter().copied());
        let stages = inputs.zip(&self.channels).map(|(from, to)| self.stage(from, *to, device)).collect();
        let heads = LinearConfig::new(self.feature_dim(), self.findings.len()).init(device);
        Ok(SmallNetwork { stages, heads })
    }

    /// A network to train: He-normal convolutions, heads of standard deviation d^-1/2, biases of zero, norms
    /// of one; each from the stream (`seed`, its path). Parameter ids are hashes of the paths, so that an
    /// optimizer's state finds its parameters again.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate).
    pub fn init_random<B: Backend>(&self, seed: u64, device: &B::Device) -> Result<SmallNetwork<B>> {
        let network = parameters::map_data(self.init::<B>(device)?, |path, shape| {
            if shape.len() < 2 {
                return Ok(None);
            }
            let fan_in = shape[1..].iter().product::<usize>() as f32;
            let gain = if shape.len() == 4 { 2.0 } else { 1.0 };
            let mut values =
                Stream::new(seed, &format!("cxr-small/{path}"), 0).normals(shape.iter().product());
            values.iter_mut().for_each(|v| *v *= (gain / fan_in).sqrt());
            Result::Ok(Some(TensorData::new(values, shape.to_vec())))
        })?;
        Ok(parameters::assign_ids(network, |path| stable_hash(path.as_bytes())))
    }

    fn stage<B: Backend>(&self, from: usize, to: usize, device: &B::Device) -> SmallStage<B> {
        let conv = |i| {
            let (from, stride) = if i == 0 { (from, 2) } else { (to, 1) };
            Conv2dConfig::new(from, to, 3).with_stride(stride).with_padding(1).init(device)
        };
        let norm = |_| GroupNormConfig::new(self.groups, to).with_eps(self.norm_eps).init(device);
        SmallStage {
            convs: (0..self.convs_per_stage).map(conv).collect(),
            norms: (0..self.convs_per_stage).map(norm).collect(),
        }
    }
}

impl<B: DiffusionBackend> SmallNetwork<B> {
    /// Features and logits of grey `pixels` `[n, 1, s, s]` in [-1, 1], s the `input_size` of the configuration.
    pub fn forward(&self, pixels: Tensor<B, 4>) -> SmallOutput<B> {
        let x = self.stages.iter().fold(pixels, |x, stage| stage.forward(x));
        let [n, c, h, w] = x.dims();
        let features = x.reshape([n, c, h * w]).mean_dim(2).reshape([n, c]);
        let logits = self.heads.forward(features.clone());
        SmallOutput { features, logits }
    }
}

impl<B: DiffusionBackend> SmallStage<B> {
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let layers = self.convs.iter().zip(&self.norms);
        layers.fold(x, |x, (conv, norm)| norm.forward_silu(conv.forward(x)))
    }
}

/// The mean of the channels of `pixels` `[n, c, h, w]` as `[n, 1, h, w]`.
pub fn grey_channel<B: Backend>(pixels: Tensor<B, 4>) -> Tensor<B, 4> {
    pixels.mean_dim(1)
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::optim::{AdamConfig, GradientsParams, Optimizer};
    use cxr_kernels::Flex;

    use super::*;
    use crate::small::multi_label_loss;

    fn small() -> SmallConfig {
        SmallConfig {
            channels: vec![8, 16],
            groups: 4,
            input_size: 16,
            ..SmallConfig::v1(vec!["a".into(), "b".into()])
        }
    }

    #[test]
    fn preset_has_the_parameters_and_names_it_promises() {
        let network =
            SmallConfig::v1(vec!["a".into(), "b".into(), "c".into()]).init::<Flex>(&Default::default());
        let list = parameters::list(&network.unwrap());
        // 9 (cin cout) + cout per convolution, two cout per norm, 128 x 3 + 3 of the heads.
        let convolutions = [(1, 24), (24, 24), (24, 48), (48, 48), (48, 96), (96, 96), (96, 128), (128, 128)];
        let expected: usize =
            convolutions.iter().map(|(i, o)| 9 * i * o + 3 * o).sum::<usize>() + 128 * 3 + 3;
        assert_eq!(list.iter().map(|p| p.elements()).sum::<usize>(), expected);
        let paths: Vec<&str> = list.iter().map(|p| p.path.as_str()).collect();
        assert!(paths.contains(&"stages.3.convs.1.weight") && paths.contains(&"heads.bias"), "{paths:?}");
    }

    #[test]
    fn initial_values_come_from_the_seed() {
        let values = |seed| {
            let mut all = Vec::new();
            let network = small().init_random::<Flex>(seed, &Default::default()).unwrap();
            parameters::read(&network, |_, data| all.extend(data.to_vec::<f32>().unwrap()));
            all
        };
        assert_eq!(values(3), values(3));
        assert_ne!(values(3), values(4));
    }

    #[test]
    fn adam_learns_eight_pictures_and_every_parameter_has_a_gradient() {
        type B = Autodiff<Flex>;
        let device = Default::default();
        let mut network = small().init_random::<B>(0, &device).unwrap();
        let pixels = Stream::new(0, "toy pictures", 0).normals(8 * 16 * 16);
        let pixels = Tensor::<B, 4>::from_data(TensorData::new(pixels, [8, 1, 16, 16]), &device);
        let labels: Vec<f32> = (0..16).map(|i| f32::from(u8::from((i * 7) % 5 < 2))).collect();
        let targets = Tensor::<B, 2>::from_data(TensorData::new(labels, [8, 2]), &device);
        let mut optimizer = AdamConfig::new().with_epsilon(1e-8).init();
        let mut losses = Vec::new();
        for _ in 0..40 {
            let output = network.forward(pixels.clone());
            let loss = multi_label_loss(output.logits, targets.clone(), None, None);
            losses.push(loss.clone().into_scalar());
            let gradients = GradientsParams::from_grads(loss.backward(), &network);
            assert_eq!(gradients.len(), parameters::list(&network).len());
            network = optimizer.step(1e-2, network, gradients);
        }
        assert!(losses[39] < 0.1 * losses[0], "{losses:?}");
    }

    #[test]
    fn grey_is_the_mean_of_three_channels() {
        let pixels = Tensor::<Flex, 4>::from_floats([[[[0.5]], [[-1.0]], [[0.2]]]], &Default::default());
        let grey = grey_channel(pixels);
        assert_eq!(grey.dims(), [1, 1, 1, 1]);
        assert!((grey.into_scalar() + 0.1).abs() < 1e-6);
    }
}
