//! One radiograph in a DICOM file, as a display would show it.
//!
//! The library decodes; stored values become grey levels here, in 16 bits: modality rescale, then the first table or
//! window of interest (DICOM PS3.3 C.11.1 and C.11.2), then MONOCHROME1 turned round.

use std::io::Cursor;

use dicom_object::{FileDicomObject, InMemDicomObject, OpenFileOptions, Tag};
use dicom_pixeldata::{
    DecodedPixelData, PhotometricInterpretation, PixelDecoder, PixelRepresentation, PlanarConfiguration,
    Rescale, WindowLevelTransform,
};
use image::{DynamicImage, ImageBuffer};

const NUMBER_OF_FRAMES: Tag = Tag(0x0028, 0x0008);
const ROWS: Tag = Tag(0x0028, 0x0010);
const COLUMNS: Tag = Tag(0x0028, 0x0011);
const BITS_ALLOCATED: Tag = Tag(0x0028, 0x0100);
const BITS_STORED: Tag = Tag(0x0028, 0x0101);
const WHITE: f64 = 65535.0;

/// Decodes a file; `Err` says what it has that a radiograph has not, or what the decoder said.
pub(super) fn decode(bytes: &[u8]) -> Result<DynamicImage, String> {
    let object = OpenFileOptions::new()
        .from_reader(Cursor::new(bytes))
        .map_err(|error| format!("as DICOM: {}", chain(&error)))?;
    check(&object)?;
    let decoded = object.decode_pixel_data().map_err(|error| format!("as DICOM: {}", chain(&error)))?;
    let (columns, rows) = (decoded.columns(), decoded.rows());
    let image = match (decoded.samples_per_pixel(), decoded.photometric_interpretation()) {
        (1, PhotometricInterpretation::Monochrome1) => grey(&decoded, true)
            .map(|values| ImageBuffer::from_raw(columns, rows, values).map(DynamicImage::ImageLuma16)),
        (1, PhotometricInterpretation::Monochrome2) => grey(&decoded, false)
            .map(|values| ImageBuffer::from_raw(columns, rows, values).map(DynamicImage::ImageLuma16)),
        (3, PhotometricInterpretation::Rgb) if decoded.bits_allocated() == 8 => colour(&decoded)
            .map(|values| ImageBuffer::from_raw(columns, rows, values).map(DynamicImage::ImageRgb8)),
        (samples, kind) => Err(format!(
            "as DICOM: it has {samples} sample(s) of {} bits as {kind}; expected MONOCHROME1, MONOCHROME2 or 8-bit RGB",
            decoded.bits_allocated()
        )),
    }?;
    image.ok_or_else(|| format!("as DICOM: its pixel data are too short for {columns} x {rows}"))
}

/// Refuses before decoding what is no single radiograph, and what would ask for more memory than one needs.
fn check(object: &FileDicomObject<InMemDicomObject>) -> Result<(), String> {
    let number = |tag: Tag| object.get(tag).and_then(|element| element.to_int::<u32>().ok());
    match number(NUMBER_OF_FRAMES) {
        None | Some(1) => {}
        Some(frames) => {
            return Err(format!("it is DICOM with {frames} frames; export the one that is meant"));
        }
    }
    let (rows, columns) = (number(ROWS).unwrap_or(0), number(COLUMNS).unwrap_or(0));
    if rows == 0 || columns == 0 || u64::from(rows) * u64::from(columns) > 1 << 28 {
        return Err(format!("as DICOM: its size is {columns} x {rows}"));
    }
    match (number(BITS_ALLOCATED), number(BITS_STORED)) {
        (Some(allocated @ (8 | 16)), Some(stored)) if (1..=allocated).contains(&stored) => Ok(()),
        (allocated, stored) => Err(format!(
            "as DICOM: {} of {} bits per sample; expected 8 or 16, all or some of them stored",
            stored.unwrap_or(0),
            allocated.unwrap_or(0)
        )),
    }
}

