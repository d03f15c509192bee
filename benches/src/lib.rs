//! What the benches share: the device, weights and inputs without files, and how a unit of work is timed.
//!
//! Weights have the published sizes and values from a table of normal numbers: times do not depend on them, as long as
//! nothing overflows and nothing is zero.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use criterion::{Criterion, SamplingMode};
use cxr::core::hash::stable_hash;
use cxr::core::random::Stream;
use cxr::device::{Program, dispatch};
use cxr::kernels::{DiffusionBackend, nn::parameters, set_pack_memory};

/// Fresh pages cost convolutions more than their arithmetic: this allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How often a unit of [`Cost::Long`] runs; criterion wants ten samples, and gets these in turns.
const LONG_RUNS: usize = 3;

/// Normal numbers in the table; a prime, so that rows of a weight do not repeat.
const TABLE: usize = 65_521;

/// How long one run of a unit takes on a few cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// Below a second or two: ten samples or more.
    Short,
    /// Seconds to a minute: three runs.
    Long,
}

/// Runs `program` on the device that `CXR_BENCH_DEVICE` names; the best one that is there without it. `CXR_BENCH_PACK_MIB` is
/// what packed weights may take, in MiB.
pub fn on_device<P: Program<Output = ()>>(program: P) {
    if let Ok(mib) = std::env::var("CXR_BENCH_PACK_MIB") {
        set_pack_memory(
            mib.parse::<usize>().unwrap_or_else(|error| panic!("CXR_BENCH_PACK_MIB: {error}")) << 20,
        );
    }
    let device = std::env::var("CXR_BENCH_DEVICE").unwrap_or_else(|_| "auto".to_string());
    let device = device.parse().unwrap_or_else(|error| panic!("CXR_BENCH_DEVICE: {error}"));
    dispatch(device, program).unwrap_or_else(|error| panic!("{error}"));
}

/// The dtype of weights and inputs, from `CXR_BENCH_DTYPE`: `f32`, which it is without it, `bf16` or `f16`.
pub fn dtype() -> DType {
    match std::env::var("CXR_BENCH_DTYPE").as_deref() {
        Err(_) | Ok("f32") => DType::F32,
        Ok("bf16") => DType::BF16,
        Ok("f16") => DType::F16,
        Ok(other) => panic!("CXR_BENCH_DTYPE: {other:?} is none of f32, bf16, f16"),
    }
}

/// Times a unit of work called `group/id`; in half precision `bf16/group/id`, or `f16/group/id`.
///
/// `make` builds weights and inputs, outside of the time, and only if the filter on the command line asks for the unit.
/// What it returns is run once, to see that the result is finite and to warm up, and then timed until the device has
/// done its work.
pub fn unit<B, W, const D: usize>(
    criterion: &mut Criterion,
    device: &B::Device,
    [group, id]: [&str; 2],
    cost: Cost,
    make: impl FnOnce() -> W,
) where
    B: Backend,
    W: FnMut() -> Tensor<B, D>,
{
    let mut made = None;
    let mut make = Some(make);
    let (mut times, mut turn) = (Vec::new(), 0);
    let mut group = criterion.benchmark_group(match dtype() {
        DType::F32 => group.to_string(),
        half => format!("{}/{group}", half.name()),
    });
    // flat: as many runs in every sample, the shortest way to ten of them
    group.sampling_mode(SamplingMode::Flat).sample_size(10).warm_up_time(Duration::from_millis(1));
    group.measurement_time(Duration::from_secs(2));
    group.bench_function(id, |bencher| {
        let work = made.get_or_insert_with(|| {
            let mut work = make.take().expect("it is made once")();
            let values = work().into_data();
            assert!(values.iter::<f32>().all(f32::is_finite), "{id}: the result is not finite");
            work
        });
        let mut timed = || {
            let start = Instant::now();
            let result = work();
            assert!(B::sync(device).is_ok(), "the device failed");
            let time = start.elapsed();
            std::hint::black_box(result);
            time
        };
        match cost {
            Cost::Short => bencher.iter_custom(|runs| (0..runs).map(|_| timed()).sum()),
            Cost::Long => bencher.iter_custom(|runs| {
                let mut next = || {
                    if times.len() < LONG_RUNS {
                        times.push(timed());
                    }
                    turn += 1;
                    times[(turn - 1) % times.len()]
                };
                (0..runs).map(|_| next()).sum()
            }),
        }
    });
    group.finish();
}

/// Standard normal numbers of [`dtype`], the same in every run.
pub fn normal<B: Backend, const D: usize>(shape: [usize; D], device: &B::Device) -> Tensor<B, D> {
    let values = Stream::new(0, "bench", 0).normals(shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), (device, dtype()))
}

/// The timestep of the first of 50 steps, for a guided picture's two rows.
pub fn timesteps<B: Backend>(device: &B::Device) -> Tensor<B, 1> {
    Tensor::from_floats([981.0, 981.0], device)
}

/// Gives every matrix and kernel normal values that keep the size of a signal; norms and biases stay one and zero.
/// All of them are of [`dtype`] then.
pub fn fill<B: DiffusionBackend, M: Module<B>>(module: M) -> M {
    fill_as(module, dtype())
}

/// [`fill`], in a dtype of one's own.
pub fn fill_as<B: DiffusionBackend, M: Module<B>>(module: M, dtype: DType) -> M {
    let table = Stream::new(0, "weights", 0).normals(TABLE);
    let filled = parameters::map_data(module, |path, shape| -> Result<_, Infallible> {
        if shape.len() < 2 {
            return Ok(None);
        }
        let fan_in: usize = shape[1..].iter().product();
        let scale = (fan_in as f32).powf(-0.5);
        let scaled: Vec<f32> = table.iter().map(|value| scale * value).collect();
        let count: usize = shape.iter().product();
        let mut values = Vec::with_capacity(count);
        let first = (stable_hash(path.as_bytes()) % TABLE as u64) as usize;
        values.extend_from_slice(&scaled[first..(first + count).min(TABLE)]);
        while values.len() < count {
            let rest = (count - values.len()).min(TABLE);
            values.extend_from_slice(&scaled[..rest]);
        }
        Ok(Some(TensorData::new(values, shape.to_vec()).convert_dtype(dtype)))
    });
    let Ok(filled) = filled;
    parameters::arrange(filled.map(&mut Cast(dtype)))
}

/// Every parameter in one dtype.
struct Cast(DType);

impl<B: Backend> ModuleMapper<B> for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if param.val().dtype() == self.0 { param } else { param.map(|tensor| tensor.cast(self.0)) }
    }
}
