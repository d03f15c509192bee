//! The backend is chosen here, once: from a name on a command line to a call of a generic program.

use std::fmt;
use std::str::FromStr;

use cxr_kernels::DiffusionAutodiff;

/// A program that runs on whichever backend was chosen.
///
/// `B` has gradients; `B::InnerBackend` is the same backend without.
pub trait Program {
    /// What it returns.
    type Output;

    /// Runs it; `name` says which device this is, for people.
    fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) -> Self::Output;
}

/// A device by name: `auto`, `flex` (or `cpu`), `cuda[:N]`, `wgpu[:N|:cpu|:integrated]`, `tch[:N]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceSpec {
    /// The best that is really there: CUDA, then a graphics adapter, then the CPU.
    #[default]
    Auto,
    /// The CPU, in pure Rust.
    Flex,
    /// NVIDIA GPU number N.
    Cuda(usize),
    /// A graphics adapter.
    Wgpu(Adapter),
    /// LibTorch: on the CPU, or on CUDA device N.
    Tch(Option<usize>),
}

/// Which graphics adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// Discrete GPU number N.
    Discrete(usize),
    /// The GPU of the processor.
    Integrated,
    /// A software driver.
    Cpu,
}

/// Why no device could be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The name is none.
    #[error("unknown device {name:?}: expected auto, flex, cuda[:N], wgpu[:N|:cpu|:integrated] or tch[:N]")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// This binary cannot.
    #[error("device {device} needs a binary built with --features {feature}; this one has: {built}")]
    NotBuilt {
        /// What was asked for.
        device: String,
        /// What to build with.
        feature: &'static str,
        /// What this one was built with.
        built: String,
    },
    /// This machine cannot.
    #[error("device {device} is not there: {reason}")]
    NotThere {
        /// What was asked for.
        device: String,
        /// What was looked for and not found.
        reason: String,
    },
}

impl FromStr for DeviceSpec {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        let unknown = || DeviceError::Unknown { name: name.to_string() };
        let (kind, which) = match name.split_once(':') {
            Some((kind, which)) => (kind, Some(which)),
            None => (name, None),
        };
        let number = |which: &str| which.parse::<usize>().map_err(|_| unknown());
        Ok(match (kind, which) {
            ("auto", None) => Self::Auto,
            ("flex" | "cpu", None) => Self::Flex,
            ("cuda", which) => Self::Cuda(which.map_or(Ok(0), number)?),
            ("wgpu" | "vulkan" | "metal", None) => Self::Wgpu(Adapter::Discrete(0)),
            ("wgpu" | "vulkan" | "metal", Some("cpu")) => Self::Wgpu(Adapter::Cpu),
            ("wgpu" | "vulkan" | "metal", Some("integrated")) => Self::Wgpu(Adapter::Integrated),
            ("wgpu" | "vulkan" | "metal", Some(which)) => Self::Wgpu(Adapter::Discrete(number(which)?)),
            ("tch", None) => Self::Tch(None),
            ("tch", Some(which)) => Self::Tch(Some(number(which)?)),
            _ => return Err(unknown()),
        })
    }
}

impl DeviceSpec {
    /// The device of one of several processes on a machine, `local_rank` from 0: that many further than this one, from
    /// the first again after the last. The CPU is the same for all, and `auto` is looked up first.
    ///
    /// A process that sees one GPU alone, as a cluster's scheduler may have it, gets that one.
    pub fn for_rank(self, local_rank: usize) -> Self {
        match self {
            Self::Auto if local_rank > 0 => match best() {
                Self::Auto => Self::Auto,
                found => found.for_rank(local_rank),
            },
            Self::Cuda(first) => Self::Cuda(further(first, local_rank, cuda_count())),
            Self::Wgpu(Adapter::Discrete(first)) => {
                Self::Wgpu(Adapter::Discrete(further(first, local_rank, discrete_count())))
            }
            Self::Tch(Some(first)) => Self::Tch(Some(first + local_rank)),
            other => other,
        }
    }
}

/// The device `steps` after `first`, of `count` where that is known.
fn further(first: usize, steps: usize, count: usize) -> usize {
    match count {
        0 => first + steps,
        count => (first + steps) % count,
    }
}

/// How many CUDA devices this process sees; 0 if that cannot be said.
fn cuda_count() -> usize {
    #[cfg(feature = "cuda")]
    return cuda_devices().unwrap_or(0);
    #[cfg(not(feature = "cuda"))]
    0
}

