//! Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003): how alike pictures of one prompt are.
//!
//! Near 1 the model draws one picture over and over. Taken on grey values, as radiographs are; with three equal
//! channels this is what `pytorch-msssim` gives, whose windows and pools are followed.

use std::collections::BTreeMap;

use cxr_core::progress::{Progress, Stage};
use cxr_core::random::Stream;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::expect_size;
use crate::image::{ImageSize, ImageSource, Picture};
use crate::progress::advance;
use crate::resample::choose;

/// Weights of the five scales.
const WEIGHTS: [f64; 5] = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333];
/// Side of the window.
const WINDOW: usize = 11;
/// Its standard deviation in pixels.
const SIGMA: f64 = 1.5;
const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);

/// Scales that pictures of this size have: five from 161 pixels of the shorter side, four from 81, three from 41, two
/// from 21, one from 11; none below.
pub fn ms_ssim_scales(size: ImageSize) -> usize {
    let side = size.width.min(size.height);
    (0..WEIGHTS.len()).take_while(|scale| side > (WINDOW - 1) << scale).count()
}

/// MS-SSIM of two pictures of one size, in [0, 1], on their grey values in [0, 255]. With fewer than five scales
/// the first weights are used, brought to a sum of one.
///
/// # Errors
/// Pictures of different sizes, or of fewer than 11 pixels on a side.
pub fn ms_ssim(first: &Picture, second: &Picture) -> Result<f64> {
    if first.size() != second.size() {
        return Err(MetricsError::MixedSizes {
            index: 1,
            name: "the second of a pair".into(),
            expected: first.size().to_string(),
            found: second.size().to_string(),
        });
    }
    let scales = expect_scales(first.size())?;
    let (first, second) = (Plane::of(first), Plane::of(second));
    Ok(similarity(first, second, scales))
}

fn expect_scales(size: ImageSize) -> Result<usize> {
    match ms_ssim_scales(size) {
        0 => Err(MetricsError::InvalidParameter {
            name: "size",
            value: size.to_string(),
            expected: format!("at least {WINDOW} pixels on a side for MS-SSIM"),
        }),
        scales => Ok(scales),
    }
}

/// Similarity of pictures of one prompt, over prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptSimilarity {
    /// Mean over prompts of the mean over pairs; 1 is one picture over and over.
    pub mean: f64,
    /// The mean of each prompt with two pictures or more.
    pub per_prompt: Vec<f64>,
    /// Pairs that were compared.
    pub pairs: usize,
    /// Scales of the similarity.
    pub scales: usize,
}

/// MS-SSIM between pictures of the same prompt: of all pairs, or of `most_pairs` drawn from the stream (`seed`,
/// `ms-ssim`, number of the prompt in alphabetical order).
///
/// # Errors
/// Other numbers of prompts and pictures, no prompt with two pictures, pictures of different sizes or too small,
/// those of the source, cancellation.
pub fn prompt_similarity(
    images: &dyn ImageSource,
    prompts: &[String],
    most_pairs: usize,
    seed: u64,
    progress: &dyn Progress,
) -> Result<PromptSimilarity> {
    expect_size(|| "prompts of the pictures".into(), images.len(), prompts.len())?;
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, prompt) in prompts.iter().enumerate() {
        groups.entry(prompt).or_default().push(i);
    }
    let groups: Vec<Vec<usize>> = groups.into_values().filter(|group| group.len() > 1).collect();
    if groups.is_empty() || most_pairs == 0 {
        return Err(MetricsError::TooFewSamples {
            what: "every prompt (MS-SSIM compares pictures of one prompt)".into(),
            needed: 2,
            found: 1,
        });
    }
    let _shown = Stage::begin(progress, "MS-SSIM within prompts", Some(groups.len() as u64));
    let mut found = PromptSimilarity { mean: 0.0, per_prompt: Vec::new(), pairs: 0, scales: 0 };
    let mut size = None;
    for (number, group) in groups.iter().enumerate() {
        let mut pairs: Vec<(usize, usize)> =
            (0..group.len()).flat_map(|j| (0..j).map(move |i| (i, j))).collect();
        if pairs.len() > most_pairs {
            let mut stream = Stream::new(seed, "ms-ssim", number as u64);
            pairs = choose(&mut stream, pairs.len(), most_pairs).into_iter().map(|i| pairs[i]).collect();
        }
        let planes = group
            .par_iter()
            .map(|&i| images.load(i).map(|picture| (i, picture.size(), Plane::of(&picture))))
            .collect::<Result<Vec<_>>>()?;
        for (i, own, _) in &planes {
            let expected = *size.get_or_insert(*own);
            if *own != expected {
                return Err(MetricsError::MixedSizes {
                    index: *i,
                    name: images.name(*i),
                    expected: expected.to_string(),
                    found: own.to_string(),
                });
            }
            found.scales = expect_scales(*own)?;
        }
        let one =
            |(i, j): &(usize, usize)| similarity(planes[*i].2.clone(), planes[*j].2.clone(), found.scales);
        let values: Vec<f64> = pairs.par_iter().map(one).collect();
        found.pairs += values.len();
        found.per_prompt.push(values.iter().sum::<f64>() / values.len() as f64);
        advance(progress, "MS-SSIM within prompts", number + 1, groups.len())?;
    }
    found.mean = found.per_prompt.iter().sum::<f64>() / found.per_prompt.len() as f64;
    Ok(found)
}

