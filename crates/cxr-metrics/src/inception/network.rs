//! The network itself: convolutions with folded normalization, pools, and blocks of branches.

use burn::tensor::{Tensor, TensorData, activation::relu, backend::Backend};
use cxr_kernels::{DiffusionBackend, Pool, WeightCache, ops};

use super::layers::{CLASSES, FEATURES, Layer};
use crate::error::Result;

/// A convolution with its normalization folded in.
#[derive(Debug, Clone)]
pub(super) struct Folded {
    /// `[out, in, kh, kw]`, row-major.
    pub(super) weight: Vec<f32>,
    /// `[out]`
    pub(super) bias: Vec<f32>,
}

/// Where the network gets its convolutions from, by name.
pub(super) type Source<'a, B> = dyn FnMut(&str) -> Result<ConvRelu<B>> + 'a;

/// Convolution, bias, ReLU.
#[derive(Debug, Clone)]
pub(super) struct ConvRelu<B: Backend> {
    weight: Tensor<B, 4>,
    bias: Tensor<B, 1>,
    stride: usize,
    padding: [usize; 2],
    cache: WeightCache,
}

impl<B: DiffusionBackend> ConvRelu<B> {
    /// # Panics
    /// If the values are not as many as the layer has.
    pub(super) fn new(layer: &Layer, folded: Folded, device: &B::Device) -> Self {
        let shape = [layer.output, layer.input, layer.kernel[0], layer.kernel[1]];
        Self {
            weight: Tensor::from_data(TensorData::new(folded.weight, shape), device),
            bias: Tensor::from_data(TensorData::new(folded.bias, [layer.output]), device),
            stride: layer.stride,
            padding: layer.padding,
            cache: WeightCache::new(),
        }
    }

    /// `[n, in, h, w] -> [n, out, h', w']`.
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [vertical, horizontal] = self.padding;
        let (x, padding) = if vertical == horizontal {
            (x, vertical)
        } else {
            (x.pad([(vertical, vertical), (horizontal, horizontal)], 0.0), 0)
        };
        relu(ops::conv2d(x, self.weight.clone(), Some(self.bias.clone()), self.stride, padding, &self.cache))
    }
}

/// Convolutions one after another.
#[derive(Debug, Clone)]
struct Branch<B: Backend>(Vec<ConvRelu<B>>);

impl<B: DiffusionBackend> Branch<B> {
    fn new(block: &str, names: &[&str], source: &mut Source<'_, B>) -> Result<Self> {
        names.iter().map(|name| source(&format!("{block}.{name}"))).collect::<Result<_>>().map(Self)
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.0.iter().fold(x, |x, conv| conv.forward(x))
    }
}

/// Branches side by side; what they give is joined.
#[derive(Debug, Clone)]
struct Block<B: Backend> {
    branches: Vec<Branch<B>>,
    /// Branches that end in two.
    forks: Vec<(Branch<B>, [ConvRelu<B>; 2])>,
    /// The mean leaves padding out, as TensorFlow does; the last block takes the maximum, a slip of the original
    /// which is part of the metric by now.
    pool: Pool,
    after_pool: Option<ConvRelu<B>>,
}

impl<B: DiffusionBackend> Block<B> {
    fn plain(
        block: &str,
        branches: &[&[&str]],
        pool: Pool,
        project: bool,
        source: &mut Source<'_, B>,
    ) -> Result<Self> {
        Ok(Self {
            branches: branches
                .iter()
                .map(|names| Branch::new(block, names, source))
                .collect::<Result<_>>()?,
            forks: Vec::new(),
            pool,
            after_pool: project.then(|| source(&format!("{block}.branch_pool"))).transpose()?,
        })
    }

