//! The last part of training the embedded autoencoder: its decoder alone, against a network that tells its pictures from
//! real ones.
//!
//! Absolute error alone makes a decoder draw the mean of what a latent can stand for, and means are blurred. Stable
//! Diffusion's own autoencoder has an adversarial term for that (Rombach et al. 2022, appendix G; Esser et al. 2021);
//! this is the same at a small size. The encoder stays, and so do all latents.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::{relu, silu};
use burn::tensor::backend::Backend;
use cxr::kernels::nn::{Conv2d, Conv2dConfig, GroupNorm, GroupNormConfig, parameters};
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::vae::AutoencoderKl;
use cxr::trainer::{Objective, ReconstructionImages, Sample, absolute_error, image_batch, posterior_sample};

/// Steps after which the adversarial terms have their whole weight: before, the discriminator knows nothing.
const RISE: f64 = 300.0;

/// Says of every patch of a picture whether it looks real (PatchGAN, Isola et al. 2017): three convolutions that halve
/// the sides, and one that judges.
#[derive(Module, Debug)]
pub struct PatchDiscriminator<B: Backend> {
    convs: Vec<Conv2d<B>>,
    norms: Vec<GroupNorm<B>>,
    head: Conv2d<B>,
}

impl<B: Backend> PatchDiscriminator<B> {
    /// With 32, 64 and 128 channels.
    pub fn new(device: &B::Device) -> Self {
        let conv = |from, to| Conv2dConfig::new(from, to, 4).with_stride(2).with_padding(1).init(device);
        Self {
            convs: vec![conv(3, 32), conv(32, 64), conv(64, 128)],
            norms: [64, 128].map(|channels| GroupNormConfig::new(8, channels).init(device)).into(),
            head: Conv2dConfig::new(128, 1, 3).with_padding(1).init(device),
        }
    }
}

impl<B: DiffusionBackend> PatchDiscriminator<B> {
    /// Of pictures `[n, 3, h, w]` in [-1, 1]: the hidden layers, and one logit per patch `[n, 1, h / 8, w / 8]`,
    /// positive where it takes the patch for a real one.
    fn forward(&self, pixels: Tensor<B, 4>) -> (Vec<Tensor<B, 4>>, Tensor<B, 4>) {
        let mut hidden = vec![silu(self.convs[0].forward(pixels))];
        for (conv, norm) in self.convs[1..].iter().zip(&self.norms) {
            let last = hidden[hidden.len() - 1].clone();
            hidden.push(norm.forward_silu(conv.forward(last)));
        }
        let logits = self.head.forward(hidden[hidden.len() - 1].clone());
        (hidden, logits)
    }
}

/// The autoencoder, and who judges it.
#[derive(Module, Debug)]
pub struct JudgedAutoencoder<B: Backend> {
    /// What is wanted.
    pub vae: AutoencoderKl<B>,
    /// What it learns from.
    pub discriminator: PatchDiscriminator<B>,
}

impl<B: Backend> JudgedAutoencoder<B> {
    /// Whether the parameter at `path` learns: all but those of the encoder.
    pub fn learns(path: &str) -> bool {
        ["discriminator.", "vae.decoder.", "vae.post_quant_conv."].iter().any(|part| path.starts_with(part))
    }
}

/// Absolute error and error of the differences between neighbours as in
/// [`Reconstruction`](cxr::trainer::Reconstruction), the discriminator's opinion, and its features (Wang et al. 2018);
/// with it the discriminator's own hinge loss (Lim and Ye 2017), so that both learn in one step.
///
/// Neither learns from the other's loss: the decoder sees a frozen discriminator, the discriminator sees pictures
/// without a graph.
pub struct Sharpening<B: DiffusionAutodiff, I> {
    /// The pictures.
    pub images: I,
    /// Weight of the error of differences between neighbouring pixels.
    pub edges: f64,
    /// Weight of the discriminator's opinion.
    pub adversarial: f64,
    /// Weight of the difference of its hidden layers, per layer.
    pub features: f64,
    /// Where the tensors go.
    pub device: B::Device,
}

impl<B: DiffusionAutodiff, I: ReconstructionImages> Objective<B> for Sharpening<B, I> {
    type Model = JudgedAutoencoder<B>;

    fn len(&self) -> usize {
        self.images.len()
    }

    fn fingerprint(&self) -> String {
        let Self { images, edges, adversarial, features, .. } = self;
        format!("{} edges {edges} adversarial {adversarial} features {features}", images.fingerprint())
    }

