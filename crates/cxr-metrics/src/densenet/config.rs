//! Sizes of the network, and what its outputs mean.

use serde::{Deserialize, Serialize};

use super::published::PUBLISHED;
use crate::error::{MetricsError, Result};

/// What a DenseNet is made of; [`torchxrayvision`](Self::torchxrayvision) has the published sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DenseNetConfig {
    /// Name of network and training, printed with every figure.
    pub name: String,
    /// Side of the input in pixels.
    pub input_size: usize,
    /// Channels that each layer adds.
    pub growth: usize,
    /// Layers of each block.
    pub blocks: Vec<usize>,
    /// Channels of the first convolution.
    pub first_channels: usize,
    /// Channels between the two convolutions of a layer, as a multiple of `growth`.
    pub bottleneck: usize,
    /// Names of the outputs, in their order; none for an output that was not trained.
    pub outputs: Vec<Option<String>>,
    /// Probability of each output at its operating point, where the file has no `op_threshs` of its own.
    pub operating_points: Vec<Option<f32>>,
}

impl DenseNetConfig {
    /// DenseNet-121 with the outputs of the published weights of that name: `densenet121-res224-all`, `-nih`,
    /// `-pc`, `-chex`, `-rsna`, `-mimic_nb` or `-mimic_ch`. 7 M parameters, 1024 features.
    ///
    /// # Errors
    /// Another name.
    pub fn torchxrayvision(name: &str) -> Result<Self> {
        let Some(published) = PUBLISHED.iter().find(|p| p.name == name) else {
            let names: Vec<&str> = PUBLISHED.iter().map(|p| p.name).collect();
            return Err(MetricsError::InvalidParameter {
                name: "weights",
                value: name.into(),
                expected: format!("one of {}", names.join(", ")),
            });
        };
        Ok(Self {
            name: format!("xrv-{name}"),
            input_size: 224,
            growth: 32,
            blocks: vec![6, 12, 24, 16],
            first_channels: 64,
            bottleneck: 4,
            outputs: published.outputs.iter().map(|o| o.map(|(name, _)| name.into())).collect(),
            operating_points: published.outputs.iter().map(|o| o.map(|(_, point)| point)).collect(),
        })
    }

