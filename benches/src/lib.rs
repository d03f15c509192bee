//! The benches are in `benches/`, one file per unit of work.
