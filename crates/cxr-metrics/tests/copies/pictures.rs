//! Radiographs with their patients: generated ones, and the thumbnails of NIH ChestX-ray14.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cxr_core::random::Stream;
use cxr_metrics::{ImageSize, Picture};

#[derive(Clone)]
pub(crate) struct Radiograph {
    pub(crate) patient: String,
    pub(crate) picture: Picture,
}

/// `n` pictures of 48 pixels: a bright middle between two dark fields, whose place, size and brightness differ
/// between patients and less between the images of one. Every tenth patient has 12 to 20 images.
pub(crate) fn generated(n: usize) -> Vec<Radiograph> {
    let mut all = Vec::new();
    for patient in 0.. {
        let mut stream = Stream::new(5, "patient", patient);
        let images = if patient % 10 == 0 { 12 + stream.below(9) } else { 1 + stream.below(3) };
        let own: Vec<f32> = stream.normals(60);
        for image in 0..images {
            let mut stream = Stream::new(5, &format!("image {image}"), patient);
            let shape: Vec<f32> = own.iter().map(|v| 0.9 * v + 0.45 * stream.normal()).collect();
            all.push(Radiograph { patient: format!("patient {patient}"), picture: drawn(&shape) });
            if all.len() == n {
                return all;
            }
        }
    }
    all
}

fn drawn(shape: &[f32]) -> Picture {
    const SIDE: usize = 48;
    let blob = |x: f32, y: f32, i: usize, cx: f32, cy: f32, rx: f32, ry: f32| {
        let dx = (x - cx - 0.06 * shape[i]) / (rx * (1.0 + 0.2 * shape[i + 1]).max(0.4));
        let dy = (y - cy - 0.06 * shape[i + 2]) / (ry * (1.0 + 0.2 * shape[i + 3]).max(0.4));
        (-dx * dx - dy * dy).exp()
    };
    let value = |x: f32, y: f32| {
        let lungs = blob(x, y, 0, 0.27, 0.45, 0.15, 0.28) + blob(x, y, 4, 0.73, 0.45, 0.15, 0.28);
        let heart = blob(x, y, 8, 0.58, 0.62, 0.15, 0.14);
        let wave = |i: usize| {
            let (u, v) = (f32::from(i as u8 % 6) + 1.0, f32::from(i as u8 / 6) + 1.0);
            0.09 * shape[16 + i]
                * (3.1 * u * x + shape[12 + i % 4]).cos()
                * (2.9 * v * y + shape[40 + i % 8]).sin()
        };
        0.62 - 0.42 * lungs + 0.25 * heart + (0..18).map(wave).sum::<f32>()
    };
    let pixel = |i: usize| {
        let (x, y) = ((i % SIDE) as f32 / SIDE as f32, (i / SIDE) as f32 / SIDE as f32);
        (255.0 * value(x, y)).round().clamp(0.0, 255.0) as u8
    };
    Picture::new(ImageSize::square(SIDE), 1, (0..SIDE * SIDE).map(pixel).collect()).unwrap()
}

/// Training set of at least `train` pictures, at least 300 to calibrate on, and the rest; patients with `many` pictures or more are
/// all in the training set.
pub(crate) fn split(all: Vec<Radiograph>, train: usize, many: usize) -> [Vec<Radiograph>; 3] {
    let mut patients: BTreeMap<String, Vec<Radiograph>> = BTreeMap::new();
    for radiograph in all {
        patients.entry(radiograph.patient.clone()).or_default().push(radiograph);
    }
    let mut order: Vec<Vec<Radiograph>> = patients.into_values().collect();
    Stream::new(3, "split", 0).shuffle(&mut order);
    order.sort_by_key(|images| images.len() < many);

    let mut sides = [Vec::new(), Vec::new(), Vec::new()];
    for images in order {
        let [first, second, _] = &sides;
        let side = match (first.len() < train, second.len() < 300) {
            (true, _) => 0,
            (_, true) => 1,
            _ => 2,
        };
        sides[side].extend(images);
    }
    sides
}

fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// The 1,000 thumbnails, in the order of their names.
pub(crate) fn thumbnails() -> Option<Vec<Radiograph>> {
    let folder = workspace("examples/data/nih-chest-64");
    let Ok(mut table) = csv::Reader::from_path(folder.join("labels.csv")) else {
        println!("skipped: {} is not there", folder.display());
        return None;
    };
    let rows = table.records().map(|row| {
        let row = row.unwrap();
        Radiograph { patient: row[3].to_string(), picture: read_png(&folder.join("images").join(&row[0])) }
    });
    Some(rows.collect())
}

/// The small network that was trained on other thumbnails' labels.
pub(crate) fn trained_extractor() -> Option<PathBuf> {
    let folder = workspace("examples/model/cxr-small-extractor");
    let there = folder.join("config.json").is_file();
    if !there {
        println!("skipped: {} is not there", folder.display());
    }
    there.then_some(folder)
}

fn read_png(path: &Path) -> Picture {
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!(info.bit_depth, png::BitDepth::Eight, "{}", path.display());
    let channels = info.color_type.samples();
    let grey = bytes[..info.buffer_size()].chunks_exact(channels).map(|pixel| pixel[0]).collect();
    Picture::new(ImageSize { width: info.width as usize, height: info.height as usize }, 1, grey).unwrap()
}