/// Grey values in [0, 255].
#[derive(Clone)]
struct Plane {
    values: Vec<f64>,
    width: usize,
}

impl Plane {
    fn of(picture: &Picture) -> Self {
        let channels = picture.channels();
        let mean = |pixel: &[u8]| pixel.iter().map(|v| f64::from(*v)).sum::<f64>() / channels as f64;
        Self {
            values: picture.pixels().chunks_exact(channels).map(mean).collect(),
            width: picture.size().width,
        }
    }

    fn height(&self) -> usize {
        self.values.len() / self.width
    }

    fn times(&self, other: &Self) -> Self {
        let values = self.values.iter().zip(&other.values).map(|(a, b)| a * b).collect();
        Self { values, width: self.width }
    }

    /// Under the window, where it fits in whole.
    fn filtered(&self, window: &[f64; WINDOW]) -> Vec<f64> {
        let (width, out_width) = (self.width, self.width - (WINDOW - 1));
        let mut rows = Vec::with_capacity(out_width * self.height());
        for row in self.values.chunks_exact(width) {
            rows.extend(
                row.windows(WINDOW).map(|part| part.iter().zip(window).map(|(x, w)| x * w).sum::<f64>()),
            );
        }
        let out_height = self.height() - (WINDOW - 1);
        let mut out = vec![0.0; out_width * out_height];
        for (y, line) in out.chunks_exact_mut(out_width).enumerate() {
            for (row, w) in rows[y * out_width..].chunks_exact(out_width).zip(window) {
                line.iter_mut().zip(row).for_each(|(to, from)| *to += from * w);
            }
        }
        out
    }

    /// Means of 2x2; an odd side is padded by zeros that count, on both ends, as there.
    fn halved(&self) -> Self {
        let (width, height) = (self.width, self.height());
        let (odd_x, odd_y) = (width % 2, height % 2);
        let (out_width, out_height) = (width / 2 + odd_x, height / 2 + odd_y);
        let at = |y: usize, x: usize| {
            let inside = y >= odd_y && x >= odd_x && y - odd_y < height && x - odd_x < width;
            if inside { self.values[(y - odd_y) * width + x - odd_x] } else { 0.0 }
        };
        let mut values = Vec::with_capacity(out_width * out_height);
        for y in 0..out_height {
            for x in 0..out_width {
                let (y, x) = (2 * y, 2 * x);
                values.push((at(y, x) + at(y, x + 1) + at(y + 1, x) + at(y + 1, x + 1)) / 4.0);
            }
        }
        Self { values, width: out_width }
    }
}

