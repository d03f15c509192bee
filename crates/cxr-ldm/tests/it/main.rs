//! Everything that needs more than one module, in one binary.

mod fixture;
mod gradients;
mod models;
mod scheduler;
mod text;
mod unet;
mod vae;
