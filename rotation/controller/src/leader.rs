//! Which of several controllers asks and decides, so that they do not disturb each other.
//!
//! A lease in the store, taken by compare-and-swap and dated by the store's clock. It avoids noise
//! and nothing else: two that think they lead would cost each other's rounds, and the
//! compare-and-swap on the state still says whose decision counts. Who cannot renew it stops asking
//! when it has run out on his own clock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use steadfast_platform::store::{LEADER_KEY, LeaderLease};
use steadfast_platform::{Store, StoreError};
use steadfast_rotation_protocol::controller::Now;

/// Whether we lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Somebody else does.
    Follows {
        /// Who.
        leader: String,
    },
    /// We do.
    Leads,
}

/// Our part in it.
#[derive(Clone, Debug)]
pub struct Candidate {
    name: String,
    held: Option<Held>,
}

/// The lease is ours.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// When the write that was answered last was sent, on the boot clock.
    renewed: Duration,
}

impl Candidate {
    /// A process of this name, which no other process has.
    pub fn new(name: String) -> Self {
        Self { name, held: None }
    }

    /// Who we are.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether we lead now: takes the lease where it is free, and renews it in time. `now.wall` is
    /// by the store's clock.
    ///
    /// # Errors
    /// The store's, when the lease is not certainly ours.
    pub async fn role(&mut self, store: &dyn Store, now: Now) -> Result<Role, StoreError> {
        let age = self.held.map(|held| now.boot.saturating_sub(held.renewed));
        if age.is_some_and(|age| age < RENEW_EVERY) {
            return Ok(Role::Leads);
        }
        match self.claim(store, now).await {
            // What we hold lasts, though it cannot be renewed at the moment.
            Err(StoreError::Unavailable(_) | StoreError::WriteFailed(_))
                if age.is_some_and(|age| age < DURATION) =>
            {
                Ok(Role::Leads)
            }
            Err(error) => {
                self.held = None;
                Err(error)
            }
            role => role,
        }
    }

    /// Gives the lease up, for whoever comes next.
    ///
    /// # Errors
    /// The store's: it lapses by itself.
    pub async fn resign(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        self.held = None;
        let Some(entry) = store.get(LEADER_KEY).await? else { return Ok(()) };
        let lease: Option<LeaderLease> = serde_json::from_slice(&entry.value).ok();
        if lease.is_some_and(|lease| lease.holder == self.name) {
            store.compare_and_swap(LEADER_KEY, Some(entry.revision), None).await?;
        }
        Ok(())
    }

    async fn claim(&mut self, store: &dyn Store, now: Now) -> Result<Role, StoreError> {
        let entry = store.get(LEADER_KEY).await?;
        // One that does not parse holds nobody back.
        let lease = entry
            .as_ref()
            .and_then(|entry| serde_json::from_slice::<LeaderLease>(&entry.value).ok());
        if let Some(lease) = lease.filter(|lease| lease.holder != self.name && holds(lease, now)) {
            self.held = None;
            return Ok(Role::Follows { leader: lease.holder });
        }
        let ours =
            LeaderLease { holder: self.name.clone(), renewed_at: now.wall, duration: DURATION };
        let value = serde_json::to_vec(&ours).map_err(|e| StoreError::Denied(e.to_string()))?;
        let expected = entry.map(|entry| entry.revision);
        match store.compare_and_swap(LEADER_KEY, expected, Some(value.into())).await {
            Ok(_) => {
                self.held = Some(Held { renewed: now.boot });
                Ok(Role::Leads)
            }
            // Somebody was faster; the next look finds who.
            Err(StoreError::Conflict { .. }) => {
                self.held = None;
                Ok(Role::Follows { leader: String::new() })
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether a lease holds now. One that is dated in the future, by a clock that was set back since,
/// holds no longer than any other.
fn holds(lease: &LeaderLease, now: Now) -> bool {
    let LeaderLease { renewed_at, duration, .. } = *lease;
    now.wall < renewed_at + duration && renewed_at < now.wall + duration
}

/// How long a controller that has died is waited for.
const DURATION: Duration = Duration::from_secs(8);
const RENEW_EVERY: Duration = Duration::from_secs(2);

/// When we were last sure to lead, for who writes without a compare-and-swap.
#[derive(Debug, Default)]
pub struct LedAt(AtomicU64);

impl LedAt {
    /// We are, at this time of the boot clock.
    pub fn confirm(&self, now: Duration) {
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        self.0.fetch_max(now, Ordering::AcqRel);
    }

    /// How long ago that was.
    pub fn since(&self, now: Duration) -> Duration {
        now.saturating_sub(Duration::from_millis(self.0.load(Ordering::Acquire)))
    }
}
