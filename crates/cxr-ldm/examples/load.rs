//! Loads a model on the CPU, and says how long that took and how much memory.
//!
//! usage: cargo run --release -p cxr-ldm --example load -- MODEL [f32|f16|bf16] [verify]
//!
//! MODEL is a folder in diffusers' layout, a single-file checkpoint or a repository's name.

use std::time::Instant;

use burn::tensor::FloatDType;
use cxr_kernels::Flex;
use cxr_kernels::nn::parameters;
use cxr_ldm::pipeline::{LoadOptions, StableDiffusion};

// what the project's programs have
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().expect("usage: load MODEL [f32|f16|bf16] [verify]");
    let (dtype, bytes) = match arguments.next().as_deref() {
        None | Some("f32") => (FloatDType::F32, 4),
        Some("f16") => (FloatDType::F16, 2),
        Some("bf16") => (FloatDType::BF16, 2),
        Some(other) => panic!("{other}: expected f32, f16 or bf16"),
    };
    let verify = arguments.next().is_some_and(|word| word == "verify");
    let options = LoadOptions::default().with_dtype(dtype).with_verify(verify);
    let start = Instant::now();
    let model = match StableDiffusion::<Flex>::load(model, options, &Default::default()) {
        Ok(model) => model,
        Err(error) => panic!("{error}"),
    };
    let seconds = start.elapsed().as_secs_f64();
    let parts = model.parts();
    let count = |(all, _): (usize, usize)| all as f64;
    let elements = count(parameters::count(&parts.text))
        + count(parameters::count(&parts.unet))
        + count(parameters::count(&parts.vae));
    let weights = elements * f64::from(bytes) / 1e9;
    println!("{dtype:?}: {seconds:.2} s for {weights:.3} GB of weights, hash {}", parts.hash);
    // Linux alone tells
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if let Some(peak) = status.lines().find_map(|line| line.strip_prefix("VmHWM:")) {
        let peak: f64 = peak.trim().trim_end_matches(" kB").parse().expect("a number of kB");
        let peak = peak * 1024.0 / 1e9;
        println!("peak of resident memory: {peak:.3} GB, {:.3} of the weights", peak / weights);
    }
}
