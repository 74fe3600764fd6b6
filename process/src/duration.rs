//! Durations as people write and read them: `500ms`, `30s`, `5m`, `24h`, `7d`, `1m30s`.
//!
//! The one grammar of every flag and variable of ours, so that what one program takes, all take.

use std::time::Duration;

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// Nothing there.
    #[error("is empty; write a number and a unit, such as 500ms, 30s, 5m or 24h")]
    Empty,
    /// A number alone.
    #[error("has no unit: write {0}s for seconds (units are ms, s, m, h, d)")]
    NoUnit(u64),
    /// Not a number where one must be.
    #[error("is no duration: write a number and a unit, such as 500ms, 30s, 5m or 24h")]
    NotANumber,
    /// More than we can hold.
    #[error("is too long")]
    TooLong,
    /// A unit that we do not know.
    #[error("has the unit {0:?}: units are ms, s, m, h, d")]
    Unit(String),
}

/// Reads a duration: numbers, each with its unit.
///
/// # Errors
/// What is wrong with the text; the text itself is left for the caller to name.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    if text.is_empty() {
        return Err(DurationError::Empty);
    }
    let mut rest = text;
    let mut millis = 0_u64;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        if digits == 0 {
            return Err(DurationError::NotANumber);
        }
        let number = rest[..digits].parse::<u64>().map_err(|_| DurationError::TooLong)?;
        let unit_and_rest = &rest[digits..];
        let unit_end = unit_and_rest.find(|c: char| c.is_ascii_digit());
        let (unit, after) = unit_and_rest.split_at(unit_end.unwrap_or(unit_and_rest.len()));
        let unit_ms = match unit {
            "" => return Err(DurationError::NoUnit(number)),
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            other => return Err(DurationError::Unit(other.to_owned())),
        };
        let part = number.checked_mul(unit_ms).ok_or(DurationError::TooLong)?;
        millis = millis.checked_add(part).ok_or(DurationError::TooLong)?;
        rest = after;
    }
    Ok(Duration::from_millis(millis))
}

/// A duration in the two units that matter: `850ms`, `12s`, `4m05s`, `23h10m`, `29d4h`.
pub fn show(duration: Duration) -> String {
    let secs = duration.as_secs();
    match secs {
        0 if duration.is_zero() => "0s".to_owned(),
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{secs}s"),
        60..3600 => format!("{}m{:02}s", secs / 60, secs % 60),
        3600..86_400 => format!("{}h{:02}m", secs / 3600, secs % 3600 / 60),
        _ if secs % 86_400 < 3600 => format!("{}d", secs / 86_400),
        _ => format!("{}d{}h", secs / 86_400, secs % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_written() {
        for (text, millis) in [
            ("500ms", 500),
            ("60s", 60_000),
            ("5m", 300_000),
            ("24h", 86_400_000),
            ("7d", 604_800_000),
            ("1m30s", 90_000),
            ("0s", 0),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_says_why() {
        for (text, error) in [
            ("", DurationError::Empty),
            ("60", DurationError::NoUnit(60)),
            ("1m30", DurationError::NoUnit(30)),
            ("s", DurationError::NotANumber),
            ("-5s", DurationError::NotANumber),
            ("1.5s", DurationError::Unit(".".to_owned())),
            ("5 s", DurationError::Unit(" s".to_owned())),
            ("5min", DurationError::Unit("min".to_owned())),
            ("99999999999999999999s", DurationError::TooLong),
            ("18446744073709551615d", DurationError::TooLong),
        ] {
            assert_eq!(parse(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn durations_show_the_two_units_that_matter() {
        for (millis, text) in [
            (0, "0s"),
            (850, "850ms"),
            (12_400, "12s"),
            (245_000, "4m05s"),
            (83_400_000, "23h10m"),
            (2_520_000_000, "29d4h"),
            (2_592_000_000, "30d"),
        ] {
            assert_eq!(show(Duration::from_millis(millis)), text);
        }
    }
}