/// Grey levels of all pixels; `inverted` where the smallest value is white.
fn grey(decoded: &DecodedPixelData<'_>, inverted: bool) -> Result<Vec<u16>, String> {
    let failed = |error: dicom_pixeldata::Error| format!("as DICOM: {}", chain(&error));
    let bits = u32::from(decoded.bits_stored());
    let signed = decoded.pixel_representation() == PixelRepresentation::Signed;
    let &Rescale { slope, intercept } =
        decoded.rescale().map_err(failed)?.first().ok_or("as DICOM: no rescale")?;
    // Bits above the stored ones may hold anything.
    let value = |raw: usize| {
        let raw = (raw & ((1 << bits) - 1)) as i32;
        let raw = if signed && raw >> (bits - 1) == 1 { raw - (1 << bits) } else { raw };
        f64::from(raw) * slope + intercept
    };
    let raw: Vec<u16> = if decoded.bits_allocated() == 8 {
        decoded.frame_data(0).map_err(failed)?.iter().map(|&byte| byte.into()).collect()
    } else {
        decoded.frame_data_ow(0).map_err(failed)?
    };

    let table = decoded.voi_lut_sequence().map_err(failed)?.and_then(|tables| tables.first());
    let window = decoded.window().map_err(failed)?.and_then(|windows| windows.first()).copied();
    let function = decoded.voi_lut_function().map_err(failed)?.and_then(|names| names.first()).copied();
    let level: Box<dyn Fn(f64) -> f64> = if let Some(table) = table.filter(|table| !table.data.is_empty()) {
        let top = table.data.iter().copied().max().unwrap_or(1).max(1);
        // Some devices declare more bits than the entries of their table use: white is the top of those in use.
        let used = u16::BITS - top.leading_zeros();
        let full = f64::from((1_u32 << used.max(1)) - 1);
        Box::new(move |value| {
            let place = (value.round() - f64::from(table.min_pixel_value)).max(0.0) as usize;
            f64::from(table.data[place.min(table.data.len() - 1)]) / full * WHITE
        })
    } else if let Some(window) = window {
        let transform = WindowLevelTransform::new(function.unwrap_or_default(), window);
        Box::new(move |value| transform.apply(value, WHITE))
    } else {
        let values = raw.iter().map(|&raw| value(raw.into()));
        let (low, high) =
            values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        let range = if high > low { high - low } else { 1.0 };
        Box::new(move |value| (value - low) / range * WHITE)
    };
    // Each stored value once, not each pixel.
    let levels: Vec<u16> = (0..1_usize << decoded.bits_allocated())
        .map(|raw| {
            let level = level(value(raw)).round().clamp(0.0, WHITE) as u16;
            if inverted { u16::MAX - level } else { level }
        })
        .collect();
    Ok(raw.into_iter().map(|raw| levels[usize::from(raw)]).collect())
}

/// Red, green and blue of all pixels, one after the other.
fn colour(decoded: &DecodedPixelData<'_>) -> Result<Vec<u8>, String> {
    let data = decoded.frame_data(0).map_err(|error| format!("as DICOM: {}", chain(&error)))?;
    if decoded.planar_configuration() == PlanarConfiguration::Standard {
        return Ok(data.to_vec());
    }
    let plane = data.len() / 3;
    Ok((0..plane).flat_map(|at| [data[at], data[plane + at], data[2 * plane + at]]).collect())
}

