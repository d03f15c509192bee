//! A module's parameters by path: listing, reading, filling, freezing, naming.
//!
//! A path is the field names from the root, joined by dots, indices of `Vec`s and tuples among them; with the
//! models of this project it is the key of the published weight files.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Tensor, TensorData, TensorPrimitive, backend::Backend};

use crate::DiffusionBackend;

/// What [`list`] says of one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterInfo {
    /// Its path, e.g. `down_blocks.0.resnets.0.conv1.weight`.
    pub path: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The id under which an optimizer keeps its state.
    pub id: u64,
    /// Whether a backward pass makes a gradient for it.
    pub trainable: bool,
}

impl ParameterInfo {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Every float parameter in module order; lazy ones are not made.
pub fn list<B: Backend, M: Module<B>>(module: &M) -> Vec<ParameterInfo> {
    struct Lister {
        path: Vec<String>,
        found: Vec<ParameterInfo>,
    }
    impl<B: Backend> ModuleVisitor<B> for Lister {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.found.push(ParameterInfo {
                path: self.path.join("."),
                shape: param.lazy_shape().to_vec(),
                id: param.id.val(),
                trainable: is_trainable(param),
            });
        }
    }
    let mut lister = Lister { path: Vec::new(), found: Vec::new() };
    module.visit(&mut lister);
    lister.found
}

/// Hands every parameter's path and values to `visit`.
pub fn read<B: Backend, M: Module<B>>(module: &M, visit: impl FnMut(&str, TensorData)) {
    struct Reader<F> {
        path: Vec<String>,
        visit: F,
    }
    impl<B: Backend, F: FnMut(&str, TensorData)> ModuleVisitor<B> for Reader<F> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            (self.visit)(&self.path.join("."), param.val().into_data());
        }
    }
    module.visit(&mut Reader { path: Vec::new(), visit });
}

/// Replaces parameters by data of the same shape; the data's dtype becomes the parameter's.
///
/// `data` gets each path and shape; `None` leaves the parameter as it is. Trainable flags and ids stay. One
/// parameter is replaced at a time, so a lazy module never holds two copies.
///
/// # Errors
/// The first error of `data`; the module is gone then.
///
/// # Panics
/// If the data's shape is not the parameter's: `data` is asked to check.
pub fn map_data<B: Backend, M: Module<B>, E>(
    module: M,
    mut data: impl FnMut(&str, &[usize]) -> Result<Option<TensorData>, E>,
) -> Result<M, E> {
    let mut error = None;
    let module = map(module, &mut |path: &str, param: AnyParam<'_>| {
        if error.is_some() {
            return Change::Keep;
        }
        match data(path, param.shape) {
            Ok(Some(data)) => {
                assert_eq!(&data.shape.to_vec(), param.shape, "{path}: shape of the new data");
                Change::Data(data)
            }
            Ok(None) => Change::Keep,
            Err(e) => {
                error = Some(e);
                Change::Keep
            }
        }
    });
    match error {
        Some(error) => Err(error),
        None => Ok(module),
    }
}

/// Marks each parameter as trainable or frozen, by path.
pub fn set_trainable<B: Backend, M: Module<B>>(module: M, mut trainable: impl FnMut(&str) -> bool) -> M {
    map(module, &mut |path: &str, _: AnyParam<'_>| Change::Trainable(trainable(path)))
}

/// Gives each parameter the id `id(path)`.
///
/// burn's ids are random otherwise, and optimizer state is kept under them: with a stable hash of the path a
/// resumed run finds its moments again, and processes agree on the order.
pub fn assign_ids<B: Backend, M: Module<B>>(module: M, mut id: impl FnMut(&str) -> u64) -> M {
    map(module, &mut |path: &str, _: AnyParam<'_>| Change::Id(id(path)))
}

/// The number of elements of all parameters, and of the trainable ones.
pub fn count<B: Backend, M: Module<B>>(module: &M) -> (usize, usize) {
    list(module).iter().fold((0, 0), |(all, trainable), p| {
        (all + p.elements(), trainable + if p.trainable { p.elements() } else { 0 })
    })
}

/// The module with the weights of its convolutions in the order of memory that the backend's convolution reads
/// ([`conv2d_weight`](crate::ops::conv2d_weight)); lazy parameters stay as they are.
///
/// No result depends on it: what is left out, or has learned since, is brought into order by each call.
pub fn arrange<B: DiffusionBackend, M: Module<B>>(module: M) -> M {
    struct Arrange;
    impl<B: DiffusionBackend> ModuleMapper<B> for Arrange {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            if D != 4 || !param.is_initialized() {
                return param;
            }
            let trainable = is_trainable(&param);
            let arranged = param.map(|weight| {
                // burn's `detach` keeps the flag
                let weight = weight.detach().set_require_grad(false);
                let weight = B::kernel_conv2d_weight(weight.into_primitive().tensor());
                Tensor::from_primitive(TensorPrimitive::Float(weight))
            });
            arranged.set_require_grad(trainable)
        }
    }
    module.map(&mut Arrange)
}

/// The trainable flag, without making a lazy parameter.
fn is_trainable<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> bool {
    if param.is_initialized() {
        return param.val().is_require_grad();
    }
    // burn shows the flag of a lazy parameter only by handing it on to what is loaded in its place.
    let nothing = Tensor::<B, D>::zeros([0; D], &param.lazy_device());
    param.clone().transform_for_load(nothing, param.id).val().is_require_grad()
}

struct AnyParam<'a> {
    shape: &'a [usize],
}

enum Change {
    Keep,
    Data(TensorData),
    Trainable(bool),
    Id(u64),
}

fn map<B: Backend, M: Module<B>>(module: M, change: &mut dyn FnMut(&str, AnyParam<'_>) -> Change) -> M {
    struct Mapper<'a> {
        path: Vec<String>,
        change: &'a mut dyn FnMut(&str, AnyParam<'_>) -> Change,
    }
    impl<B: Backend> ModuleMapper<B> for Mapper<'_> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let shape = param.lazy_shape().to_vec();
            match (self.change)(&self.path.join("."), AnyParam { shape: &shape }) {
                Change::Keep => param,
                Change::Trainable(trainable) => param.set_require_grad(trainable),
                Change::Data(data) => {
                    let (device, id, dtype) = (param.lazy_device(), param.id, data.dtype);
                    let tensor = Tensor::<B, D>::from_data(data, (&device, dtype));
                    param.transform_for_load(tensor, id)
                }
                Change::Id(id) => {
                    let mut param = param;
                    param.id = ParamId::from(id);
                    param
                }
            }
        }
    }
    module.map(&mut Mapper { path: Vec::new(), change })
}
