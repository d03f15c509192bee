//! Training from outside, on small models, in one binary.

mod accumulation;
mod blocks;
mod checkpoints;
mod common;
mod encode;
mod formulas;
mod lora;
mod losses;
mod ranks;
mod resume;
mod toy;
mod validation;
mod watch;
