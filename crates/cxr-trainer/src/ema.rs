//! The exponentially averaged copy of what learns.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorPrimitive};

type Values<I> = HashMap<ParamId, <I as burn::tensor::backend::BackendTypes>::FloatTensorPrimitive>;

/// Averages of the trainable parameters, by id.
pub(crate) struct Ema<B: AutodiffBackend> {
    decay: f64,
    values: Values<B::InnerBackend>,
}

impl<B: AutodiffBackend> Ema<B> {
    /// Starts at the model's present values.
    pub(crate) fn new<M: Module<B>>(decay: f64, model: &M) -> Self {
        let mut ema = Self { decay: 0.0, values: HashMap::new() };
        ema.update(model, 0);
        Self { decay, ..ema }
    }

    /// Takes in the model after `step` optimizer steps.
    ///
    /// The decay rises with the step, `(1 + step) / (10 + step)` up to its setting, so that the first steps
    /// do not stay in the average for long.
    pub(crate) fn update<M: Module<B>>(&mut self, model: &M, step: u64) {
        struct Update<'a, I: Backend> {
            values: &'a mut Values<I>,
            decay: f64,
        }
        impl<B: AutodiffBackend> ModuleVisitor<B> for Update<'_, B::InnerBackend> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
                let value = param.val();
                if !value.is_require_grad() {
                    return;
                }
                let value = value.inner();
                let average = match self.values.remove(&param.id) {
                    None => value,
                    Some(old) => {
                        let old = Tensor::<B::InnerBackend, D>::from_primitive(TensorPrimitive::Float(old));
                        old.mul_scalar(self.decay).add(value.mul_scalar(1.0 - self.decay))
                    }
                };
                self.values.insert(param.id, average.into_primitive().tensor());
            }
        }
        let decay = self.decay.min((1 + step) as f64 / (10 + step) as f64);
        Module::<B>::visit(model, &mut Update::<B::InnerBackend> { values: &mut self.values, decay });
    }

    /// The model with its trainable parameters replaced by their averages.
    pub(crate) fn apply<M: Module<B>>(&self, model: M) -> M {
        struct Apply<'a, I: Backend>(&'a Values<I>);
        impl<B: AutodiffBackend> ModuleMapper<B> for Apply<'_, B::InnerBackend> {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
                let Some(average) = self.0.get(&param.id) else { return param };
                let average =
                    Tensor::<B::InnerBackend, D>::from_primitive(TensorPrimitive::Float(average.clone()));
                Param::initialized(param.id, Tensor::from_inner(average).require_grad())
            }
        }
        model.map(&mut Apply::<B::InnerBackend>(&self.values))
    }
}
