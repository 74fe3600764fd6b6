//! Randomness as an argument: a share of a whole, drawn outside.
//!
//! Whole numbers throughout, so that a recorded run replays to the bit on every machine.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A share in `[0, 1)`, in parts of 2³².
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Jitter(u32);

impl Jitter {
    /// Nothing of the whole.
    pub const NONE: Self = Self(0);
    /// As near to the whole as there is.
    pub const MAX: Self = Self(u32::MAX);

    /// From 32 random bits, or from 32 bits of a hash where the share must stay the same.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// This share of a duration, to the millisecond, rounded down.
    pub fn of(self, whole: Duration) -> Duration {
        let millis = (whole.as_millis() * u128::from(self.0)) >> 32;
        Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_stays_below_its_whole() {
        let hour = Duration::from_secs(3600);
        assert_eq!(Jitter::NONE.of(hour), Duration::ZERO);
        assert_eq!(Jitter::from_bits(1 << 31).of(hour), hour / 2);
        assert!(Jitter::MAX.of(hour) < hour);
        assert!(Jitter::MAX.of(Duration::MAX) <= Duration::MAX);
    }
}
