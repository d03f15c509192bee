//! One step of the UNet of Stable Diffusion 1.x with guidance: two rows, one text each.
//!
//! 128 px is what small experiments and the training use, 512 px is what the model was made for; at 512 px attention
//! sees 4096 tokens and is a large part of the step, at 128 px it is next to nothing.

use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::DiffusionAutodiff;
use cxr::ldm::unet::UNetConfig;
use cxr_benches::{Cost, fill, normal, on_device, timesteps, unit};

struct Unet<'a>(&'a mut Criterion);

impl Program for Unet<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        let model = std::cell::OnceCell::new();
        for (pixels, cost) in [(128, Cost::Short), (512, Cost::Long)] {
            let id = ["unet", &format!("guided-step/{pixels}px")];
            unit::<B::InnerBackend, _, 4>(self.0, &device, id, cost, || {
                let model = model.get_or_init(|| fill(UNetConfig::sd15().init::<B::InnerBackend>(&device)));
                let context = model.prepare(normal([2, 77, 768], &device));
                let latents = normal([2, 4, pixels / 8, pixels / 8], &device);
                let timesteps = timesteps(&device);
                move || model.forward(latents.clone(), timesteps.clone(), &context)
            });
        }
    }
}

fn unet(criterion: &mut Criterion) {
    on_device(Unet(criterion));
}

criterion_group!(benches, unet);
criterion_main!(benches);
