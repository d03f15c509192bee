//! What is drawn for people: how long prompts are, and some pairs.

use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use cxr::core::atomic;
use cxr::dataset::image::{Pixels, Square};
use cxr::dataset::{Collection, ImageLoader, TokenFilterReport, epoch_order};
use image::imageops::{self, FilterType};
use image::{ImageFormat, RgbImage};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

/// The letters, so that pictures look alike where no fonts are installed; `LICENSE` beside the file has its terms.
const FONT: &[u8] = include_bytes!("../../../crates/cxr-trainer/fonts/DejaVuSans-Latin.ttf");
const FONT_NAME: &str = "cxr-prepare";

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Draws on white and writes a PNG file, whole or not at all.
fn draw(
    (width, height): (u32, u32),
    path: &Path,
    fill: impl FnOnce(&Area<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<RgbImage> {
    let wrong = |problem: String| anyhow!("cannot draw {}: {problem}", path.display());
    register_font(FONT_NAME, FontStyle::Normal, FONT).map_err(|_| wrong("its font is broken".into()))?;
    let mut picture = RgbImage::new(width, height);
    {
        let area = BitMapBackend::with_buffer(&mut picture, (width, height)).into_drawing_area();
        let drawn = area.fill(&WHITE).map_err(Into::into).and_then(|()| fill(&area));
        drawn.map_err(|error| wrong(error.to_string()))?;
        area.present().map_err(|error| wrong(error.to_string()))?;
    }
    Ok(picture)
}

fn save(picture: &RgbImage, path: &Path) -> Result<()> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png)?;
    atomic::write_bytes(path, bytes.get_ref()).with_context(|| format!("cannot write {}", path.display()))
}

/// How many prompts have each length; those that are too long are red.
pub(crate) fn tokens(report: &TokenFilterReport, path: &Path) -> Result<()> {
    let longest = report.longest().max(report.max_length) as u32;
    let most = report.histogram.values().max().copied().unwrap_or(0).max(1) as u32;
    let picture = draw((900, 480), path, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .set_label_area_size(LabelAreaPosition::Left, 60)
            .set_label_area_size(LabelAreaPosition::Bottom, 40)
            .caption("Prompts by length", (FONT_NAME, 20))
            .build_cartesian_2d(0..longest + 2, 0..most + most / 10 + 1)?;
        let label = (FONT_NAME, 14);
        let x = format!("CLIP tokens, both marks counted; {} are read", report.max_length);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_desc(x)
            .y_desc("pairs")
            .label_style(label)
            .axis_desc_style(label)
            .draw()?;
        let colour = |length: usize| if length > report.max_length { RED } else { BLUE };
        chart.draw_series(report.histogram.iter().map(|(&length, &count)| {
            let (x, count) = (length as u32, count as u32);
            Rectangle::new([(x, 0), (x + 1, count)], colour(length).mix(0.7).filled())
        }))?;
        Ok(())
    })?;
    save(&picture, path)
}

const COLUMNS: usize = 4;
/// Side of a picture on the sheet, whatever size it has been brought to.
const SIDE: u32 = 240;
const GAP: u32 = 12;
const LINE: u32 = 16;
const LINES: usize = 6;

/// Pairs drawn by a seed, side by side, each with its view and its prompt.
pub(crate) fn sheet(
    collection: &Collection,
    images: &ImageLoader,
    count: usize,
    seed: u64,
    path: &Path,
) -> Result<()> {
    let mut positions = epoch_order(collection.len(), seed, 0);
    positions.truncate(count);
    positions.sort_unstable();
    let pictures = positions
        .iter()
        .map(|&position| picture(collection, images, position))
        .collect::<Result<Vec<_>>>()?;

    let rows = positions.len().div_ceil(COLUMNS) as u32;
    let (cell_width, cell_height) = (SIDE + GAP, SIDE + LINE * LINES as u32 + GAP);
    let size = (COLUMNS as u32 * cell_width + GAP, rows * cell_height + GAP);
    let corner = |place: usize| {
        let (x, y) =
            ((place % COLUMNS) as u32 * cell_width + GAP, (place / COLUMNS) as u32 * cell_height + GAP);
        (x as i32, y as i32)
    };
    let mut sheet = draw(size, path, |area| {
        let style = TextStyle::from((FONT_NAME, 13).into_font()).color(&BLACK);
        for (place, &position) in positions.iter().enumerate() {
            let (x, y) = corner(place);
            let width = |text: &str| area.estimate_text_size(text, &style).map_or(0, |(width, _)| width);
            let lines = wrap(&collection.pairs[position].text, SIDE, LINES, width);
            for (number, line) in lines.iter().enumerate() {
                area.draw_text(line, &style, (x, y + SIDE as i32 + 3 + (number as u32 * LINE) as i32))?;
            }
        }
        Ok(())
    })?;
    for (place, picture) in pictures.iter().enumerate() {
        let (x, y) = corner(place);
        imageops::replace(&mut sheet, picture, x.into(), y.into());
    }
    save(&sheet, path)
}

fn picture(collection: &Collection, images: &ImageLoader, position: usize) -> Result<RgbImage> {
    let pair = &collection.pairs[position];
    let pixels = match &images.cache {
        Some(cache) => {
            cache.load(&pair.image, &images.options).map(|square: std::sync::Arc<Square>| square.to_pixels())
        }
        None => cxr::dataset::image::load(&pair.image, &images.options),
    };
    let pixels: Pixels =
        pixels.with_context(|| format!("{}, row {}", collection.table.display(), pair.row))?;
    Ok(imageops::resize(&pixels.to_rgb(), SIDE, SIDE, FilterType::Triangle))
}

/// Breaks a text between words into lines that are not too wide; what does not fit ends in an ellipsis.
fn wrap(text: &str, width: u32, lines: usize, measure: impl Fn(&str) -> u32) -> Vec<String> {
    let mut out: Vec<String> = vec![String::new()];
    for word in text.split_whitespace() {
        let last = out.last_mut().expect("there is one");
        let longer = if last.is_empty() { word.to_string() } else { format!("{last} {word}") };
        if last.is_empty() || measure(&longer) <= width {
            *last = longer;
        } else {
            out.push(word.to_string());
        }
    }
    if out.len() > lines {
        out.truncate(lines);
        let last = out.last_mut().expect("lines is not 0");
        while !last.is_empty() && measure(&format!("{last} ...")) > width {
            last.pop();
        }
        last.push_str(" ...");
    }
    out
}
