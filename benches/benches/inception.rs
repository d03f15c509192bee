//! Features of InceptionV3, in images a second: the network alone, and with decoding and resizing, from files.
//!
//! `CXR_INCEPTION_WEIGHTS` names a weight file and `CXR_BENCH_IMAGES` a folder of PNG files; without them both are
//! made. `benches/inception.py` puts torch-fidelity's times beside these.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cxr::core::hash::stable_hash;
use cxr::core::progress::Silent;
use cxr::core::random::Stream;
use cxr::core::tensor_file::{RawTensor, write_safetensors};
use cxr::dataset::image::Decoded;
use cxr::device::Program;
use cxr::kernels::{DiffusionAutodiff, DiffusionBackend};
use cxr::metrics::inception::{INPUT_SIDE, InceptionExtractor, ResizeMode, layers};
use cxr::metrics::{FeatureExtractor, ImageSize, ImageSource, MetricsError, Picture};
use cxr_benches::{Cost, on_device, unit};

/// Images that are made where no folder is named, and their side.
const IMAGES: usize = 64;
const SIDE: usize = 128;

/// PNG files of a folder.
struct Files(Vec<PathBuf>);

impl Files {
    fn of(folder: &Path) -> Self {
        let entries = std::fs::read_dir(folder).expect("the folder can be read");
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "png"));
        files.sort();
        assert!(!files.is_empty(), "{}: no PNG files", folder.display());
        Self(files)
    }
}

impl ImageSource for Files {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn load(&self, index: usize) -> cxr::metrics::Result<Cow<'_, Picture>> {
        let name = self.0[index].display().to_string();
        let decoded = Decoded::open(&self.0[index])
            .map_err(|source| MetricsError::UnreadableImage { name, source: source.into() })?;
        let (width, height) = decoded.dimensions();
        let size = ImageSize { width: width as usize, height: height as usize };
        Ok(Cow::Owned(match decoded {
            Decoded::Grey8(grey) => Picture::new(size, 1, grey.into_raw())?,
            Decoded::Rgb8(rgb) => Picture::new(size, 3, rgb.into_raw())?,
            Decoded::Grey16(_) => panic!("8 bits are expected here"),
        }))
    }
}

/// Weights that keep the size of a signal: times do not depend on them.
fn weights(folder: &Path) -> PathBuf {
    if let Some(file) = std::env::var_os("CXR_INCEPTION_WEIGHTS") {
        return file.into();
    }
    let table = Stream::new(0, "weights", 0).normals(65_521);
    let mut tensors = Vec::new();
    for layer in layers() {
        let name = layer.name;
        let shape = vec![layer.output, layer.input, layer.kernel[0], layer.kernel[1]];
        let scale = (2.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
        let first = (stable_hash(name.as_bytes()) % 65_521) as usize;
        let values = table.iter().cycle().skip(first).take(shape.iter().product()).map(|v| v * scale);
        tensors.push((format!("{name}.conv.weight"), RawTensor::from_f32(shape, values.collect())));
        for (part, value) in [("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)] {
            let values = RawTensor::from_f32(vec![layer.output], vec![value; layer.output]);
            tensors.push((format!("{name}.bn.{part}"), values));
        }
    }
    let path = folder.join("inception.safetensors");
    write_safetensors(&path, &tensors, &Default::default()).expect("it can be written");
    path
}

struct Inception<'a>(&'a mut Criterion);

impl Program for Inception<'_> {
    type Output = ();

    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) {
        eprintln!("device: {name}");
        measure::<B::InnerBackend>(self.0, &device);
    }
}

fn measure<B: DiffusionBackend>(criterion: &mut Criterion, device: &B::Device) {
    let folder = tempfile::tempdir().expect("a folder for weights");
    let extractor = OnceCell::new();
    let extractor = || {
        extractor.get_or_init(|| {
            InceptionExtractor::<B>::load(&weights(folder.path()), ResizeMode::TorchFidelity, device)
                .expect("the weights are whole")
        })
    };
    for batch in [1, 16] {
        unit::<B, _, 2>(criterion, device, ["inception", &format!("network/{batch}")], Cost::Short, || {
            let extractor = extractor();
            let pixels = Stream::new(0, "pixels", 0).normals(batch * 3 * INPUT_SIDE * INPUT_SIDE);
            move || {
                let output = extractor.forward(pixels.clone()).expect("it runs");
                let shape = [batch, extractor.feature_dim()];
                Tensor::from_data(TensorData::new(output.features, shape), device)
            }
        });
    }
    let files = match std::env::var_os("CXR_BENCH_IMAGES") {
        Some(named) => Files::of(Path::new(&named)),
        None => Files::of(&made(folder.path())),
    };
    let mut group = criterion.benchmark_group("inception");
    group.sample_size(10).throughput(Throughput::Elements(files.len() as u64));
    group.bench_function(BenchmarkId::new("files", files.len()), |bencher| {
        let extractor = extractor();
        bencher.iter(|| extractor.features(&files, &Silent).expect("the files are whole"));
    });
    group.finish();
}

fn made(folder: &Path) -> PathBuf {
    for number in 0..IMAGES {
        let mut stream = Stream::new(0, "picture", number as u64);
        let pixels = (0..SIDE * SIDE).map(|i| ((i % SIDE + i / SIDE) as u64 / 2 + stream.below(100)) as u8);
        let picture =
            image::GrayImage::from_raw(SIDE as u32, SIDE as u32, pixels.collect()).expect("as many pixels");
        picture.save(folder.join(format!("{number:04}.png"))).expect("it can be written");
    }
    folder.to_path_buf()
}

fn inception(criterion: &mut Criterion) {
    on_device(Inception(criterion));
}

criterion_group!(benches, inception);
criterion_main!(benches);
