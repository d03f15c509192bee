//! The reference that `fixtures/generate.py` wrote, read by the safetensors crate.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use cxr_kernels::nn::parameters;
use cxr_ldm::text::{ClipTextConfig, ClipTextModel};
use cxr_ldm::unet::{UNet2dCondition, UNetConfig};
use cxr_ldm::vae::{AutoencoderKl, AutoencoderKlConfig};
use safetensors::{Dtype, SafeTensors};

/// The bar of every comparison: the norm of the difference over the norm of the reference.
pub(crate) const BAR: f64 = 1e-4;

/// What leaves out a part of the computation has to miss the bar by at least this.
pub(crate) const MISS: f64 = 10.0 * BAR;

pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// All tensors of a file by name; f16 as f32.
pub(crate) fn tensors(name: &str) -> BTreeMap<String, TensorData> {
    let bytes = std::fs::read(path(name)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = |view: safetensors::tensor::TensorView<'_>| {
        let dtype = match view.dtype() {
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            Dtype::I64 => DType::I64,
            other => panic!("{name}: {other:?}"),
        };
        let data = TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype);
        if dtype == DType::F16 { data.convert::<f32>() } else { data }
    };
    file.tensors().into_iter().map(|(name, view)| (name, data(view))).collect()
}

/// Inputs and outputs of the reference.
pub(crate) struct Reference(BTreeMap<String, TensorData>);

impl Reference {
    pub(crate) fn open() -> Self {
        Self::of("reference.safetensors")
    }

    /// Those of another file.
    pub(crate) fn of(name: &str) -> Self {
        Self(tensors(name))
    }

    pub(crate) fn data(&self, name: &str) -> TensorData {
        self.0[name].clone()
    }

    pub(crate) fn float<B: Backend, const D: usize>(&self, name: &str) -> Tensor<B, D> {
        Tensor::from_data(self.data(name), &Default::default())
    }

    pub(crate) fn int<B: Backend, const D: usize>(&self, name: &str) -> Tensor<B, D, Int> {
        Tensor::from_data(self.data(name), &Default::default())
    }

    /// Whole timesteps, as the UNet takes them.
    pub(crate) fn timesteps<B: Backend>(&self, name: &str) -> Tensor<B, 1> {
        Tensor::from_data(self.data(name).convert::<f32>(), &Default::default())
    }

    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        self.data(name).to_vec().unwrap()
    }

    /// The names that begin with `start`, without it.
    pub(crate) fn names(&self, start: &str) -> Vec<String> {
        self.0.keys().filter_map(|name| name.strip_prefix(start)).map(String::from).collect()
    }
}

fn config(part: &str) -> String {
    std::fs::read_to_string(path("model").join(part).join("config.json")).unwrap()
}

/// The model with the weights of a file: each tensor of either is in the other.
fn load<B: Backend, M: Module<B>>(model: M, file: &str, prefix: &str) -> M {
    let mut tensors: BTreeMap<String, TensorData> =
        tensors(file).into_iter().map(|(name, data)| (format!("{prefix}{name}"), data)).collect();
    let Ok(model) = parameters::map_data(model, |path, shape| -> Result<_, Infallible> {
        let data = tensors.remove(path).unwrap_or_else(|| panic!("{path} is not in {file}"));
        assert_eq!(&data.shape.to_vec(), shape, "{path}");
        Ok(Some(data))
    });
    assert!(tensors.is_empty(), "{file} has more than the model: {:?}", tensors.keys());
    model
}

pub(crate) fn text<B: Backend>() -> ClipTextModel<B> {
    let model = ClipTextConfig::from_json(&config("text_encoder")).unwrap().init(&Default::default());
    // this version of transformers leaves the outer module out of the names
    load(model, "model/text_encoder/model.safetensors", "text_model.")
}

pub(crate) fn unet<B: Backend>() -> UNet2dCondition<B> {
    let model = UNetConfig::from_json(&config("unet")).unwrap().init(&Default::default());
    load(model, "model/unet/diffusion_pytorch_model.safetensors", "")
}

pub(crate) fn vae<B: Backend>() -> AutoencoderKl<B> {
    let model = AutoencoderKlConfig::from_json(&config("vae")).unwrap().init(&Default::default());
    load(model, "model/vae/diffusion_pytorch_model.safetensors", "")
}

pub(crate) fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().to_vec().unwrap()
}

/// The norm of the difference over the norm of the reference.
pub(crate) fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)))
        / norm(&mut expected.iter().map(|b| f64::from(*b)))
}

/// That `found` is the reference.
pub(crate) fn assert_meets(what: &str, found: &[f32], expected: &[f32]) {
    let error = relative(found, expected);
    println!("{what}: relative error {error:.1e}");
    assert!(error <= BAR, "{what}: relative error {error:e}, the bar is {BAR:e}");
}

/// That `broken` is not the reference by far.
pub(crate) fn assert_misses(what: &str, broken: &[f32], expected: &[f32]) {
    let error = relative(broken, expected);
    println!("{what}: relative error {error:.1e}");
    assert!(
        error > MISS,
        "{what}: relative error {error:e} is too close to the bar, {BAR:e}, to show anything"
    );
}

/// That the reference shows each parameter: without it, the output misses the bar.
///
/// A key's bias moves all of a query's scores by the same amount, which softmax does not see.
pub(crate) fn assert_every_parameter_counts<B: Backend, M: Module<B>>(
    model: &M,
    expected: &[f32],
    forward: impl Fn(&M) -> Vec<f32>,
) {
    for zeroed in parameters::list::<B, M>(model) {
        let Ok(broken) = parameters::map_data(model.clone(), |path, shape| -> Result<_, Infallible> {
            let zeros = || TensorData::new(vec![0.0_f32; shape.iter().product()], shape.to_vec());
            Ok((path == zeroed.path).then(zeros))
        });
        let error = relative(&forward(&broken), expected);
        let is_key_bias = zeroed.path.ends_with("to_k.bias") || zeroed.path.ends_with("k_proj.bias");
        let shows = if is_key_bias { error <= BAR } else { error > MISS };
        assert!(shows, "without {}: relative error {error:e}", zeroed.path);
    }
}
