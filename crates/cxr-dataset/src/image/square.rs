use super::Pixels;

/// A picture that has been brought to size, in the depth of its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Square {
    /// Width and height.
    pub size: u32,
    /// `size * size` samples of grey, or three such planes.
    pub samples: Samples,
}

/// The samples of a [`Square`], row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Samples {
    /// One plane of 0 to 255.
    Grey8(Vec<u8>),
    /// One plane of 0 to 65535.
    Grey16(Vec<u16>),
    /// Three planes of 0 to 255: red, green, blue.
    Rgb8(Vec<u8>),
}

/// A code that no other kind of samples has; the first byte of a cached picture.
const GREY8: u8 = 1;
const GREY16: u8 = 2;
const RGB8: u8 = 3;

impl Square {
    /// How many values `[3, size, size]` has.
    pub fn values(&self) -> usize {
        3 * self.size as usize * self.size as usize
    }

    /// How many bytes the samples take.
    pub fn bytes(&self) -> usize {
        match &self.samples {
            Samples::Grey8(plane) => plane.len(),
            Samples::Grey16(plane) => 2 * plane.len(),
            Samples::Rgb8(planes) => planes.len(),
        }
    }

    /// `[3, size, size]` in [-1, 1]; grey becomes three equal planes.
    pub fn to_pixels(&self) -> Pixels {
        let mut values = vec![0.0; self.values()];
        self.write(&mut values);
        Pixels { values, size: self.size as usize }
    }

    /// [`Self::to_pixels`] into values at hand.
    ///
    /// # Panics
    /// When there are not [`Self::values`] of them.
    pub fn write(&self, values: &mut [f32]) {
        assert_eq!(values.len(), self.values(), "values of a picture of {0} x {0}", self.size);
        let plane = values.len() / 3;
        match &self.samples {
            Samples::Grey8(grey) => fill(values, grey.iter().map(|&value| unit(value.into(), 255.0))),
            Samples::Grey16(grey) => fill(values, grey.iter().map(|&value| unit(value.into(), 65535.0))),
            Samples::Rgb8(planes) => fill(values, planes.iter().map(|&value| unit(value.into(), 255.0))),
        }
        if !matches!(self.samples, Samples::Rgb8(_)) {
            values.copy_within(..plane, plane);
            values.copy_within(..plane, 2 * plane);
        }
    }

    /// Appends the picture as [`Self::from_bytes`] reads it: kind, size, samples, all little endian.
    pub(crate) fn append_bytes(&self, bytes: &mut Vec<u8>) {
        bytes.push(match self.samples {
            Samples::Grey8(_) => GREY8,
            Samples::Grey16(_) => GREY16,
            Samples::Rgb8(_) => RGB8,
        });
        bytes.extend(self.size.to_le_bytes());
        match &self.samples {
            Samples::Grey8(samples) | Samples::Rgb8(samples) => bytes.extend(samples),
            Samples::Grey16(samples) => bytes.extend(samples.iter().flat_map(|sample| sample.to_le_bytes())),
        }
    }

    /// `None` when the bytes are not a whole picture.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (&kind, rest) = bytes.split_first()?;
        let (size, samples) = rest.split_first_chunk::<4>()?;
        let size = u32::from_le_bytes(*size);
        let plane = (size as usize).checked_mul(size as usize)?;
        let (samples, expected) = match kind {
            GREY8 => (Samples::Grey8(samples.to_vec()), plane),
            GREY16 => {
                let (pairs, rest) = samples.as_chunks::<2>();
                let samples = pairs.iter().map(|&pair| u16::from_le_bytes(pair)).collect();
                rest.is_empty().then_some((Samples::Grey16(samples), plane.checked_mul(2)?))?
            }
            RGB8 => (Samples::Rgb8(samples.to_vec()), plane.checked_mul(3)?),
            _ => return None,
        };
        let square = Self { size, samples };
        (square.bytes() == expected).then_some(square)
    }
}

fn fill(values: &mut [f32], from: impl Iterator<Item = f32>) {
    values.iter_mut().zip(from).for_each(|(value, sample)| *value = sample);
}

/// `0..=full` to [-1, 1].
fn unit(value: f32, full: f32) -> f32 {
    value / full * 2.0 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squares() -> [Square; 3] {
        [
            Square { size: 2, samples: Samples::Grey8(vec![0, 255, 51, 204]) },
            Square { size: 2, samples: Samples::Grey16(vec![0, 65535, 256, 1]) },
            Square { size: 2, samples: Samples::Rgb8((0..12).map(|i| i * 20).collect()) },
        ]
    }

    #[test]
    fn bytes_come_back_and_anything_else_does_not() {
        for square in squares() {
            let mut bytes = Vec::new();
            square.append_bytes(&mut bytes);
            assert_eq!(Square::from_bytes(&bytes), Some(square));
            for end in 0..bytes.len() {
                assert_eq!(Square::from_bytes(&bytes[..end]), None, "{end} bytes");
            }
            assert_eq!(Square::from_bytes(&[&bytes[..], &[0]].concat()), None);
            for (place, value) in [(0, 9), (1, 3), (4, 255)] {
                let mut other = bytes.clone();
                other[place] = value;
                assert_eq!(Square::from_bytes(&other), None, "byte {place}");
            }
        }
    }

    #[test]
    fn grey_fills_three_planes_and_colour_its_own() {
        let [grey, deep, rgb] = squares().map(|square| square.to_pixels().values);
        assert_eq!((grey[0], grey[1]), (-1.0, 1.0));
        assert_eq!((&grey[..4], &grey[..4]), (&grey[4..8], &grey[8..]));
        assert!((deep[2] - (256.0 / 65535.0 * 2.0 - 1.0)).abs() < 1e-7);
        assert_eq!(rgb.len(), 12);
        assert!(
            rgb.iter().enumerate().all(|(i, v)| (v - (i as f32 * 20.0 / 255.0 * 2.0 - 1.0)).abs() < 1e-6)
        );
    }
}
