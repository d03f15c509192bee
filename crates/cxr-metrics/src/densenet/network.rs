//! The network: blocks whose layers each add a few channels to what all before them have made.

use burn::tensor::activation::relu;
use burn::tensor::module::{avg_pool2d, max_pool2d};
use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_kernels::nn::{Conv2d, Conv2dConfig};
use cxr_kernels::{DiffusionBackend, WeightCache, ops};

use super::config::DenseNetConfig;
use super::load::Weights;
use crate::error::Result;

/// A network for inference: normalizations that follow a convolution are part of it.
#[derive(Debug, Clone)]
pub(super) struct DenseNet<B: Backend> {
    first: Conv2d<B>,
    blocks: Vec<Vec<Layer<B>>>,
    transitions: Vec<Transition<B>>,
    last: Norm<B>,
    classifier: Classifier<B>,
}

/// `[n, c, h, w]` to the channels `[n, growth, h, w]` that it adds.
#[derive(Debug, Clone)]
struct Layer<B: Backend> {
    norm: Norm<B>,
    narrow: Conv2d<B>,
    spread: Conv2d<B>,
}

/// Halves channels and sides between blocks.
#[derive(Debug, Clone)]
struct Transition<B: Backend> {
    norm: Norm<B>,
    conv: Conv2d<B>,
}

/// A normalization by running statistics, as `[1, c, 1, 1]` each.
#[derive(Debug, Clone)]
struct Norm<B: Backend> {
    factor: Tensor<B, 4>,
    term: Tensor<B, 4>,
}

#[derive(Debug, Clone)]
struct Classifier<B: Backend> {
    weight: Tensor<B, 2>,
    bias: Tensor<B, 1>,
    cache: WeightCache,
}

impl<B: DiffusionBackend> DenseNet<B> {
    pub(super) fn load(config: &DenseNetConfig, weights: &Weights, device: &B::Device) -> Result<Self> {
        let inputs = config.inputs();
        let middle = config.bottleneck * config.growth;
        let norm = |name: String| {
            let [factor, term] = weights.norm(&name)?.tensors(device);
            Result::Ok(Norm { factor, term })
        };
        let pointwise = |from, to| Conv2dConfig::new(from, to, 1);
        let layer = |i: usize, j: usize| {
            let name = format!("denseblock{}.denselayer{}", i + 1, j + 1);
            let narrow = pointwise(inputs[i] + j * config.growth, middle);
            let spread = Conv2dConfig::new(middle, config.growth, 3).with_padding(1);
            Result::Ok(Layer {
                norm: norm(format!("{name}.norm1"))?,
                narrow: weights.conv(
                    &format!("{name}.conv1"),
                    Some(&format!("{name}.norm2")),
                    narrow,
                    device,
                )?,
                spread: weights.conv(&format!("{name}.conv2"), None, spread, device)?,
            })
        };
        let transition = |i: usize| {
            let channels = inputs[i] + config.blocks[i] * config.growth;
            let conv = pointwise(channels, inputs[i + 1]);
            Result::Ok(Transition {
                norm: norm(format!("transition{}.norm", i + 1))?,
                conv: weights.conv(&format!("transition{}.conv", i + 1), None, conv, device)?,
            })
        };
        let block =
            |(i, layers): (usize, &usize)| (0..*layers).map(|j| layer(i, j)).collect::<Result<Vec<_>>>();
        let first = Conv2dConfig::new(1, config.first_channels, 7).with_stride(2).with_padding(3);
        let shape = [config.outputs.len(), config.feature_dim()];
        Ok(Self {
            first: weights.conv("conv0", Some("norm0"), first, device)?,
            blocks: config.blocks.iter().enumerate().map(block).collect::<Result<_>>()?,
            transitions: (0..config.blocks.len() - 1).map(transition).collect::<Result<_>>()?,
            last: norm("norm5".into())?,
            classifier: Classifier {
                weight: Tensor::from_data(
                    TensorData::new(weights.values("classifier.weight")?, shape),
                    device,
                ),
                bias: Tensor::from_data(
                    TensorData::new(weights.values("classifier.bias")?, [shape[0]]),
                    device,
                ),
                cache: WeightCache::new(),
            },
        })
    }

    /// Grey `pixels` `[n, 1, s, s]` in [-1024, 1024] to features `[n, d]` (after the last ReLU and the mean over
    /// the picture) and logits `[n, outputs]`, before any sigmoid.
    pub(super) fn forward(&self, pixels: Tensor<B, 4>) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let x = relu(self.first.forward(pixels));
        let mut x = max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1], false);
        for (i, block) in self.blocks.iter().enumerate() {
            for layer in block {
                let new = layer.forward(x.clone());
                x = Tensor::cat(vec![x, new], 1);
            }
            if let Some(transition) = self.transitions.get(i) {
                x = transition.forward(x);
            }
        }
        let x = self.last.relu(x);
        let [n, c, h, w] = x.dims();
        let features = x.reshape([n, c, h * w]).mean_dim(2).reshape([n, c]);
        let Classifier { weight, bias, cache } = &self.classifier;
        let logits = ops::linear(features.clone(), weight.clone(), Some(bias.clone()), cache);
        (features, logits)
    }
}

impl<B: DiffusionBackend> Layer<B> {
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.spread.forward(relu(self.narrow.forward(self.norm.relu(x))))
    }
}

impl<B: DiffusionBackend> Transition<B> {
    /// The pool goes first: a mean and a convolution of one pixel may change places, and it leaves a quarter.
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.conv.forward(avg_pool2d(self.norm.relu(x), [2, 2], [2, 2], [0, 0], true, false))
    }
}

impl<B: Backend> Norm<B> {
    fn relu(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        relu(x * self.factor.clone() + self.term.clone())
    }
}
