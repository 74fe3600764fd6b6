//! What the commands print: aligned tables, colours where they are wanted, and standard output
//! that may have lost its reader.

use std::io::{self, IsTerminal as _, Write as _};

use clap::ValueEnum;
use serde::Serialize;

/// The form of a listing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For programs.
    Json,
    /// For people.
    #[default]
    Table,
    /// For programs, and people who like it better than JSON.
    Yaml,
}

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint(bool);

impl Paint {
    /// Colours for standard output.
    pub(crate) fn stdout() -> Self {
        Self::when(io::stdout().is_terminal())
    }

    /// Colours if this is so and the user has not asked for none.
    pub(crate) fn when(terminal: bool) -> Self {
        Self(terminal && colours_wanted())
    }

    /// No colours.
    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        Self(false)
    }

    /// Whether there are any.
    pub(crate) fn is_on(self) -> bool {
        self.0
    }

    /// Stands out.
    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// Stands back.
    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// Is wrong.
    pub(crate) fn red(self, text: &str) -> String {
        self.wrap("1;31", text)
    }

    /// Is well.
    pub(crate) fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Writes to standard output.
///
/// # Errors
/// As the operating system says; a reader that has gone away is a broken pipe.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

impl Format {
    /// Writes a value in this form; `table` makes what people read.
    ///
    /// # Errors
    /// As [`print()`].
    pub(crate) fn print<T: Serialize>(
        self,
        value: &T,
        table: impl FnOnce(&T) -> String,
    ) -> io::Result<()> {
        match self {
            Self::Json => print(&(serde_json::to_string_pretty(value)? + "\n")),
            Self::Table => print(&table(value)),
            Self::Yaml => print(&yaml(value)?),
        }
    }

    /// The same as one of many, as a reader of a stream takes them: JSON in a line, YAML as a
    /// document.
    ///
    /// # Errors
    /// As [`print()`].
    pub(crate) fn print_line<T: Serialize>(
        self,
        value: &T,
        table: impl FnOnce(&T) -> String,
    ) -> io::Result<()> {
        match self {
            Self::Json => print(&(serde_json::to_string(value)? + "\n")),
            Self::Table => print(&table(value)),
            Self::Yaml => print(&format!("---\n{}", yaml(value)?)),
        }
    }
}

fn yaml(value: &impl Serialize) -> io::Result<String> {
    let text = serde_saphyr::to_string(value).map_err(io::Error::other)?;
    Ok(text.trim_end().to_owned() + "\n")
}

/// Columns two spaces apart, each as wide as its widest cell; nothing behind the last.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(width);
    for row in rows {
        for (have, cell) in widths.iter_mut().zip(row) {
            *have = (*have).max(width(cell));
        }
    }
    let mut text = String::new();
    let mut line = |cells: &[&str]| {
        let mut at = String::new();
        for (cell, wide) in cells.iter().zip(widths) {
            at.push_str(cell);
            at.push_str(&" ".repeat(wide - width(cell) + 2));
        }
        text.push_str(at.trim_end());
        text.push('\n');
    };
    line(&header);
    for row in rows {
        line(&row.each_ref().map(String::as_str));
    }
    text
}

/// A certificate in PEM.
pub(crate) fn pem(der: &[u8]) -> String {
    pem_of("CERTIFICATE", der)
}

/// Anything in PEM, with line feeds as everyone on these machines has them.
pub(crate) fn pem_of(label: &str, der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), config)
}

/// Breaks a text into lines of at most `columns`, each behind `indent`.
pub(crate) fn wrap(text: &str, indent: &str, columns: usize) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && width(&line) + 1 + width(word) > columns - width(indent) {
            lines.push_str(&format!("{indent}{line}\n"));
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines + &format!("{indent}{line}\n")
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// <https://no-color.org>: set to anything but nothing. A dumb terminal shows none either.
#[allow(clippy::disallowed_methods)] // A convention of all programs, not our configuration.
fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_has_no_trailing_spaces() {
        let rows = [["web".to_owned(), "1".to_owned()], ["store".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "N"], &rows), "NAME   N\nweb    1\nstore\n");
    }

    #[test]
    fn a_listing_in_yaml_says_what_the_one_in_json_says() {
        let value = serde_json::json!([
            { "name": "web", "text": "two\nlines: \"x\"", "left": null, "count": 3 },
            { "name": "no", "list": ["1", "true"] },
        ]);
        let text = yaml(&value).unwrap();
        assert!(text.starts_with("- ") && text.ends_with('\n'), "{text}");
        assert_eq!(serde_saphyr::from_str::<serde_json::Value>(&text).unwrap(), value, "{text}");
    }

    #[test]
    fn wrapped_lines_keep_to_their_columns() {
        let text = wrap("one two three four", "  ", 11);
        assert_eq!(text, "  one two\n  three\n  four\n");
    }

    #[test]
    fn without_colours_a_text_stays_as_it_is() {
        assert_eq!(Paint::plain().red("x"), "x");
        assert_eq!(Paint(true).red("x"), "\x1b[1;31mx\x1b[0m");
    }
}
