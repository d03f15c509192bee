//! The views of a picture that count as the same picture: mirrored, moved by a little, brighter or darker.

use serde::{Deserialize, Serialize};

use super::nearest::Queries;
use super::side::AuditConfig;
use crate::error::Result;
use crate::features::FeatureSet;

/// How a picture was turned and moved before it came nearest to a training picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PictureView {
    /// Left and right were exchanged.
    pub mirrored: bool,
    /// Cells (of [`AuditConfig::side`] per picture) by which it lies to the right of the training picture.
    pub right: i32,
    /// Cells by which it lies below the training picture.
    pub down: i32,
}

impl PictureView {
    /// All views that a configuration asks for, the picture as it is first.
    pub(super) fn all(config: &AuditConfig) -> Vec<Self> {
        let reach = config.shift as i32;
        let mut views = Vec::new();
        for mirrored in [false, true].into_iter().take(1 + usize::from(config.mirror)) {
            for down in -reach..=reach {
                views.extend((-reach..=reach).map(|right| Self { mirrored, right, down }));
            }
        }
        views.sort_by_key(|view| (view.mirrored, view.right.abs() + view.down.abs()));
        views
    }
}

/// Reduced pictures `[n, side * side]`, each seen in every [`PictureView`].
pub(super) struct PixelViews<'a> {
    pictures: &'a FeatureSet,
    side: usize,
    shift: usize,
    pub(super) views: Vec<PictureView>,
}

impl<'a> PixelViews<'a> {
    pub(super) fn new(pictures: &'a FeatureSet, config: &AuditConfig) -> Self {
        Self { pictures, side: config.side, shift: config.shift, views: PictureView::all(config) }
    }
}

impl Queries for PixelViews<'_> {
    fn len(&self) -> usize {
        self.pictures.len()
    }
    fn width(&self) -> usize {
        window(self.side, self.shift).pow(2)
    }
    fn views(&self) -> usize {
        self.views.len()
    }
    fn write(&self, index: usize, view: usize, row: &mut [f32]) {
        write_window(self.pictures.row(index), self.side, self.shift, self.views[view], row);
    }
}

/// The middle of every reduced picture, as [`PixelViews`] has it in its first view: what training pictures are
/// stored as.
pub(super) fn middles(pictures: &FeatureSet, config: &AuditConfig) -> Result<FeatureSet> {
    let width = window(config.side, config.shift).pow(2);
    let mut values = vec![0.0; pictures.len() * width];
    let still = PictureView { mirrored: false, right: 0, down: 0 };
    for (picture, row) in pictures.rows().zip(values.chunks_exact_mut(width)) {
        write_window(picture, config.side, config.shift, still, row);
    }
    FeatureSet::new(values, width)
}

/// Features of pictures, and of the same pictures mirrored.
pub(super) struct FeatureViews<'a>(pub(super) &'a [FeatureSet]);

impl Queries for FeatureViews<'_> {
    fn len(&self) -> usize {
        self.0[0].len()
    }
    fn width(&self) -> usize {
        self.0[0].width()
    }
    fn views(&self) -> usize {
        self.0.len()
    }
    fn write(&self, index: usize, view: usize, row: &mut [f32]) {
        row.copy_from_slice(self.0[view].row(index));
    }
}

/// Side of the window that stays inside the picture wherever it is moved.
fn window(side: usize, shift: usize) -> usize {
    side - 2 * shift
}

/// Cuts the window of a view out and brings it to mean 0 and length 1, so that the squared distance of two windows
/// is twice one less their correlation: brightness and contrast make no difference. A window without any
/// contrast stays 0, at distance 1 from all others and 0 from its like.
fn write_window(picture: &[f32], side: usize, shift: usize, view: PictureView, row: &mut [f32]) {
    let size = window(side, shift);
    let moved = |by: i32| (shift as i32 + by) as usize;
    let (top, left) = (moved(view.down), moved(view.right));
    for (y, line) in row.chunks_exact_mut(size).enumerate() {
        let source = &picture[(top + y) * side..][..side];
        for (x, value) in line.iter_mut().enumerate() {
            let column = left + x;
            *value = source[if view.mirrored { side - 1 - column } else { column }];
        }
    }
    let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / row.len() as f64;
    let length = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>().sqrt();
    // Less than a hundredth of a grey level per cell is rounding, not contrast.
    let flat = length <= 1e-4 * (row.len() as f64).sqrt();
    let scale = if flat { 0.0 } else { 1.0 / length };
    row.iter_mut().for_each(|v| *v = ((f64::from(*v) - mean) * scale) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memorization::nearest::nearest_in_views;
    use crate::testing::random_set;
    use cxr_core::progress::Silent;

    fn config() -> AuditConfig {
        AuditConfig { side: 12, shift: 2, ..AuditConfig::default() }
    }

    fn changed(picture: &[f32], view: PictureView, fill: f32, gain: f32, offset: f32) -> Vec<f32> {
        let at = |x: i32, y: i32| {
            let inside = (0..12).contains(&x) && (0..12).contains(&y);
            if inside { gain * picture[(y * 12 + x) as usize] + offset } else { fill }
        };
        let pixel = |i: i32| {
            let (x, y) = (i % 12, i / 12);
            at((if view.mirrored { 11 - x } else { x }) - view.right, y - view.down)
        };
        (0..144).map(pixel).collect()
    }

    #[test]
    fn every_view_of_a_picture_is_found_again_at_distance_zero() {
        let train = random_set("train", 40, 144, 0.3);
        let references = middles(&train, &config()).unwrap();
        let views = PictureView::all(&config());
        assert_eq!((views.len(), views[0]), (50, PictureView { mirrored: false, right: 0, down: 0 }));
        for view in views {
            // Moved first, mirrored then: what is undone is the mirror image, then the move.
            let picture = changed(train.row(23), view, -1.0, 0.6, 0.2);
            let queries = FeatureSet::new(picture, 144).unwrap();
            let (found, at) =
                nearest_in_views(&PixelViews::new(&queries, &config()), &references, None, &Silent).unwrap()
                    [0]
                .clone();
            assert_eq!(found.nearest, 23);
            assert!(found.distance < 1e-5, "{view:?}: {found:?}");
            assert!(found.ratio.unwrap() < 1e-4);
            assert_eq!(PictureView::all(&config())[at], view);
        }
    }

    #[test]
    fn a_move_beyond_the_reach_is_another_picture() {
        let train = random_set("train", 40, 144, 0.3);
        let references = middles(&train, &config()).unwrap();
        let far = PictureView { mirrored: false, right: 3, down: 0 };
        let queries = FeatureSet::new(changed(train.row(23), far, 0.0, 1.0, 0.0), 144).unwrap();
        let views = PixelViews::new(&queries, &config());
        assert!(nearest_in_views(&views, &references, None, &Silent).unwrap()[0].0.distance > 0.5);
    }

    #[test]
    fn pictures_without_contrast_are_like_each_other_alone() {
        let flat = FeatureSet::new([vec![0.25; 144], vec![-1.0; 144]].concat(), 144).unwrap();
        let noise = random_set("noise", 1, 144, 0.3);
        let both = FeatureSet::new([flat.row(0), noise.row(0)].concat(), 144).unwrap();
        let references = middles(&both, &config()).unwrap();
        let found = nearest_in_views(&PixelViews::new(&flat, &config()), &references, None, &Silent).unwrap();
        for (neighbour, _) in found {
            assert_eq!((neighbour.nearest, neighbour.distance), (0, 0.0));
            assert!((neighbour.second_distance.unwrap() - 1.0).abs() < 1e-6);
        }
    }
}
