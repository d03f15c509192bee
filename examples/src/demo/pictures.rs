//! What the embedded base model is trained on: radiographs under domain randomization, and procedural pictures.
//!
//! The base stands for a general model that has not learned radiography. It sees a thumbnail only turned,
//! zoomed, inverted, blurred or with its contrast changed, with a caption that says so, beside stripes, discs and
//! clouds. All of it is a pure function of a stream.

use cxr::core::random::Stream;

/// Side of every picture, in pixels.
pub const SIDE: usize = 64;

/// A grey picture `[SIDE * SIDE]` in `[0, 1]` and what it shows.
#[derive(Debug, Clone)]
pub struct Picture {
    /// Row by row.
    pub pixels: Vec<f32>,
    /// In words.
    pub caption: String,
}

impl Picture {
    /// Three equal channels in `[-1, 1]`, `[3, SIDE, SIDE]`.
    pub fn to_rgb(&self) -> Vec<f32> {
        to_rgb(&self.pixels)
    }
}

/// Grey pixels in `[0, 1]` as three equal channels in `[-1, 1]`.
pub(super) fn to_rgb(pixels: &[f32]) -> Vec<f32> {
    let plane: Vec<f32> = pixels.iter().map(|p| 2.0 * p - 1.0).collect();
    [plane.as_slice(); 3].concat()
}

/// Grey pixels `[SIDE * SIDE]` in `[0, 1]` as an 8-bit picture for the metrics.
///
/// # Errors
/// If there are not `SIDE * SIDE` pixels.
pub fn metric_picture(pixels: &[f32]) -> cxr::metrics::Result<cxr::metrics::Picture> {
    let bytes = pixels.iter().map(|p| (255.0 * p.clamp(0.0, 1.0)).round() as u8).collect();
    cxr::metrics::Picture::new(cxr::metrics::ImageSize::square(SIDE), 1, bytes)
}

/// An 8-bit picture of grey pixels `[SIDE * SIDE]` in `[0, 1]`.
pub fn grey_image(pixels: &[f32]) -> image::RgbImage {
    image::RgbImage::from_fn(SIDE as u32, SIDE as u32, |x, y| {
        let value = pixels[y as usize * SIDE + x as usize].clamp(0.0, 1.0);
        image::Rgb([(255.0 * value).round() as u8; 3])
    })
}

/// How far a thumbnail is changed at strength 1.
struct Limits {
    /// Largest turn, in degrees.
    turn: f32,
    /// Largest shift, in sides, and change of size; 0 leaves every pixel where it was.
    moved: f32,
    /// Chance of inversion.
    inverted: f32,
    /// Chance of blur.
    blurred: f32,
    /// How often a blurred one is blurred.
    blurs: usize,
}

const MODERATE: Limits = Limits { turn: 40.0, moved: 1.0, inverted: 0.45, blurred: 0.5, blurs: 1 };
const IN_PLACE: Limits = Limits { turn: 0.0, moved: 0.0, blurred: 0.0, ..MODERATE };
const WILD: Limits = Limits { turn: 180.0, inverted: 1.0, blurred: 1.0, blurs: 4, ..MODERATE };

/// A thumbnail under randomization of the given strength, 0 (hardly changed) to 1 (strong).
pub fn randomized(thumbnail: &[f32], finding: &str, strength: f32, stream: &mut Stream) -> Picture {
    changed(thumbnail, finding, strength, &MODERATE, stream)
}

/// The same changes of contrast, inversion and mirroring, but every pixel where it was: nothing is interpolated, so what
/// is finer than two pixels stays.
pub fn recoloured(thumbnail: &[f32], strength: f32, stream: &mut Stream) -> Picture {
    changed(thumbnail, "", strength, &IN_PLACE, stream)
}

/// Turned to any side, mostly inverted, mostly blurred several times.
pub fn wild(thumbnail: &[f32], finding: &str, strength: f32, stream: &mut Stream) -> Picture {
    changed(thumbnail, finding, strength, &WILD, stream)
}

