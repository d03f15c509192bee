//! What the example programs share.

pub mod arguments;
pub mod backend;
pub mod demo;
pub mod evaluation;
pub mod exit;
pub mod finetune;
pub mod memory;
pub mod progress;
pub mod ranks;
pub mod report;
pub mod sheet;

/// Fresh pages cost convolutions more than their arithmetic: this allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
