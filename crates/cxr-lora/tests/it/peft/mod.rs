//! What `generate.py` wrote with PEFT and diffusers, and the comparison with it.

pub(crate) mod parity;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use cxr_core::tensor_file::TensorFile;

pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/peft").join(name)
}

/// Weights, inputs, outputs, gradients and trained factors of the reference.
pub(crate) struct Fixture(TensorFile);

impl Fixture {
    /// Of the model of attentions.
    pub(crate) fn open() -> Self {
        Self(TensorFile::open(path("fixture.safetensors")).unwrap())
    }

    /// Of the model of convolutions.
    pub(crate) fn convolutions() -> Self {
        Self(TensorFile::open(path("convolutions_fixture.safetensors")).unwrap())
    }

    pub(crate) fn data(&self, name: &str) -> TensorData {
        let tensor = self.0.read(name).unwrap();
        TensorData::new(tensor.to_f32().unwrap(), tensor.shape)
    }

    pub(crate) fn tensor<B: Backend, const D: usize>(&self, name: &str) -> Tensor<B, D> {
        Tensor::from_data(self.data(name), &Default::default())
    }

    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        self.data(name).to_vec().unwrap()
    }

    /// The tensors whose names begin with `start`, by the path that the parameter has in a model of this crate.
    pub(crate) fn factors(&self, start: &str) -> BTreeMap<String, Vec<f32>> {
        let ours = |name: &str| {
            name.replace(".lora_A.weight", ".adapters.0.lora_a")
                .replace(".lora_B.weight", ".adapters.0.lora_b")
        };
        self.0.names().filter_map(|name| Some((ours(name.strip_prefix(start)?), self.values(name)))).collect()
    }
}

/// The gradient of every parameter that has one, by path.
pub(crate) fn gradients<B: AutodiffBackend, M: Module<B>>(
    model: &M,
    gradients: &B::Gradients,
) -> BTreeMap<String, Vec<f32>> {
    struct Collect<'a, B: AutodiffBackend> {
        path: Vec<String>,
        gradients: &'a B::Gradients,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<'_, B> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = param.val().grad(self.gradients) {
                self.found.insert(self.path.join("."), crate::values(gradient));
            }
        }
    }
    let mut collect = Collect { path: Vec::new(), gradients, found: BTreeMap::new() };
    model.visit(&mut collect);
    collect.found
}
