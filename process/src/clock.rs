//! The only place that reads a clock.
//!
//! Wall-clock time jumps and laptops sleep: a lease or fence is measured on the boot clock, which
//! does neither stop nor jump; only what is compared with a certificate uses wall-clock time.

use std::time::{Duration, SystemTime};

use steadfast_api::UnixTime;

/// A source of time; tests bring their own.
pub trait Clock: Send + Sync + 'static {
    /// Wall-clock time.
    fn now(&self) -> UnixTime;
    /// Time since the machine started, sleep included; never runs backwards.
    fn since_boot(&self) -> Duration;
}

/// The machine's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)] // This is the place that may.
    fn now(&self) -> UnixTime {
        SystemTime::now().into()
    }

    fn since_boot(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(
            u64::try_from(time.tv_sec).unwrap_or(0),
            u32::try_from(time.tv_nsec).unwrap_or(0),
        )
    }
}
