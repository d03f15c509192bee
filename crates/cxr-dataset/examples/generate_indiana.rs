//! Writes an invented collection in the layout of the Indiana University collection's Kaggle edition, for
//! measurements: `generate_indiana DIR [REPORTS IMAGES SIDE]`, by default 3,851 reports and 7,466 images of 256 pixels.

use std::process::ExitCode;

use cxr_dataset::synthetic::{Shape, write_indiana};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next();
    let numbers: Vec<Option<usize>> = arguments.map(|text| text.parse().ok()).collect();
    let (Some(folder), Some(shape)) = (folder, shape(&numbers)) else {
        eprintln!("usage: generate_indiana DIR [REPORTS IMAGES SIDE], with 1 to 3 images of every report");
        return ExitCode::FAILURE;
    };
    match write_indiana(folder.as_ref(), shape, 0) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn shape(numbers: &[Option<usize>]) -> Option<Shape> {
    match numbers {
        [] => Some(Shape::INDIANA),
        &[Some(reports), Some(images), Some(side)] => {
            let side = u32::try_from(side).ok().filter(|side| (1..=8192).contains(side))?;
            (reports <= images && images <= 3 * reports).then_some(Shape { reports, images, side })
        }
        _ => None,
    }
}
