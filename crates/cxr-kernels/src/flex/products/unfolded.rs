//! Panels of the pixels that a convolution sees: a line for every weight of a filter, a column for every output pixel
//! of every image.

use std::ops::Range;

use rayon::prelude::*;

use super::super::conv::Geometry;
use super::super::half::Stored;
use super::number::{Line, Number};
use super::product::{Columns, Engine, place, words};
use super::simd::{LANES, Simd};

/// Images with their padding, and where in them each line and each column begins: an element of the matrix is at the sum
/// of the two.
pub(super) struct Unfolded<'a, T: Clone> {
    data: std::borrow::Cow<'a, [T]>,
    lines: Vec<usize>,
    columns: Vec<usize>,
}

impl<'a, T: Stored> Unfolded<'a, T> {
    /// Of the images `x` `[n, c, h, w]`.
    pub(super) fn new(geometry: &Geometry, x: &'a [T]) -> Self {
        let ([c, h, w], [_, height, width], [kh, kw]) = (geometry.input, geometry.output, geometry.kernel);
        let (stride, padding) = (geometry.stride, geometry.padding);
        let [padded_h, padded_w] = [h, w].map(|size| size + 2 * padding);
        let plane = padded_h * padded_w;
        let data = if padding == 0 {
            x.into()
        } else {
            let mut padded = vec![T::default(); geometry.batch * c * plane];
            padded.par_chunks_mut(plane).zip(x.par_chunks(h * w)).for_each(|(to, from)| {
                let rows = to.chunks_exact_mut(padded_w).skip(padding);
                for (to, from) in rows.zip(from.chunks_exact(w)) {
                    to[padding..padding + w].copy_from_slice(from);
                }
            });
            padded.into()
        };
        let lines = (0..c).flat_map(|channel| {
            let taps = (0..kh).flat_map(move |ky| (0..kw).map(move |kx| ky * padded_w + kx));
            taps.map(move |tap| channel * plane + tap)
        });
        let columns = (0..geometry.batch).flat_map(|image| {
            let places = (0..height).flat_map(move |y| (0..width).map(move |x| (y * padded_w + x) * stride));
            places.map(move |place| image * c * plane + place)
        });
        Self { data, lines: lines.collect(), columns: columns.collect() }
    }
}

/// How the pixels of sixteen columns lie.
enum Run {
    /// Side by side.
    Whole(usize),
    /// Eight and eight side by side.
    Halves([usize; 2]),
    /// Anyhow.
    Scattered([usize; LANES]),
}

impl Run {
    /// Of columns that begin at these places, the last of them taken again for those that are not there.
    fn new(places: &[usize]) -> Self {
        let at = |i: usize| places[i.min(places.len() - 1)];
        let side_by_side = |from: usize, to: usize| (from..to).all(|i| at(i) - at(from) == i - from);
        if places.len() == LANES && side_by_side(0, LANES) {
            Self::Whole(places[0])
        } else if places.len() > LANES / 2 && side_by_side(0, 8) && side_by_side(8, LANES) {
            Self::Halves([places[0], places[8]])
        } else {
            Self::Scattered(std::array::from_fn(at))
        }
    }

    /// The pixels of one line, which begins at `from`.
    ///
    /// # Safety
    /// The processor must have the instructions; the line must have all of the run's columns.
    #[inline(always)]
    unsafe fn load<T: Number<E>, E: Engine>(&self, from: *const T) -> T::Sixteen {
        // SAFETY: the columns are there, says the caller.
        unsafe {
            match self {
                Self::Whole(place) => T::sixteen(from.add(*place), LANES),
                Self::Halves([low, high]) => T::eights(from.add(*low), from.add(*high)),
                Self::Scattered(places) => {
                    let mut pixels = [T::default(); LANES];
                    for (pixel, place) in pixels.iter_mut().zip(places) {
                        *pixel = *from.add(*place);
                    }
                    T::sixteen(pixels.as_ptr(), LANES)
                }
            }
        }
    }
}

// SAFETY: `pack` writes every line of every vector of the panel.
unsafe impl<T: Number<E>, E: Engine> Columns<E> for Unfolded<'_, T> {
    fn count(&self) -> usize {
        self.columns.len()
    }

    #[inline(always)]
    unsafe fn pack(&self, columns: Range<usize>, depth: Range<usize>, panel: *mut Line) {
        let vectors = columns.len().div_ceil(LANES);
        let words_of_panel = words::<E>(depth.len());
        let data = self.data.as_ptr();
        for (v, places) in self.columns[columns].chunks(LANES).enumerate() {
            let run = Run::new(places);
            for (word, lines) in self.lines[depth.clone()].chunks(E::PER_WORD).enumerate() {
                // SAFETY: all lines have all columns, and the panel has this line.
                unsafe {
                    let next = lines.get(1).map(|line| run.load::<T, E>(data.add(*line)));
                    let words = T::zipped(run.load::<T, E>(data.add(lines[0])), next);
                    E::Simd::store(
                        words,
                        panel.add(place::<E::Simd>(word, v, vectors, words_of_panel)).cast(),
                    );
                }
            }
        }
    }
}
