//! The feature vectors of a set of images: one checked matrix that every metric reads.

use faer::Mat;

use crate::error::{MetricsError, Result};

/// Feature vectors of a set of images, one row per image, all finite and of one width.
///
/// The checks are made once, at construction: what holds a `FeatureSet` need not look for NaN again.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureSet {
    values: Vec<f32>,
    width: usize,
}

impl FeatureSet {
    /// Takes row-major `values` of `values.len() / width` images.
    ///
    /// # Errors
    /// A `width` of zero, a length that is no multiple of `width`, a value that is not finite.
    pub fn new(values: Vec<f32>, width: usize) -> Result<Self> {
        if width == 0 {
            return Err(MetricsError::InvalidParameter {
                name: "width",
                value: "0".into(),
                expected: "at least one feature per image".into(),
            });
        }
        if !values.len().is_multiple_of(width) {
            return Err(MetricsError::SizeMismatch {
                what: format!("values in the last row of features of width {width}"),
                expected: width,
                found: values.len() % width,
            });
        }
        check_finite("features", &values, width)?;
        Ok(Self { values, width })
    }

    /// Takes one vector per image.
    ///
    /// # Errors
    /// No rows (the width would be unknown), rows of different widths, a value that is not finite.
    pub fn from_rows<R: AsRef<[f32]>>(rows: &[R]) -> Result<Self> {
        let width = rows.first().map_or(0, |row| row.as_ref().len());
        if rows.is_empty() {
            return Err(MetricsError::TooFewSamples {
                what: "the list of feature vectors".into(),
                needed: 1,
                found: 0,
            });
        }
        let mut values = Vec::with_capacity(rows.len() * width);
        for (index, row) in rows.iter().enumerate() {
            let row = row.as_ref();
            expect_size(|| format!("width of feature vector {index}"), width, row.len())?;
            values.extend_from_slice(row);
        }
        Self::new(values, width)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.values.len() / self.width
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Number of features per image.
    pub fn width(&self) -> usize {
        self.width
    }

    /// All values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The features of one image.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.width..(index + 1) * self.width]
    }

    /// The rows in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.width)
    }

    /// The rows at `indices`, in that order, repetitions included.
    ///
    /// # Panics
    /// If an index is not below [`len`](Self::len).
    pub fn select(&self, indices: &[usize]) -> Self {
        let mut values = Vec::with_capacity(indices.len() * self.width);
        for &index in indices {
            values.extend_from_slice(self.row(index));
        }
        Self { values, width: self.width }
    }

    /// Rows `start..end` in f64.
    pub(crate) fn matrix(&self, start: usize, end: usize) -> Mat<f64> {
        Mat::from_fn(end - start, self.width, |i, j| f64::from(self.values[(start + i) * self.width + j]))
    }

    pub(crate) fn expect_width_of(&self, other: &Self) -> Result<()> {
        expect_size(|| "width of the second set's features".into(), self.width, other.width)
    }

    pub(crate) fn expect_at_least(&self, needed: usize, what: &str) -> Result<()> {
        expect_samples(what, needed, self.len())
    }
}

pub(crate) fn expect_samples(what: &str, needed: usize, found: usize) -> Result<()> {
    if found < needed {
        return Err(MetricsError::TooFewSamples { what: what.into(), needed, found });
    }
    Ok(())
}

pub(crate) fn expect_size(what: impl FnOnce() -> String, expected: usize, found: usize) -> Result<()> {
    if expected != found {
        return Err(MetricsError::SizeMismatch { what: what(), expected, found });
    }
    Ok(())
}

pub(crate) fn check_finite(what: &str, values: &[f32], width: usize) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(position) => Err(MetricsError::NonFinite {
            what: what.into(),
            row: position / width,
            column: position % width,
            value: f64::from(values[position]),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_selection_keep_their_order() {
        let set = FeatureSet::from_rows(&[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).unwrap();
        assert_eq!((set.len(), set.width()), (3, 2));
        assert_eq!(set.select(&[2, 0, 2]).values(), &[5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        assert_eq!(set.matrix(1, 3)[(1, 0)], 5.0);
    }

    #[test]
    fn broken_sets_are_refused_with_their_place() {
        let error = FeatureSet::new(vec![0.0, 1.0, f32::NAN, 3.0], 2).unwrap_err();
        assert!(matches!(error, MetricsError::NonFinite { row: 1, column: 0, .. }), "{error}");
        assert!(matches!(FeatureSet::new(vec![0.0; 3], 2), Err(MetricsError::SizeMismatch { .. })));
        assert!(matches!(FeatureSet::new(vec![], 0), Err(MetricsError::InvalidParameter { .. })));
        let uneven: [&[f32]; 2] = [&[1.0, 2.0], &[3.0]];
        assert!(matches!(FeatureSet::from_rows(&uneven), Err(MetricsError::SizeMismatch { .. })));
        assert!(matches!(FeatureSet::from_rows::<Vec<f32>>(&[]), Err(MetricsError::TooFewSamples { .. })));
    }
}
