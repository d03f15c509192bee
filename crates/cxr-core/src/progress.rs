//! How libraries tell of their progress, and are told to stop.

use std::ops::ControlFlow;

/// Receives the progress of long work; an embedding program shows it as it likes.
///
/// Libraries call, in this order: [`begin`](Self::begin), any number of [`advance`](Self::advance),
/// [`end`](Self::end). All methods have empty bodies to start from.
pub trait Progress: Send + Sync {
    /// A stage begins; `total` is how many units it has, where that is known.
    fn begin(&self, _stage: &str, _total: Option<u64>) {}

    /// `done` units of the stage are done. `Break` asks the library to stop within one step, keeping what is
    /// finished.
    fn advance(&self, _done: u64, _message: &str) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// The stage has ended.
    fn end(&self, _message: &str) {}
}

/// A stage that is under way: it begins when this is made and ends when this is dropped, an error on the way
/// included.
pub struct Stage<'a> {
    progress: &'a dyn Progress,
    done: u64,
}

impl<'a> Stage<'a> {
    /// Begins a stage of `total` units, where their number is known.
    pub fn begin(progress: &'a dyn Progress, name: &str, total: Option<u64>) -> Self {
        progress.begin(name, total);
        Self { progress, done: 0 }
    }

    /// One unit more is done; `Break` asks to stop.
    pub fn advance(&mut self, message: &str) -> ControlFlow<()> {
        self.done += 1;
        self.progress.advance(self.done, message)
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        self.progress.end("");
    }
}

/// Shows nothing and never stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Progress for Log {
        fn begin(&self, stage: &str, total: Option<u64>) {
            self.0.lock().unwrap().push(format!("{stage} of {total:?}"));
        }

        fn advance(&self, done: u64, message: &str) -> ControlFlow<()> {
            self.0.lock().unwrap().push(format!("{done} {message}"));
            if done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }

        fn end(&self, _message: &str) {
            self.0.lock().unwrap().push("end".to_string());
        }
    }

    #[test]
    fn a_stage_counts_and_ends_however_it_is_left() {
        let log = Log::default();
        let work = |progress: &dyn Progress| -> Result<(), ()> {
            let mut stage = Stage::begin(progress, "work", Some(3));
            for _ in 0..3 {
                if stage.advance("step").is_break() {
                    return Err(());
                }
            }
            Ok(())
        };
        assert!(work(&log).is_err());
        assert_eq!(*log.0.lock().unwrap(), ["work of Some(3)", "1 step", "2 step", "end"]);
        assert!(work(&Silent).is_ok());
    }
}
