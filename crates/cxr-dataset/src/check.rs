use std::ops::ControlFlow;

use cxr_core::progress::{Progress, Stage};
use rayon::prelude::*;

use crate::{Collection, DatasetError, ImageLoader, OnProblem, source};

/// Images between two looks at the progress: enough to keep all cores at work, few enough to stop soon.
const PIECE: usize = 256;

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
        let mut stage = Stage::begin(progress, "images", Some(total as u64));
        let mut problems = Vec::with_capacity(total);
        for piece in self.pairs.chunks(PIECE) {
            let found: Vec<Option<DatasetError>> =
                piece.par_iter().map(|pair| images.touch(self, pair).err()).collect();
            for problem in found {
                if let Some(error) = &problem
                    && (on_problem == OnProblem::Stop || error.concerns_more_than_a_row())
                {
                    return Err(problem.unwrap_or_else(|| unreachable!("it is there")));
                }
                problems.push(problem);
                if stage.advance("") == ControlFlow::Break(()) {
                    return Err(DatasetError::Stopped { done: problems.len(), total });
                }
            }
        }
        if let Some(cache) = &images.cache {
            cache.flush().map_err(|source| DatasetError::Cache { source })?;
        }
        let mut problems = problems.into_iter();
        let (table, rows_read) = (self.table.clone(), self.rows_read);
        let skipped = &mut self.skipped;
        self.pairs.retain(|_| match problems.next().flatten() {
            None => true,
            Some(error) => {
                source::skip(skipped, &error);
                false
            }
        });
        if self.pairs.is_empty() {
            return Err(DatasetError::NoPairs { path: table, rows: rows_read, skipped: self.skipped.len() });
        }
        Ok(())
    }
}
