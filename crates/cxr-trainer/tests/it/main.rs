//! Training from outside, on small models, in one binary.

mod accumulation;
mod checkpoints;
mod common;
mod encode;
mod formulas;
mod lora;
mod losses;
mod resume;
mod toy;
mod watch;
