//! Real DICOM files where they are at hand; files made on the spot are tested beside the decoder.

#![cfg(feature = "dicom")]

mod common;

use common::shared;
use cxr_dataset::ImageOptions;
use cxr_dataset::image::{Decoded, load};

type Reference = (&'static str, (u32, u32), f64, [f64; 9]);

/// Size, tolerance, and means of nine fields in 16 bits from top left to bottom right: pydicom 3 took the code stream
/// out, Pillow decoded it (OpenJPEG; libjpeg), and the window of C.11.2.1.2.1 (or the range of the values) and the
/// inversion were done with NumPy.
const REFERENCE: [Reference; 2] = [
    (
        "RG1_J2KI.dcm",
        (1841, 1955),
        1.0,
        [42122.8, 46661.8, 41589.1, 48494.0, 51189.3, 47312.1, 55956.8, 57860.1, 53324.0],
    ),
    (
        "Fake_MONOHR1.dcm",
        (1024, 1024),
        // The JPEG decoders differ by a level of 8 bits here and there, and with it the range that becomes 0 to 65535.
        300.0,
        [30875.3, 27789.3, 31122.9, 25108.6, 21230.9, 23918.8, 22923.6, 8655.1, 25659.6],
    ),
];

/// As `numpy.array_split` divides: the first parts are one larger.
fn third(length: u32, part: u32) -> std::ops::Range<u32> {
    let at = |part: u32| part * (length / 3) + part.min(length % 3);
    at(part)..at(part + 1)
}

#[test]
fn real_files_look_as_other_programs_show_them() {
    let Some(folder) = shared("dicom") else { return };
    for (name, size, bar, expected) in REFERENCE {
        let path = folder.join(name);
        let Decoded::Grey16(found) = Decoded::open(&path).unwrap() else { panic!("{name} is grey") };
        assert_eq!(found.dimensions(), size, "{name}");
        for (field, expected) in expected.into_iter().enumerate() {
            let (rows, columns) = (third(size.1, field as u32 / 3), third(size.0, field as u32 % 3));
            let count = rows.len() * columns.len();
            let values = rows.flat_map(|y| columns.clone().map(move |x| (x, y)));
            let sum: f64 = values.map(|(x, y)| f64::from(found.get_pixel(x, y).0[0])).sum();
            let mean = sum / count as f64;
            assert!((mean - expected).abs() < bar, "{name}, field {field}: {mean}, expected {expected}");
        }
        let pixels = load(&path, &ImageOptions::new(64)).unwrap();
        assert_eq!(pixels.values.len(), 3 * 64 * 64);
    }
}

#[test]
fn real_files_that_are_cut_off_are_errors() {
    let Some(folder) = shared("dicom") else { return };
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("x.dcm");
    for (name, ..) in REFERENCE {
        let whole = std::fs::read(folder.join(name)).unwrap();
        for part in [200, 1000, whole.len() / 2] {
            std::fs::write(&path, &whole[..part]).unwrap();
            let error = Decoded::open(&path).unwrap_err().to_string();
            assert!(error.contains("x.dcm") && error.contains("DICOM"), "{name}, {part} bytes: {error}");
        }
    }
    std::fs::write(here.path().join("y.dcm"), format!("{}DICM and no more", "\0".repeat(128))).unwrap();
    assert!(Decoded::open(&here.path().join("y.dcm")).unwrap_err().to_string().contains("DICOM"));
}
