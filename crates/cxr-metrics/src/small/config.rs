//! Sizes of the small network.

use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};

/// What a small network is made of; saved beside its weights as `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmallConfig {
    /// Name of network and training, printed with every figure.
    pub name: String,
    /// Side of the square input in pixels; pictures of other sizes are resized with antialiasing.
    pub input_size: usize,
    /// Channels of each stage, which halves the side; the last is the number of features.
    pub channels: Vec<usize>,
    /// 3x3 convolutions per stage, the first of them with stride 2.
    pub convs_per_stage: usize,
    /// Groups of every group normalization; divides all channels.
    pub groups: usize,
    /// Epsilon of every group normalization.
    pub norm_eps: f64,
    /// Names of the findings, one logit each.
    pub findings: Vec<String>,
}

impl SmallConfig {
    /// `cxr-small-v1`: 64 pixels, 4 stages of 24, 48, 96, 128 channels with two convolutions each, 0.4 M
    /// parameters, 128 features.
    pub fn v1(findings: Vec<String>) -> Self {
        Self {
            name: "cxr-small-v1".into(),
            input_size: 64,
            channels: vec![24, 48, 96, 128],
            convs_per_stage: 2,
            groups: 8,
            norm_eps: 1e-5,
            findings,
        }
    }

    /// Number of features.
    pub fn feature_dim(&self) -> usize {
        self.channels.last().copied().unwrap_or(0)
    }

    /// Whether a network can be made of these sizes; [`init`](Self::init) asks first.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let invalid = |name, value: String, expected: &str| {
            Err(MetricsError::InvalidParameter { name, value, expected: expected.into() })
        };
        if self.channels.is_empty() || self.groups == 0 {
            let value = format!("{:?} in {} groups", self.channels, self.groups);
            return invalid("channels", value, "at least one stage and one group");
        }
        if let Some(channels) = self.channels.iter().find(|c| **c == 0 || !c.is_multiple_of(self.groups)) {
            return invalid(
                "channels",
                channels.to_string(),
                &format!("multiples of the {} groups", self.groups),
            );
        }
        if self.convs_per_stage == 0 {
            return invalid("convs_per_stage", "0".into(), "at least one");
        }
        if self.channels.len() > 16
            || self.input_size == 0
            || !self.input_size.is_multiple_of(1 << self.channels.len())
        {
            let expected = format!("a multiple of 2^{}, one halving per stage", self.channels.len());
            return invalid("input_size", self.input_size.to_string(), &expected);
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return invalid("norm_eps", self.norm_eps.to_string(), "a small positive number, as 1e-5");
        }
        if self.findings.is_empty() {
            return invalid("findings", "[]".into(), "the name of at least one finding");
        }
        for (i, finding) in self.findings.iter().enumerate() {
            if self.findings[..i].contains(finding) {
                return invalid("findings", format!("`{finding}` twice"), "every name once");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_holds_and_each_broken_field_is_named() {
        let good = SmallConfig::v1(vec!["Effusion".into(), "Nodule".into()]);
        good.validate().unwrap();
        assert_eq!(good.feature_dim(), 128);
        type Change = fn(&mut SmallConfig);
        let broken: [(&str, Change); 7] = [
            ("channels", |c| c.channels.clear()),
            ("channels", |c| c.channels[1] = 50),
            ("channels", |c| c.groups = 0),
            ("convs_per_stage", |c| c.convs_per_stage = 0),
            ("input_size", |c| c.input_size = 72),
            ("findings", |c| c.findings.clear()),
            ("findings", |c| c.findings[1] = "Effusion".into()),
        ];
        for (field, change) in broken {
            let mut config = good.clone();
            change(&mut config);
            match config.validate() {
                Err(MetricsError::InvalidParameter { name, .. }) => assert_eq!(name, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_unknown_field_is_no_configuration() {
        let mut json = serde_json::to_value(SmallConfig::v1(vec!["Mass".into()])).unwrap();
        json["dropout"] = 0.5.into();
        assert!(serde_json::from_value::<SmallConfig>(json).is_err());
    }
}
