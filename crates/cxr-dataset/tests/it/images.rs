use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cxr_core::progress::{Progress, Silent};
use cxr_dataset::image::{Decoded, load};
use cxr_dataset::{DatasetError, ImageCache, ImageLoader, ImageOptions, OnProblem};
use image::{GrayImage, ImageEncoder, ImageFormat, Luma};

use super::{open, write, write_image};

/// A picture without symmetry: black but for one corner and one edge.
fn corner() -> GrayImage {
    GrayImage::from_fn(24, 16, |x, y| Luma([if x < 8 && y < 8 { 255 } else { 8 * x as u8 }]))
}

/// EXIF data with an orientation and nothing else.
fn exif(orientation: u8) -> Vec<u8> {
    let mut bytes = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    bytes.extend([orientation, 0, 0, 0, 0, 0, 0]);
    bytes
}

fn save(path: &Path, format: ImageFormat, orientation: u8) {
    let picture = corner();
    let mut bytes = Vec::new();
    let (w, h, kind) = (24, 16, image::ExtendedColorType::L8);
    if format == ImageFormat::Png {
        let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        encoder.set_exif_metadata(exif(orientation)).unwrap();
        encoder.write_image(picture.as_raw(), w, h, kind).unwrap();
    } else {
        let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 100);
        encoder.set_exif_metadata(exif(orientation)).unwrap();
        encoder.write_image(picture.as_raw(), w, h, kind).unwrap();
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn the_orientation_of_exif_is_honoured() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let upright = corner();
    use image::imageops::{flip_horizontal, rotate90, rotate180, rotate270};
    let expected = [
        (1, upright.clone()),
        (2, flip_horizontal(&upright)),
        (3, rotate180(&upright)),
        (4, flip_horizontal(&rotate180(&upright))),
        (5, flip_horizontal(&rotate90(&upright))),
        (6, rotate90(&upright)),
        (7, flip_horizontal(&rotate270(&upright))),
        (8, rotate270(&upright)),
        (99, upright.clone()),
    ];
    for format in [ImageFormat::Png, ImageFormat::Jpeg] {
        for (orientation, expected) in &expected {
            save(&path, format, *orientation);
            let Decoded::Grey8(found) = Decoded::open(&path).unwrap() else { panic!("grey") };
            assert_eq!(found.dimensions(), expected.dimensions(), "{format:?} {orientation}");
            let far = found.pixels().zip(expected.pixels()).map(|(a, b)| a.0[0].abs_diff(b.0[0])).max();
            // JPEG blurs the edge of the corner a little.
            let bar = if format == ImageFormat::Png { 0 } else { 40 };
            assert!(far <= Some(bar), "{format:?} {orientation}: {far:?}");
        }
    }
}

/// A PNG of few bits or with a palette, which the encoder of `image` does not write.
fn png(color: png::ColorType, depth: png::BitDepth, palette: &[u8], data: &[u8], width: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, 1);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if color == png::ColorType::Indexed {
        encoder.set_palette(palette.to_vec());
    }
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(data).unwrap();
    writer.finish().unwrap();
    bytes
}

#[test]
fn every_kind_of_png_is_read() {
    use png::{BitDepth, ColorType};
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("x.png");
    let read = |bytes: Vec<u8>| {
        std::fs::File::create(&path).unwrap().write_all(&bytes).unwrap();
        Decoded::open(&path).unwrap()
    };
    let grey =
        |values: &[u8]| Decoded::Grey8(GrayImage::from_raw(values.len() as u32, 1, values.to_vec()).unwrap());
    assert_eq!(
        read(png(ColorType::Grayscale, BitDepth::One, &[], &[0b1010_0000], 4)),
        grey(&[255, 0, 255, 0])
    );
    assert_eq!(
        read(png(ColorType::Grayscale, BitDepth::Two, &[], &[0b0001_1011], 4)),
        grey(&[0, 85, 170, 255])
    );
    assert_eq!(
        read(png(ColorType::Grayscale, BitDepth::Four, &[], &[0x0f, 0x30], 4)),
        grey(&[0, 255, 51, 0])
    );
    assert_eq!(read(png(ColorType::Grayscale, BitDepth::Eight, &[], &[1, 2, 3], 3)), grey(&[1, 2, 3]));
    let deep = read(png(ColorType::Grayscale, BitDepth::Sixteen, &[], &[0x12, 0x34, 0xff, 0xff], 2));
    let Decoded::Grey16(deep) = deep else { panic!("{deep:?}") };
    assert_eq!(deep.into_raw(), [0x1234, 0xffff]);
    // A palette of greys is grey, one of colours is not.
    let greys = [7, 7, 7, 200, 200, 200];
    assert_eq!(read(png(ColorType::Indexed, BitDepth::Eight, &greys, &[0, 1, 1], 3)), grey(&[7, 200, 200]));
    let colours = [7, 8, 9, 200, 100, 50];
    let found = read(png(ColorType::Indexed, BitDepth::One, &colours, &[0b0100_0000], 2));
    let Decoded::Rgb8(found) = found else { panic!("{found:?}") };
    assert_eq!(found.into_raw(), colours);
    let found = read(png(ColorType::Rgb, BitDepth::Sixteen, &[], &[0x10, 0, 0x20, 0, 0x30, 0], 1));
    assert!(matches!(found, Decoded::Rgb8(_)), "{found:?}");
    assert_eq!(load(&path, &ImageOptions::new(1)).unwrap().values.len(), 3);
}