/// An error with its causes, which the library's own text leaves out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text += ": ";
        text += &inner.to_string();
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A DICOM file written by hand: explicit VR, little endian, not compressed.
    struct File(Vec<u8>);

    impl File {
        fn new() -> Self {
            let mut file = Self([&[0; 128][..], b"DICM"].concat());
            let mut meta = Self(Vec::new());
            meta.put(2, 1, b"OB", &[0, 1]).put(2, 2, b"UI", b"1.2.840.10008.5.1.4.1.1.1\0");
            meta.put(2, 3, b"UI", b"1.2\0").put(2, 0x10, b"UI", b"1.2.840.10008.1.2.1\0");
            file.put(2, 0, b"UL", &(meta.0.len() as u32).to_le_bytes());
            file.0.extend(meta.0);
            file
        }

        fn put(&mut self, group: u16, element: u16, kind: &[u8; 2], value: &[u8]) -> &mut Self {
            self.0.extend(group.to_le_bytes());
            self.0.extend(element.to_le_bytes());
            self.0.extend(kind);
            if matches!(kind, b"OB" | b"OW" | b"SQ") {
                self.0.extend([0, 0]);
                self.0.extend((value.len() as u32).to_le_bytes());
            } else {
                self.0.extend((value.len() as u16).to_le_bytes());
            }
            self.0.extend(value);
            self
        }

        fn short(&mut self, element: u16, value: u16) -> &mut Self {
            self.put(0x28, element, b"US", &value.to_le_bytes())
        }
    }

    /// A picture of one row: `kind` is even in length, `more` comes between the bits and the pixels.
    fn row(kind: &str, samples: u16, stored: u16, more: &[(u16, &[u8; 2], &str)], pixels: &[u8]) -> Vec<u8> {
        let allocated = if stored > 8 { 16 } else { 8 };
        let columns = pixels.len() as u16 / samples / (allocated / 8);
        let mut file = File::new();
        file.short(2, samples).put(0x28, 4, b"CS", kind.as_bytes());
        if samples == 3 {
            file.short(6, 0);
        }
        for (element, kind, text) in more.iter().filter(|(element, ..)| *element < 0x10) {
            file.put(0x28, *element, kind, text.as_bytes());
        }
        file.short(0x10, 1).short(0x11, columns).short(0x100, allocated).short(0x101, stored);
        file.short(0x102, stored - 1).short(0x103, 0);
        for (element, kind, text) in more.iter().filter(|(element, ..)| *element > 0x10) {
            file.put(0x28, *element, kind, text.as_bytes());
        }
        file.put(0x7fe0, 0x10, if allocated == 16 { b"OW" } else { b"OB" }, pixels);
        file.0
    }

    fn words(values: &[u16]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn greys(file: &[u8]) -> Vec<u16> {
        decode(file).unwrap().into_luma16().into_raw()
    }

    #[test]
    fn values_become_grey_levels_as_the_standard_says() {
        let values = words(&[0, 100, 200, 300, 4095, 0xf000]);
        // Without a window the range of the values is black to white; bits above the stored ones are no part of them.
        assert_eq!(greys(&row("MONOCHROME2 ", 1, 12, &[], &values)), [0, 1600, 3201, 4801, 65535, 0]);
        // C.11.2.1.2.1 with centre 200 and width 201: black up to 99.5, white above 299.5.
        let window: [(u16, &[u8; 2], &str); 2] = [(0x1050, b"DS", "200 "), (0x1051, b"DS", "201 ")];
        let windowed = greys(&row("MONOCHROME2 ", 1, 12, &window, &values));
        let level = |value: f64| (((value - 199.5) / 200.0 + 0.5) * WHITE).round() as u16;
        assert_eq!(windowed, [0, level(100.0), level(200.0), 65535, 65535, 0]);
        let inverted = greys(&row("MONOCHROME1 ", 1, 12, &window, &values));
        assert!(inverted.iter().zip(&windowed).all(|(a, b)| a + b == u16::MAX), "{inverted:?}");
        // The rescale comes before the window: half the values, so that 400 is the new 200.
        let rescaled = [window[0], window[1], (0x1052, b"DS", "0 "), (0x1053, b"DS", ".5")];
        let doubled = words(&[0, 200, 400, 600, 4095, 0]);
        assert_eq!(greys(&row("MONOCHROME2 ", 1, 12, &rescaled, &doubled)), windowed);
        // 8 bits, and colour.
        assert_eq!(greys(&row("MONOCHROME2 ", 1, 8, &[], &[10, 20, 30, 10])), [0, 32768, 65535, 0]);
        let rgb = decode(&row("RGB ", 3, 8, &[], &[1, 2, 3, 4, 5, 6])).unwrap();
        assert_eq!(rgb.into_rgb8().into_raw(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn what_is_no_single_radiograph_is_refused_by_name() {
        let pixels = words(&[1, 2, 3, 4]);
        let refused = |file: &[u8], words: &str| {
            let error = decode(file).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        refused(&row("MONOCHROME2 ", 1, 12, &[(8, b"IS", "2 ")], &pixels), "2 frames");
        refused(&row("PALETTE COLOR ", 1, 8, &[], &[1, 2]), "PALETTE COLOR");
        let whole = row("MONOCHROME2 ", 1, 12, &[], &pixels);
        decode(&whole).unwrap();
        for length in 132..whole.len() {
            assert!(decode(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
    }
}
