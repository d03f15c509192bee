//! The matrix product that the kernels here are built on, on one core: they are parallel outside of it.

use gemm::{Parallelism, gemm};

/// A matrix somewhere in memory: its first element, and the steps to the next row and column.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub(super) data: *const f32,
    pub(super) row: usize,
    pub(super) column: usize,
}

impl Matrix {
    /// Rows of `width` elements, one after another.
    pub(super) fn rows(data: &[f32], width: usize) -> Self {
        Self { data: data.as_ptr(), row: width, column: 1 }
    }

    /// Rows becomes columns.
    pub(super) fn transposed(self) -> Self {
        Self { data: self.data, row: self.column, column: self.row }
    }
}

/// `out = lhs @ rhs`, or `out += lhs @ rhs`; `out` `[m, n]` has rows `out_row` apart.
///
/// # Safety
/// `lhs` must hold `[m, k]`, `rhs` `[k, n]`, and `out` must be valid for writes of `[m, n]` at its steps, with
/// nothing else using those elements.
pub(super) unsafe fn product(
    [m, n, k]: [usize; 3],
    lhs: Matrix,
    rhs: Matrix,
    out: *mut f32,
    out_row: usize,
    accumulate: bool,
) {
    // SAFETY: the caller vouches for the extents.
    unsafe {
        gemm(
            m,
            n,
            k,
            out,
            1,
            out_row as isize,
            accumulate,
            lhs.data,
            lhs.column as isize,
            lhs.row as isize,
            rhs.data,
            rhs.column as isize,
            rhs.row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// A pointer that tasks may share: each writes elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: the kernels hand disjoint elements to their tasks, which is what `get`'s users state.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn new(data: &mut [f32]) -> Self {
        Self(data.as_mut_ptr())
    }

    /// The memory behind the elements of `data`, as much as it has capacity for; to be written before it is read.
    pub(super) fn spare(data: &mut Vec<f32>) -> Self {
        Self(data.spare_capacity_mut().as_mut_ptr().cast())
    }

    /// The address of element `offset`.
    ///
    /// # Safety
    /// `offset` must lie in the slice or memory that this was made from.
    pub(super) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}
