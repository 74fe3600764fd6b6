//! The server's time, told by a local wall clock that jumps.
//!
//! Local time is read into [`Steady`], which never runs backwards: a step back counts as no time
//! passed, a step forward or a suspension as time passed. The server's time is Steady less a
//! measured offset. Lives and schedules are compared in the server's time, waits in Steady.

use std::ops::Add;
use std::time::Duration;

use steadfast_api::UnixTime;

/// Local wall-clock time less every step back, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Steady(i64);

/// What is known of the two clocks.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerClock {
    /// The wall clock at the last event; `None` before the first.
    wall: Option<UnixTime>,
    /// Steady less the wall clock: the sum of all steps back.
    stepped_back_millis: i64,
    /// Steady less the server's clock; `None` before the first measurement.
    offset_millis: Option<i64>,
}

impl ServerClock {
    /// Takes in what the wall clock says; answers by how much it has jumped, if it has. A step
    /// forward cannot be told from a suspension: it shows as a wait longer than was asked for.
    pub(crate) fn observe(&mut self, wall: UnixTime, asked: Duration) -> Option<i64> {
        let last = self.wall.replace(wall)?;
        let passed_millis = wall.offset_millis(last);
        if passed_millis < 0 {
            self.stepped_back_millis = self.stepped_back_millis.saturating_sub(passed_millis);
        }
        let overslept_millis = passed_millis.saturating_sub(millis(asked));
        if passed_millis < -millis(STEP_BACK_MIN) {
            Some(passed_millis)
        } else {
            (overslept_millis > millis(STEP_FORWARD_MIN)).then_some(overslept_millis)
        }
    }

    /// The time of the last event.
    pub(crate) fn now(&self) -> Steady {
        let wall_millis = self.wall.map_or(0, |wall| wall.offset_millis(UnixTime::default()));
        Steady(wall_millis.saturating_add(self.stepped_back_millis))
    }

    /// Measures the offset by an answer that was asked for at `sent` and has arrived now. The
    /// server wrote its time somewhere between, so that half the trip is the best guess.
    pub(crate) fn measure_round_trip(&mut self, sent: Steady, server: UnixTime) {
        let now = self.now();
        let middle = Steady(now.0.saturating_sub(now.0.saturating_sub(sent.0) / 2));
        self.offset_millis = Some(offset(middle, server));
    }

    /// Measures the offset by a message that nobody asked for. It may have lain in a buffer for a
    /// week: it proves that the server's clock is at least there, never that it is behind.
    pub(crate) fn measure_one_way(&mut self, server: UnixTime) {
        let measured = offset(self.now(), server);
        if measured < self.offset_millis.unwrap_or(0) {
            self.offset_millis = Some(measured);
        }
    }

    /// The server's time at a local one; the local clock is believed until there is an offset.
    pub(crate) fn server(&self, at: Steady) -> UnixTime {
        let server_millis = at.0.saturating_sub(self.offset_millis.unwrap_or(0));
        UnixTime::from_millis(u64::try_from(server_millis).unwrap_or(0))
    }

    /// The local time at which the server's clock will say `server`.
    pub(crate) fn steady(&self, server: UnixTime) -> Steady {
        let server_millis = server.offset_millis(UnixTime::default());
        Steady(server_millis.saturating_add(self.offset_millis.unwrap_or(0)))
    }

    /// What the wall clock will show then, if it does not jump.
    pub(crate) fn wall(&self, at: Steady) -> UnixTime {
        let wall_millis = at.0.saturating_sub(self.stepped_back_millis);
        UnixTime::from_millis(u64::try_from(wall_millis).unwrap_or(0))
    }

    /// The wall clock less the server's; `None` before the first measurement.
    pub(crate) fn wall_offset_millis(&self) -> Option<i64> {
        Some(self.offset_millis?.saturating_sub(self.stepped_back_millis))
    }
}

impl Steady {
    /// How long after `earlier` this is; zero if it is not.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        let passed_millis = self.0.saturating_sub(earlier.0);
        Duration::from_millis(u64::try_from(passed_millis).unwrap_or(0))
    }
}

impl Add<Duration> for Steady {
    type Output = Self;
    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(millis(rhs)))
    }
}

fn offset(local: Steady, server: UnixTime) -> i64 {
    local.0.saturating_sub(server.offset_millis(UnixTime::default()))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Clocks are slewed by milliseconds all the time; that is no jump.
const STEP_BACK_MIN: Duration = Duration::from_secs(1);
/// A busy machine wakes late by seconds; that is no jump either.
const STEP_FORWARD_MIN: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Duration = Duration::from_secs(30);

    fn at(secs: i64) -> UnixTime {
        UnixTime::from_secs(secs)
    }

    #[test]
    fn a_step_back_is_a_jump_and_no_time_passes() {
        let mut clock = ServerClock::default();
        assert_eq!(clock.observe(at(1000), ASKED), None);
        clock.measure_round_trip(clock.now(), at(1000));
        assert_eq!(clock.observe(at(400), ASKED), Some(-600_000));
        assert_eq!(clock.server(clock.now()), at(1000));
        assert_eq!(clock.wall_offset_millis(), Some(-600_000));
        assert_eq!(clock.observe(at(410), ASKED), None);
        assert_eq!(clock.server(clock.now()), at(1010));
        assert_eq!(clock.wall(clock.steady(at(1020))), at(420));
    }

    #[test]
    fn a_suspension_is_a_jump_and_its_time_passes() {
        let mut clock = ServerClock::default();
        clock.observe(at(1000), ASKED);
        assert_eq!(clock.observe(at(1035), ASKED), None, "a late waking is no jump");
        assert_eq!(clock.observe(at(5000), ASKED), Some(3_935_000));
        assert_eq!(clock.server(clock.now()), at(5000));
    }

    #[test]
    fn a_stale_message_never_sets_the_server_back() {
        let mut clock = ServerClock::default();
        clock.observe(at(1000), ASKED);
        clock.measure_one_way(at(990));
        assert_eq!(clock.server(clock.now()), at(1000), "not even the first");
        assert_eq!(clock.wall_offset_millis(), None);
        clock.measure_round_trip(clock.now(), at(700));
        clock.observe(at(1010), ASKED);
        clock.measure_one_way(at(600));
        assert_eq!(clock.server(clock.now()), at(710));
        clock.measure_one_way(at(720));
        assert_eq!(clock.server(clock.now()), at(720));
        clock.measure_round_trip(clock.now(), at(650));
        assert_eq!(clock.server(clock.now()), at(650), "an answer does");
    }

    #[test]
    fn extremes_saturate() {
        let mut clock = ServerClock::default();
        for wall in [0, u64::MAX, 0, u64::MAX / 2, u64::MAX] {
            clock.observe(UnixTime::from_millis(wall), Duration::MAX);
            clock.measure_round_trip(clock.now(), UnixTime::from_millis(u64::MAX - wall));
            clock.measure_one_way(UnixTime::from_millis(wall));
            let _ = clock.wall(clock.steady(clock.server(clock.now() + Duration::MAX)));
        }
    }
}
