//! Gradients by parameter path.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::AutodiffBackend;

/// The gradient of every parameter that has one.
pub(crate) fn by_path<B: AutodiffBackend, M: Module<B>>(
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
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if let Some(gradient) = param.val().grad(self.gradients) {
                self.found.insert(self.path.join("."), gradient.into_data().to_vec().unwrap());
            }
        }
    }
    let mut collect = Collect { path: Vec::new(), gradients, found: BTreeMap::new() };
    model.visit(&mut collect);
    collect.found
}