/// How many discrete adapters this process sees; 0 if that cannot be said.
fn discrete_count() -> usize {
    #[cfg(feature = "wgpu")]
    return adapters(Adapter::Discrete(0));
    #[cfg(not(feature = "wgpu"))]
    0
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Flex => f.write_str("flex"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Wgpu(Adapter::Discrete(n)) => write!(f, "wgpu:{n}"),
            Self::Wgpu(Adapter::Integrated) => f.write_str("wgpu:integrated"),
            Self::Wgpu(Adapter::Cpu) => f.write_str("wgpu:cpu"),
            Self::Tch(None) => f.write_str("tch"),
            Self::Tch(Some(n)) => write!(f, "tch:{n}"),
        }
    }
}

/// The backends that this build has, by burn's names.
pub fn built() -> Vec<&'static str> {
    [
        ("flex", cfg!(feature = "flex")),
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("wgpu", cfg!(all(feature = "wgpu", not(any(feature = "vulkan", feature = "metal"))))),
        ("tch", cfg!(feature = "tch")),
    ]
    .into_iter()
    .filter_map(|(name, there)| there.then_some(name))
    .collect()
}

/// Runs `program` on the device.
///
/// Drivers are looked for before burn touches them: burn panics where there is none.
///
/// # Errors
/// If this build has no such backend, or this machine no such device.
pub fn dispatch<P: Program>(device: DeviceSpec, program: P) -> Result<P::Output, DeviceError> {
    match device {
        DeviceSpec::Auto => dispatch(best(), program),
        DeviceSpec::Flex => flex(device, program),
        DeviceSpec::Cuda(index) => cuda(device, index, program),
        DeviceSpec::Wgpu(adapter) => wgpu_device(device, adapter, program),
        DeviceSpec::Tch(index) => tch(device, index, program),
    }
}

/// The best device that is there, without starting it.
pub fn best() -> DeviceSpec {
    #[cfg(feature = "cuda")]
    if cuda_devices().is_ok_and(|count| count > 0) {
        return DeviceSpec::Cuda(0);
    }
    #[cfg(feature = "wgpu")]
    for adapter in [Adapter::Discrete(0), Adapter::Integrated] {
        if adapters(adapter) > 0 {
            return DeviceSpec::Wgpu(adapter);
        }
    }
    if cfg!(not(feature = "flex")) && cfg!(feature = "tch") {
        return DeviceSpec::Tch(None);
    }
    DeviceSpec::Flex
}

#[allow(dead_code, reason = "each build lacks some backend, none lacks the same")]
fn not_built<T>(device: DeviceSpec, feature: &'static str) -> Result<T, DeviceError> {
    Err(DeviceError::NotBuilt { device: device.to_string(), feature, built: built().join(", ") })
}

#[cfg(feature = "flex")]
fn flex<P: Program>(_: DeviceSpec, program: P) -> Result<P::Output, DeviceError> {
    type B = burn::backend::Autodiff<cxr_kernels::Flex>;
    Ok(program.run::<B>(Default::default(), "flex (CPU)"))
}

#[cfg(not(feature = "flex"))]
fn flex<P: Program>(device: DeviceSpec, _: P) -> Result<P::Output, DeviceError> {
    not_built(device, "flex")
}

/// How many CUDA devices there are, or what is missing.
#[cfg(feature = "cuda")]
fn cuda_devices() -> Result<usize, String> {
    use cudarc::driver::{CudaContext, result, sys};
    // SAFETY: looks for the driver's library by name, as loading it would.
    if !unsafe { sys::is_culib_present() } {
        return Err("the CUDA driver library was not found".to_string());
    }
    result::init().map_err(|e| format!("the CUDA driver does not start: {e}"))?;
    CudaContext::device_count().map(|n| n.max(0) as usize).map_err(|e| e.to_string())
}

/// Where burn keeps what it finds out about a CUDA device: a folder of this card and driver in the user's cache. `None`
/// where the system names no such place.
#[cfg(feature = "cuda")]
fn tuning_folder(index: usize) -> Option<std::path::PathBuf> {
    use std::path::PathBuf;
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = set("XDG_CACHE_HOME")
        .or_else(|| set("LOCALAPPDATA"))
        .or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    let index = i32::try_from(index).ok()?;
    let name =
        cudarc::driver::result::device::get_name(cudarc::driver::result::device::get(index).ok()?).ok()?;
    let mut version = 0;
    // SAFETY: the driver writes one number where it is told to.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) }.result().ok()?;
    let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    Some(caches.join("cxr").join(format!("{name}-cuda-{version}")))
}

#[cfg(feature = "cuda")]
fn cuda<P: Program>(device: DeviceSpec, index: usize, program: P) -> Result<P::Output, DeviceError> {
    type B = burn::backend::Autodiff<burn::backend::Cuda<f32, i32>>;
    let not_there = |reason| DeviceError::NotThere { device: device.to_string(), reason };
    let count = cuda_devices().map_err(not_there)?;
    if index >= count {
        return Err(not_there(format!("there are {count} CUDA devices")));
    }
    if let Some(folder) = tuning_folder(index) {
        cxr_kernels::keep_tuning(&folder);
    }
    Ok(program.run::<B>(burn::backend::cuda::CudaDevice::new(index), &device.to_string()))
}

