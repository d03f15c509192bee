//! Convolutions and linear layers as one matrix product on the matrix units, whose left side is never unfolded in memory
//! (an implicit GEMM).
//!
//! A cube makes 128 rows (pixels of the result) of 64 or 128 columns (its channels). Its eight warps go along the terms
//! in stages of 64 bytes: numbers of the next stage are on their way from memory into registers while those of this one
//! are multiplied. Where results are too few for the device, several cubes share the terms of each, and a second kernel
//! adds up what they found.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::cubecl::cmma::MmaDefinition;
use burn_cubecl::cubecl::ir::{ElemType, FloatKind, StorageType};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::permute_nhwc_to_nchw;
use burn_cubecl::{CubeRuntime, cubecl, tensor::CubeTensor};

use super::layout::{empty, empty_of, in_rows, pixels, reshaped, units};
use super::mma::{self, LANES};

/// Vectors that a warp reads or writes at once.
const WARP: usize = LANES as usize;

/// Warps of a cube: four down, two across.
const WARPS: u32 = 8;

/// Rows of a cube.
const ROWS: usize = 128;

/// Columns of a cube, where they divide those of the result, and otherwise.
const WIDE: usize = 128;
const NARROW: usize = 64;

/// Vectors of 16 bytes of a row in a stage, and words of a vector.
const VECTORS: usize = 4;

/// Rows that the units of a cube read at once, a vector each.
const READ: usize = (LANES * WARPS) as usize / VECTORS;

/// The fewest stages of a cube that shares its results with others: the sum at the end must not cost more than it saves.
const FEWEST: usize = 16;

/// A vector of four words as what the matrix units take of one unit for a tile: the words of two rows in turns.
#[cube]
fn in_turns<W: Numeric, U: Numeric, N: Size>(
    upper: Vector<W, N>,
    lower: Vector<W, N>,
    #[comptime] from: usize,
) -> Vector<U, N> {
    let mut turns = Vector::<U, N>::empty();
    turns[0] = U::cast_from(upper[from]);
    turns[1] = U::cast_from(lower[from]);
    turns[2] = U::cast_from(upper[from + 1]);
    turns[3] = U::cast_from(lower[from + 1]);
    turns
}

