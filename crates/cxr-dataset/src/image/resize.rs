use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3, U16};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};

use super::{Decoded, Filter, Fit, ImageOptions, Samples, Square};

/// Brings a decoded picture to a square; `Err` is the resizer's message.
pub(super) fn to_square(decoded: &Decoded, options: &ImageOptions) -> Result<Square, String> {
    let (width, height) = decoded.dimensions();
    let (to_width, to_height) = fitted(width, height, options);
    let plan = Plan { from: (width, height), to: (to_width, to_height), filter: options.filter };
    let place =
        |values: Vec<u8>| place(&values, to_width as usize, to_height as usize, options.size as usize);
    // Resizing works in the depth of the file, as PIL's does.
    let samples = match decoded {
        Decoded::Grey8(grey) => {
            let small = plan.bytes::<U8>(grey.as_raw())?;
            Samples::Grey8(place(small.pixels().iter().map(|p| p.0).collect()))
        }
        Decoded::Grey16(grey) => {
            let typed: Vec<U16> = grey.as_raw().iter().map(|&value| U16::new(value)).collect();
            let source = TypedImageRef::new(width, height, &typed).map_err(|error| error.to_string())?;
            let small: Vec<u16> = plan.run(&source)?.pixels().iter().map(|p| p.0).collect();
            Samples::Grey16(self::place(&small, to_width as usize, to_height as usize, options.size as usize))
        }
        Decoded::Rgb8(rgb) => {
            let small = plan.bytes::<U8x3>(rgb.as_raw())?;
            let plane = |channel: usize| place(small.pixels().iter().map(|p| p.0[channel]).collect());
            Samples::Rgb8((0..3).flat_map(plane).collect())
        }
    };
    Ok(Square { size: options.size, samples })
}

/// The size before cropping or padding. The long side of a crop is rounded down, as torchvision's `Resize` does.
fn fitted(width: u32, height: u32, options: &ImageOptions) -> (u32, u32) {
    let size = u64::from(options.size);
    let (w, h) = (u64::from(width), u64::from(height));
    let (short, long) = (w.min(h), w.max(h));
    let other = match options.fit {
        Fit::CentreCrop => size * long / short,
        Fit::PadToSquare => ((2 * size * short + long) / (2 * long)).max(1),
    };
    let other = u32::try_from(other).unwrap_or(u32::MAX);
    let wide_keeps_size = (w <= h) == (options.fit == Fit::CentreCrop);
    if wide_keeps_size { (options.size, other) } else { (other, options.size) }
}

/// Cuts the middle out of a plane, or sets the plane into the middle of black.
fn place<T: Copy + Default>(plane: &[T], width: usize, height: usize, size: usize) -> Vec<T> {
    // torchvision rounds the crop's offset half to even: round((length - size) / 2).
    let offset = |length: usize| {
        let spare = length.saturating_sub(size);
        spare / 2 + usize::from(spare % 4 == 3)
    };
    let (left, top) = (offset(width), offset(height));
    let (pad_left, pad_top) = (size.saturating_sub(width) / 2, size.saturating_sub(height) / 2);
    let mut out = vec![T::default(); size * size];
    let columns = width.min(size);
    for y in 0..height.min(size) {
        let from = (top + y) * width + left;
        let to = (pad_top + y) * size + pad_left;
        out[to..to + columns].copy_from_slice(&plane[from..from + columns]);
    }
    out
}

struct Plan {
    from: (u32, u32),
    to: (u32, u32),
    filter: Filter,
}

