//! Which training image is each synthetic one nearest to, and how near?
//!
//! Distances are Euclidean, in pixels or in features, against the whole training set. A small distance, or a
//! small ratio of the nearest to the second nearest, is what a copy looks like.

use std::collections::HashMap;

use cxr_core::progress::{Progress, Silent};
use faer::Mat;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::features::{FeatureSet, expect_size};
use crate::frechet::product;
use crate::progress::advance;

/// Images per matrix product: two blocks of 4096 pixels in f64 take 42 MB.
const QUERIES: usize = 256;
const REFERENCES: usize = 1024;

/// The nearest training image of one synthetic image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Position of the nearest training image.
    pub nearest: usize,
    /// Euclidean distance to it.
    pub distance: f64,
    /// Position of the second nearest, of another group where groups are given; none if there is no other.
    pub second: Option<usize>,
    /// Distance to the second nearest.
    pub second_distance: Option<f64>,
    /// `distance / second_distance`, in [0, 1]; 1 where both are zero (the training set repeats itself, the
    /// ratio says nothing); none without a second.
    pub ratio: Option<f64>,
}

/// The nearest and second nearest reference of every query, exactly: by blocked products in f64, the
/// distances of the winners then taken again from their differences. Ties go to the lower position.
///
/// `groups` names the group (patient) of each reference: the second nearest is then the nearest of another
/// group, because several images of one patient resemble each other and would hide a copy from the ratio.
///
/// # Errors
/// Different widths, no references, a number of groups other than that of references.
pub fn nearest_neighbours(
    queries: &FeatureSet,
    references: &FeatureSet,
    groups: Option<&[String]>,
) -> Result<Vec<Neighbour>> {
    let found = nearest_in_views(queries, references, groups, &Silent)?;
    Ok(found.into_iter().map(|(neighbour, _)| neighbour).collect())
}

/// Pictures that are looked for, each in one or several views of which the nearest counts.
pub(super) trait Queries: Sync {
    /// Number of pictures.
    fn len(&self) -> usize;
    /// Values per view.
    fn width(&self) -> usize;
    /// Views of each picture.
    fn views(&self) -> usize;
    /// Writes a view `[width]` of a picture.
    fn write(&self, index: usize, view: usize, row: &mut [f32]);
}

impl Queries for FeatureSet {
    fn len(&self) -> usize {
        self.len()
    }
    fn width(&self) -> usize {
        self.width()
    }
    fn views(&self) -> usize {
        1
    }
    fn write(&self, index: usize, _: usize, row: &mut [f32]) {
        row.copy_from_slice(self.row(index));
    }
}

/// [`nearest_neighbours`] over all views of each query, and the view in which the nearest was found.
pub(super) fn nearest_in_views<Q: Queries>(
    queries: &Q,
    references: &FeatureSet,
    groups: Option<&[String]>,
    progress: &dyn Progress,
) -> Result<Vec<(Neighbour, usize)>> {
    // Blocks between two looks at the progress.
    const CHUNK: usize = 16;
    expect_size(|| "width of the second set's features".into(), references.width(), queries.width())?;
    references.expect_at_least(1, "the training set")?;
    if let Some(groups) = groups {
        expect_size(|| "groups of the training set".into(), references.len(), groups.len())?;
    }
    let group_ids = group_ids(groups, references.len());
    let squares: Vec<f64> = references.rows().map(square).collect();
    let starts: Vec<usize> = (0..queries.len()).step_by(QUERIES).collect();
    progress.begin("nearest training pictures", Some(queries.len() as u64));
    let mut found = Vec::with_capacity(queries.len());
    for chunk in starts.chunks(CHUNK) {
        let blocks: Vec<_> =
            chunk.par_iter().map(|start| block(queries, *start, references, &squares, &group_ids)).collect();
        found.extend(blocks.into_iter().flatten());
        advance(progress, "nearest training pictures", found.len(), queries.len())?;
    }
    progress.end("");
    Ok(found)
}

/// A number per reference, equal within a group; without groups every reference is its own.
fn group_ids(groups: Option<&[String]>, n: usize) -> Vec<usize> {
    let mut seen = HashMap::new();
    match groups {
        None => (0..n).collect(),
        Some(groups) => groups
            .iter()
            .map(|group| {
                let next = seen.len();
                *seen.entry(group).or_insert(next)
            })
            .collect(),
    }
}

/// A reference and how near it is.
#[derive(Clone, Copy)]
struct Candidate {
    position: usize,
    view: usize,
    square: f64,
}

/// The best reference so far, and the best of another group.
#[derive(Clone, Copy)]
struct Best {
    first: Candidate,
    second: Option<Candidate>,
}

impl Best {
    fn offer(best: &mut Option<Self>, new: Candidate, groups: &[usize]) {
        let Some(best) = best else {
            *best = Some(Self { first: new, second: None });
            return;
        };
        // What is no nearer than the second is nothing to either: true of nearly all.
        if best.second.is_some_and(|second| new.square >= second.square) {
            return;
        }
        let other_group = groups[new.position] != groups[best.first.position];
        if new.square < best.first.square {
            if other_group {
                best.second = Some(best.first);
            }
            best.first = new;
        } else if other_group {
            best.second = Some(new);
        }
    }
}

