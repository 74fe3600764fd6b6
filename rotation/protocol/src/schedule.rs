//! When a rotation begins by itself.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;

use crate::trust_domain::{AnchorRecord, TrustDomainState};

/// When anchors are rotated without anybody asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// An anchor is active for so long.
    pub anchor_period: Duration,
    /// Only in these hours, unless it is late.
    pub window: Option<Window>,
}

/// Hours of every day, UTC; they may go past midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// After midnight.
    pub from: Duration,
    /// How long they last.
    pub length: Duration,
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let minutes = |time: Duration| time.as_secs() / 60;
        let (from, to) = (minutes(self.from), minutes(self.from + self.length) % DAY_MINUTES);
        write!(f, "{:02}:{:02} to {:02}:{:02} UTC", from / 60, from % 60, to / 60, to % 60)
    }
}

impl Window {
    /// Whether this moment is in them.
    pub fn holds(&self, now: UnixTime) -> bool {
        let into_day = Duration::from_millis(now.as_millis() % DAY_MS);
        let since = |from: Duration| into_day.checked_sub(from);
        let day = Duration::from_millis(DAY_MS);
        let since_start = since(self.from).unwrap_or_else(|| into_day + day - self.from.min(day));
        since_start < self.length
    }
}

impl Schedule {
    /// Whether the active anchor is to be replaced now: after its period, in the hours for it,
    /// unless it is external, since that is for its owner to say; and at any hour when no more than
    /// three slow paths are left before it ends.
    pub fn is_due(&self, state: &TrustDomainState, now: UnixTime, slow_path: Duration) -> bool {
        let Some(active) = state.active_anchor() else { return false };
        let old = !active.is_external() && now >= state.activated_at + self.anchor_period;
        is_late(active, now, slow_path) || old && self.is_open(state, now, slow_path)
    }

    /// Whether a rotation that is due may begin now: in the hours for it, and at any hour when it is
    /// late. It is, too, where an issuer that only its owner can replace would not last until then.
    pub fn is_open(&self, state: &TrustDomainState, now: UnixTime, slow_path: Duration) -> bool {
        let late = state.active_anchor().is_none_or(|active| {
            let ends = state.active_issuer().map_or(active.not_after, |issuer| issuer.not_after);
            let day = Duration::from_millis(DAY_MS);
            is_late(active, now, slow_path) || active.is_external() && now + day + slow_path >= ends
        });
        late || self.window.is_none_or(|window| window.holds(now))
    }
}

fn is_late(active: &AnchorRecord, now: UnixTime, slow_path: Duration) -> bool {
    now + slow_path * SLOW_PATHS >= active.not_after
}

const DAY_MS: u64 = 86_400_000;
const DAY_MINUTES: u64 = 1_440;
/// A rotation that can only wait for SVIDs to expire still ends in time, twice over.
const SLOW_PATHS: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn hours_go_past_midnight() {
        let window = Window { from: HOUR * 22, length: HOUR * 4 };
        let at = |hours: i64| UnixTime::from_secs(1_800_057_600 + hours * 3600);
        assert_eq!(at(0).as_millis() % DAY_MS, 0, "midnight");
        for hours in [22, 23, 24, 25, -1, 0, 1] {
            assert!(window.holds(at(hours)), "{hours}");
        }
        for hours in [2, 12, 21, 26] {
            assert!(!window.holds(at(hours)), "{hours}");
        }
    }

    #[test]
    fn hours_are_told_by_the_clock() {
        let window = Window { from: HOUR * 45 / 2, length: HOUR * 4 };
        assert_eq!(window.to_string(), "22:30 to 02:30 UTC");
    }

    #[test]
    fn a_day_long_window_is_always_open_and_an_empty_one_never() {
        for hours in 0..48 {
            let at = UnixTime::from_secs(1_800_000_000 + hours * 3600);
            assert!(Window { from: HOUR * 5, length: HOUR * 24 }.holds(at));
            assert!(!Window { from: HOUR * 5, length: Duration::ZERO }.holds(at));
        }
    }
}