#[test]
fn a_small_file_cannot_ask_for_much_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    let mut bytes = png(png::ColorType::Grayscale, png::BitDepth::Eight, &[], &[1; 9], 9);
    // Width and height of the header, with its check sum: 60,000 x 60,000.
    bytes[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let sum = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&sum.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = Decoded::open(&path).unwrap_err().to_string();
    assert!(error.contains("x.png") && error.to_lowercase().contains("limit"), "{error}");
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 * (sum & 1)))
    })
}

fn folder_of(n: u8) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut table = "file_name,text\n".to_string();
    for i in 0..n {
        write_image(folder.path(), &format!("{i}.png"), i);
        table += &format!("{i}.png,Text.\n");
    }
    write(folder.path(), "metadata.csv", &table);
    folder
}

#[test]
fn all_images_are_loaded_once_and_bad_ones_named_or_counted() {
    let folder = folder_of(9);
    let cache = || Arc::new(ImageCache::on_disk(folder.path().join("cache")).unwrap());
    let first = cache();
    let images = ImageLoader::new(ImageOptions::new(8)).with_cache(first.clone());
    let mut all = open(folder.path()).unwrap();
    for kept in [0, 9] {
        all.load_images(&images, OnProblem::Stop, &Silent).unwrap();
        assert_eq!((first.counts().kept, first.counts().made), (kept, 9));
    }

    write(folder.path(), "3.png", "no picture");
    write(folder.path(), "7.png", "");
    for images in [&images, &ImageLoader::new(ImageOptions::new(8))] {
        let mut all = open(folder.path()).map_or_else(
            |_| {
                let options =
                    cxr_dataset::ReadOptions { images: cxr_dataset::ImageCheck::None, ..Default::default() };
                cxr_dataset::Collection::open(folder.path(), &options).unwrap()
            },
            |_| panic!("the empty file was not noticed"),
        );
        let error = all.load_images(images, OnProblem::Stop, &Silent).unwrap_err().to_string();
        assert!(error.contains("row 5 of") && error.contains("3.png"), "{error}");
        assert_eq!(all.len(), 9, "an error leaves the collection as it was");
        all.load_images(images, OnProblem::Skip, &Silent).unwrap();
        let kinds: Vec<_> = all.skipped.iter().map(|row| row.kind.as_str()).collect();
        assert_eq!((all.len(), kinds), (7, vec!["undecodable image", "empty image"]));
        assert!(all.skipped[1].message.contains("row 9 of"), "{:?}", all.skipped);
    }

    // Without its folder the cache is of no use for any row.
    std::fs::remove_dir_all(folder.path().join("cache")).unwrap();
    let images = ImageLoader::new(ImageOptions::new(9)).with_cache(cache());
    std::fs::remove_dir_all(folder.path().join("cache")).unwrap();
    write(folder.path(), "cache", "in the way");
    let error = all.load_images(&images, OnProblem::Skip, &Silent).unwrap_err();
    assert_eq!(error.kind(), "unusable cache", "{error}");
}

#[test]
fn a_stop_is_heard_and_an_empty_rest_is_an_error() {
    struct After(u64);
    impl Progress for After {
        fn advance(&self, done: u64, _: &str) -> ControlFlow<()> {
            if done == self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
    let folder = folder_of(9);
    let mut all = open(folder.path()).unwrap();
    let images = ImageLoader::new(ImageOptions::new(8));
    let error = all.load_images(&images, OnProblem::Stop, &After(4)).unwrap_err();
    assert!(matches!(error, DatasetError::Stopped { done: 4, total: 9 }), "{error}");
    all.load_images(&images, OnProblem::Stop, &After(99)).unwrap();
    for i in 0..9 {
        write(folder.path(), &format!("{i}.png"), "");
    }
    let error = all.load_images(&images, OnProblem::Skip, &Silent).unwrap_err();
    assert!(matches!(error, DatasetError::NoPairs { rows: 9, skipped: 9, .. }), "{error}");
}

/// Without the feature a DICOM file is an error that says which feature it needs.
#[cfg(not(feature = "dicom"))]
#[test]
fn dicom_needs_its_feature() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "x.dcm", &format!("{}DICM", "\0".repeat(128)));
    let error = Decoded::open(&folder.path().join("x.dcm")).unwrap_err().to_string();
    assert!(error.contains("x.dcm") && error.contains("feature `dicom`"), "{error}");
}
