//! Progress for people: a bar with the time left on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cxr::core::progress::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// How long a stage is watched before it is said how long it will take: longer than a first step that is fast.
const WATCHED: Duration = Duration::from_secs(1);
/// What is over sooner needs no estimate.
const LONG: f64 = 30.0;
/// A stage of fewer parts has unequal ones as a rule: the first says nothing of the others.
const PARTS: u64 = 20;
/// Seconds between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// Set by Ctrl-C: work ends at its next step, and what is finished is kept.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes the first Ctrl-C ask the work to stop, and the second end the program.
pub fn stop_on_interrupt() {
    let asked = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(crate::exit::Code::Stopped as i32);
        }
        eprintln!("\nstopping after this step; press Ctrl-C again to end at once");
    });
    if asked.is_err() {
        log::debug!("no Ctrl-C handler: one was installed before");
    }
}

/// Shows what is logged on standard error: warnings of this project's libraries, with `verbose` 1 all that they report,
/// with more that of other libraries too.
struct Log {
    verbose: u8,
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        let own = metadata.target().starts_with("cxr");
        match self.verbose {
            0 => own && metadata.level() <= log::Level::Warn,
            1 => own,
            _ => own || metadata.level() <= log::Level::Debug,
        }
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = match record.level() {
                log::Level::Error => "error",
                log::Level::Warn => "warning",
                log::Level::Info => "info",
                log::Level::Debug => "debug",
                log::Level::Trace => "trace",
            };
            eprintln!("{level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

static LOGS: [Log; 3] = [Log { verbose: 0 }, Log { verbose: 1 }, Log { verbose: 2 }];

/// Shows the libraries' warnings on standard error, from `verbose` 1 on what they report besides, from 2 on
/// everything, other libraries' included.
pub fn show_log(verbose: u8) {
    let logger = &LOGS[usize::from(verbose).min(LOGS.len() - 1)];
    // A logger that is there already was installed by the program that calls this.
    if log::set_logger(logger).is_ok() {
        log::set_max_level(if verbose == 0 { log::LevelFilter::Warn } else { log::LevelFilter::Trace });
    }
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Shows the stages of the work on standard error.
#[derive(Default)]
pub struct Terminal {
    stage: Mutex<Option<Stage>>,
    quiet: bool,
}

struct Stage {
    name: String,
    bar: Option<ProgressBar>,
    total: Option<u64>,
    started: Instant,
    last_line: Instant,
    /// Done when the stage was first heard of: a resumed run does not start at zero.
    first: Option<u64>,
    /// Whether it was said how long it will take.
    estimated: bool,
}

impl Stage {
    /// How long the stage takes in all, by what is done so far; once, as soon as that can be said.
    fn estimate(&mut self, done: u64, first: u64) -> Option<f64> {
        let elapsed = self.started.elapsed();
        let total = self.total.filter(|total| *total >= PARTS)?;
        if self.estimated || done <= first || elapsed < WATCHED {
            return None;
        }
        self.estimated = true;
        let all = elapsed.as_secs_f64() / (done - first) as f64 * total.saturating_sub(first) as f64;
        (all >= LONG).then_some(all)
    }
}

impl Terminal {
    /// A display; `quiet` shows nothing.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, ..Self::default() }
    }

    fn with_stage<T>(&self, act: impl FnOnce(&mut Option<Stage>) -> T) -> T {
        act(&mut self.stage.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

impl Progress for Terminal {
    fn begin(&self, stage: &str, total: Option<u64>) {
        if self.quiet {
            return;
        }
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            let template = match total {
                Some(_) => "{prefix:>22} {bar:30} {pos}/{len} {elapsed} left {eta} {msg}",
                None => "{prefix:>22} {spinner} {pos} {elapsed} {msg}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(stage.to_string());
            bar
        });
        let now = Instant::now();
        if bar.is_none() {
            eprintln!("{stage} ...");
        }
        self.with_stage(|slot| {
            *slot = Some(Stage {
                name: stage.to_string(),
                bar,
                total,
                started: now,
                last_line: now,
                first: None,
                estimated: false,
            });
        });
    }

    fn advance(&self, done: u64, message: &str) -> ControlFlow<()> {
        self.with_stage(|slot| {
            let Some(stage) = slot else { return };
            let first = *stage.first.get_or_insert(done.saturating_sub(1));
            if let Some(all) = stage.estimate(done, first) {
                let line = format!("{}: about {} by its first steps", stage.name, seconds_text(all));
                match &stage.bar {
                    Some(bar) => bar.println(line),
                    None => eprintln!("{line}"),
                }
            }
            if let Some(bar) = &stage.bar {
                if bar.position() == 0 && first > 0 {
                    bar.set_position(first);
                    bar.reset_eta();
                }
                bar.set_position(done);
                bar.set_message(message.to_string());
            } else if stage.last_line.elapsed() >= LINE_EVERY {
                stage.last_line = Instant::now();
                let seconds = stage.started.elapsed().as_secs_f64();
                let left = stage
                    .total
                    .filter(|_| done > first)
                    .map(|total| seconds / (done - first) as f64 * total.saturating_sub(done) as f64);
                let left = left.map_or(String::new(), |left| format!(", {} left", seconds_text(left)));
                let total = stage.total.map_or(String::new(), |total| format!("/{total}"));
                eprintln!("{}: {done}{total}, {}{left} {message}", stage.name, seconds_text(seconds));
            }
        });
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn end(&self, message: &str) {
        self.with_stage(|slot| {
            let Some(stage) = slot.take() else { return };
            let seconds = seconds_text(stage.started.elapsed().as_secs_f64());
            if let Some(bar) = &stage.bar {
                bar.finish_and_clear();
            }
            let message = if message.is_empty() { "done" } else { message };
            eprintln!("{}: {message} ({seconds})", stage.name);
        });
    }
}

/// `75.3` as `1:15`.
pub fn seconds_text(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    if seconds >= 3600 {
        format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    } else {
        format!("{}:{:02}", seconds / 60, seconds % 60)
    }
}

/// Gives the stages of some work a name of one's own.
pub struct Titled<'a> {
    /// Where it is shown.
    pub progress: &'a dyn Progress,
    /// The name.
    pub title: &'a str,
}

impl Progress for Titled<'_> {
    fn begin(&self, _: &str, total: Option<u64>) {
        self.progress.begin(self.title, total);
    }

    fn advance(&self, done: u64, message: &str) -> ControlFlow<()> {
        self.progress.advance(done, message)
    }

    fn end(&self, message: &str) {
        self.progress.end(message);
    }
}

/// Counts the stages of some work as the steps of one: for many short ones in a row.
pub struct Counting<'a> {
    progress: &'a dyn Progress,
    done: AtomicU64,
}

impl<'a> Counting<'a> {
    /// Begins a stage of `total` stages.
    pub fn begin(progress: &'a dyn Progress, title: &str, total: u64) -> Self {
        progress.begin(title, Some(total));
        Self { progress, done: AtomicU64::new(0) }
    }

    /// Ends it.
    pub fn finish(self, message: &str) {
        self.progress.end(message);
    }
}

impl Progress for Counting<'_> {
    fn advance(&self, _: u64, _: &str) -> ControlFlow<()> {
        self.progress.advance(self.done.load(Ordering::SeqCst), "")
    }

    fn end(&self, _: &str) {
        // a stop that is asked for here is heard at the next step
        let _ = self.progress.advance(self.done.fetch_add(1, Ordering::SeqCst) + 1, "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what it was told.
    #[derive(Default)]
    struct Heard(Mutex<Vec<(u64, String)>>);

    impl Progress for Heard {
        fn begin(&self, stage: &str, total: Option<u64>) {
            self.0.lock().unwrap().push((total.unwrap_or(0), stage.to_string()));
        }

        fn advance(&self, done: u64, _: &str) -> ControlFlow<()> {
            self.0.lock().unwrap().push((done, String::new()));
            if done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }

    #[test]
    fn how_long_a_stage_takes_is_said_once_and_only_of_long_ones() {
        let stage = |seconds: u64, total| Stage {
            name: "steps".into(),
            bar: None,
            total,
            started: Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap(),
            last_line: Instant::now(),
            first: None,
            estimated: false,
        };
        // A run that goes on from step 100: two steps took 4 seconds, 900 are to be made.
        let mut long = stage(4, Some(1000));
        let all = long.estimate(102, 100).unwrap();
        assert!((1800.0..1900.0).contains(&all), "{all}");
        assert_eq!(long.estimate(103, 100), None);
        assert_eq!(stage(2, Some(25)).estimate(2, 0), None, "25 seconds");
        assert_eq!(stage(40, Some(16)).estimate(1, 0), None, "few parts");
        assert_eq!(stage(4, None).estimate(2, 0), None);
        assert_eq!(stage(0, Some(1000)).estimate(2, 0), None, "too early to say");
    }

    #[test]
    fn times_read_as_people_write_them() {
        assert_eq!([0.4, 75.3, 3725.0].map(seconds_text), ["0:00", "1:15", "1:02:05"]);
    }

    #[test]
    fn many_stages_count_as_one_and_a_stop_reaches_them() {
        let heard = Heard::default();
        let counting = Counting::begin(&heard, "measuring", 3);
        for _ in 0..2 {
            Progress::begin(&counting, "part", Some(100));
            counting.end("");
        }
        assert_eq!(counting.advance(57, "of the third part"), ControlFlow::Break(()));
        let told = heard.0.lock().unwrap().clone();
        assert_eq!(told.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [3, 1, 2, 2]);
        assert_eq!(told[0].1, "measuring");
    }
}
