//! An error and all its causes in one line.
//!
//! `Display` of our errors never prints its source, so that no cause is printed twice; whoever
//! logs an error wraps it in [`ErrorChain`].

use std::error::Error;
use std::fmt;

/// Prints an error and its sources, joined by `: `.
pub struct ErrorChain<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::num::ParseIntError);

    #[test]
    fn a_chain_prints_every_cause_once() {
        let Err(inner) = "x".parse::<u8>() else { panic!("x is no number") };
        let text = ErrorChain(&Outer(inner)).to_string();
        assert_eq!(text, "outer: invalid digit found in string");
    }
}