    fn a(block: &str, source: &mut Source<'_, B>) -> Result<Self> {
        let branches: [&[&str]; 3] = [
            &["branch1x1"],
            &["branch5x5_1", "branch5x5_2"],
            &["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        ];
        Self::plain(block, &branches, Pool::Mean, true, source)
    }

    fn b(block: &str, source: &mut Source<'_, B>) -> Result<Self> {
        let branches: [&[&str]; 2] =
            [&["branch3x3"], &["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]];
        Self::plain(block, &branches, Pool::MaxHalving, false, source)
    }

    fn c(block: &str, source: &mut Source<'_, B>) -> Result<Self> {
        let branches: [&[&str]; 3] = [
            &["branch1x1"],
            &["branch7x7_1", "branch7x7_2", "branch7x7_3"],
            &["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"],
        ];
        Self::plain(block, &branches, Pool::Mean, true, source)
    }

    fn d(block: &str, source: &mut Source<'_, B>) -> Result<Self> {
        let branches: [&[&str]; 2] = [
            &["branch3x3_1", "branch3x3_2"],
            &["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"],
        ];
        Self::plain(block, &branches, Pool::MaxHalving, false, source)
    }

    fn e(block: &str, pool: Pool, source: &mut Source<'_, B>) -> Result<Self> {
        let fork = |stem: &[&str], ends: [&str; 2], source: &mut Source<'_, B>| {
            let stem = Branch::new(block, stem, source)?;
            let [left, right] = ends.map(|end| format!("{block}.{end}"));
            Result::Ok((stem, [source(&left)?, source(&right)?]))
        };
        let forks = vec![
            fork(&["branch3x3_1"], ["branch3x3_2a", "branch3x3_2b"], source)?,
            fork(&["branch3x3dbl_1", "branch3x3dbl_2"], ["branch3x3dbl_3a", "branch3x3dbl_3b"], source)?,
        ];
        Ok(Self { forks, ..Self::plain(block, &[&["branch1x1"]], pool, true, source)? })
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let mut parts = Vec::new();
        parts.extend(self.branches.iter().map(|branch| branch.forward(x.clone())));
        for (stem, ends) in &self.forks {
            let y = stem.forward(x.clone());
            parts.extend(ends.iter().map(|end| end.forward(y.clone())));
        }
        let pooled = ops::pool(x, self.pool);
        parts.push(match &self.after_pool {
            Some(conv) => conv.forward(pooled),
            None => pooled,
        });
        Tensor::cat(parts, 1)
    }
}

/// The last layer, without its bias.
#[derive(Debug, Clone)]
pub(super) struct Classifier<B: Backend> {
    weight: Tensor<B, 2>,
    cache: WeightCache,
}

impl<B: Backend> Classifier<B> {
    /// Takes the weight `[1008, 2048]`, row-major.
    ///
    /// # Panics
    /// If the values are not as many.
    pub(super) fn new(weight: Vec<f32>, device: &B::Device) -> Self {
        let weight = Tensor::from_data(TensorData::new(weight, [CLASSES, FEATURES]), device);
        Self { weight, cache: WeightCache::new() }
    }
}

/// InceptionV3 of 2015-12-05 up to its features, and its last layer where the weights have it.
#[derive(Debug, Clone)]
pub(super) struct Network<B: Backend> {
    stem: Vec<ConvRelu<B>>,
    blocks: Vec<Block<B>>,
    classifier: Option<Classifier<B>>,
}

impl<B: DiffusionBackend> Network<B> {
    pub(super) fn new(source: &mut Source<'_, B>, classifier: Option<Classifier<B>>) -> Result<Self> {
        let stem = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"];
        Ok(Self {
            stem: stem.iter().map(|name| source(name)).collect::<Result<_>>()?,
            blocks: vec![
                Block::a("Mixed_5b", source)?,
                Block::a("Mixed_5c", source)?,
                Block::a("Mixed_5d", source)?,
                Block::b("Mixed_6a", source)?,
                Block::c("Mixed_6b", source)?,
                Block::c("Mixed_6c", source)?,
                Block::c("Mixed_6d", source)?,
                Block::c("Mixed_6e", source)?,
                Block::d("Mixed_7a", source)?,
                Block::e("Mixed_7b", Pool::Mean, source)?,
                Block::e("Mixed_7c", Pool::Max, source)?,
            ],
            classifier,
        })
    }

    /// Features `[n, 2048]` and, with a classifier, logits without bias `[n, 1008]`, of pixels `[n, 3, 299, 299]`
    /// in the range of the resize mode, about [-1, 1].
    pub(super) fn forward(&self, pixels: Tensor<B, 4>) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
        let mut x = pixels;
        for (i, conv) in self.stem.iter().enumerate() {
            x = conv.forward(x);
            if i == 2 || i == 4 {
                x = ops::pool(x, Pool::MaxHalving);
            }
        }
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x));
        let [n, c, h, w] = x.dims();
        let features = x.reshape([n, c, h * w]).mean_dim(2).reshape([n, c]);
        let logits = self
            .classifier
            .as_ref()
            .map(|fc| ops::linear(features.clone(), fc.weight.clone(), None, &fc.cache));
        (features, logits)
    }

    pub(super) fn has_logits(&self) -> bool {
        self.classifier.is_some()
    }
}