fn similarity(mut first: Plane, mut second: Plane, scales: usize) -> f64 {
    let window = window();
    // The five weights as published add up to 1.0001, and are taken as they are.
    let total: f64 = if scales == WEIGHTS.len() { 1.0 } else { WEIGHTS[..scales].iter().sum() };
    let mut product = 1.0;
    for (scale, weight) in WEIGHTS[..scales].iter().enumerate() {
        let (structure, whole) = compare(&first, &second, &window);
        let value: f64 = if scale + 1 == scales { whole } else { structure };
        product *= value.max(0.0).powf(weight / total);
        if scale + 1 < scales {
            (first, second) = (first.halved(), second.halved());
        }
    }
    product
}

/// Mean of contrast times structure, and of all three terms.
fn compare(first: &Plane, second: &Plane, window: &[f64; WINDOW]) -> (f64, f64) {
    let [mean1, mean2] = [first, second].map(|plane| plane.filtered(window));
    let [square1, square2] = [first, second].map(|plane| plane.times(plane).filtered(window));
    let cross = first.times(second).filtered(window);
    let (mut structure, mut whole) = (0.0, 0.0);
    for i in 0..cross.len() {
        let (m1, m2) = (mean1[i], mean2[i]);
        let (v1, v2, both) = (square1[i] - m1 * m1, square2[i] - m2 * m2, cross[i] - m1 * m2);
        let cs = (2.0 * both + C2) / (v1 + v2 + C2);
        structure += cs;
        whole += (2.0 * m1 * m2 + C1) / (m1 * m1 + m2 * m2 + C1) * cs;
    }
    (structure / cross.len() as f64, whole / cross.len() as f64)
}

fn window() -> [f64; WINDOW] {
    let half = (WINDOW / 2) as f64;
    let weights = std::array::from_fn(|i| (-(i as f64 - half).powi(2) / (2.0 * SIGMA * SIGMA)).exp());
    let total: f64 = weights.iter().sum();
    weights.map(|w: f64| w / total)
}

#[cfg(test)]
mod tests {
    use cxr_core::progress::Silent;

    use super::*;

    fn picture(side: usize, seed: usize) -> Picture {
        let pixels = (0..side * side).map(|i| ((i * 7 + i / side * (13 + seed) + seed * i) % 256) as u8);
        Picture::new(ImageSize::square(side), 1, pixels.collect()).unwrap()
    }

    #[test]
    fn scales_follow_the_shorter_side() {
        let sides = [10, 11, 20, 21, 40, 41, 80, 81, 160, 161, 512];
        let scales = sides.map(|side| ms_ssim_scales(ImageSize { width: side, height: 999 }));
        assert_eq!(scales, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
    }

    #[test]
    fn a_picture_is_itself_and_prompts_are_compared_within() {
        assert!((ms_ssim(&picture(50, 3), &picture(50, 3)).unwrap() - 1.0).abs() < 1e-12);
        let images = vec![picture(24, 1), picture(24, 2), picture(24, 1), picture(24, 5)];
        let prompts = ["a", "b", "a", "c"].map(String::from);
        let found = prompt_similarity(&images, &prompts, 10, 0, &Silent).unwrap();
        assert_eq!((found.pairs, found.scales, found.per_prompt.len()), (1, 2, 1));
        assert!((found.mean - 1.0).abs() < 1e-12);
        let together = ["a", "a", "a", "a"].map(String::from);
        let all = prompt_similarity(&images, &together, 10, 0, &Silent).unwrap();
        assert_eq!(all.pairs, 6);
        assert!(all.mean < 0.9, "{}", all.mean);
        assert_eq!(prompt_similarity(&images, &together, 4, 0, &Silent).unwrap().pairs, 4);
    }

    #[test]
    fn bad_input_is_an_error() {
        assert!(ms_ssim(&picture(10, 1), &picture(10, 2)).is_err());
        assert!(matches!(ms_ssim(&picture(20, 1), &picture(21, 2)), Err(MetricsError::MixedSizes { .. })));
        let images = vec![picture(24, 1), picture(24, 2)];
        let apart = ["a", "b"].map(String::from);
        let error = prompt_similarity(&images, &apart, 10, 0, &Silent).unwrap_err();
        assert!(matches!(error, MetricsError::TooFewSamples { .. }), "{error}");
        assert!(prompt_similarity(&images, &apart[..1], 10, 0, &Silent).is_err());
    }
}
