//! Initial values for training from scratch.

use burn::module::Module;
use burn::tensor::TensorData;
use burn::tensor::backend::Backend;
use cxr_core::random::Stream;
use cxr_kernels::nn::parameters;

/// Fills a module for training from scratch, each parameter from a stream named by its path.
///
/// Matrices and kernels are uniform in `+-1/sqrt(fan_in)`, as PyTorch starts linear and convolution layers;
/// tables (paths ending in `embedding.weight`) are normal with a deviation of 0.02, as CLIP's; vectors stay as
/// they are made (norm weights one, biases zero). The last convolution of each resnet and the output projections
/// of attention start near zero, so that a deep model starts close to its shortcuts.
pub fn initialize<B: Backend, M: Module<B>>(module: M, seed: u64) -> M {
    let filled = parameters::map_data(module, |path, shape| {
        if shape.len() < 2 {
            return Ok(None);
        }
        let mut stream = Stream::new(seed, &format!("initialize {path}"), 0);
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = if path.ends_with("embedding.weight") {
            (0..count).map(|_| 0.02 * stream.normal()).collect()
        } else {
            let fan_in = shape[1..].iter().product::<usize>() as f32;
            let last = ["conv2.weight", "to_out.0.weight", "proj_out.weight", "net.2.weight"];
            let bound = if last.iter().any(|l| path.ends_with(l)) { 0.1 } else { 1.0 } / fan_in.sqrt();
            (0..count).map(|_| bound * (2.0 * stream.uniform() - 1.0)).collect()
        };
        Ok::<_, std::convert::Infallible>(Some(TensorData::new(values, shape.to_vec())))
    });
    match filled {
        Ok(module) => module,
        Err(never) => match never {},
    }
}
