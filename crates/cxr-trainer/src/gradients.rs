//! All gradients of a step together: their norm, their sum over accumulated passes, their scaling.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Tensor, TensorData};

/// Adds `weight * from` to `into`.
pub(crate) fn accumulate<B: AutodiffBackend, M: Module<B>>(
    model: &M,
    into: &mut GradientsParams,
    from: GradientsParams,
    weight: f64,
) {
    struct Add<'a> {
        into: &'a mut GradientsParams,
        from: GradientsParams,
        weight: f64,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Add<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let Some(grad) = self.from.remove::<B::InnerBackend, D>(param.id) else { return };
            let grad = grad.mul_scalar(self.weight);
            let sum = match self.into.remove::<B::InnerBackend, D>(param.id) {
                Some(sum) => sum.add(grad),
                None => grad,
            };
            self.into.register(param.id, sum);
        }
    }
    model.visit(&mut Add { into, from, weight });
}

/// The gradients of all trainable parameters one after the other, in the order of the module; 0 where there is none.
pub(crate) fn flatten<B: AutodiffBackend, M: Module<B>>(model: &M, grads: &GradientsParams) -> Vec<f32> {
    struct Flatten<'a> {
        grads: &'a GradientsParams,
        values: Vec<f32>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Flatten<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let value = param.val();
            if !value.is_require_grad() {
                return;
            }
            match self.grads.get::<B::InnerBackend, D>(param.id) {
                Some(grad) => self.values.extend(grad.into_data().iter::<f32>()),
                None => self.values.extend(std::iter::repeat_n(0.0, value.shape().num_elements())),
            }
        }
    }
    let mut flatten = Flatten { grads, values: Vec::new() };
    model.visit(&mut flatten);
    flatten.values
}

/// What [`flatten`] made, as gradients again.
pub(crate) fn unflatten<B: AutodiffBackend, M: Module<B>>(model: &M, values: &[f32]) -> GradientsParams {
    struct Unflatten<'a> {
        values: &'a [f32],
        grads: GradientsParams,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Unflatten<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let value = param.val();
            if !value.is_require_grad() {
                return;
            }
            let shape = value.shape();
            let (own, rest) = self.values.split_at(shape.num_elements());
            self.values = rest;
            let data = TensorData::new(own.to_vec(), shape);
            let grad = Tensor::<B::InnerBackend, D>::from_data(data, (&value.device(), value.dtype()));
            self.grads.register(param.id, grad);
        }
    }
    let mut unflatten = Unflatten { values, grads: GradientsParams::new() };
    model.visit(&mut unflatten);
    unflatten.grads
}

/// The Euclidean norm of all gradients together.
pub(crate) fn global_norm<B: AutodiffBackend, M: Module<B>>(model: &M, grads: &GradientsParams) -> f64 {
    struct Norm<'a, I: burn::tensor::backend::Backend> {
        grads: &'a GradientsParams,
        sum: Option<Tensor<I, 1>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Norm<'_, B::InnerBackend> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let Some(grad) = self.grads.get::<B::InnerBackend, D>(param.id) else { return };
            let square = grad.clone().mul(grad).sum();
            // summed on the device: one read for all parameters
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum.add(square),
                None => square,
            });
        }
    }
    let mut norm = Norm::<B::InnerBackend> { grads, sum: None };
    Module::<B>::visit(model, &mut norm);
    norm.sum.map_or(0.0, |sum| sum.into_data().iter::<f64>().sum::<f64>().sqrt())
}

/// Every gradient times `factor`.
pub(crate) fn scale<B: AutodiffBackend, M: Module<B>>(
    model: &M,
    grads: GradientsParams,
    factor: f64,
) -> GradientsParams {
    let mut scaled = GradientsParams::new();
    accumulate::<B, M>(model, &mut scaled, grads, factor);
    scaled
}