fn changed(thumbnail: &[f32], finding: &str, strength: f32, limits: &Limits, stream: &mut Stream) -> Picture {
    let mut signed = |scale: f32| scale * (2.0 * stream.uniform() - 1.0);
    let angle = signed(limits.turn * strength).to_radians();
    let shift = [signed(0.12 * strength), signed(0.12 * strength)].map(|s| limits.moved * s);
    let contrast = 1.0 + signed(0.5 * strength);
    let brightness = signed(0.2 * strength);
    let gamma = signed(0.8 * strength).exp2();
    let shading = [signed(0.3 * strength), signed(0.3 * strength)];
    let zoom = 1.0 + limits.moved * 0.4 * strength * (stream.uniform() - 0.35);
    let flip = stream.uniform() < 0.5 * strength;
    let inverted = stream.uniform() < limits.inverted * strength;
    let blur = stream.uniform() < limits.blurred * strength;

    let mut words = vec!["distorted chest picture"];
    words.extend(inverted.then_some("inverted"));
    words.extend((angle.abs() > 0.25).then_some(if angle > 0.0 { "turned left" } else { "turned right" }));
    words.extend(flip.then_some("mirrored"));
    words.extend(blur.then_some("blurred"));
    words.extend((contrast < 0.75).then_some("pale"));
    words.extend((zoom < 0.93).then_some("close"));
    let caption = format!("{}. {finding}", words.join(", "));

    let mut pixels = warp(thumbnail, angle, zoom, shift, flip);
    for _ in 0..if blur { limits.blurs } else { 0 } {
        pixels = blurred(&pixels);
    }
    for (i, p) in pixels.iter_mut().enumerate() {
        let [x, y] = [i % SIDE, i / SIDE].map(|v| v as f32 / SIDE as f32 - 0.5);
        let value = p.clamp(0.0, 1.0).powf(gamma);
        let value = 0.5 + contrast * (value - 0.5) + brightness + shading[0] * x + shading[1] * y;
        let value = value.clamp(0.0, 1.0);
        *p = if inverted { 1.0 - value } else { value };
    }
    Picture { pixels, caption }
}

/// A picture of some shapes.
pub fn procedural(stream: &mut Stream) -> Picture {
    let (dark, bright) = (0.45 * stream.uniform(), 0.55 + 0.45 * stream.uniform());
    let kind = stream.below(6);
    let angle = std::f32::consts::PI * stream.uniform();
    let frequency = 2.0 + 8.0 * stream.uniform();
    let phase = std::f32::consts::TAU * stream.uniform();
    let centres: Vec<[f32; 3]> = (0..1 + stream.below(4))
        .map(|_| [stream.uniform(), stream.uniform(), 0.06 + 0.2 * stream.uniform()])
        .collect();
    let waves: Vec<[f32; 3]> = (0..6)
        .map(|_| {
            [
                12.0 * (stream.uniform() - 0.5),
                12.0 * (stream.uniform() - 0.5),
                std::f32::consts::TAU * stream.uniform(),
            ]
        })
        .collect();
    let swapped = stream.uniform() < 0.5;
    let value = |x: f32, y: f32| -> f32 {
        let along = x * angle.cos() + y * angle.sin();
        let across = y * angle.cos() - x * angle.sin();
        let wave = |t: f32| 0.5 + 0.5 * (std::f32::consts::TAU * frequency * t + phase).sin();
        match kind {
            0 => wave(along),
            1 => (along.abs() + 0.2 * phase / std::f32::consts::TAU).min(1.0),
            2 => centres
                .iter()
                .map(|[cx, cy, r]| ((r - (x - cx).hypot(y - cy)) * 24.0 + 0.5).clamp(0.0, 1.0))
                .fold(0.0, f32::max),
            3 => f32::from((wave(along) > 0.5) != (wave(across) > 0.5)),
            4 => {
                let sum: f32 = waves.iter().map(|[fx, fy, p]| (fx * x * 3.0 + fy * y * 3.0 + p).sin()).sum();
                0.5 + 0.2 * sum
            }
            _ => centres
                .iter()
                .map(|[cx, cy, r]| f32::from((x - cx).abs() < *r && (y - cy).abs() < 0.7 * *r))
                .fold(0.0, f32::max),
        }
    };
    let pixels = (0..SIDE * SIDE)
        .map(|i| {
            let v = value((i % SIDE) as f32 / SIDE as f32, (i / SIDE) as f32 / SIDE as f32).clamp(0.0, 1.0);
            let v = if swapped { 1.0 - v } else { v };
            dark + (bright - dark) * v
        })
        .collect();
    let name = ["stripes", "a smooth ramp", "discs", "a chequered board", "clouds", "boxes"][kind as usize];
    Picture { pixels, caption: format!("a grey picture of {name}") }
}

