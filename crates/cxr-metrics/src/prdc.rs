//! Precision, recall, density and coverage: how much of the synthetic set lies among real pictures, and how much of
//! the real set is reached.
//!
//! Definitions of Kynkäänniemi et al. 2019 and Naeem et al. 2020, as the latter's package `prdc` has them: a set is
//! the union of balls around its pictures, each reaching to the `k`-th nearest other one.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{MetricsError, Result};
use crate::features::FeatureSet;
use crate::frechet::product;

/// Neighbours that are the custom.
pub const NEAREST_K: usize = 5;

/// Pictures per matrix product.
const QUERIES: usize = 256;
const REFERENCES: usize = 1024;

/// The four figures, and what each picture adds to them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prdc {
    /// Share of synthetic pictures within a ball of a real one.
    pub precision: f64,
    /// Share of real pictures within a ball of a synthetic one.
    pub recall: f64,
    /// Real balls that a synthetic picture lies in, over `k`, on average; may exceed one.
    pub density: f64,
    /// Share of real pictures whose ball has a synthetic picture in it.
    pub coverage: f64,
    /// Neighbours that a ball reaches over.
    pub k: usize,
    /// Per picture, what the four are means of.
    pub parts: PrdcParts,
}

/// What the figures are means of: precision and density per synthetic picture, recall and coverage per real one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PrdcParts {
    /// 0 or 1 per synthetic picture.
    pub precision: Vec<f64>,
    /// 0 or 1 per real picture.
    pub recall: Vec<f64>,
    /// Per synthetic picture.
    pub density: Vec<f64>,
    /// 0 or 1 per real picture.
    pub coverage: Vec<f64>,
}

/// Precision, recall, density and coverage with balls that reach to the `k`-th nearest neighbour. Exact: distances
/// come from blocked products in f64. Equality counts as outside, as in `prdc`.
///
/// # Errors
/// Different widths, `k` of zero, a set of `k` pictures or fewer.
pub fn prdc(real: &FeatureSet, fake: &FeatureSet, k: usize) -> Result<Prdc> {
    real.expect_width_of(fake)?;
    if k == 0 {
        return Err(MetricsError::InvalidParameter {
            name: "k",
            value: "0".into(),
            expected: "at least one neighbour; 5 is the custom".into(),
        });
    }
    real.expect_at_least(k + 1, &format!("the real set of balls over {k} neighbours"))?;
    fake.expect_at_least(k + 1, &format!("the synthetic set of balls over {k} neighbours"))?;
    let (real_radii, fake_radii) = (radii(real, k), radii(fake, k));
    let per_fake = rows(fake, real, |_, distances| {
        let inside = distances.iter().zip(&real_radii).filter(|(d, r)| d < r).count();
        (f64::from(u8::from(inside > 0)), inside as f64 / k as f64)
    });
    let per_real = rows(real, fake, |i, distances| {
        let inside = distances.iter().zip(&fake_radii).any(|(d, r)| d < r);
        let reached = distances.iter().any(|d| *d < real_radii[i]);
        (f64::from(u8::from(inside)), f64::from(u8::from(reached)))
    });
    let (precision, density): (Vec<f64>, Vec<f64>) = per_fake.into_iter().unzip();
    let (recall, coverage): (Vec<f64>, Vec<f64>) = per_real.into_iter().unzip();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    Ok(Prdc {
        precision: mean(&precision),
        recall: mean(&recall),
        density: mean(&density),
        coverage: mean(&coverage),
        k,
        parts: PrdcParts { precision, recall, density, coverage },
    })
}

/// Squared distance of each picture to its `k`-th nearest other one.
fn radii(set: &FeatureSet, k: usize) -> Vec<f64> {
    rows(set, set, |i, distances| {
        // A picture is its own nearest, whatever rounding says.
        distances[i] = 0.0;
        *distances.select_nth_unstable_by(k, f64::total_cmp).1
    })
}