fn block<Q: Queries>(
    queries: &Q,
    start: usize,
    references: &FeatureSet,
    squares: &[f64],
    groups: &[usize],
) -> Vec<(Neighbour, usize)> {
    let end = (start + QUERIES).min(queries.len());
    let views: Vec<View> = (0..queries.views()).map(|view| View::of(queries, start, end, view)).collect();
    let mut best: Vec<Option<Best>> = vec![None; end - start];
    for from in (0..references.len()).step_by(REFERENCES) {
        let to = (from + REFERENCES).min(references.len());
        let right = references.matrix(from, to);
        for (view, View { rows, squares: own }) in views.iter().enumerate() {
            let dots = product(right.as_ref(), rows.transpose());
            for (i, best) in best.iter_mut().enumerate() {
                for (j, dot) in dots.col(i).iter().enumerate() {
                    // |q - r|^2
                    let square = own[i] + squares[from + j] - 2.0 * dot;
                    Best::offer(best, Candidate { position: from + j, view, square }, groups);
                }
            }
        }
    }
    let finish = |(i, best): (usize, Option<Best>)| {
        best.map(|best| (neighbour(queries, start + i, best, references), best.first.view))
    };
    best.into_iter().enumerate().filter_map(finish).collect()
}

/// One view of a block of queries, and the squared length of each row.
struct View {
    rows: Mat<f64>,
    squares: Vec<f64>,
}

impl View {
    fn of<Q: Queries>(queries: &Q, start: usize, end: usize, view: usize) -> Self {
        let width = queries.width();
        let mut values = vec![0.0; (end - start) * width];
        for (i, row) in values.chunks_exact_mut(width).enumerate() {
            queries.write(start + i, view, row);
        }
        Self {
            squares: values.chunks_exact(width).map(square).collect(),
            rows: Mat::from_fn(end - start, width, |i, j| f64::from(values[i * width + j])),
        }
    }
}

fn neighbour<Q: Queries>(queries: &Q, index: usize, best: Best, references: &FeatureSet) -> Neighbour {
    let mut row = vec![0.0; queries.width()];
    let mut exact = |candidate: Candidate| {
        queries.write(index, candidate.view, &mut row);
        let pairs = row.iter().zip(references.row(candidate.position));
        pairs.map(|(q, r)| (f64::from(*q) - f64::from(*r)).powi(2)).sum::<f64>().sqrt()
    };
    let distance = exact(best.first);
    let second_distance = best.second.map(&mut exact);
    let second = best.second.map(|second| second.position);
    let ratio = second_distance.map(|s| if s > 0.0 { (distance / s).min(1.0) } else { 1.0 });
    Neighbour { nearest: best.first.position, distance, second, second_distance, ratio }
}

fn square(row: &[f32]) -> f64 {
    row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::MetricsError;
    use crate::testing::random_set;

    fn naive(query: &[f32], references: &FeatureSet) -> Vec<(usize, f64)> {
        let distance = |r: &[f32]| {
            query.iter().zip(r).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
        };
        let mut all: Vec<_> = references.rows().map(distance).enumerate().collect();
        all.sort_by(|a, b| a.1.total_cmp(&b.1));
        all
    }

    #[test]
    fn blocks_find_what_a_plain_search_finds() {
        let (q, r) = (random_set("q", 300, 9, 1.0), random_set("r", 2100, 9, 1.0));
        let found = nearest_neighbours(&q, &r, None).unwrap();
        assert_eq!(found.len(), 300);
        for (i, neighbour) in found.iter().enumerate() {
            let expected = naive(q.row(i), &r);
            assert_eq!((neighbour.nearest, neighbour.second), (expected[0].0, Some(expected[1].0)));
            assert!((neighbour.distance - expected[0].1).abs() < 1e-12);
            assert!((neighbour.ratio.unwrap() - expected[0].1 / expected[1].1).abs() < 1e-12);
        }
    }

    #[test]
    fn a_planted_copy_stands_out_and_a_patients_other_images_do_not_hide_it() {
        let train = random_set("train", 50, 30, 1.0);
        // Image 51 is almost image 17, of the same patient; the synthetic image copies 17.
        let mut values = train.values().to_vec();
        values.extend(train.row(17).iter().map(|v| v + 0.001));
        let train = FeatureSet::new(values, 30).unwrap();
        let copy = FeatureSet::new(train.row(17).iter().map(|v| v + 0.0001).collect(), 30).unwrap();
        let plain = &nearest_neighbours(&copy, &train, None).unwrap()[0];
        assert_eq!((plain.nearest, plain.second), (17, Some(50)));
        let groups: Vec<String> =
            (0..51).map(|i| format!("patient {}", if i == 50 { 17 } else { i })).collect();
        let grouped = &nearest_neighbours(&copy, &train, Some(&groups)).unwrap()[0];
        assert_eq!(grouped.nearest, 17);
        assert_ne!(grouped.second, Some(50));
        assert!(grouped.ratio.unwrap() < 0.001, "{grouped:?}");
    }

    #[test]
    fn exact_copies_and_single_references_are_told() {
        let train = FeatureSet::from_rows(&[[1.0e3, 2.0], [1.0e3, 2.0], [5.0, 6.0]]).unwrap();
        let found = nearest_neighbours(&train.select(&[1]), &train, None).unwrap();
        assert_eq!((found[0].nearest, found[0].distance, found[0].ratio), (0, 0.0, Some(1.0)));
        let alone = nearest_neighbours(&train, &train.select(&[2]), None).unwrap();
        assert_eq!((alone[2].distance, alone[2].second, alone[2].ratio), (0.0, None, None));
    }

    #[test]
    fn bad_input_is_an_error() {
        let (a, b) = (random_set("a", 4, 3, 1.0), random_set("b", 4, 2, 1.0));
        assert!(matches!(nearest_neighbours(&a, &b, None), Err(MetricsError::SizeMismatch { .. })));
        assert!(nearest_neighbours(&a, &a, Some(&["one".to_string()])).is_err());
        assert!(matches!(
            nearest_neighbours(&a, &a.select(&[]), None),
            Err(MetricsError::TooFewSamples { .. })
        ));
    }
}