    /// Number of features.
    pub fn feature_dim(&self) -> usize {
        self.inputs().last().copied().unwrap_or(0)
    }

    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let invalid = |name, value: String, expected: &str| {
            Err(MetricsError::InvalidParameter { name, value, expected: expected.into() })
        };
        // Halved by the first convolution, the first pool and between blocks.
        let halvings = 2 + self.blocks.len().saturating_sub(1);
        if self.blocks.is_empty() || self.blocks.len() > 8 || self.blocks.contains(&0) {
            return invalid("blocks", format!("{:?}", self.blocks), "1 to 8 blocks of at least one layer");
        }
        if self.input_size >> halvings == 0 || self.input_size > 4096 {
            let expected = format!("at least {} and at most 4096 pixels", 1 << halvings);
            return invalid("input_size", self.input_size.to_string(), &expected);
        }
        let widths = [self.growth, self.first_channels, self.bottleneck];
        if widths.contains(&0) || widths.iter().any(|w| *w > 4096) {
            return invalid("growth, first_channels, bottleneck", format!("{widths:?}"), "1 to 4096");
        }
        if self.outputs.iter().flatten().next().is_none() {
            return invalid("outputs", format!("{:?}", self.outputs), "at least one with a name");
        }
        for (i, name) in self.outputs.iter().enumerate() {
            if name.is_some() && self.outputs[..i].contains(name) {
                return invalid("outputs", format!("{name:?} twice"), "every name once");
            }
        }
        if self.operating_points.len() != self.outputs.len() {
            let value = format!("{} of {} outputs", self.operating_points.len(), self.outputs.len());
            return invalid("operating_points", value, "one per output, or null");
        }
        Ok(())
    }

    /// Channels that enter each block, then those that leave the last.
    pub(super) fn inputs(&self) -> Vec<usize> {
        let mut channels = self.first_channels;
        let mut inputs = vec![channels];
        for (i, layers) in self.blocks.iter().enumerate() {
            channels += layers * self.growth;
            if i + 1 < self.blocks.len() {
                channels /= 2;
            }
            inputs.push(channels);
        }
        inputs
    }

    /// Name and shape of every tensor of the network, under torchxrayvision's names.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        let conv = |all: &mut Vec<_>, name: String, shape: [usize; 4]| {
            all.push((format!("features.{name}.weight"), shape.to_vec()));
        };
        let norm = |all: &mut Vec<_>, name: String, channels: usize| {
            for part in ["weight", "bias", "running_mean", "running_var"] {
                all.push((format!("features.{name}.{part}"), vec![channels]));
            }
        };
        conv(&mut all, "conv0".into(), [self.first_channels, 1, 7, 7]);
        norm(&mut all, "norm0".into(), self.first_channels);
        let middle = self.bottleneck * self.growth;
        let inputs = self.inputs();
        for (i, layers) in self.blocks.iter().enumerate() {
            for j in 0..*layers {
                let (channels, name) =
                    (inputs[i] + j * self.growth, format!("denseblock{}.denselayer{}", i + 1, j + 1));
                norm(&mut all, format!("{name}.norm1"), channels);
                conv(&mut all, format!("{name}.conv1"), [middle, channels, 1, 1]);
                norm(&mut all, format!("{name}.norm2"), middle);
                conv(&mut all, format!("{name}.conv2"), [self.growth, middle, 3, 3]);
            }
            if i + 1 < self.blocks.len() {
                let channels = inputs[i] + layers * self.growth;
                norm(&mut all, format!("transition{}.norm", i + 1), channels);
                conv(&mut all, format!("transition{}.conv", i + 1), [inputs[i + 1], channels, 1, 1]);
            }
        }
        norm(&mut all, "norm5".into(), self.feature_dim());
        all.push(("classifier.weight".into(), vec![self.outputs.len(), self.feature_dim()]));
        all.push(("classifier.bias".into(), vec![self.outputs.len()]));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_sizes_are_those_of_densenet_121() {
        let config = DenseNetConfig::torchxrayvision("densenet121-res224-nih").unwrap();
        config.validate().unwrap();
        assert_eq!((config.feature_dim(), config.inputs()), (1024, vec![64, 128, 256, 512, 1024]));
        // torchvision's DenseNet-121 has 7,978,856 parameters with 3 input channels and 1000 classes; here 1 and 18,
        // and two buffers per channel of its 41,824 normalized channels.
        let count: usize = config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(count, 7_978_856 - 2 * 64 * 49 - 982 * 1025 + 2 * 41_824);
        assert_eq!(config.outputs.iter().flatten().count(), 14);
        let error = DenseNetConfig::torchxrayvision("all").unwrap_err().to_string();
        assert!(error.contains("densenet121-res224-all"), "{error}");
    }

    #[test]
    fn broken_fields_are_named() {
        type Change = fn(&mut DenseNetConfig);
        let broken: [(&str, Change); 7] = [
            ("blocks", |c| c.blocks.clear()),
            ("blocks", |c| c.blocks[1] = 0),
            ("input_size", |c| c.input_size = 31),
            ("growth, first_channels, bottleneck", |c| c.growth = 0),
            ("outputs", |c| c.outputs.iter_mut().for_each(|o| *o = None)),
            ("outputs", |c| c.outputs[1] = c.outputs[0].clone()),
            ("operating_points", |c| c.operating_points.clear()),
        ];
        for (field, change) in broken {
            let mut config = DenseNetConfig::torchxrayvision("densenet121-res224-all").unwrap();
            change(&mut config);
            match config.validate() {
                Err(MetricsError::InvalidParameter { name, .. }) => assert_eq!(name, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
