//! Reading weights: the autoencoder of Stable Diffusion 1.x, 84 M parameters, in f32 from files of f32 and of f16, and all
//! of the embedded model. The files are in the system's cache after the first time: what is measured is reading, checking,
//! converting and hashing, not the disk.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cxr::device::Program;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::ldm::weights::{LoadOptions, ModelConfig, ModelFiles, SaveDtype, save_folder};
use cxr_benches::{fill_as, on_device};

/// The embedded model.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/model/cxr-demo-64");

struct Weights<'a>(&'a mut Criterion);

impl Program for Weights<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        weights::<B::InnerBackend>(self.0, &device);
    }
}

fn weights<B: DiffusionBackend>(criterion: &mut Criterion, device: &B::Device) {
    let mut group = criterion.benchmark_group("weights");
    group.sample_size(10);
    let locate = |path: &std::path::Path| {
        ModelFiles::locate(&path.to_path_buf().into(), &LoadOptions::default()).expect("the model is there")
    };
    group.bench_function("load/embedded", |bencher| {
        let files = locate(MODEL.as_ref());
        bencher.iter(|| files.load::<B>(&LoadOptions::default(), device).expect("it loads"));
    });
    for (name, dtype, bytes) in [("f32", SaveDtype::F32, 4), ("f16", SaveDtype::F16, 2)] {
        let mut made = None;
        group.throughput(Throughput::Bytes(83_653_863 * bytes));
        group.bench_function(format!("load/vae/from-{name}"), |bencher| {
            let (_, files) = made.get_or_insert_with(|| {
                let folder = tempfile::tempdir().expect("a folder");
                let model = folder.path().join("model");
                let mut config = ModelConfig::sd15();
                // not read here: a small one keeps the folder small
                config.unet.block_out_channels.fill(32);
                let parts = config.init::<B>(device).expect("published sizes");
                let vae = fill_as(parts.vae, burn::tensor::DType::F32);
                save_folder(&model, &config, &parts.text, &parts.unet, &vae, None, dtype).expect("room");
                (folder, locate(&model))
            });
            bencher.iter(|| files.load_vae::<B>(&LoadOptions::default(), device).expect("it loads"));
        });
    }
    group.finish();
}

fn load(criterion: &mut Criterion) {
    on_device(Weights(criterion));
}

criterion_group!(benches, load);
criterion_main!(benches);
