//! Several processes that train one model together, one for each device.
//!
//! Every process, a rank, has all of the data's latents and the whole model, and takes its share of each step's samples;
//! the gradients are summed over all ranks, so that every rank takes the same optimizer step. What a run makes is that
//! of one process with batches as large as all of theirs together, up to rounding.

#[cfg(feature = "mpi")]
mod mpi;

#[cfg(feature = "mpi")]
pub use self::mpi::Mpi;

use crate::TrainError;

/// The processes of a run, as one of them sees them.
pub trait Ranks {
    /// Which process this is, from 0. Rank 0 writes all files.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Puts the sums over all ranks in place of `values`, the same bits on each; all ranks call it with as many.
    ///
    /// # Errors
    /// [`TrainError::Ranks`] if the other processes cannot be reached.
    fn sum(&self, values: &mut [f32]) -> Result<(), TrainError>;

    /// Returns when all ranks have called it.
    fn wait(&self);
}

/// One process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _values: &mut [f32]) -> Result<(), TrainError> {
        Ok(())
    }

    fn wait(&self) {}
}

/// That `what` is the same on every rank, a hexadecimal number; an error on all of them otherwise.
pub(crate) fn expect_same(ranks: &dyn Ranks, hexadecimal: &str, what: &str) -> Result<(), TrainError> {
    // Digits and their sums are small whole numbers, which f32 holds exactly.
    let own: Vec<f32> = hexadecimal.chars().map(|digit| digit.to_digit(16).unwrap_or(0) as f32).collect();
    let mut sums = own.clone();
    ranks.sum(&mut sums)?;
    let size = ranks.size() as f32;
    // Where digits differ, the mean of all ranks may be that of this one, but not that of each.
    let differs = own.iter().zip(&sums).any(|(own, sum)| own * size != *sum);
    let mut differing = [f32::from(u8::from(differs))];
    ranks.sum(&mut differing)?;
    match differing[0] > 0.0 {
        true => Err(TrainError::Ranks { problem: format!("the ranks do not have the same {what}") }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of several ranks whose digits are known.
    struct Told {
        others: Vec<Vec<f32>>,
        calls: std::cell::Cell<usize>,
        others_differ: f32,
    }

    impl Ranks for Told {
        fn rank(&self) -> usize {
            0
        }
        fn size(&self) -> usize {
            1 + self.others.len()
        }
        fn sum(&self, values: &mut [f32]) -> Result<(), TrainError> {
            match self.calls.replace(self.calls.get() + 1) {
                0 => self.others.iter().for_each(|other| {
                    values.iter_mut().zip(other).for_each(|(value, other)| *value += other);
                }),
                _ => values[0] += self.others_differ,
            }
            Ok(())
        }
        fn wait(&self) {}
    }

    #[test]
    fn what_differs_on_one_rank_is_an_error_on_all() {
        let check = |others: &[[f32; 2]], others_differ| {
            let others = others.iter().map(|digits| digits.to_vec()).collect();
            let ranks = Told { others, calls: Default::default(), others_differ };
            expect_same(&ranks, "4a", "settings")
        };
        check(&[[4.0, 10.0], [4.0, 10.0]], 0.0).unwrap();
        let error = check(&[[4.0, 11.0], [4.0, 10.0]], 0.0).unwrap_err().to_string();
        assert!(error.contains("the same settings"), "{error}");
        // the mean is this rank's own: the others notice
        check(&[[3.0, 10.0], [5.0, 10.0]], 2.0).unwrap_err();
        expect_same(&Alone, "4a", "settings").unwrap();
    }
}
