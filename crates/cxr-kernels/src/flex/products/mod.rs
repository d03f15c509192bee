//! Products of activations and weights as they are stored: of f32, and of half precision, whose weights and activations
//! are read in their two bytes. Sums are taken in f32, and a result is rounded once.
//!
//! | Dtype and processor | How |
//! |---|---|
//! | f32, on AVX-512, AVX2, NEON, or anything else | [`product`] by [`vectors`]: a layer's weights are turned into panels by registers, which for the few rows of a small picture costs a fraction of what a general product takes to bring them into order |
//! | bf16, AMX | [`product`] by [`tiles`]: sixteen rows by sixteen columns in one instruction |
//! | bf16, AVX-512 BF16 | [`product`] by [`vectors`]: pairs of bf16 are multiplied as they are, two at a time in each lane |
//! | other half precision | as f32, which it becomes on its way into panels, and rows a part at a time in the cache |
//! | f64 | burn's product |
//!
//! Every sum goes along the depth from its first element to its last, whatever the blocks and however many threads and
//! rows there are: a row of a batch has the bits that it has alone.

mod ahead;
mod attention;
mod attention_backward;
mod conv;
mod linear;
mod number;
mod product;
mod simd;
#[cfg(target_arch = "x86_64")]
mod softmax;
mod store;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod turned;
mod unfolded;
mod vectors;
mod weights;

pub(super) use attention::attention;
pub(super) use attention_backward::attention_backward;
pub(super) use conv::{conv2d, conv2d_x_backward};
pub(super) use linear::{linear, linear_x_backward};

use std::mem::MaybeUninit;

use burn::tensor::DType;

use self::simd::Simd as _;

/// Which instructions a product is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// f32, or what becomes it, on AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// On AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// On NEON.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// On any processor.
    Portable,
    /// bf16 on AMX.
    #[cfg(target_arch = "x86_64")]
    Tiles,
    /// bf16 on AVX-512 BF16.
    #[cfg(target_arch = "x86_64")]
    Pairs,
    /// Burn's.
    General,
}

impl Path {
    /// The one for `dtype` on this processor.
    fn of(dtype: DType) -> Self {
        match dtype {
            #[cfg(target_arch = "x86_64")]
            DType::BF16 if tiles::is_available() => Self::Tiles,
            #[cfg(target_arch = "x86_64")]
            DType::BF16 if number::has_bf16() => Self::Pairs,
            DType::F32 | DType::BF16 | DType::F16 => Self::of_f32(),
            _ => Self::General,
        }
    }

    /// The one for f32.
    fn of_f32() -> Self {
        #[cfg(target_arch = "x86_64")]
        if simd::Avx512::is_available() {
            return Self::Avx512;
        } else if simd::Avx2::is_available() {
            return Self::Avx2;
        }
        #[cfg(target_arch = "aarch64")]
        if simd::Neon::is_available() {
            return Self::Neon;
        }
        Self::Portable
    }

    /// Whether it multiplies half precision as it is.
    fn is_of_halves(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Tiles | Self::Pairs => true,
            _ => false,
        }
    }
}

/// Whether products of `dtype` are of numbers of half precision as they are.
pub(super) fn multiplies_halves(dtype: DType) -> bool {
    Path::of(dtype).is_of_halves()
}

/// Whether products of `dtype` are so fast that a convolution by its definition takes less time than Winograd's in f32, which
/// has a quarter of the products. Pairs of bf16 are no more than twice as fast as f32.
pub(super) fn outrun_winograd(dtype: DType) -> bool {
    match Path::of(dtype) {
        #[cfg(target_arch = "x86_64")]
        Path::Tiles => true,
        _ => false,
    }
}

