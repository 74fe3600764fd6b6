//! `steadfast explain`: what a code means and what to do about it.

use steadfast_api::Code;

use crate::output::{Format, Paint, table, wrap};
use crate::problem::Problem;
use crate::suggest::nearest;

/// Say what an error code means and what to do about it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast explain                  list every code
  steadfast explain SFT-TLS-001      one code, in any case
  steadfast explain -o json          every code for a program")]
pub(crate) struct Args {
    /// The code, as it stands in a log line; every code is listed without one
    code: Option<String>,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

pub(super) fn run(args: &Args) -> Result<(), Problem> {
    let Some(text) = &args.code else {
        let pages: Vec<_> = Code::all().map(Page::of).collect();
        return Ok(args.output.print(&pages, |_| listing())?);
    };
    let Ok(code) = text.trim().parse::<Code>() else { return Err(unknown(text)) };
    Ok(args.output.print(&Page::of(code), |_| page(code, Paint::stdout()))?)
}

/// A code for a program.
#[derive(serde::Serialize)]
struct Page {
    code: &'static str,
    label: &'static str,
    title: &'static str,
    meaning: &'static str,
    fix: &'static str,
}

impl Page {
    fn of(code: Code) -> Self {
        Self {
            code: code.as_str(),
            label: code.label(),
            title: code.title(),
            meaning: code.meaning(),
            fix: code.fix(),
        }
    }
}

fn listing() -> String {
    let rows: Vec<_> =
        Code::all().map(|code| [code.to_string(), code.title().to_owned()]).collect();
    table(["CODE", "WHAT HAS HAPPENED"], &rows)
}

fn page(code: Code, paint: Paint) -> String {
    format!(
        "{} {}\n\n{}\n{}\n{}\n{}",
        paint.bold(code.as_str()),
        paint.bold(code.title()),
        wrap(code.meaning(), "  ", COLUMNS),
        paint.green("What to do"),
        wrap(code.fix(), "  ", COLUMNS),
        paint.dim(&format!("In metrics: {}\n", code.label())),
    )
}

fn unknown(text: &str) -> Problem {
    let near = nearest(text.trim(), Code::all().map(Code::as_str));
    let hint = match near.as_slice() {
        [] => "codes look like SFT-ID-001; `steadfast explain` lists them".to_owned(),
        near => {
            let lines = near.iter().filter_map(|code| code.parse::<Code>().ok());
            let lines: Vec<_> = lines.map(|code| format!("\n  {code}  {}", code.title())).collect();
            format!("did you mean{}", lines.concat())
        }
    };
    Problem::usage(format!("{text:?} is no Steadfast code; {hint}"))
}

/// Reads well on the narrowest terminal that anyone still has.
const COLUMNS: usize = 78;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_what_and_what_to_do_within_its_columns() {
        for code in Code::all() {
            let text = page(code, Paint::plain());
            assert!(text.contains(code.as_str()) && text.contains("What to do"));
            assert!(text.lines().skip(1).all(|line| line.chars().count() <= COLUMNS), "{text}");
        }
    }

    #[test]
    fn an_unknown_code_gets_the_nearest_ones() {
        let problem = unknown("sft-tls-01");
        assert!(problem.text().contains("SFT-TLS-001"), "{}", problem.text());
        let problem = unknown("what");
        assert!(problem.text().contains("`steadfast explain` lists them"));
    }
}
