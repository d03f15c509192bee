//! Everything that needs more than one module, in one binary.

mod fixture;
mod gradients;
mod lora;
mod models;
mod pipeline;
mod scheduler;
mod text;
mod unet;
mod vae;
mod weights;
