//! Lines for people, where no live view is: on standard output, or on standard error when that
//! must stay clean for the summary. A reader that has gone away is nobody to tell.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use super::observe::Screen;
use super::summary::percent;
use super::view::millis;
use crate::output::Paint;

/// Where progress is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    to_stderr: bool,
    pub(crate) paint: Paint,
}

impl Progress {
    /// On standard error if standard output is for a program.
    pub(crate) fn new(json: bool) -> Self {
        let terminal = if json { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
        Self { to_stderr: json, paint: Paint::when(terminal) }
    }

    /// One line, or several.
    pub(crate) fn say(self, text: &str) {
        // Nobody is left to tell if this fails; what must go on, goes on.
        let _ = self.write(text);
    }

    fn write(self, text: &str) -> io::Result<()> {
        let text = format!("{text}\n");
        if self.to_stderr {
            return io::stderr().write_all(text.as_bytes());
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Something has been reached, after this time.
    pub(crate) fn reached(self, what: &str, took: Duration, details: &str) {
        let mark = self.paint.green("✓");
        let took = format!("{:>5.1} s", took.as_secs_f64());
        self.say(&format!("  {mark} {what:<18} {}  {details}", self.paint.dim(&took)));
    }

    /// How it goes, in one line of at most 80 columns.
    ///
    /// # Errors
    /// Whoever read this has gone.
    pub(crate) fn tick(self, screen: &Screen) -> io::Result<()> {
        self.write(&line(screen))
    }
}

fn line(screen: &Screen) -> String {
    let (p50, p99) = screen.edges.first().map_or((None, None), |edge| (edge.p50, edge.p99));
    let renewals: u64 = screen.workloads.iter().map(|row| row.renewals).sum();
    let mut text = format!(
        "  {:>4}s  {} requests, {} failed, mTLS {}, p50 {}, p99 {}, {renewals} renewals",
        screen.elapsed.as_secs(),
        screen.requests,
        screen.failed,
        percent(screen.mtls_rate),
        millis(p50),
        millis(p99),
    );
    if let Some(problem) = screen.problem.as_ref().or(screen.first_failure.as_ref()) {
        text.push_str(&format!("\n         {problem}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_and_tells_the_first_failure() {
        let mut screen = Screen {
            elapsed: Duration::from_secs(3600),
            length: None,
            trust_domain: "cluster.local".to_owned(),
            svid_ttl: Duration::from_secs(30),
            requests: 360_000,
            failed: 0,
            mtls_rate: Some(1.0),
            first_failure: None,
            edges: Vec::new(),
            workloads: Vec::new(),
            rotation: None,
            problem: None,
        };
        let text = line(&screen);
        assert_eq!(
            text,
            "  3600s  360000 requests, 0 failed, mTLS 100 %, p50 –, p99 –, 0 renewals"
        );
        screen.first_failure = Some("answered 503".to_owned());
        assert!(line(&screen).ends_with("\n         answered 503"));
    }
}
