//! Positions drawn from a named stream.

use cxr_core::random::Stream;

/// `k` different positions below `n`, in the order in which they were drawn.
///
/// # Panics
/// If `k` exceeds `n`.
pub(crate) fn choose(stream: &mut Stream, n: usize, k: usize) -> Vec<usize> {
    assert!(k <= n, "{k} positions out of {n}");
    let mut positions: Vec<usize> = (0..n).collect();
    for i in 0..k {
        let j = i + stream.below((n - i) as u64) as usize;
        positions.swap(i, j);
    }
    positions.truncate(k);
    positions
}

/// `n` positions below `n`, with replacement.
pub(crate) fn with_replacement(stream: &mut Stream, n: usize) -> Vec<usize> {
    (0..n).map(|_| stream.below(n as u64) as usize).collect()
}

/// How often each position below `n` was drawn, for those that were, in their order.
///
/// # Panics
/// If a position is not below `n`.
pub(crate) fn multiplicities(indices: &[usize], n: usize) -> Vec<(usize, f64)> {
    let mut counts = vec![0u32; n];
    for &index in indices {
        counts[index] += 1;
    }
    counts.iter().enumerate().filter(|(_, c)| **c > 0).map(|(i, c)| (i, f64::from(*c))).collect()
}
