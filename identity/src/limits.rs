//! Rate limits: how often one workload, and all of them together, get an SVID.
//!
//! New work is shed before renewals. A renewal (of a workload whose SVID is still valid, as this
//! replica has issued it or the workload's ack says) has a budget of its own and then shares the
//! common one; new work has the common one only. So whenever a renewal is refused, new work is
//! refused too.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Mutex, MutexGuard, PoisonError};

use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use steadfast_api::{Code, UnixTime};

use crate::refusal::Refusal;

/// How much is let through.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// New work, and renewals beyond their own budget, per second.
    pub common_per_second: NonZeroU32,
    /// Renewals alone, per second.
    pub renewals_per_second: NonZeroU32,
    /// One workload, per minute.
    pub workload_per_minute: NonZeroU32,
}

/// What kind of request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Of a workload that has no valid SVID, as far as is known here.
    New,
    /// Of a workload that would go on working for a while.
    Renewal,
}

/// The limits and what they have to know.
pub struct Limits {
    common: DefaultDirectRateLimiter,
    renewals: DefaultDirectRateLimiter,
    workloads: DefaultKeyedRateLimiter<String>,
    /// The end of the last SVID by pod UID.
    known: Mutex<HashMap<String, UnixTime>>,
    rates: Rates,
}

impl Kind {
    /// The label that counts it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Renewal => "renewal",
        }
    }
}

impl Limits {
    /// These limits, with nothing used up.
    pub fn new(rates: Rates) -> Self {
        Self {
            common: RateLimiter::direct(Quota::per_second(rates.common_per_second)),
            renewals: RateLimiter::direct(Quota::per_second(rates.renewals_per_second)),
            workloads: RateLimiter::keyed(Quota::per_minute(rates.workload_per_minute)),
            known: Mutex::default(),
            rates,
        }
    }

    /// Lets one request of this workload through, or not.
    ///
    /// # Errors
    /// [`Code::RATE_LIMITED`], naming the limit.
    pub fn admit(&self, pod_uid: &str, now: UnixTime) -> Result<Kind, (Kind, Refusal)> {
        let kind = self.kind(pod_uid, now);
        let refuse = |what: String| (kind, Refusal::new(Code::RATE_LIMITED, what));
        if self.workloads.check_key(&pod_uid.to_owned()).is_err() {
            let rate = self.rates.workload_per_minute;
            return Err(refuse(format!("the workload asks more than {rate} times a minute")));
        }
        let admitted = match kind {
            Kind::New => self.common.check().is_ok(),
            Kind::Renewal => self.renewals.check().is_ok() || self.common.check().is_ok(),
        };
        if admitted {
            return Ok(kind);
        }
        let rate = self.rates.common_per_second;
        Err(refuse(format!(
            "all workloads together ask for more than {rate} SVIDs a second (this is a {} request)",
            kind.label()
        )))
    }

    /// Remembers an SVID, so that the next request of its workload is a renewal.
    pub fn issued(&self, pod_uid: &str, not_after: UnixTime) {
        let mut known = self.known();
        let full = known.len() >= WORKLOADS_MAX;
        match known.get_mut(pod_uid) {
            Some(end) => *end = not_after,
            // Full: whoever comes is new work until somebody's SVID has ended.
            None if full => {}
            None => drop(known.insert(pod_uid.to_owned(), not_after)),
        }
    }

    /// Remembers an SVID that another replica issued, or this one before a restart, by the word of
    /// the workload that has it: it gains no more than a turn among those that renew.
    pub fn holds(&self, pod_uid: &str, not_after: UnixTime) {
        let known = self.known().get(pod_uid).copied();
        if known.is_none_or(|end| end < not_after) {
            self.issued(pod_uid, not_after);
        }
    }

    /// Forgets whom there is nothing to know about any more. Called every few seconds.
    pub fn tidy(&self, now: UnixTime) {
        self.known().retain(|_, end| *end > now);
        self.workloads.retain_recent();
        self.workloads.shrink_to_fit();
    }

    fn kind(&self, pod_uid: &str, now: UnixTime) -> Kind {
        match self.known().get(pod_uid) {
            Some(end) if *end > now => Kind::Renewal,
            _ => Kind::New,
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, UnixTime>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As many pods as a large cluster has.
const WORKLOADS_MAX: usize = 200_000;

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1000);

    fn limits(common: u32, renewals: u32, workload: u32) -> Limits {
        let rate = |n| NonZeroU32::new(n).unwrap();
        Limits::new(Rates {
            common_per_second: rate(common),
            renewals_per_second: rate(renewals),
            workload_per_minute: rate(workload),
        })
    }

    /// Many at once: what trickles back in the meantime is far below what is asked for.
    fn admitted(limits: &Limits, workloads: std::ops::Range<u32>) -> usize {
        workloads.filter(|n| limits.admit(&format!("pod-{n}"), NOW).is_ok()).count()
    }

    #[test]
    fn a_renewal_passes_where_new_work_is_shed() {
        let limits = limits(1, 100, 1000);
        for n in 0..50 {
            limits.issued(&format!("pod-{n}"), NOW + std::time::Duration::from_secs(1));
        }
        assert!(admitted(&limits, 1000..2000) < 50);
        assert_eq!(admitted(&limits, 0..50), 50);
    }

    #[test]
    fn a_workload_whose_svid_has_ended_is_new_work() {
        let limits = limits(10, 10, 1000);
        limits.issued("pod", NOW);
        assert_eq!(limits.admit("pod", NOW).unwrap(), Kind::New);
        limits.issued("pod", NOW + std::time::Duration::from_secs(1));
        assert_eq!(limits.admit("pod", NOW).unwrap(), Kind::Renewal);
    }

    #[test]
    fn one_workload_cannot_use_up_what_is_there_for_all() {
        let limits = limits(1000, 1000, 3);
        let admitted = (0..100).filter(|_| limits.admit("greedy", NOW).is_ok()).count();
        assert!((3..5).contains(&admitted), "{admitted}");
        let (_, refusal) = limits.admit("greedy", NOW).unwrap_err();
        assert_eq!(refusal.code, Code::RATE_LIMITED);
        assert!(limits.admit("modest", NOW).is_ok());
    }

    #[test]
    fn a_workload_whose_ack_shows_a_live_svid_is_a_renewal_also_after_a_restart() {
        let limits = limits(10, 10, 1000);
        let end = NOW + std::time::Duration::from_secs(60);
        limits.holds("pod", end);
        assert_eq!(limits.admit("pod", NOW).unwrap(), Kind::Renewal);
        limits.holds("pod", NOW);
        assert_eq!(limits.admit("pod", NOW).unwrap(), Kind::Renewal, "what is known stays");
    }

    #[test]
    fn what_has_ended_is_forgotten() {
        let limits = limits(10, 10, 10);
        limits.issued("pod", NOW);
        limits.tidy(NOW);
        assert!(limits.known().is_empty());
    }
}