/// `y[row, column]`, the sum over `side * side * channels` terms: `x` `[n, height, width, channels]` and `weight` `[columns,
/// side, side, channels]` in vectors of four words of 32 bits (`W`, and `U` in shared memory: two numbers in half precision
/// or one in TF32). A pixel has `channels` of them, `x_row` and `weight_row` from one to the next; `y` is in pairs. Cubes
/// of the third dimension have `share` stages each and write behind one another.
///
/// The products are NVIDIA's `mma`: with `g` the lane over four and `t` the rest, a unit gives the words `t` and `t + 4` of the
/// rows `g` and `g + 8`, and of the column `g`. In which order terms are added is free, as long as it is one for both
/// sides: a unit takes the four words of a vector, two for each of two products. So are rows: `g` and `g + 8` are two
/// that one unit reads, 64 apart, and brings into the order of registers before they are shared. Shared memory is read 16
/// bytes at a time then, a warp's beside each other, and nothing is moved between registers.
#[cube(launch_unchecked, address_type = "dynamic")]
fn gemm<W: Numeric, U: Numeric, H: Float, F: Float, O: Float, N: Size, Q: Size>(
    x: &Tensor<Vector<W, N>>,
    weight: &Tensor<Vector<W, N>>,
    bias: &Tensor<F>,
    y: &mut Tensor<Vector<O, Q>>,
    height: usize,
    width: usize,
    channels: usize,
    x_row: usize,
    weight_row: usize,
    out_height: usize,
    out_width: usize,
    rows: usize,
    columns: usize,
    share: usize,
    #[comptime] side: usize,
    #[comptime] stride: usize,
    #[comptime] spread: usize,
    #[comptime] padding: usize,
    #[comptime] tile: usize,
    #[comptime] pair: usize,
    #[comptime] biased: bool,
    #[define(W, U, H, F, O)] _types: [StorageType; 5],
) {
    let size!(P) = comptime!(pair);
    let weight_reads = comptime!(tile / READ);
    // columns of a warp, eight at a time
    let across = comptime!(tile / 2 / 8);
    let mut left = SharedMemory::<Vector<U, N>>::new(comptime!(2 * ROWS * VECTORS));
    let mut right = SharedMemory::<Vector<U, N>>::new(comptime!(2 * tile * VECTORS));

    let unit = UNIT_POS as usize;
    let (lane, warp) = (UNIT_POS_X as usize, UNIT_POS_Y as usize);
    let (g, t) = (lane / 4, lane % 4);
    let first_row = CUBE_POS_Y as usize * ROWS;
    let first_column = CUBE_POS_X as usize * tile;
    let (reader, vector) = (unit / VECTORS, unit % VECTORS);

    // where the pixels of this unit's rows begin
    let mut images = Array::<usize>::new(2usize);
    let mut tops = Array::<usize>::new(2usize);
    let mut lefts = Array::<usize>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        let row = first_row + reader + i * READ;
        let (rest, column) = (row / out_width, row % out_width);
        images[i] = rest / out_height * height;
        // below zero wraps, and is not less than the height then
        tops[i] = rest % out_height * stride - padding;
        lefts[i] = column * stride - padding;
        if row >= rows {
            tops[i] = height * spread;
        }
    }

    let mut sum = Array::<Vector<f32, Q>>::new(comptime!(4 * across));
    #[unroll]
    for i in 0..comptime!(4 * across) {
        sum[i] = Vector::new(0.0f32);
    }
    let product = MmaDefinition::<H, H, f32>::new(16usize, 8usize, comptime!(8 * pair));

    // All taps of a few channels before the next ones: pixels are read for every tap, and lie in the first cache meanwhile.
    let taps = comptime!(side * side);
    let first = CUBE_POS_Z as usize * share;
    let end = min(first + share, taps * channels.div_ceil(VECTORS));
    let mut tap = first % taps;
    let mut part = first / taps;
    let mut buffer = 0usize;
    let mut held = Array::<Vector<W, N>>::new(2usize);
    let mut weight_held = Array::<Vector<W, N>>::new(weight_reads);

    for stage in first..end + 1 {
        let channel = part * VECTORS + vector;
        let inside = stage < end && channel < channels;
        #[unroll]
        for i in 0..2usize {
            let (row, column) = (tops[i] + tap / side, lefts[i] + tap % side);
            let mut there = inside && row < height * spread && column < width * spread;
            if comptime!(spread > 1) {
                there = there && row % spread == 0 && column % spread == 0;
            }
            let mut found = Vector::<W, N>::new(W::from_int(0));
            if there {
                let pixel = (images[i] + row / spread) * width + column / spread;
                found = x[pixel * x_row + channel];
            }
            held[i] = found;
        }
        #[unroll]
        for i in 0..weight_reads {
            let column = first_column + reader + i * READ;
            let mut found = Vector::<W, N>::new(W::from_int(0));
            if inside && column < columns {
                found = weight[(column * taps + tap) * weight_row + channel];
            }
            weight_held[i] = found;
        }
        tap += 1;
        if tap == taps {
            tap = 0usize;
            part += 1;
        }

        // what the stage before brought
        if stage > first {
            let before = 1 - buffer;
            // two tiles of a warp, two products of a stage
            let left_at = before * comptime!(ROWS * VECTORS) + warp / 2 * comptime!(4 * WARP) + lane;
            let right_at =
                before * comptime!(tile * VECTORS) + warp % 2 * comptime!(tile / 2 * VECTORS) + lane;
            let mut a = Array::<Vector<U, N>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                a[i] = left[left_at + i * WARP];
            }
            #[unroll]
            for j in 0..across {
                let b = right[right_at + j * WARP];
                #[unroll]
                for i in 0..4usize {
                    let words = a[i];
                    let mut rows = Array::<Vector<H, P>>::new(4usize);
                    #[unroll]
                    for word in 0..4usize {
                        rows[word] = Vector::<H, P>::reinterpret(words[word]);
                    }
                    let mut column = Array::<Vector<H, P>>::new(2usize);
                    column[0] = Vector::<H, P>::reinterpret(b[comptime!(i % 2 * 2)]);
                    column[1] = Vector::<H, P>::reinterpret(b[comptime!(i % 2 * 2 + 1)]);
                    let at = comptime!((i / 2 * across + j) * 2);
                    let mut before = Array::<Vector<f32, Q>>::new(2usize);
                    before[0] = sum[at];
                    before[1] = sum[at + 1];
                    let found = product.execute(&rows, &column, &before);
                    sum[at] = found[0];
                    sum[at + 1] = found[1];
                }
            }
        }

        let left_at = buffer * comptime!(ROWS * VECTORS) + warp * comptime!(2 * WARP) + lane;
        left[left_at] = in_turns::<W, U, N>(held[0], held[1], 0usize);
        left[left_at + WARP] = in_turns::<W, U, N>(held[0], held[1], 2usize);
        #[unroll]
        for i in 0..weight_reads {
            right[buffer * comptime!(tile * VECTORS) + comptime!(i * READ * VECTORS) + unit] =
                Vector::cast_from(weight_held[i]);
        }
        buffer = 1 - buffer;
        sync_cube();
    }

    let origin = CUBE_POS_Z as usize * rows;
    #[unroll]
    for j in 0..across {
        let column = first_column + warp % 2 * comptime!(tile / 2) + j * 8 + 2 * t;
        if column < columns {
            let mut shift = Vector::<f32, Q>::new(0.0f32);
            if biased {
                shift[0] = f32::cast_from(bias[column]);
                shift[1] = f32::cast_from(bias[column + 1]);
            }
            #[unroll]
            for i in 0..4usize {
                let row = first_row + warp / 2 * 16 + comptime!(i / 2 * 8 + i % 2 * READ) + g;
                if row < rows {
                    let value = sum[comptime!((i / 2 * across + j) * 2 + i % 2)] + shift;
                    y[((origin + row) * columns + column) / 2] = Vector::cast_from(value);
                }
            }
        }
    }
}

