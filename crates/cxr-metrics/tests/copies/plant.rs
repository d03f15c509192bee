//! Copies of a picture that are not byte for byte.

use cxr_core::random::Stream;
use cxr_metrics::Picture;

/// What a copy differs by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    /// Normal noise of 10 grey levels per pixel.
    Noise,
    /// 25 to 45 levels brighter or darker, cut off at black and white.
    Brightness,
    /// Two pixels in one of eight directions, black, the edge or the other side moving in.
    Shift,
    /// One pixel, which is half a cell of a thumbnail: the worst case between two views.
    OnePixel,
    /// Left and right exchanged.
    Flip,
}

impl Change {
    pub(crate) const ALL: [Self; 5] =
        [Self::Noise, Self::Brightness, Self::Shift, Self::OnePixel, Self::Flip];

    pub(crate) fn of(self, picture: &Picture, index: u64) -> Picture {
        let (width, height) = (picture.size().width as i32, picture.size().height as i32);
        let mut stream = Stream::new(11, &format!("{self:?}"), index);
        let at = |x: i32, y: i32| f32::from(picture.pixels()[(y * width + x) as usize * picture.channels()]);
        let sign = if stream.bernoulli(0.5) { 1.0 } else { -1.0 };
        let offset = sign * stream.range(25.0, 45.0);
        let directions = [(2, 0), (0, 2), (-2, 0), (0, -2), (2, 2), (2, -2), (-2, 2), (-2, -2)];
        let (right, down) = directions[stream.below(8) as usize];
        let border = stream.below(3);
        let mut value = |x: i32, y: i32| match self {
            Self::Noise => at(x, y) + 10.0 * stream.normal(),
            Self::Brightness => at(x, y) + offset,
            Self::Flip => at(width - 1 - x, y),
            Self::Shift | Self::OnePixel => {
                let pixels = if matches!(self, Self::Shift) { 1 } else { 2 };
                let (x, y) = (x - right / pixels, y - down / pixels);
                let inside = (0..width).contains(&x) && (0..height).contains(&y);
                match border {
                    _ if inside => at(x, y),
                    0 => 0.0,
                    1 => at(x.clamp(0, width - 1), y.clamp(0, height - 1)),
                    _ => at(x.rem_euclid(width), y.rem_euclid(height)),
                }
            }
        };
        let mut pixels = Vec::new();
        for y in 0..height {
            for x in 0..width {
                pixels.push(value(x, y).round().clamp(0.0, 255.0) as u8);
            }
        }
        Picture::new(picture.size(), 1, pixels).unwrap()
    }
}
