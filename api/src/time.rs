//! Wall-clock time as a value: milliseconds since the Unix epoch.
//!
//! The pure crates take "now" as an argument of this type; only a shell's `clock` makes one.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A point in wall-clock time, in milliseconds since 1970-01-01T00:00:00Z.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct UnixTime(u64);

impl UnixTime {
    /// From milliseconds since the epoch.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// From seconds since the epoch; times before it become the epoch.
    pub const fn from_secs(secs: i64) -> Self {
        Self((if secs < 0 { 0 } else { secs as u64 }).saturating_mul(1000))
    }

    /// Milliseconds since the epoch.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// Whole seconds since the epoch, rounded down: the resolution of X.509 times.
    pub const fn as_secs(self) -> u64 {
        self.0 / 1000
    }

    /// How long after `earlier` this is; zero if it is not.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }

    /// This time less the other, in milliseconds: negative when it is earlier.
    pub const fn offset_millis(self, other: Self) -> i64 {
        if self.0 >= other.0 { saturated(self.0 - other.0) } else { -saturated(other.0 - self.0) }
    }
}

impl Add<Duration> for UnixTime {
    type Output = Self;
    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(millis(rhs)))
    }
}

impl Sub<Duration> for UnixTime {
    type Output = Self;
    fn sub(self, rhs: Duration) -> Self {
        Self(self.0.saturating_sub(millis(rhs)))
    }
}

impl From<SystemTime> for UnixTime {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(millis(since))
    }
}

impl From<UnixTime> for SystemTime {
    fn from(time: UnixTime) -> Self {
        UNIX_EPOCH + Duration::from_millis(time.0)
    }
}

impl From<UnixTime> for prost_types::Timestamp {
    fn from(time: UnixTime) -> Self {
        Self { seconds: (time.0 / 1000) as i64, nanos: (time.0 % 1000) as i32 * 1_000_000 }
    }
}

impl From<prost_types::Timestamp> for UnixTime {
    fn from(time: prost_types::Timestamp) -> Self {
        let millis = u64::try_from(time.nanos / 1_000_000).unwrap_or(0);
        Self(Self::from_secs(time.seconds).0.saturating_add(millis))
    }
}

/// RFC 3339 in UTC, to the second: what a person reads in logs and listings.
impl fmt::Display for UnixTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Days to civil date: Howard Hinnant's algorithm, exact for the whole range of u64 seconds
        // that a certificate can name (https://howardhinnant.github.io/date_algorithms.html).
        let secs = self.as_secs();
        let (days, rest) = (secs / 86_400 + 719_468, secs % 86_400);
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

const fn saturated(millis: u64) -> i64 {
    if millis > i64::MAX as u64 { i64::MAX } else { millis as i64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_rfc3339() {
        for (secs, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_102_444_800, "2100-01-01T00:00:00Z"),
        ] {
            assert_eq!(UnixTime::from_secs(secs).to_string(), text);
        }
    }

    #[test]
    fn arithmetic_saturates() {
        let (first, last) = (UnixTime::default(), UnixTime::from_millis(u64::MAX));
        assert_eq!(last + Duration::MAX, last);
        assert_eq!(first - Duration::MAX, first);
        assert_eq!(last.offset_millis(first), i64::MAX);
        assert_eq!(first.offset_millis(last), -i64::MAX);
        assert_eq!(UnixTime::from_secs(i64::MAX).offset_millis(last), 0);
        let _ = (last.to_string(), SystemTime::from(last));
    }

    #[test]
    fn a_time_before_the_epoch_becomes_the_epoch() {
        assert_eq!(UnixTime::from_secs(-5).as_millis(), 0);
    }
}
