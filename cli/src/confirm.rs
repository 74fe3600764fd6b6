//! Asking a person before something is done that others will notice.

use std::io::{self, IsTerminal as _, Write as _};

use crate::output::Format;
use crate::problem::Problem;

/// Who gives an order, and whether he wants to be asked.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct OrderArgs {
    /// Do not ask
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Who orders it, for the history [default: $USER]
    #[arg(
        long,
        value_name = "NAME",
        env = "USER",
        hide_env = true,
        default_value = "unknown",
        hide_default_value = true
    )]
    pub(crate) by: String,
}

/// Whether a person is there and wants to be asked.
pub(crate) fn asks(args: &OrderArgs, output: Format) -> bool {
    !args.yes && is_somebody_there(output)
}

/// Waits for a `y`; anything else is a no.
///
/// # Errors
/// The answer is no; or nobody can be asked.
pub(crate) fn confirm(question: &str, args: &OrderArgs, output: Format) -> Result<(), Problem> {
    match agrees(question, args.yes, output)? {
        true => Ok(()),
        false => Err(Problem::found("nothing was changed")),
    }
}

/// The same for a no that leaves something changed: what, is for the caller to say.
///
/// # Errors
/// Nobody can be asked.
pub(crate) fn agrees(question: &str, yes: bool, output: Format) -> Result<bool, Problem> {
    if yes {
        return Ok(true);
    }
    if !is_somebody_there(output) {
        return Err(Problem::usage(
            "this asks before it begins, and nobody is there to answer: add --yes",
        ));
    }
    write!(io::stderr(), "{question} [y/N] ")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// A program that reads the answer is asked nothing.
fn is_somebody_there(output: Format) -> bool {
    output == Format::Table && io::stdin().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_reads_the_answer_is_never_asked() {
        assert!(agrees("Begin?", true, Format::Json).unwrap());
        for output in [Format::Json, Format::Yaml] {
            let refused = agrees("Begin?", false, output).unwrap_err();
            assert!(refused.text().contains("add --yes"), "{}", refused.text());
        }
    }
}
