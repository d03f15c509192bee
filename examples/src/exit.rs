//! How programs end: with a number that scripts can use.

use std::fmt;
use std::process::ExitCode;

use anyhow::Result;

use crate::progress::interrupted;

/// The last lines of every program's help.
pub const EXIT_CODES: &str = "Exit codes:
  0    done
  1    failed; the last line on standard error says what was wrong, in which file or flag, and what to do
  2    arguments that cannot be meant; nothing was begun
  3    it needs more memory than there is; nothing was begun
  130  stopped by Ctrl-C or SIGTERM; what is finished is kept, and the same command goes on";

/// Why a program ends before its work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Anything that has no number of its own.
    Failed = 1,
    /// Arguments that cannot be meant; clap's own errors have the same number.
    Arguments = 2,
    /// More memory is needed than there is.
    Memory = 3,
    /// It was asked to stop: 128 and the number of `SIGINT`, as shells have it.
    Stopped = 130,
}

/// An error with a number.
#[derive(Debug)]
struct Coded {
    code: Code,
    /// The whole chain.
    message: String,
}

impl fmt::Display for Coded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Coded {}

/// Gives errors a number other than 1.
pub trait OrExit<T> {
    /// The same result; an error ends the program with `code`.
    ///
    /// # Errors
    /// The same.
    fn or_exit(self, code: Code) -> Result<T>;
}

impl<T> OrExit<T> for Result<T> {
    fn or_exit(self, code: Code) -> Result<T> {
        self.map_err(|error| Coded { code, message: format!("{error:#}") }.into())
    }
}

/// The number of an error. What fails once it was asked to stop was stopped.
fn code(error: &anyhow::Error, stopped: bool) -> Code {
    match error.downcast_ref::<Coded>() {
        _ if stopped => Code::Stopped,
        Some(coded) => coded.code,
        None => Code::Failed,
    }
}

/// Ends `main`: prints the chain of what went wrong.
pub fn exit(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(code(&error, interrupted()) as u8)
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn an_error_keeps_its_number_and_its_words() {
        let plain: Result<()> = Err(anyhow!("no such file")).context("--data");
        let error = plain.or_exit(Code::Arguments).context("of the command line").unwrap_err();
        assert_eq!(format!("{error:#}"), "of the command line: --data: no such file");
        assert_eq!((code(&error, false), code(&error, true)), (Code::Arguments, Code::Stopped));
        assert_eq!(code(&anyhow!("else"), false), Code::Failed);
    }

    #[test]
    fn the_help_has_every_number() {
        for code in [Code::Failed, Code::Arguments, Code::Memory, Code::Stopped] {
            let number = format!("\n  {} ", code as u8);
            assert!(EXIT_CODES.contains(&number), "{code:?}");
        }
    }
}
