//! Pools of 3x3, by rows: the three rows under the window become one, and that one is taken at three shifts.
//!
//! burn's own goes through the window of every pixel with its bounds checked, which takes longer than the
//! convolutions around it.

use burn::tensor::{Shape, TensorMetadata};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::elementwise::{contiguous, slice, tensor};
use crate::Pool;

/// `x` `[n, c, h, w]`, f32.
pub(super) fn forward(x: FlexTensor, pool: Pool) -> FlexTensor {
    let x = contiguous(x);
    let [n, c, h, w] = x.shape().dims();
    let [out_h, out_w] = pool.output([h, w]);
    let mut out = vec![0.0_f32; n * c * out_h * out_w];
    let planes = slice(&x).par_chunks_exact((h * w).max(1));
    out.par_chunks_exact_mut((out_h * out_w).max(1)).zip(planes).for_each_init(
        Vec::new,
        |line, (out, plane)| match pool {
            Pool::MaxHalving => max_halving(plane, w, out, out_w, line),
            Pool::Max => same_size(plane, w, out, line, f32::max),
            Pool::Mean => {
                same_size(plane, w, out, line, |a, b| a + b);
                divide(out, w, h);
            }
        },
    );
    tensor(out, Shape::new([n, c, out_h, out_w]))
}

fn max_halving(plane: &[f32], w: usize, out: &mut [f32], out_w: usize, line: &mut Vec<f32>) {
    line.resize(w, 0.0);
    for (y, out) in out.chunks_exact_mut(out_w).enumerate() {
        let rows = &plane[2 * y * w..(2 * y + 3) * w];
        let (first, rest) = rows.split_at(w);
        let (second, third) = rest.split_at(w);
        for (((to, a), b), c) in line.iter_mut().zip(first).zip(second).zip(third) {
            *to = a.max(*b).max(*c);
        }
        for (x, to) in out.iter_mut().enumerate() {
            *to = line[2 * x].max(line[2 * x + 1]).max(line[2 * x + 2]);
        }
    }
}

/// Stride 1, what lies outside left out.
fn same_size(
    plane: &[f32],
    w: usize,
    out: &mut [f32],
    line: &mut Vec<f32>,
    join: impl Fn(f32, f32) -> f32 + Copy,
) {
    let h = plane.len() / w;
    for (y, out) in out.chunks_exact_mut(w).enumerate() {
        line.clear();
        line.extend_from_slice(&plane[y * w..(y + 1) * w]);
        let above = y.checked_sub(1);
        for row in above.into_iter().chain(Some(y + 1).filter(|row| *row < h)) {
            for (to, from) in line.iter_mut().zip(&plane[row * w..(row + 1) * w]) {
                *to = join(*to, *from);
            }
        }
        out.copy_from_slice(line);
        for (to, left) in out[1..].iter_mut().zip(line.iter()) {
            *to = join(*to, *left);
        }
        for (to, right) in out.iter_mut().zip(&line[1..]) {
            *to = join(*to, *right);
        }
    }
}

/// By how many pixels lay under the window.
fn divide(out: &mut [f32], w: usize, h: usize) {
    let inside = |i: usize, size: usize| (i + 2).min(size) - i.saturating_sub(1);
    for (y, row) in out.chunks_exact_mut(w).enumerate() {
        let rows = inside(y, h);
        let scale = 1.0 / (3 * rows) as f32;
        for (x, value) in row.iter_mut().enumerate() {
            let columns = inside(x, w);
            *value = if columns == 3 { *value * scale } else { *value / (rows * columns) as f32 };
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Tensor, TensorData};
    use burn_flex::Flex;

    use crate::{Pool, ops, plain};

    #[test]
    fn pools_are_burns_at_every_size() {
        for (h, w) in [(3, 3), (4, 7), (8, 8), (17, 17), (35, 9), (73, 73)] {
            let values: Vec<f32> =
                (0..2 * 3 * h * w).map(|i| ((i * 7919) % 1013) as f32 / 100.0 - 5.0).collect();
            let x = Tensor::<Flex, 4>::from_data(TensorData::new(values, [2, 3, h, w]), &Default::default());
            for pool in [Pool::MaxHalving, Pool::Max, Pool::Mean] {
                let found = ops::pool(x.clone(), pool).into_data();
                let expected = plain::pool::<Flex>(x.clone().into_primitive().tensor(), pool);
                let expected =
                    Tensor::<Flex, 4>::from_primitive(burn::tensor::TensorPrimitive::Float(expected))
                        .into_data();
                assert_eq!(found.shape, expected.shape, "{pool:?} of {h} x {w}");
                let pairs = found.iter::<f32>().zip(expected.iter::<f32>());
                for (found, expected) in pairs {
                    assert!((found - expected).abs() < 1e-5, "{pool:?} of {h} x {w}: {found}, {expected}");
                }
            }
        }
        // One row and one column, which have no neighbours.
        let x = Tensor::<Flex, 4>::from_floats([[[[1.0, -2.0, 6.0]]]], &Default::default());
        let mean = ops::pool(x, Pool::Mean).into_data().to_vec::<f32>().unwrap();
        assert!([-0.5, 5.0 / 3.0, 2.0].iter().zip(&mean).all(|(a, b)| (a - b).abs() < 1e-6), "{mean:?}");
    }
}