    fn loss(&self, model: &Self::Model, samples: &[Sample], seed: u64) -> Tensor<B, 1> {
        let pixels = image_batch::<B, _>(&self.images, samples, seed, &self.device);
        let latents = posterior_sample(&model.vae.encode(pixels.clone()), samples, seed);
        let made = model.vae.decode(latents.detach());
        let likeness = absolute_error(made.clone().sub(pixels.clone()), self.edges);

        let step = samples.first().map_or(0.0, |s| s.position as f64 / samples.len() as f64);
        let rise = (step / RISE).min(1.0);
        let frozen = parameters::set_trainable(model.discriminator.clone(), |_| false);
        let (hidden, opinion) = frozen.forward(made.clone());
        let (real_hidden, _) = frozen.forward(pixels.clone());
        let opinion = opinion.mean().mul_scalar(-self.adversarial * rise);
        let layers = hidden.into_iter().zip(real_hidden).map(|(made, real)| (made - real).abs().mean());
        let features = layers.fold(opinion, |sum, layer| sum + layer.mul_scalar(self.features * rise));

        let (_, of_real) = model.discriminator.forward(pixels);
        let (_, of_made) = model.discriminator.forward(made.detach());
        let hinge = relu(of_real.neg().add_scalar(1.0)).mean().add(relu(of_made.add_scalar(1.0)).mean());
        likeness.add(features).add(hinge)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use burn::backend::Autodiff;
    use burn::module::ParamId;
    use burn::tensor::TensorData;
    use cxr::core::random::Stream;
    use cxr::kernels::Flex;
    use cxr::ldm::vae::AutoencoderKlConfig;
    use cxr::trainer::initialize;

    use super::*;
    use crate::demo::autoencoder::AutoencoderPictures;
    use crate::demo::{VAE_CONFIG, pictures};

    type B = Autodiff<Flex>;

    /// Gradients of the parameters that have four dimensions, by path.
    fn gradients(adversarial: f64, features: f64, position: u64) -> BTreeMap<String, TensorData> {
        let device = Default::default();
        let vae = AutoencoderKlConfig::from_json(VAE_CONFIG).expect("the embedded sizes").init::<B>(&device);
        let model = JudgedAutoencoder { vae, discriminator: PatchDiscriminator::new(&device) };
        let model = parameters::set_trainable(initialize(model, 3), JudgedAutoencoder::<B>::learns);
        let thumbnails = vec![pictures::procedural(&mut Stream::new(0, "test", 0)).pixels; 2];
        let objective = Sharpening {
            images: AutoencoderPictures { thumbnails, sharp: true },
            edges: 1.0,
            adversarial,
            features,
            device,
        };
        let samples = [Sample { index: 0, position }, Sample { index: 1, position: position + 1 }];
        let (loss, gradients) = objective.gradients(&model, &samples, 0);
        assert!(loss.is_finite());
        let convolutions = parameters::list(&model).into_iter().filter(|p| p.shape.len() == 4);
        convolutions
            .filter_map(|p| Some((p.path, gradients.get::<Flex, 4>(ParamId::from(p.id))?.into_data())))
            .collect()
    }

    fn part(gradients: &BTreeMap<String, TensorData>, name: &str) -> Vec<TensorData> {
        gradients.iter().filter(|(path, _)| path.starts_with(name)).map(|(_, data)| data.clone()).collect()
    }

    #[test]
    fn each_learns_from_its_own_loss_alone() {
        let (late, both) = (10_000, gradients(0.1, 0.5, 10_000));
        let (neither, at_first) = (gradients(0.0, 0.0, late), gradients(0.1, 0.5, 0));
        assert!(part(&both, "vae.encoder").is_empty());
        // What the decoder wants is nothing to the discriminator.
        assert_eq!(part(&both, "discriminator").len(), 4);
        assert_eq!(part(&both, "discriminator"), part(&neither, "discriminator"));
        // What the discriminator wants is nothing to the decoder, who hears its opinion all the same.
        let decoder = part(&both, "vae.decoder");
        assert!(!decoder.is_empty());
        assert_ne!(decoder, part(&neither, "vae.decoder"));
        // The opinion comes slowly.
        let without = gradients(0.0, 0.0, 0);
        assert_eq!(part(&at_first, "vae.decoder"), part(&without, "vae.decoder"));
    }
}
