//! An invented collection in the layout of the Indiana University collection, for tests and measurements: nobody's
//! radiographs and nobody's reports, in the number and size that the real ones have.
//!
//! Hidden, because it is no way to get data to train on.

use std::fmt::Write;
use std::path::Path;

use cxr_core::atomic;
use cxr_core::random::Stream;
use image::{GrayImage, Luma};
use rayon::prelude::*;

use crate::DatasetError;
use crate::source::kaggle::{PROJECTIONS, REPORTS};

/// How much of it there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Reports.
    pub reports: usize,
    /// Images: one or more of every report, 3 at most.
    pub images: usize,
    /// Width and height of an image.
    pub side: u32,
}

impl Shape {
    /// The real collection's numbers, with images of 256 pixels.
    pub const INDIANA: Self = Self { reports: 3851, images: 7466, side: 256 };
}

const FINDINGS: [(&str, &str, &str); 6] = [
    ("normal", "normal", "No acute cardiopulmonary abnormality."),
    ("normal", "normal", "Clear lungs."),
    ("Cardiomegaly", "Cardiomegaly/mild", "Mild cardiomegaly."),
    ("Opacity", "Opacity/lung/base/left", "Opacity in the left base."),
    ("Pulmonary Atelectasis", "Pulmonary Atelectasis/base", "Bibasilar atelectasis, no edema."),
    ("Pleural Effusion", "Pleural Effusion/right", "Small right pleural effusion."),
];

/// Writes `indiana_reports.csv`, `indiana_projections.csv` and `images/images_normalized/`; the same shape and seed
/// give the same bytes. One report in 128 has no impression, one in 64 an impression of more than 77 tokens, one in 6
/// an `XXXX`.
///
/// # Errors
/// When a file cannot be written.
///
/// # Panics
/// When there are fewer images than reports, or more than 3 of each.
pub fn write_indiana(folder: &Path, shape: Shape, seed: u64) -> Result<(), DatasetError> {
    let Shape { reports, images, side } = shape;
    assert!((reports..=3 * reports).contains(&images), "{images} images of {reports} reports");
    let pictures = folder.join("images/images_normalized");
    let failed = |path: &Path, source| DatasetError::Write { path: path.into(), source };
    std::fs::create_dir_all(&pictures).map_err(|source| failed(&pictures, source))?;

    let mut report_table = "uid,MeSH,Problems,image,indication,comparison,findings,impression\n".to_string();
    let mut projection_table = "uid,filename,projection\n".to_string();
    let mut names = Vec::with_capacity(images);
    for report in 0..reports {
        let (uid, mut stream) = (report + 1, Stream::new(seed, "synthetic-report", report as u64));
        let (problems, mesh, sentence) = FINDINGS[stream.below(FINDINGS.len() as u64) as usize];
        let impression = match report {
            _ if report % 128 == 7 => String::new(),
            _ if report % 64 == 3 => format!("{sentence} ").repeat(20),
            _ if report % 6 == 5 => format!("Comparison XXXX, \"stable\". {sentence}"),
            _ => format!("{}. {sentence}\nReport {}.", report % 9 + 1, report % 1500),
        };
        let quoted = impression.replace('"', "\"\"");
        let _ =
            writeln!(report_table, "{uid},{mesh},{problems},Chest,Cough.,None.,As described.,\"{quoted}\"");
        let own = images * (report + 1) / reports - images * report / reports;
        for view in 0..own {
            let name = format!("{uid}_IM-{report:04}-{}001.dcm.png", view + 1);
            let _ =
                writeln!(projection_table, "{uid},{name},{}", if view == 0 { "Frontal" } else { "Lateral" });
            names.push(name);
        }
    }
    for (name, table) in [(REPORTS, report_table), (PROJECTIONS, projection_table)] {
        let path = folder.join(name);
        atomic::write_bytes(&path, table.as_bytes()).map_err(|source| failed(&path, source))?;
    }
    names.par_iter().enumerate().try_for_each(|(number, name)| {
        let path = pictures.join(name);
        picture(side, seed, number as u64)
            .save(&path)
            .map_err(|error| failed(&path, std::io::Error::other(error)))
    })
}

/// Two dark lungs in a bright body, with grain, so that the file is about as large as a radiograph's of its size.
fn picture(side: u32, seed: u64, number: u64) -> GrayImage {
    let mut stream = Stream::new(seed, "synthetic-image", number);
    let (shift, width, depth) =
        (stream.range(-0.05, 0.05), stream.range(0.12, 0.2), stream.range(90.0, 150.0));
    // Grain is drawn once per row and turned from row to row: a radiograph's noise at a tenth of the cost.
    let grain: Vec<f32> = stream.normals(4 * side as usize + 1).iter().map(|value| 3.0 * value).collect();
    GrayImage::from_fn(side, side, |x, y| {
        let (u, v) = (x as f32 / side as f32 - 0.5 + shift, y as f32 / side as f32 - 0.5);
        let lung = |centre: f32| (-((u - centre) / width).powi(2) - (v / 0.3).powi(2)).exp();
        let body = 200.0 - 60.0 * v * v - depth * (lung(-0.2) + lung(0.2));
        let place = (x as usize * 7 + y as usize * 131) % grain.len();
        Luma([(body + grain[place]).clamp(0.0, 255.0) as u8])
    })
}