/// Calls `of` with the position of each query and its squared distances to all references, in f64.
fn rows<T: Send>(
    queries: &FeatureSet,
    references: &FeatureSet,
    of: impl Fn(usize, &mut [f64]) -> T + Sync,
) -> Vec<T> {
    let square = |row: &[f32]| row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
    let squares: Vec<f64> = references.rows().map(square).collect();
    let starts: Vec<usize> = (0..queries.len()).step_by(QUERIES).collect();
    let blocks: Vec<Vec<T>> = starts
        .into_par_iter()
        .map(|start| {
            let end = (start + QUERIES).min(queries.len());
            let left = queries.matrix(start, end);
            let mut distances = vec![vec![0.0; references.len()]; end - start];
            for from in (0..references.len()).step_by(REFERENCES) {
                let to = (from + REFERENCES).min(references.len());
                let dots = product(references.matrix(from, to).as_ref(), left.transpose());
                for (i, row) in distances.iter_mut().enumerate() {
                    let own = square(queries.row(start + i));
                    for (j, dot) in dots.col(i).iter().enumerate() {
                        row[from + j] = (own + squares[from + j] - 2.0 * dot).max(0.0);
                    }
                }
            }
            distances.iter_mut().enumerate().map(|(i, row)| of(start + i, row)).collect()
        })
        .collect();
    blocks.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_set;

    #[test]
    fn sets_of_one_distribution_cover_each_other_and_distant_ones_do_not() {
        let (x, y) = (random_set("x", 400, 4, 1.0), random_set("y", 300, 4, 1.0));
        let same = prdc(&x, &y, 5).unwrap();
        assert!(same.precision > 0.9 && same.recall > 0.9 && same.coverage > 0.9, "{:?}", same.precision);
        assert!((same.density - 1.0).abs() < 0.15, "{}", same.density);
        let far = FeatureSet::new(y.values().iter().map(|v| v + 50.0).collect(), 4).unwrap();
        let far = prdc(&x, &far, 5).unwrap();
        assert_eq!((far.precision, far.recall, far.density, far.coverage), (0.0, 0.0, 0.0, 0.0));
        // Pictures of one kind only are precise and cover little.
        let one_kind = FeatureSet::new(y.values().iter().map(|v| 0.05 * v).collect(), 4).unwrap();
        let one_kind = prdc(&x, &one_kind, 5).unwrap();
        assert!(one_kind.precision > 0.95 && one_kind.recall < 0.05 && one_kind.coverage < 0.3);
    }

    #[test]
    fn blocks_change_nothing() {
        let (x, y) = (random_set("x", 1100, 3, 1.0), random_set("y", 530, 3, 1.1));
        let found = prdc(&x, &y, 3).unwrap();
        let distance = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>()
        };
        let radius = |i: usize| {
            let mut all: Vec<f64> = x.rows().map(|r| distance(r, x.row(i))).collect();
            all.sort_by(f64::total_cmp);
            all[3]
        };
        let radii: Vec<f64> = (0..x.len()).map(radius).collect();
        let inside = |f: &[f32]| x.rows().zip(&radii).filter(|(r, radius)| distance(r, f) < **radius).count();
        let expected: f64 = y.rows().map(|f| inside(f) as f64 / 3.0).sum::<f64>() / y.len() as f64;
        assert!((found.density - expected).abs() < 1e-12, "{} against {expected}", found.density);
    }

    #[test]
    fn bad_input_is_an_error() {
        let (x, y) = (random_set("x", 6, 3, 1.0), random_set("y", 6, 4, 1.0));
        assert!(matches!(prdc(&x, &y, 5), Err(MetricsError::SizeMismatch { .. })));
        assert!(matches!(prdc(&x, &x.select(&[0, 1, 2]), 3), Err(MetricsError::TooFewSamples { .. })));
        assert!(prdc(&x, &x, 0).is_err());
        // Repeated pictures have balls of no size, and nothing lies in them.
        let twice = x.select(&[0, 0, 0]);
        assert_eq!(prdc(&twice, &twice, 2).unwrap().precision, 0.0);
    }
}
