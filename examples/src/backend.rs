//! The backend of an example program: chosen on its command line, named to the user.

use anyhow::Result;
use burn::tensor::FloatDType;
use cxr::device::{DeviceSpec, Program, built, dispatch};
use cxr::kernels::DiffusionAutodiff;

pub use crate::exit::exit;

/// `--device`, `--quiet` and `--verbose`, which every program has that computes.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    /// Device: `auto`, `flex` (CPU), `cuda[:N]`, `wgpu[:N|:cpu|:integrated]`, `tch[:N]`; what this binary was not
    /// built with is refused.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
    /// Show no progress; warnings and errors are shown all the same.
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Show what the libraries report; twice: everything.
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// `--quiet` and `--verbose` of a program without a device.
#[derive(Debug, Clone, clap::Args)]
pub struct Talk {
    /// Show no progress; warnings and errors are shown all the same.
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Show what the libraries report; twice: everything.
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// A program over any backend, which may fail.
pub trait Job {
    /// Does the work.
    ///
    /// # Errors
    /// Whatever goes wrong, for people to read.
    fn run<B: DiffusionAutodiff>(self, device: B::Device) -> Result<()>;
}

/// Runs `job` on the device that was asked for, and says which that is.
///
/// # Errors
/// If there is no such device, or the job fails.
pub fn run(args: &RunArgs, job: impl Job) -> Result<()> {
    struct Named<J>(J, bool);
    impl<J: Job> Program for Named<J> {
        type Output = Result<()>;

        fn run<B: DiffusionAutodiff>(self, device: B::Device, name: &str) -> Result<()> {
            if !self.1 {
                eprintln!("device: {name} (this binary has: {})", built().join(", "));
            }
            self.0.run::<B>(device)
        }
    }
    dispatch(args.device, Named(job, args.quiet))?
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeArg {
    /// Single precision.
    F32,
    /// Half precision, 11 bits.
    F16,
    /// Half precision with the range of single, 8 bits.
    Bf16,
}

impl DtypeArg {
    /// burn's.
    pub fn float(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::F16 => FloatDType::F16,
            Self::Bf16 => FloatDType::BF16,
        }
    }
}
