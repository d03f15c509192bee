//! The text encoder of Stable Diffusion 1.x on the two texts of a guided picture: the negative prompt and the prompt.

use burn::tensor::{Int, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::DiffusionAutodiff;
use cxr::ldm::text::ClipTextConfig;
use cxr_benches::{Cost, fill, on_device, unit};

struct Text<'a>(&'a mut Criterion);

impl Program for Text<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        let id = ["text", "encode/2x77"];
        unit::<B::InnerBackend, _, 3>(self.0, &device, id, Cost::Short, || {
            let model = fill(ClipTextConfig::sd15().init::<B::InnerBackend>(&device));
            let ids = Tensor::<B::InnerBackend, 1, Int>::arange(0..2 * 77, &device).reshape([2, 77]);
            move || model.forward(ids.clone())
        });
    }
}

fn text(criterion: &mut Criterion) {
    on_device(Text(criterion));
}

criterion_group!(benches, text);
criterion_main!(benches);