impl Plan {
    fn run<P: PixelTrait>(&self, source: &TypedImageRef<'_, P>) -> Result<TypedImage<'static, P>, String> {
        // A strip of a picture can ask for more memory than there is: refuse what no radiograph needs.
        if u64::from(self.to.0) * u64::from(self.to.1) > 1 << 28 {
            return Err(format!("it would become {} x {} pixels before cropping", self.to.0, self.to.1));
        }
        let mut target = TypedImage::new(self.to.0, self.to.1);
        let filter = match self.filter {
            Filter::Lanczos3 => FilterType::Lanczos3,
            Filter::CatmullRom => FilterType::CatmullRom,
            Filter::Bilinear => FilterType::Bilinear,
            Filter::Box => FilterType::Box,
        };
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
        Resizer::new()
            .resize_typed(source, &mut target, Some(&options))
            .map_err(|error| error.to_string())?;
        Ok(target)
    }

    fn bytes<P: PixelTrait>(&self, raw: &[u8]) -> Result<TypedImage<'static, P>, String> {
        let source =
            TypedImageRef::from_buffer(self.from.0, self.from.1, raw).map_err(|error| error.to_string())?;
        self.run(&source)
    }
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, ImageBuffer, Luma, Rgb, RgbImage};

    use super::*;

    fn to_square(decoded: &Decoded, options: &ImageOptions) -> Result<crate::Pixels, String> {
        super::to_square(decoded, options).map(|square| square.to_pixels())
    }

    fn options(size: u32, filter: Filter, fit: Fit) -> ImageOptions {
        ImageOptions { size, filter, fit }
    }

    #[test]
    fn the_same_size_is_the_same_picture() {
        let grey = GrayImage::from_fn(16, 16, |x, y| Luma([(x * 16 + y) as u8]));
        for filter in [Filter::Lanczos3, Filter::CatmullRom, Filter::Bilinear, Filter::Box] {
            for fit in [Fit::CentreCrop, Fit::PadToSquare] {
                let pixels = to_square(&Decoded::Grey8(grey.clone()), &options(16, filter, fit)).unwrap();
                assert_eq!(pixels.values.len(), 3 * 256);
                assert_eq!((pixels.values[0], pixels.values[255]), (-1.0, 1.0));
                let (red, rest) = pixels.values.split_at(256);
                assert_eq!((red, red), rest.split_at(256), "three equal channels");
                assert!(pixels.to_rgb().pixels().zip(grey.pixels()).all(|(a, b)| a.0 == [b.0[0]; 3]));
            }
        }
    }

    #[test]
    fn colour_keeps_its_planes_apart_and_16_bits_their_depth() {
        let rgb = RgbImage::from_pixel(8, 8, Rgb([255, 0, 51]));
        let pixels = to_square(&Decoded::Rgb8(rgb), &ImageOptions::new(4)).unwrap();
        let planes: Vec<f32> = pixels.values.chunks(16).map(|plane| plane[5]).collect();
        assert_eq!(planes[..2], [1.0, -1.0]);
        assert!((planes[2] + 0.6).abs() < 1e-6);

        let deep = ImageBuffer::from_pixel(8, 8, Luma([32_800_u16]));
        let pixels = to_square(&Decoded::Grey16(deep), &ImageOptions::new(4)).unwrap();
        assert!(pixels.values.iter().all(|v| (v - (32_800.0 / 65_535.0 * 2.0 - 1.0)).abs() < 1e-6));
    }

    #[test]
    fn fitted_sizes_are_torchvisions() {
        let crop = |w, h| fitted(w, h, &options(128, Filter::Lanczos3, Fit::CentreCrop));
        assert_eq!(crop(2496, 2048), (156, 128));
        assert_eq!(crop(2048, 2496), (128, 156));
        assert_eq!(crop(512, 362), (181, 128));
        assert_eq!(crop(64, 64), (128, 128));
        let pad = |w, h| fitted(w, h, &options(128, Filter::Lanczos3, Fit::PadToSquare));
        assert_eq!(pad(2496, 2048), (128, 105));
        assert_eq!(pad(2048, 2496), (105, 128));
        assert_eq!(pad(100_000, 3), (128, 1));
    }

    #[test]
    fn the_crop_is_the_middle_and_padding_is_black() {
        // Columns count 0 to 9; 4 rows.
        let grey = GrayImage::from_fn(10, 4, |x, _| Luma([x as u8 * 10]));
        let crop =
            to_square(&Decoded::Grey8(grey.clone()), &options(4, Filter::Box, Fit::CentreCrop)).unwrap();
        let row: Vec<u8> = (0..4).map(|x| crop.to_rgb().get_pixel(x, 0).0[0]).collect();
        assert_eq!(row, [30, 40, 50, 60]);

        let pad =
            to_square(&Decoded::Grey8(grey), &options(10, Filter::Box, Fit::PadToSquare)).unwrap().to_rgb();
        for y in 0..10 {
            let inside = (3..7).contains(&y);
            assert_eq!(pad.get_pixel(9, y).0[0], if inside { 90 } else { 0 }, "row {y}");
        }
    }

    #[test]
    fn crop_offsets_round_half_to_even() {
        for (spare, offset) in [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (7, 4), (28, 14)] {
            let plane: Vec<u8> = (1..=4 + spare).collect();
            let out = place(&plane, 4 + usize::from(spare), 1, 4);
            // The single row stands in the second of four.
            assert_eq!((out[0], out[4]), (0, offset + 1), "spare {spare}");
        }
    }

    #[test]
    fn reducing_averages_and_does_not_alias() {
        // Stripes of one pixel: a filter that skips pixels would return stripes or a flat black or white.
        let stripes = GrayImage::from_fn(256, 256, |x, _| Luma([if x % 2 == 0 { 0 } else { 255 }]));
        for filter in [Filter::Lanczos3, Filter::CatmullRom, Filter::Bilinear, Filter::Box] {
            let small =
                to_square(&Decoded::Grey8(stripes.clone()), &options(32, filter, Fit::CentreCrop)).unwrap();
            assert!(small.values.iter().all(|v| v.abs() < 0.05), "{filter:?}");
        }
    }

    #[test]
    fn a_strip_is_refused_instead_of_filling_memory() {
        let strip = Decoded::Grey8(GrayImage::new(70_000, 1));
        let error = to_square(&strip, &ImageOptions::new(512)).unwrap_err();
        assert!(error.contains("35840000 x 512"), "{error}");
    }
}