/// Turns by `angle`, magnifies by `1 / zoom`, shifts (in sides) and mirrors; bilinear, edges repeated.
fn warp(source: &[f32], angle: f32, zoom: f32, shift: [f32; 2], flip: bool) -> Vec<f32> {
    let (sin, cos) = angle.sin_cos();
    let centre = (SIDE as f32 - 1.0) / 2.0;
    let side = SIDE as f32;
    (0..SIDE * SIDE)
        .map(|i| {
            let mut x = (i % SIDE) as f32 - centre;
            let y = (i / SIDE) as f32 - centre;
            if flip {
                x = -x;
            }
            let u = zoom * (cos * x - sin * y) + centre + shift[0] * side;
            let v = zoom * (sin * x + cos * y) + centre + shift[1] * side;
            bilinear(source, u, v)
        })
        .collect()
}

/// The value at a place between pixels; edges are repeated.
pub(super) fn bilinear(source: &[f32], x: f32, y: f32) -> f32 {
    let last = (SIDE - 1) as f32;
    let (x, y) = (x.clamp(0.0, last), y.clamp(0.0, last));
    let (x0, y0) = (x as usize, y as usize);
    let (x1, y1) = ((x0 + 1).min(SIDE - 1), (y0 + 1).min(SIDE - 1));
    let (fx, fy) = (x - x0 as f32, y - y0 as f32);
    let at = |x: usize, y: usize| source[y * SIDE + x];
    let top = at(x0, y0) * (1.0 - fx) + at(x1, y0) * fx;
    let bottom = at(x0, y1) * (1.0 - fx) + at(x1, y1) * fx;
    top * (1.0 - fy) + bottom * fy
}

/// Binomial blur, 3 x 3.
fn blurred(source: &[f32]) -> Vec<f32> {
    let pass = |source: &[f32], step: usize, place: fn(usize) -> usize| -> Vec<f32> {
        (0..SIDE * SIDE)
            .map(|i| {
                let before = if place(i) > 0 { source[i - step] } else { source[i] };
                let after = if place(i) + 1 < SIDE { source[i + step] } else { source[i] };
                0.25 * before + 0.5 * source[i] + 0.25 * after
            })
            .collect()
    };
    pass(&pass(source, 1, |i| i % SIDE), SIDE, |i| i / SIDE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_strength_changes_nothing_but_the_caption() {
        let source: Vec<f32> = (0..SIDE * SIDE).map(|i| (i % 97) as f32 / 97.0).collect();
        let picture = randomized(&source, "Cardiomegaly.", 0.0, &mut Stream::new(1, "test", 0));
        assert!(picture.pixels.iter().zip(&source).all(|(a, b)| (a - b).abs() < 1e-4));
        assert_eq!(picture.caption, "distorted chest picture. Cardiomegaly.");
    }

    #[test]
    fn what_is_recoloured_stays_where_it_was() {
        let bar: Vec<f32> = (0..SIDE * SIDE).map(|i| f32::from(i % SIDE == 20)).collect();
        for i in 0..50 {
            let picture = recoloured(&bar, 1.0, &mut Stream::new(1, "test", i)).pixels;
            let row = &picture[10 * SIDE..11 * SIDE];
            let step = |at: usize| (row[at] - row[at - 1]).abs();
            let sharpest = (1..SIDE).max_by(|a, b| step(*a).total_cmp(&step(*b))).expect("not empty");
            // A mirrored bar is in column 43; with little contrast left nothing is sharp.
            assert!([20, 21, 43, 44].contains(&sharpest) || step(sharpest) < 0.1, "{i}: {sharpest}");
        }
    }

    #[test]
    fn strong_randomization_stays_in_range_and_repeats() {
        let source = vec![0.7; SIDE * SIDE];
        let make = |i| randomized(&source, "", 1.0, &mut Stream::new(1, "test", i));
        assert_eq!(make(3).pixels, make(3).pixels);
        assert_ne!(make(3).pixels, make(4).pixels);
        assert!((0..50).all(|i| make(i).pixels.iter().all(|p| (0.0..=1.0).contains(p))));
    }

    #[test]
    fn every_kind_of_procedural_picture_varies() {
        let kinds: std::collections::BTreeSet<_> = (0..100)
            .map(|i| {
                let picture = procedural(&mut Stream::new(2, "test", i));
                let (low, high) =
                    picture.pixels.iter().fold((1.0_f32, 0.0_f32), |(l, h), p| (l.min(*p), h.max(*p)));
                assert!(low >= 0.0 && high <= 1.0 && high > low, "{}", picture.caption);
                picture.caption
            })
            .collect();
        assert_eq!(kinds.len(), 6);
    }
}
