//! The autoencoder against diffusers.

use std::convert::Infallible;

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData};
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::vae::AutoencoderKl;

use crate::fixture::{
    Reference, assert_every_parameter_counts, assert_meets, assert_misses, relative, vae, values,
};

#[test]
fn encode() {
    let reference = Reference::open();
    let moments = vae::<Flex>().encode(reference.float("vae.pixels"));
    assert_meets("VAE mean", &values(moments.mean), &reference.values("vae.mean"));
    assert_meets("VAE log-variance", &values(moments.logvar), &reference.values("vae.logvar"));
}

#[test]
fn decode() {
    let reference = Reference::open();
    let (model, expected) = (vae::<Flex>(), reference.values("vae.decoded"));
    let latents = || reference.float::<Flex, 4>("vae.latents");
    assert_meets("VAE decode", &values(model.decode(latents())), &expected);
    assert_misses("VAE decode, other latents", &values(model.decode(latents() * 0.99)), &expected);
}

#[test]
fn every_parameter_counts() {
    let reference = Reference::open();
    let expected =
        [reference.values("vae.mean"), reference.values("vae.logvar"), reference.values("vae.decoded")];
    // one number for each part, so that the size of one output does not hide an error in another
    let forward = |model: &AutoencoderKl<Flex>| {
        let moments = model.encode(reference.float("vae.pixels"));
        let decoded = model.decode(reference.float("vae.latents"));
        let found = [values(moments.mean), values(moments.logvar), values(decoded)];
        found.iter().zip(&expected).map(|(f, e)| 1.0 + relative(f, e) as f32 * 3.0_f32.sqrt()).collect()
    };
    assert_every_parameter_counts::<Flex, _>(&vae(), &[1.0; 3], forward);
}

#[test]
fn the_log_variance_is_clamped() {
    let reference = Reference::open();
    let with_bias = |bias: f32| {
        let Ok(model) = parameters::map_data(vae::<Flex>(), |path, shape| -> Result<_, Infallible> {
            Ok((path == "quant_conv.bias").then(|| TensorData::new(vec![bias; shape[0]], shape.to_vec())))
        });
        let moments = model.encode(reference.float("vae.pixels"));
        let logvar = values(moments.logvar.clone());
        assert!(logvar.iter().all(|&v| v == logvar[0]));
        (logvar[0], values(moments.std())[0])
    };
    assert_eq!(with_bias(1e4).0, 20.0);
    let (logvar, std) = with_bias(-1e4);
    assert_eq!(logvar, -30.0);
    assert!((std / (-15.0_f32).exp() - 1.0).abs() < 1e-5);
}

#[test]
fn a_sample_is_mean_and_deviation() {
    let reference = Reference::open();
    let moments = vae::<Flex>().encode(reference.float("vae.pixels"));
    let noise = reference.float::<Flex, 4>("vae.latents");
    let (found, noise) = (values(moments.sample(noise.clone())), values(noise));
    let (mean, logvar) = (reference.values("vae.mean"), reference.values("vae.logvar"));
    let expected: Vec<f32> = (0..mean.len()).map(|i| mean[i] + (0.5 * logvar[i]).exp() * noise[i]).collect();
    assert_meets("VAE sample", &found, &expected);
    assert_misses("VAE sample without noise", &mean, &expected);
}

/// Training from scratch: the loss's gradient by every parameter, along one direction, against a difference.
#[test]
fn gradients_reach_every_parameter() {
    type B = Autodiff<Flex>;
    let reference = Reference::open();
    let loss = |model: &AutoencoderKl<B>| {
        let moments = model.encode(reference.float("vae.pixels"));
        let decoded = model.decode(moments.sample(reference.float("vae.latents")));
        (decoded - reference.float::<B, 4>("vae.pixels")).powi_scalar(2).mean()
    };
    let model = parameters::set_trainable::<B, _>(vae::<B>(), |_| true);
    let gradients = crate::gradients::by_path(&model, &loss(&model).backward());
    let parameters = parameters::list::<B, _>(&model);
    assert_eq!(gradients.len(), parameters.len());
    for (path, gradient) in &gradients {
        let norm = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        assert_eq!(norm > 1e-6, !path.ends_with("to_k.bias"), "{path}: gradient {norm:e}");
    }
    // step along the gradient of each parameter: the loss changes by its squared norm
    for path in
        ["encoder.conv_in.weight", "encoder.mid_block.attentions.0.to_q.weight", "decoder.conv_in.bias"]
    {
        let gradient = &gradients[path];
        let squared: f64 = gradient.iter().map(|g| f64::from(*g).powi(2)).sum();
        let step = 1e-2 / squared.sqrt();
        let at = |sign: f64| {
            let Ok(moved) = parameters::map_data(vae::<B>(), |p, shape| -> Result<_, Infallible> {
                let original = || crate::fixture::tensors("model/vae/diffusion_pytorch_model.safetensors");
                Ok((p == path).then(|| {
                    let values = original()[path].to_vec::<f32>().unwrap();
                    let moved = values.iter().zip(gradient).map(|(v, g)| v + (sign * step) as f32 * g);
                    TensorData::new(moved.collect::<Vec<f32>>(), shape.to_vec())
                }))
            });
            f64::from(Tensor::<B, 1>::into_scalar(loss(&moved)))
        };
        let (found, expected) = ((at(1.0) - at(-1.0)) / (2.0 * step), squared);
        assert!((found / expected - 1.0).abs() < 0.02, "{path}: difference {found:e}, gradient {expected:e}");
    }
}
