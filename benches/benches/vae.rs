//! The autoencoder of Stable Diffusion 1.x on one picture, in both directions.
//!
//! 128 px as in small experiments and training, 512 px as the model was made for.

use std::cell::OnceCell;

use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::DiffusionAutodiff;
use cxr::ldm::vae::AutoencoderKlConfig;
use cxr_benches::{Cost, fill, normal, on_device, unit};

struct Vae<'a>(&'a mut Criterion);

impl Program for Vae<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        let model = OnceCell::new();
        let model =
            || model.get_or_init(|| fill(AutoencoderKlConfig::sd15().init::<B::InnerBackend>(&device)));
        for (pixels, cost) in [(128, Cost::Short), (512, Cost::Long)] {
            let id = ["vae", &format!("encode/{pixels}px")];
            unit::<B::InnerBackend, _, 4>(self.0, &device, id, cost, || {
                let (model, picture) = (model(), normal([1, 3, pixels, pixels], &device));
                move || model.encode(picture.clone()).mean
            });
            let id = ["vae", &format!("decode/{pixels}px")];
            unit::<B::InnerBackend, _, 4>(self.0, &device, id, cost, || {
                let (model, latents) = (model(), normal([1, 4, pixels / 8, pixels / 8], &device));
                move || model.decode(latents.clone())
            });
        }
    }
}

fn vae(criterion: &mut Criterion) {
    on_device(Vae(criterion));
}

criterion_group!(benches, vae);
criterion_main!(benches);
