use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use cxr_core::progress::{Progress, Stage};
use rayon::prelude::*;

use crate::{Collection, DatasetError, ImageLoader, OnProblem, source};

impl Collection {
    /// Decodes and resizes every image on all cores: into the loader's cache if it has one, else to see that it can
    /// be done. Under [`OnProblem::Skip`] the pairs whose image cannot be used are left out and counted in
    /// [`Collection::skipped`].
    ///
    /// # Errors
    /// Under [`OnProblem::Stop`] the first image, in the order of the table, that cannot be used; a cache that cannot
    /// be written, always; [`DatasetError::Stopped`] when the progress asks for it. The collection is then as it was.
    pub fn load_images(
        &mut self,
        images: &ImageLoader,
        on_problem: OnProblem,
        progress: &dyn Progress,
    ) -> Result<(), DatasetError> {
        images.options.validate()?;
        let total = self.len();
        let _stage = Stage::begin(progress, "images", Some(total as u64));
        let done = AtomicUsize::new(0);
        // Images behind this one need not be looked at any more; those before it are, so that the error that is
        // returned is the first one however many cores there are.
        let end = AtomicUsize::new(total);
        let asked_after = AtomicUsize::new(usize::MAX);
        let load = |(position, pair)| -> Option<DatasetError> {
            if position > end.load(Ordering::Relaxed) || asked_after.load(Ordering::Relaxed) != usize::MAX {
                return None;
            }
            let problem = images.touch(self, pair).err();
            if problem.as_ref().is_some_and(|error| stops(error, on_problem)) {
                end.fetch_min(position, Ordering::Relaxed);
            }
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if progress.advance(done as u64, "") == ControlFlow::Break(()) {
                asked_after.fetch_min(done, Ordering::Relaxed);
            }
            problem
        };
        let mut problems: Vec<Option<DatasetError>> = self.pairs.par_iter().enumerate().map(load).collect();
        if let Some(error) = problems.get_mut(end.into_inner()).and_then(Option::take) {
            return Err(error);
        }
        if let Some(cache) = &images.cache {
            cache.flush().map_err(|source| DatasetError::Cache { source })?;
        }
        match asked_after.into_inner() {
            usize::MAX => self.leave_out(problems),
            done => Err(DatasetError::Stopped { done, total }),
        }
    }

    /// Leaves out the pairs that have a problem.
    fn leave_out(&mut self, problems: Vec<Option<DatasetError>>) -> Result<(), DatasetError> {
        let mut problems = problems.into_iter();
        let skipped = &mut self.skipped;
        self.pairs.retain(|_| match problems.next().flatten() {
            None => true,
            Some(error) => {
                source::skip(skipped, &error);
                false
            }
        });
        if self.pairs.is_empty() {
            let (path, rows, skipped) = (self.table.clone(), self.rows_read, self.skipped.len());
            return Err(DatasetError::NoPairs { path, rows, skipped });
        }
        Ok(())
    }
}

fn stops(error: &DatasetError, on_problem: OnProblem) -> bool {
    on_problem == OnProblem::Stop || error.concerns_more_than_a_row()
}
