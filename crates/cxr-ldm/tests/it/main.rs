//! Everything that needs more than one module, in one binary.

mod checkpoint;
mod fixture;
mod gradients;
mod lcm;
mod lora;
mod models;
mod pipeline;
mod pipeline_reference;
mod scheduler;
mod text;
mod unet;
mod vae;
mod weights;
