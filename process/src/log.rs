//! The log: one line an event, to standard error, as text or JSON.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// JSON, one object a line.
    Json,
    /// For people.
    #[default]
    Plain,
}

impl std::str::FromStr for Format {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "json" => Ok(Self::Json),
            "plain" => Ok(Self::Plain),
            other => Err(format!("{other:?} is no log format: expected \"plain\" or \"json\"")),
        }
    }
}

/// Changes the level of a running log.
#[derive(Clone)]
pub struct Handle(reload::Handle<EnvFilter, Registry>);

/// Starts the log. `filter` is in the syntax of `tracing` (`info`, `warn,steadfast_proxy=debug`).
///
/// # Errors
/// A filter that does not parse, or a log that was started before.
pub fn init(filter: &str, format: Format) -> Result<Handle, String> {
    let filter = parse_filter(filter)?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !no_color())
        .with_target(false);
    let lines = match format {
        Format::Json => lines.json().flatten_event(true).boxed(),
        Format::Plain => lines.boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|error| error.to_string())?;
    Ok(Handle(handle))
}

impl Handle {
    /// The filter in force.
    pub fn filter(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Puts another filter in force.
    ///
    /// # Errors
    /// A filter that does not parse; the old one stays.
    pub fn set_filter(&self, filter: &str) -> Result<(), String> {
        self.0.reload(parse_filter(filter)?).map_err(|error| error.to_string())
    }
}

fn parse_filter(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(filter).map_err(|error| format!("log filter {filter:?}: {error}"))
}

/// <https://no-color.org>: set to anything but nothing.
#[allow(clippy::disallowed_methods)] // A convention of all programs, not our configuration.
fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}
