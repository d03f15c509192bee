//! Pictures as torchxrayvision prepares them: `normalize`, `XRayCenterCrop`, `XRayResizer(size)`.

use crate::image::{ImageSize, Picture};

/// Grey values at `side` pixels `[side * side]` in [-1024, 1024]: the mean of the channels, the centre square, and
/// scikit-image's `resize` (order 1, mode `constant`, antialiased).
///
/// That resize takes everything beyond the picture for 0, which is mid-grey here, so that the outermost pixels
/// fade towards it; the weights were trained on such pictures.
pub fn centre_and_resize(picture: &Picture, side: usize) -> Vec<f32> {
    let ImageSize { width, height } = picture.size();
    let crop = width.min(height);
    let (left, top) = (width / 2 - crop / 2, height / 2 - crop / 2);
    let grey = picture.grey();
    let mut square = Vec::with_capacity(crop * crop);
    for row in grey.chunks_exact(width).skip(top).take(crop) {
        square.extend(row[left..left + crop].iter().map(|v| v * 1024.0));
    }
    resize(square, crop, side)
}

/// `skimage.transform.resize(x, (to, to), mode="constant", preserve_range=True)` on a square of f32.
fn resize(square: Vec<f32>, from: usize, to: usize) -> Vec<f32> {
    let (low, high) = square.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    let factor = from as f64 / to as f64;
    // Down the columns first, as scipy goes through the axes.
    let smooth = taps_of_gaussian((factor - 1.0) / 2.0);
    let mut pixels = square;
    if factor > 1.0 {
        pixels = columns(&pixels, from, &smooth);
        pixels = rows(&pixels, from, &smooth);
    }
    let taps = Linear::new(from, to);
    let mut out = Vec::with_capacity(to * to);
    for y in 0..to {
        for x in 0..to {
            let at = |(y, wy): (Option<usize>, f64), (x, wx): (Option<usize>, f64)| match (y, x) {
                (Some(y), Some(x)) => wy * wx * f64::from(pixels[y * from + x]),
                _ => 0.0,
            };
            let pairs = taps.0[y].iter().flat_map(|y| taps.0[x].iter().map(move |x| (*y, *x)));
            out.push(pairs.map(|(y, x)| at(y, x)).sum::<f64>() as f32);
        }
    }
    // scikit-image clips to the range of its input, widened by the 0 from outside where the output reaches it.
    let (lowest, highest) = out.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    let outside = !(low..=high).contains(&0.0) && lowest <= 0.0 && 0.0 <= highest;
    let (low, high) = if outside { (low.min(0.0), high.max(0.0)) } else { (low, high) };
    out.iter_mut().for_each(|v| *v = v.clamp(low, high));
    out
}

/// scipy's `gaussian_filter1d` kernel, cut off at four standard deviations.
fn taps_of_gaussian(sigma: f64) -> Vec<f64> {
    if sigma <= 0.0 {
        return vec![1.0];
    }
    let radius = (4.0 * sigma + 0.5) as i64;
    let weights: Vec<f64> =
        (-radius..=radius).map(|x| (-0.5 / (sigma * sigma) * (x * x) as f64).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Filters the rows of a square, with zeros beyond their ends.
fn rows(pixels: &[f32], side: usize, taps: &[f64]) -> Vec<f32> {
    let radius = taps.len() / 2;
    let filtered = |row: &[f32], x: usize| {
        let first = radius.saturating_sub(x);
        let last = taps.len().min(side + radius - x);
        (first..last).map(|t| taps[t] * f64::from(row[x + t - radius])).sum::<f64>() as f32
    };
    pixels.chunks_exact(side).flat_map(|row| (0..side).map(move |x| filtered(row, x))).collect()
}

fn columns(pixels: &[f32], side: usize, taps: &[f64]) -> Vec<f32> {
    transposed(&rows(&transposed(pixels, side), side, taps), side)
}

fn transposed(pixels: &[f32], side: usize) -> Vec<f32> {
    (0..side * side).map(|i| pixels[i % side * side + i / side]).collect()
}

/// For each output position the two input positions around it (none beyond the ends) and their weights.
struct Linear(Vec<[(Option<usize>, f64); 2]>);

impl Linear {
    fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        let taps = |i: usize| {
            let centre = (i as f64 + 0.5) * scale - 0.5;
            let part = centre - centre.floor();
            let position = |x: f64| (0.0..from as f64).contains(&x).then_some(x as usize);
            [(position(centre.floor()), 1.0 - part), (position(centre.floor() + 1.0), part)]
        };
        Self((0..to).map(taps).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scikit-image 0.26 on 1..=16 as a 4 x 4 square.
    #[test]
    fn resizing_is_scikit_images_with_its_fading_border() {
        let square: Vec<f32> = (1..=16).map(|v| v as f32).collect();
        let larger = resize(square.clone(), 4, 7);
        let first = [1.0, 1.0663265, 1.5153061, 1.9642857, 2.4132652, 2.8622448, 2.4693878];
        let last = [8.02551, 10.494898, 10.943877, 11.392858, 11.841837, 12.290816, 9.877551];
        for (found, expected) in larger[..7].iter().zip(first).chain(larger[42..].iter().zip(last)) {
            assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
        }
        let smaller = resize(square.clone(), 4, 2);
        for (found, expected) in smaller.iter().zip([3.5159247, 5.1555557, 10.074449, 11.71408]) {
            assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
        }
        assert_eq!(resize(square.clone(), 4, 4), square);
    }

    #[test]
    fn the_centre_is_cropped_and_spans_the_range() {
        let picture =
            Picture::new(ImageSize { width: 5, height: 2 }, 1, vec![9, 0, 255, 9, 9, 9, 255, 0, 9, 9])
                .unwrap();
        assert_eq!(centre_and_resize(&picture, 2), [-1024.0, 1024.0, 1024.0, -1024.0]);
    }
}
