//! From a picture to the network's input: three ways, which do not give the same FID.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::image::{ImageSize, Picture, resize_bicubic};

/// Side of the network's input.
pub const INPUT_SIDE: usize = 299;

/// How pictures are brought to 299x299 and to the network's range. A figure belongs to one of them: on pictures of
/// other sizes their FIDs differ by several units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResizeMode {
    /// As pytorch-fid: bilinear between pixel centres without antialiasing, on values in [0, 1], then `2 x - 1`.
    #[default]
    PytorchFid,
    /// As torch-fidelity: TensorFlow 1's bilinear, whose corner is the first pixel, on bytes, then `(x - 128) / 128`.
    TorchFidelity,
    /// As clean-fid: Pillow's bicubic with antialiasing on floats, cut to [0, 255], then `(x - 128) / 128`.
    Clean,
}

impl ResizeMode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PytorchFid, Self::TorchFidelity, Self::Clean];

    /// `pytorch-fid`, `torch-fidelity` or `clean`.
    pub fn name(self) -> &'static str {
        match self {
            Self::PytorchFid => "pytorch-fid",
            Self::TorchFidelity => "torch-fidelity",
            Self::Clean => "clean",
        }
    }

    /// The network's input `[3, 299, 299]` of a picture; a grey one becomes three equal channels.
    pub fn pixels(self, picture: &Picture) -> Vec<f32> {
        let channels = picture.channels();
        let mut out = Vec::with_capacity(3 * INPUT_SIDE * INPUT_SIDE);
        for channel in 0..channels {
            let values = picture.pixels().iter().skip(channel).step_by(channels);
            match self {
                Self::PytorchFid => {
                    let plane: Vec<f32> = values.map(|v| f32::from(*v) / 255.0).collect();
                    bilinear(&plane, picture.size(), Taps::between_centres, |x| 2.0 * x - 1.0, &mut out);
                }
                Self::TorchFidelity => {
                    let plane: Vec<f32> = values.map(|v| f32::from(*v)).collect();
                    bilinear(&plane, picture.size(), Taps::from_corner, |x| (x - 128.0) / 128.0, &mut out);
                }
                Self::Clean => {
                    let plane: Vec<f32> = values.map(|v| f32::from(*v)).collect();
                    let resized = resize_bicubic(&plane, picture.size(), ImageSize::square(INPUT_SIDE));
                    out.extend(resized.iter().map(|x| (x.clamp(0.0, 255.0) - 128.0) / 128.0));
                }
            }
        }
        if channels == 1 {
            out.extend_from_within(..);
            out.extend_from_within(..INPUT_SIDE * INPUT_SIDE);
        }
        out
    }
}

impl fmt::Display for ResizeMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ResizeMode {
    type Err = MetricsError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name).ok_or_else(|| MetricsError::InvalidParameter {
            name: "resize mode",
            value: name.into(),
            expected: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// The two input positions of each output position, and how much of the second there is.
struct Taps(Vec<(usize, usize, f32)>);

impl Taps {
    /// PyTorch's `interpolate(align_corners=False)`, in f32 as there.
    fn between_centres(from: usize) -> Self {
        let scale = from as f32 / INPUT_SIDE as f32;
        Self::at(from, |i| (scale * (i as f32 + 0.5) - 0.5).max(0.0))
    }

    /// TensorFlow 1's `resize_bilinear(align_corners=False)`.
    fn from_corner(from: usize) -> Self {
        let scale = (from as f64 / INPUT_SIDE as f64) as f32;
        Self::at(from, |i| i as f32 * scale)
    }

    fn at(from: usize, position: impl Fn(usize) -> f32) -> Self {
        let tap = |i| {
            let position = position(i);
            let low = (position as usize).min(from - 1);
            (low, (low + 1).min(from - 1), position - low as f32)
        };
        Self((0..INPUT_SIDE).map(tap).collect())
    }
}

fn bilinear(
    plane: &[f32],
    size: ImageSize,
    taps: fn(usize) -> Taps,
    range: impl Fn(f32) -> f32,
    out: &mut Vec<f32>,
) {
    let (across, down) = (taps(size.width), taps(size.height));
    let line = |y: usize| -> Vec<f32> {
        let row = &plane[y * size.width..(y + 1) * size.width];
        across.0.iter().map(|&(low, high, part)| row[low] + (row[high] - row[low]) * part).collect()
    };
    // Neighbouring rows of the result share those of the picture.
    let mut kept: [Option<(usize, Vec<f32>)>; 2] = [None, None];
    for &(low, high, part) in &down.0 {
        for (slot, y) in [low, high].into_iter().enumerate() {
            if kept[slot].as_ref().is_none_or(|(at, _)| *at != y) {
                let other = kept[1 - slot].as_ref().filter(|(at, _)| *at == y).map(|(_, line)| line.clone());
                kept[slot] = Some((y, other.unwrap_or_else(|| line(y))));
            }
        }
        if let [Some((_, above)), Some((_, below))] = &kept {
            out.extend(above.iter().zip(below).map(|(a, b)| range(a + (b - a) * part)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_refused_with_the_list() {
        for mode in ResizeMode::ALL {
            assert_eq!(mode.to_string().parse::<ResizeMode>().unwrap(), mode);
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.name());
        }
        let error = "lanczos".parse::<ResizeMode>().unwrap_err().to_string();
        assert!(error.contains("lanczos") && error.contains("torch-fidelity"), "{error}");
    }

    #[test]
    fn one_pixel_fills_the_picture_and_the_right_size_is_left_alone() {
        for mode in ResizeMode::ALL {
            let one = Picture::new(ImageSize::square(1), 1, vec![200]).unwrap();
            let pixels = mode.pixels(&one);
            assert_eq!(pixels.len(), 3 * INPUT_SIDE * INPUT_SIDE);
            let expected =
                if mode == ResizeMode::PytorchFid { 2.0 * (200.0 / 255.0) - 1.0 } else { 72.0 / 128.0 };
            assert!(pixels.iter().all(|p| (p - expected).abs() < 1e-6), "{mode}");
            let bytes: Vec<u8> = (0..3 * INPUT_SIDE * INPUT_SIDE).map(|i| (i * 7 % 256) as u8).collect();
            let own = Picture::new(ImageSize::square(INPUT_SIDE), 3, bytes.clone()).unwrap();
            let pixels = mode.pixels(&own);
            for (i, byte) in bytes.iter().enumerate().step_by(1001) {
                let place = i % 3 * INPUT_SIDE * INPUT_SIDE + i / 3;
                let byte = f32::from(*byte);
                let expected = match mode {
                    ResizeMode::PytorchFid => byte / 127.5 - 1.0,
                    _ => byte / 128.0 - 1.0,
                };
                assert!((pixels[place] - expected).abs() < 1e-5, "{mode} {i}");
            }
        }
    }
}