/// Calls a function for the number of a dtype and the engine of a path; `None` for f64, which has none.
macro_rules! by_engine {
    (@ $engine:ty, $dtype:expr, $function:tt, $arguments:tt) => {
        match $dtype {
            burn::tensor::DType::F32 => by_engine!(# f32, $engine, $function, $arguments),
            burn::tensor::DType::BF16 => by_engine!(# burn::tensor::bf16, $engine, $function, $arguments),
            burn::tensor::DType::F16 => by_engine!(# burn::tensor::f16, $engine, $function, $arguments),
            dtype => unreachable!("{dtype:?} has no engine"),
        }
    };
    (# $number:ty, $engine:ty, [$($function:ident)::+], ($($argument:expr),*)) => {
        Some($($function)::+::<$number, $engine>($($argument),*))
    };
    ($path:expr, $dtype:expr, $($function:ident)::+ ($($argument:expr),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        use $crate::flex::products::{tiles::Tiles, vectors::Pairs};
        use $crate::flex::products::{Path, simd, vectors::Vectors};

        match $path {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => by_engine!(@ Vectors<simd::Avx512>, $dtype, [$($function)::+], ($($argument),*)),
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => by_engine!(@ Vectors<simd::Avx2>, $dtype, [$($function)::+], ($($argument),*)),
            #[cfg(target_arch = "aarch64")]
            Path::Neon => by_engine!(@ Vectors<simd::Neon>, $dtype, [$($function)::+], ($($argument),*)),
            Path::Portable => by_engine!(@ Vectors<simd::Portable>, $dtype, [$($function)::+], ($($argument),*)),
            #[cfg(target_arch = "x86_64")]
            Path::Tiles => by_engine!(# burn::tensor::bf16, Tiles, [$($function)::+], ($($argument),*)),
            #[cfg(target_arch = "x86_64")]
            Path::Pairs => by_engine!(# burn::tensor::bf16, Pairs, [$($function)::+], ($($argument),*)),
            Path::General => None,
        }
    }};
}
use by_engine;

/// `count` shared out evenly into blocks of a multiple of `unit`, `most` at most: the size of a block.
fn even_blocks(count: usize, most: usize, unit: usize) -> usize {
    let blocks = count.div_ceil(most).max(1);
    count.div_ceil(blocks).next_multiple_of(unit).max(unit)
}

/// Which operand of a product is a layer's weight: read from memory, and that once where a block has all of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weights {
    Rows,
    Columns,
}

/// The blocks of a result: rows and columns of each, multiples of `units`, and no more than `sums` in all. Weights are shared
/// out among threads first.
///
/// What is computed does not depend on them, so they may look at the number of threads.
fn blocks([rows, columns]: [usize; 2], sums: usize, units: [usize; 2], weights: Weights) -> [usize; 2] {
    const MOST_COLUMNS: usize = 384;
    /// Rows below which bringing the columns into order would cost too much beside multiplying them.
    const FEWEST_ROWS: usize = 96;

    let [row_unit, column_unit] = units;
    let mut width = even_blocks(columns, MOST_COLUMNS, column_unit);
    let mut height = even_blocks(rows, sums / width, row_unit);
    let tasks = |height, width| rows.div_ceil(height) * columns.div_ceil(width);
    while tasks(height, width) < 4 * rayon::current_num_threads() {
        if weights == Weights::Columns && width > column_unit {
            width = (width / 2).next_multiple_of(column_unit);
        } else if height >= 2 * FEWEST_ROWS {
            height = (height / 2).next_multiple_of(row_unit);
        } else if width > column_unit {
            width = (width / 2).next_multiple_of(column_unit);
        } else {
            break;
        }
    }
    [height, width]
}

/// Where results are written, by tasks that each have elements of their own.
struct Target<T>(*mut T);

impl<T> Clone for Target<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Target<T> {}

// SAFETY: tasks write disjoint elements, which is what the users of `at` state.
unsafe impl<T: Send> Send for Target<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Target<T> {}

impl<T> Target<T> {
    /// To be filled.
    fn new(data: &mut [MaybeUninit<T>]) -> Self {
        Self(data.as_mut_ptr().cast())
    }

    /// The address of element `offset`.
    ///
    /// # Safety
    /// It must lie in what this was made from.
    unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(offset) }
    }
}

#[cfg(test)]
mod tests;