#[cfg(not(feature = "cuda"))]
fn cuda<P: Program>(device: DeviceSpec, _: usize, _: P) -> Result<P::Output, DeviceError> {
    not_built(device, "cuda")
}

/// How many adapters of this kind there are.
#[cfg(feature = "wgpu")]
fn adapters(adapter: Adapter) -> usize {
    let wanted = match adapter {
        Adapter::Discrete(_) => wgpu::DeviceType::DiscreteGpu,
        Adapter::Integrated => wgpu::DeviceType::IntegratedGpu,
        Adapter::Cpu => wgpu::DeviceType::Cpu,
    };
    let instance = wgpu::Instance::default();
    let found = block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    found.iter().filter(|found| found.get_info().device_type == wanted).count()
}

/// Waits for a future that never waits itself: enumerating adapters is asynchronous in browsers alone.
#[cfg(feature = "wgpu")]
fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        std::thread::yield_now();
    }
}

#[cfg(feature = "wgpu")]
fn wgpu_device<P: Program>(
    device: DeviceSpec,
    adapter: Adapter,
    program: P,
) -> Result<P::Output, DeviceError> {
    use burn::backend::wgpu::WgpuDevice;
    type B = burn::backend::Autodiff<burn::backend::Wgpu<f32, i32>>;
    let (wanted, target) = match adapter {
        Adapter::Discrete(index) => (index + 1, WgpuDevice::DiscreteGpu(index)),
        Adapter::Integrated => (1, WgpuDevice::IntegratedGpu(0)),
        Adapter::Cpu => (1, WgpuDevice::Cpu),
    };
    let count = adapters(adapter);
    if count < wanted {
        let reason = format!("{count} graphics adapters of this kind were found; is a driver installed?");
        return Err(DeviceError::NotThere { device: device.to_string(), reason });
    }
    Ok(program.run::<B>(target, &device.to_string()))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_device<P: Program>(device: DeviceSpec, _: Adapter, _: P) -> Result<P::Output, DeviceError> {
    not_built(device, "wgpu")
}

#[cfg(feature = "tch")]
fn tch<P: Program>(device: DeviceSpec, index: Option<usize>, program: P) -> Result<P::Output, DeviceError> {
    use burn::backend::libtorch::LibTorchDevice;
    type B = burn::backend::Autodiff<burn::backend::LibTorch<f32>>;
    let target = index.map_or(LibTorchDevice::Cpu, LibTorchDevice::Cuda);
    Ok(program.run::<B>(target, &device.to_string()))
}

#[cfg(not(feature = "tch"))]
fn tch<P: Program>(device: DeviceSpec, _: Option<usize>, _: P) -> Result<P::Output, DeviceError> {
    not_built(device, "tch")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in
            ["auto", "flex", "cuda:0", "cuda:3", "wgpu:1", "wgpu:cpu", "wgpu:integrated", "tch", "tch:2"]
        {
            assert_eq!(name.parse::<DeviceSpec>().unwrap().to_string(), name);
        }
        for name in ["", "gpu", "cuda:x", "flex:1", "auto:0", "wgpu:"] {
            let message = name.parse::<DeviceSpec>().unwrap_err().to_string();
            assert!(message.contains(&format!("{name:?}")), "{message}");
        }
    }

    #[test]
    fn each_process_on_a_machine_has_a_device_of_its_own() {
        assert_eq!([further(0, 3, 8), further(2, 7, 8), further(0, 5, 1), further(1, 2, 0)], [3, 1, 0, 3]);
        assert_eq!(DeviceSpec::Flex.for_rank(3), DeviceSpec::Flex);
        #[cfg(not(feature = "cuda"))]
        assert_eq!(DeviceSpec::Cuda(0).for_rank(3), DeviceSpec::Cuda(3));
        assert_eq!(DeviceSpec::Tch(Some(1)).for_rank(1), DeviceSpec::Tch(Some(2)));
        #[cfg(not(any(feature = "cuda", feature = "wgpu", feature = "tch")))]
        assert_eq!(DeviceSpec::Auto.for_rank(1), DeviceSpec::Flex);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_backend_that_was_not_built_says_how_to_build_it() {
        struct Nothing;
        impl Program for Nothing {
            type Output = ();
            fn run<B: DiffusionAutodiff>(self, _: B::Device, _: &str) {}
        }
        let message = dispatch(DeviceSpec::Cuda(0), Nothing).unwrap_err().to_string();
        assert!(message.contains("--features cuda") && message.contains(&built().join(", ")), "{message}");
    }
}