/// The sum of what `shares` cubes found of each result, and the bias.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_shares<F: Float, N: Size>(
    found: &Tensor<Vector<f32, N>>,
    bias: &Tensor<Vector<F, N>>,
    y: &mut Tensor<Vector<F, N>>,
    count: usize,
    width: usize,
    shares: usize,
    #[comptime] biased: bool,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let mut sum = found[ABSOLUTE_POS];
    for share in 1..shares {
        sum += found[share * count + ABSOLUTE_POS];
    }
    if biased {
        sum += Vector::cast_from(bias[ABSOLUTE_POS % width]);
    }
    y[ABSOLUTE_POS] = Vector::cast_from(sum);
}

/// A square kernel: how it goes over an image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Steps {
    pub(super) side: usize,
    pub(super) stride: usize,
    /// Pixels from one of the image to the next, zeros between them: the stride of which this is the gradient.
    pub(super) spread: usize,
    pub(super) padding: usize,
}

/// What a word of a dtype is read and shared as, what the matrix units take it for, and the terms of a product; `None`
/// for what they do not take.
fn taken(dtype: DType) -> Option<([StorageType; 3], u32)> {
    let (word, tf32) = (DType::U32.into(), ElemType::Float(FloatKind::TF32).into());
    match dtype {
        DType::F16 | DType::BF16 => Some(([word, word, dtype.into()], 16)),
        DType::F32 => Some(([dtype.into(), tf32, tf32], 8)),
        _ => None,
    }
}

/// Among how many cubes to share the `stages` of each of `tiles`: two for each multiprocessor, if there is as much to do.
fn shares(tiles: usize, stages: usize, multiprocessors: usize) -> usize {
    (2 * multiprocessors / tiles).clamp(1, (stages / FEWEST).max(1))
}

/// Whether the kernel is made for a product of so many `rows` and `columns`, in the dtype and on the device of `x`;
/// `channels` are the terms, or those of one pixel.
pub(super) fn takes<R: CubeRuntime>(x: &CubeTensor<R>, rows: usize, channels: usize, columns: usize) -> bool {
    let Some(([_, _, number], k)) = taken(x.dtype) else { return false };
    let whole = channels.is_multiple_of(16 / x.dtype.size()) && columns.is_multiple_of(2);
    whole && rows * channels * columns > 0 && rows.div_ceil(ROWS) <= 65_535 && mma::is_there(x, number, k)
}

/// `x` `[rows, in]` by `weight` `[out, in]`, and `bias` `[out]`, where the kernel [`takes`] it: the convolution of one line of
/// pixels by a kernel of one.
pub(super) fn linear<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: Option<CubeTensor<R>>,
) -> CubeTensor<R> {
    let ([rows, width], [out, _]) = (x.shape().dims(), weight.shape().dims());
    let ((x, x_row), (weight, weight_row)) = (in_rows(x), in_rows(weight));
    let x = Pixels { x: reshaped(x, Shape::new([1, 1, rows, width])), row: x_row };
    let weight = Pixels { x: reshaped(weight, Shape::new([out, 1, 1, width])), row: weight_row };
    let y = of_pixels(&x, &weight, bias, Steps { side: 1, stride: 1, spread: 1, padding: 0 }, [1, rows]);
    reshaped(y, Shape::new([rows, out]))
}

