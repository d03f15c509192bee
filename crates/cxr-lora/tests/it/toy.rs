//! The model of `peft/generate.py`: two blocks of two attentions each, and a head that no adapter is meant for.

use std::convert::Infallible;

use burn::module::Module;
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use cxr_kernels::nn::parameters;
use cxr_kernels::{DiffusionBackend, ops};
use cxr_lora::{Adaptable, LayerMut, LayerRef, LoraLinear, LoraLinearConfig};

use crate::peft::Fixture;

const WIDTH: usize = 8;
const CONTEXT: usize = 6;

#[derive(Module, Debug)]
pub(crate) struct Attention<B: Backend> {
    to_q: LoraLinear<B>,
    to_k: LoraLinear<B>,
    to_v: LoraLinear<B>,
    to_out: Vec<LoraLinear<B>>,
}

#[derive(Module, Debug)]
pub(crate) struct Block<B: Backend> {
    attn1: Attention<B>,
    attn2: Attention<B>,
}

#[derive(Module, Debug)]
pub(crate) struct Toy<B: Backend> {
    blocks: Vec<Block<B>>,
    head: LoraLinear<B>,
}

impl<B: Backend> Toy<B> {
    /// The model with the fixture's weights.
    pub(crate) fn new(fixture: &Fixture) -> Self {
        Self::with_dtype(fixture, DType::F32)
    }

    /// The model with the fixture's weights rounded to `dtype`.
    pub(crate) fn with_dtype(fixture: &Fixture, dtype: DType) -> Self {
        let device = Default::default();
        let attention = |context| Attention {
            to_q: LoraLinearConfig::new(WIDTH, WIDTH).with_bias(false).init(&device),
            to_k: LoraLinearConfig::new(context, WIDTH).with_bias(false).init(&device),
            to_v: LoraLinearConfig::new(context, WIDTH).with_bias(false).init(&device),
            to_out: vec![LoraLinearConfig::new(WIDTH, WIDTH).init(&device)],
        };
        let block = |_| Block { attn1: attention(WIDTH), attn2: attention(CONTEXT) };
        let model = Self {
            blocks: (0..2).map(block).collect(),
            head: LoraLinearConfig::new(WIDTH, WIDTH).init(&device),
        };
        let Ok(model) =
            parameters::map_data(model, |path, shape| -> Result<Option<TensorData>, Infallible> {
                let data = fixture.data(&format!("base.{path}"));
                assert_eq!(data.shape.to_vec(), shape, "{path}");
                Ok(Some(data.convert_dtype(dtype)))
            });
        model
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        cxr_lora::layers(self).unwrap().into_iter().map(|layer| layer.path).collect()
    }

    /// The layer at `path`.
    pub(crate) fn layer(&self, path: &str) -> LoraLinear<B> {
        let mut found = None;
        self.visit_layers(&mut |other, layer| {
            if let LayerRef::Linear(layer) = layer
                && other == path
            {
                found = Some(layer.clone());
            }
        });
        found.unwrap_or_else(|| panic!("no layer `{path}`"))
    }
}

impl<B: DiffusionBackend> Toy<B> {
    pub(crate) fn forward(&self, x: Tensor<B, 3>, context: Tensor<B, 3>) -> Tensor<B, 3> {
        let blocks = self.blocks.iter().fold(x, |x, block| {
            let x = block.attn1.forward(x.clone(), x);
            block.attn2.forward(x, context.clone())
        });
        self.head.forward(blocks)
    }

    /// The output for the fixture's inputs, in the dtype of the weights.
    pub(crate) fn output(&self, fixture: &Fixture) -> Tensor<B, 3> {
        let dtype = self.head.weight.val().dtype();
        let input = |name| {
            let data = fixture.data(name).convert_dtype(dtype);
            Tensor::from_data(data, (&Default::default(), dtype))
        };
        self.forward(input("x"), input("context"))
    }
}

impl<B: DiffusionBackend> Attention<B> {
    fn forward(&self, x: Tensor<B, 3>, context: Tensor<B, 3>) -> Tensor<B, 3> {
        let k = self.to_k.forward(context.clone()).mean_dim(1);
        let v = self.to_v.forward(context).mean_dim(1);
        x.clone() + self.to_out[0].forward(ops::silu(self.to_q.forward(x) * k + v))
    }
}

impl<B: Backend> Adaptable<B> for Toy<B> {
    fn visit_layers(&self, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        for (i, block) in self.blocks.iter().enumerate() {
            for (name, attention) in [("attn1", &block.attn1), ("attn2", &block.attn2)] {
                let path = |projection| format!("blocks.{i}.{name}.{projection}");
                visit(&path("to_q"), LayerRef::Linear(&attention.to_q));
                visit(&path("to_k"), LayerRef::Linear(&attention.to_k));
                visit(&path("to_v"), LayerRef::Linear(&attention.to_v));
                visit(&path("to_out.0"), LayerRef::Linear(&attention.to_out[0]));
            }
        }
        visit("head", LayerRef::Linear(&self.head));
    }

    fn visit_layers_mut(&mut self, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (name, attention) in [("attn1", &mut block.attn1), ("attn2", &mut block.attn2)] {
                let path = |projection| format!("blocks.{i}.{name}.{projection}");
                visit(&path("to_q"), LayerMut::Linear(&mut attention.to_q));
                visit(&path("to_k"), LayerMut::Linear(&mut attention.to_k));
                visit(&path("to_v"), LayerMut::Linear(&mut attention.to_v));
                visit(&path("to_out.0"), LayerMut::Linear(&mut attention.to_out[0]));
            }
        }
        visit("head", LayerMut::Linear(&mut self.head));
    }
}
