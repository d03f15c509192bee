use burn::module::Module;
use burn::tensor::{Tensor, backend::Backend};
use cxr_kernels::DiffusionBackend;
use cxr_kernels::nn::{LayerNorm, LayerNormConfig};
use cxr_kernels::ops::{self, AttentionOptions};
use cxr_lora::{LayerMut, LayerRef, LoraLinear, LoraLinearConfig};

use super::{Activation, ClipTextConfig};

/// transformers' `CLIPEncoderLayer`.
#[derive(Module, Debug)]
pub(crate) struct EncoderLayer<B: Backend> {
    self_attn: SelfAttention<B>,
    layer_norm1: LayerNorm<B>,
    mlp: Mlp<B>,
    layer_norm2: LayerNorm<B>,
}

#[derive(Module, Debug)]
struct SelfAttention<B: Backend> {
    k_proj: LoraLinear<B>,
    v_proj: LoraLinear<B>,
    q_proj: LoraLinear<B>,
    out_proj: LoraLinear<B>,
    heads: usize,
}

#[derive(Module, Debug)]
struct Mlp<B: Backend> {
    fc1: LoraLinear<B>,
    fc2: LoraLinear<B>,
    quick: bool,
}

impl<B: Backend> EncoderLayer<B> {
    pub(crate) fn new(config: &ClipTextConfig, device: &B::Device) -> Self {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let linear = |input, output| LoraLinearConfig::new(input, output).init(device);
        let norm = || LayerNormConfig::new(width).with_eps(config.layer_norm_eps).init(device);
        Self {
            self_attn: SelfAttention {
                k_proj: linear(width, width),
                v_proj: linear(width, width),
                q_proj: linear(width, width),
                out_proj: linear(width, width),
                heads: config.num_attention_heads,
            },
            layer_norm1: norm(),
            mlp: Mlp {
                fc1: linear(width, inner),
                fc2: linear(inner, width),
                quick: config.hidden_act == Activation::QuickGelu,
            },
            layer_norm2: norm(),
        }
    }

    pub(crate) fn visit_layers(&self, path: &str, visit: &mut dyn FnMut(&str, LayerRef<'_, B>)) {
        let (attention, mlp) = (&self.self_attn, &self.mlp);
        for (name, layer) in [
            ("self_attn.q_proj", &attention.q_proj),
            ("self_attn.k_proj", &attention.k_proj),
            ("self_attn.v_proj", &attention.v_proj),
            ("self_attn.out_proj", &attention.out_proj),
            ("mlp.fc1", &mlp.fc1),
            ("mlp.fc2", &mlp.fc2),
        ] {
            visit(&format!("{path}.{name}"), LayerRef::Linear(layer));
        }
    }

    pub(crate) fn visit_layers_mut(&mut self, path: &str, visit: &mut dyn FnMut(&str, LayerMut<'_, B>)) {
        let (attention, mlp) = (&mut self.self_attn, &mut self.mlp);
        for (name, layer) in [
            ("self_attn.q_proj", &mut attention.q_proj),
            ("self_attn.k_proj", &mut attention.k_proj),
            ("self_attn.v_proj", &mut attention.v_proj),
            ("self_attn.out_proj", &mut attention.out_proj),
            ("mlp.fc1", &mut mlp.fc1),
            ("mlp.fc2", &mut mlp.fc2),
        ] {
            visit(&format!("{path}.{name}"), LayerMut::Linear(layer));
        }
    }
}

impl<B: DiffusionBackend> EncoderLayer<B> {
    /// `[n, tokens, width]` to the same shape.
    pub(crate) fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let x = ops::add(self.self_attn.forward(self.layer_norm1.forward(x.clone())), x);
        ops::add(self.mlp.forward(self.layer_norm2.forward(x.clone())), x)
    }
}

impl<B: DiffusionBackend> SelfAttention<B> {
    /// A token attends to itself and to those before it.
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let [n, tokens, width] = x.dims();
        let split = |layer: &LoraLinear<B>| {
            let shape = [n, tokens, self.heads, width / self.heads];
            layer.forward(x.clone()).reshape(shape).swap_dims(1, 2)
        };
        let (q, k, v) = (split(&self.q_proj), split(&self.k_proj), split(&self.v_proj));
        let mixed = ops::attention(q, k, v, AttentionOptions { causal: true });
        self.out_proj.forward(mixed.swap_dims(1, 2).reshape([n, tokens, width]))
    }
}

impl<B: DiffusionBackend> Mlp<B> {
    fn forward(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let x = self.fc1.forward(x);
        self.fc2.forward(if self.quick { ops::quick_gelu(x) } else { ops::gelu(x) })
    }
}