/// `[n, h, w, c]`, pixels behind one another without gaps but for what lies behind the channels of each.
struct Pixels<R: CubeRuntime> {
    x: CubeTensor<R>,
    /// Numbers from one pixel to the next.
    row: usize,
}

impl<R: CubeRuntime> Pixels<R> {
    fn of(x: CubeTensor<R>) -> Self {
        let x = pixels(x);
        Self { row: x.meta.shape()[3], x }
    }
}

/// The convolution of `x` `[n, c, h, w]` by `weight` `[out, c, side, side]` as `[n, out, h', w']`, whose channels are last in
/// memory, where the kernel [`takes`] it.
pub(super) fn convolution<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    bias: Option<CubeTensor<R>>,
    steps: Steps,
    out: [usize; 2],
) -> CubeTensor<R> {
    permute_nhwc_to_nchw(of_pixels(&Pixels::of(x), &Pixels::of(weight), bias, steps, out))
}

/// `x` `[n, h, w, c]` and `weight` `[out, side, side, c]` to `[n, h', w', out]`, without gaps. Sums are in f32; f32 is taken
/// in TF32.
fn of_pixels<R: CubeRuntime>(
    Pixels { x, row: x_row }: &Pixels<R>,
    Pixels { x: weight, row: weight_row }: &Pixels<R>,
    bias: Option<CubeTensor<R>>,
    steps: Steps,
    [out_height, out_width]: [usize; 2],
) -> CubeTensor<R> {
    let Steps { side, stride, spread, padding } = steps;
    let ([n, height, width, c], [out, ..]) = (x.shape().dims(), weight.shape().dims::<4>());
    let rows = n * out_height * out_width;
    let ([word, shared, half], k) = taken(x.dtype).expect("a dtype that is taken");
    let vector = 16 / x.dtype.size();
    let tile = if out.is_multiple_of(WIDE) { WIDE } else { NARROW };
    let (down, across) = (rows.div_ceil(ROWS), out.div_ceil(tile));
    let bias = bias.map(into_contiguous);
    let y = empty(x, Shape::new([n, out_height, out_width, out]));
    let stages = side * side * (c / vector).div_ceil(VECTORS);
    let multiprocessors = x.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
    let share = stages.div_ceil(shares(down * across, stages, multiprocessors));
    let shares = stages.div_ceil(share);
    let found = match shares {
        1 => y.clone(),
        _ => empty_of(x, Shape::new([shares, rows, out]), DType::F32),
    };
    let any = bias.clone().unwrap_or_else(|| weight.clone());
    let address =
        x.required_address_type().max(weight.required_address_type()).max(found.required_address_type());
    // SAFETY: what lies beyond the image, the rows or the columns is neither read nor written
    unsafe {
        gemm::launch_unchecked::<R>(
            &x.client,
            CubeCount::Static(across as u32, down as u32, shares as u32),
            CubeDim::new_2d(LANES, WARPS),
            address,
            VECTORS,
            2,
            x.clone().into_tensor_arg(),
            weight.clone().into_tensor_arg(),
            any.clone().into_tensor_arg(),
            found.clone().into_tensor_arg(),
            height,
            width,
            c / vector,
            x_row / vector,
            weight_row / vector,
            out_height,
            out_width,
            rows,
            out,
            share,
            side,
            stride,
            spread,
            padding,
            tile,
            k as usize / 8,
            bias.is_some() && shares == 1,
            [word, shared, half, x.dtype.into(), found.dtype.into()],
        );
    }
    if shares > 1 {
        let vector = if out.is_multiple_of(4) { 4 } else { 2 };
        let count = rows * out / vector;
        let (cubes, dim) = units(count);
        // SAFETY: units beyond the last number end at once
        unsafe {
            sum_shares::launch_unchecked::<R>(
                &x.client,
                cubes,
                dim,
                address,
                vector,
                found.into_tensor_arg(),
                any.into_tensor_arg(),
                y.clone().into_tensor_arg(),
                count,
                out / vector,
                shares,
                bias.is_some(),
                x.dtype.into(),
            );
        }
    }
    y
}
