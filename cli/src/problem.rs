//! A problem as a person meets it: a text that names the thing, the value and the fix, and the
//! exit code. The error types of the modules end here.

use std::error::Error;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use steadfast_process::ErrorChain;

use crate::output::Paint;

/// Why a command ends without having done what it was asked.
#[derive(Debug)]
pub(crate) struct Problem {
    text: String,
    exit: u8,
}

impl Problem {
    /// Something is wrong with the mesh, the machine or the files: exit code 1.
    pub(crate) fn found(text: impl Into<String>) -> Self {
        Self { text: text.into(), exit: FOUND }
    }

    /// The command cannot mean what it says: exit code 2.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), exit: USAGE }
    }

    /// Prints it to standard error.
    pub(crate) fn report(self) -> ExitCode {
        if !self.text.is_empty() {
            let paint = Paint::when(io::stderr().is_terminal());
            // Nobody is left to tell if this fails.
            let _ = writeln!(io::stderr(), "{} {}", paint.red("error:"), self.text);
        }
        ExitCode::from(self.exit)
    }

    #[cfg(test)]
    pub(crate) fn text(&self) -> &str {
        &self.text
    }
}

/// Every error of a module, with its causes in one line. Output that nobody reads any more is the
/// one that ends the command without a word.
impl<E: Error + 'static> From<E> for Problem {
    fn from(error: E) -> Self {
        let io = (&error as &(dyn Error + 'static)).downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe) {
            return Self { text: String::new(), exit: 0 };
        }
        Self::found(ErrorChain(&error).to_string())
    }
}

const FOUND: u8 = 1;
const USAGE: u8 = 2;
