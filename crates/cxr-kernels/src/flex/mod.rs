//! Hand-written kernels for `Flex`, one file each.

use burn_flex::Flex;

use crate::DiffusionBackend;

impl DiffusionBackend for Flex {}
