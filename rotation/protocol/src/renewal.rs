//! SVID renewal: when to ask for the next SVID, and when to put it to use.
//!
//! Owns the schedule, the retries and the deadline of the one request that may be under way; knows
//! neither keys nor certificates nor the network. A shell feeds it what happens with the time and
//! a random share, carries the effects out in their order, and calls again at
//! [`Renewal::next_wakeup`] at the latest. A renewal is due at a share of `not_after − issued_at`
//! by the server's clock (a certificate begins earlier than it is issued: with short lives, a share
//! of its whole life is over at once, and renews without end); retries have their jitter inside
//! their cap; and the SVID that is held is never let go before the next one is in use.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};

mod event;

pub use event::{Alarm, Effect, Event, Failure, Issued, Readiness, Record, RequestId};

use crate::jitter::Jitter;
use crate::server_clock::{ServerClock, Steady};

/// An SVID that is installed or held, as far as a schedule needs to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScheduledSvid {
    /// The request that brought it.
    pub id: RequestId,
    /// Its end, by the server's clock.
    pub not_after: UnixTime,
    /// `not_after − issued_at`.
    pub life: Duration,
    /// Who signed it.
    pub issuer: KeyId,
}

/// The renewal machine of one workload.
#[derive(Clone, Debug, Default)]
pub struct Renewal {
    clock: ServerClock,
    /// The sequence number of the installed bundle.
    bundle_seq: Option<u64>,
    denied: BTreeSet<KeyId>,
    svids: Svids,
    phase: Phase,
    last_id: RequestId,
    last_sent: Option<Steady>,
    /// The orders to pull forward that are still to be followed.
    pulls: VecDeque<Pull>,
    /// The newest install, until the shell has carried it out: it may fail.
    last_install: Option<Install>,
    told: Option<Readiness>,
    clock_off: bool,
}

/// The SVIDs at hand.
#[derive(Clone, Debug, Default)]
enum Svids {
    /// In use.
    Installed(ScheduledSvid),
    /// None yet.
    #[default]
    None,
    /// Issued, but its bundle is not here yet; the one before stays in use.
    Waiting { installed: Option<ScheduledSvid>, next: ScheduledSvid, seq: u64, attempt: u32 },
}

/// What the shell was told to put to use.
#[derive(Clone, Copy, Debug)]
struct Install {
    id: RequestId,
    /// Of the request that brought it.
    attempt: u32,
    /// What was in use before, and is again if this fails.
    before: Option<ScheduledSvid>,
}

/// What is being done about the next SVID. There is room for one request only.
#[derive(Clone, Copy, Debug, Default)]
enum Phase {
    /// A request is under way.
    Asking { id: RequestId, attempt: u32, sent: Steady, timeout: Duration },
    /// Not started.
    #[default]
    Created,
    /// A request failed, or its answer could not be used; the next goes out at `at`.
    Retrying { attempt: u32, at: Steady },
    /// All is well until then, by the server's clock.
    Scheduled { due: UnixTime },
}

/// An order to renew early.
#[derive(Clone, Copy, Debug)]
struct Pull {
    id: u64,
    from: UnixTime,
    /// When this instance follows it.
    due: UnixTime,
    /// The newest request when the order came.
    after: RequestId,
}

impl Renewal {
    /// A machine that waits for [`Event::Started`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in one event at the wall clock's `now`; says what to do. `jitter` is drawn anew for
    /// each call.
    pub fn handle(&mut self, now: UnixTime, jitter: Jitter, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(by_millis) = self.clock.observe(now, self.look_again()) {
            // How much time has really passed is unknown; an answer of the server will tell.
            effects.push(Effect::Alarm(Alarm::ClockJumped { by_millis }));
            self.hasten(self.clock.now() + jitter.of(JUMP_SPREAD_MAX));
        }
        match event {
            Event::AckSent => self.disown(&mut effects),
            Event::BundleInstalled { seq, denied } => {
                self.bundle_seq = self.bundle_seq.max(Some(seq));
                self.denied = denied.into_iter().collect();
                self.drop_denied(&mut effects);
                self.install_held(&mut effects);
            }
            Event::Failed { id, reason } => {
                if let Some(asked) = self.asked(id) {
                    self.fail(jitter, asked.attempt, Failure::Request(reason), &mut effects);
                }
            }
            Event::InstallFailed { id, reason } => {
                self.take_back(jitter, id, reason, &mut effects);
            }
            Event::Issued(issued) => self.take_issued(jitter, issued, &mut effects),
            Event::PulledForward { id, from, window, share } => {
                self.pull_forward(id, from, from + share.of(window));
            }
            Event::ServerTime(server) => self.clock.measure_one_way(server),
            Event::Started => {
                if matches!(self.phase, Phase::Created) {
                    self.phase = Phase::Retrying { attempt: 1, at: self.clock.now() };
                }
            }
            Event::StreamCameBack => {
                if matches!(self.phase, Phase::Retrying { .. }) {
                    self.hasten(self.clock.now() + jitter.of(STREAM_BACK_SPREAD_MAX));
                }
            }
            Event::Tainted { issuer } => {
                self.denied.insert(issuer);
                self.drop_denied(&mut effects);
            }
            Event::Tick => {}
        }
        self.give_up_hung(jitter, &mut effects);
        self.request_when_due(jitter, &mut effects);
        self.tell_changes(&mut effects);
        effects
    }

    /// When to call again at the latest, by the wall clock; `None` before the start. A hint: the
    /// clock is read again on waking, and a [`Event::Tick`] that comes early changes nothing.
    pub fn next_wakeup(&self) -> Option<UnixTime> {
        let next = match self.phase {
            Phase::Asking { sent, timeout, .. } => sent + timeout,
            Phase::Created => return None,
            Phase::Retrying { .. } | Phase::Scheduled { .. } => self.next_request()?,
        };
        let now = self.clock.now();
        let look_again = now + self.look_again();
        let expiry = self.svids.installed().map(|svid| self.clock.steady(svid.not_after));
        let expiry = expiry.filter(|&at| at > now).unwrap_or(look_again);
        Some(self.clock.wall(next.min(expiry).min(look_again)))
    }

    /// For who simulates years: as [`Event::Tick`] at each [`Renewal::next_wakeup`] until now, where
    /// nothing is due before, and so nothing would have come of any of them.
    pub fn idle(&mut self, now: UnixTime) {
        self.clock.observe(now, Duration::MAX);
    }

    /// The SVID in use.
    pub fn installed(&self) -> Option<ScheduledSvid> {
        self.svids.installed()
    }

    /// When the next request goes out, by the wall clock; `None` while one is under way.
    pub fn next_renewal(&self) -> Option<UnixTime> {
        self.next_request().map(|at| self.clock.wall(at))
    }

    /// The wall clock less the server's; `None` before the first measurement.
    pub fn clock_offset_millis(&self) -> Option<i64> {
        self.clock.wall_offset_millis()
    }

    fn take_issued(&mut self, jitter: Jitter, issued: Issued, effects: &mut Vec<Effect>) {
        let Some(asked) = self.asked(issued.id) else {
            // Late, or told twice: the key of a cancelled request must not stay behind.
            if !self.svids.has(issued.id) {
                effects.push(Effect::Discard { id: issued.id });
            }
            return;
        };
        let trip = self.clock.now().since(asked.sent);
        if trip <= asked.timeout {
            self.clock.measure_round_trip(asked.sent, issued.server_time);
        } else {
            self.clock.measure_one_way(issued.server_time);
        }
        let Issued { id, issued_at, not_after, issuer, .. } = issued;
        let failure = if not_after <= issued_at.max(issued.server_time) {
            Some(Failure::NoLife { issued_at, not_after })
        } else {
            self.denied.contains(&issuer).then_some(Failure::IssuerDenied(issuer))
        };
        if let Some(failure) = failure {
            effects.push(Effect::Discard { id });
            return self.fail(jitter, asked.attempt, failure, effects);
        }
        // At the earliest: the whole trip may have passed before the server wrote its time.
        let sent_at = issued.server_time - trip;
        self.pulls.retain(|pull| !pull.is_followed_by(&issued, sent_at));
        let pulled = self.pulls.iter().map(|pull| pull.due);
        let due = pulled.fold(renewal_due(&issued, jitter), UnixTime::min);
        self.phase = Phase::Scheduled { due };
        let next = ScheduledSvid { id, not_after, life: not_after.since(issued_at), issuer };
        self.hold(next, issued.seq, asked.attempt, effects);
    }

    /// Keeps an SVID that was just issued, and uses it at once if its bundle is installed.
    fn hold(&mut self, next: ScheduledSvid, seq: u64, attempt: u32, effects: &mut Vec<Effect>) {
        let installed = self.svids.installed();
        if let Svids::Waiting { next: older, .. } = self.svids {
            effects.push(Effect::Discard { id: older.id });
        }
        self.svids = Svids::Waiting { installed, next, seq, attempt };
        self.install_held(effects);
        if matches!(self.svids, Svids::Waiting { .. }) {
            effects.push(Effect::Hold { id: next.id, seq });
            let alarm = Alarm::BundleBehind { needed_seq: seq, installed_seq: self.bundle_seq };
            effects.push(Effect::Alarm(alarm));
        }
    }

    fn install_held(&mut self, effects: &mut Vec<Effect>) {
        let Svids::Waiting { installed, next, seq, attempt } = self.svids else { return };
        if self.bundle_seq.is_none_or(|installed_seq| installed_seq < seq) {
            return;
        }
        if self.is_over(next) {
            // It has waited too long; the one in use is no worse.
            effects.push(Effect::Discard { id: next.id });
            self.svids = installed.map_or(Svids::None, Svids::Installed);
        } else {
            effects.push(Effect::Install { id: next.id });
            self.last_install = Some(Install { id: next.id, attempt, before: installed });
            self.svids = Svids::Installed(next);
        }
    }

    /// The shell could not put to use what it was told to: what was in use before still is, and
    /// the request counts as one that failed.
    fn take_back(
        &mut self,
        jitter: Jitter,
        id: RequestId,
        reason: String,
        effects: &mut Vec<Effect>,
    ) {
        let Some(install) = self.last_install.take_if(|install| install.id == id) else { return };
        match &mut self.svids {
            Svids::Installed(svid) if svid.id == id => {
                self.svids = install.before.map_or(Svids::None, Svids::Installed);
            }
            Svids::Waiting { installed, .. } if installed.is_some_and(|svid| svid.id == id) => {
                *installed = install.before;
            }
            Svids::Installed(_) | Svids::None | Svids::Waiting { .. } => return,
        }
        match self.phase {
            // Another request is on its way or planned already.
            Phase::Asking { .. } | Phase::Created | Phase::Retrying { .. } => {}
            Phase::Scheduled { .. } => {
                self.fail(jitter, install.attempt, Failure::Request(reason), effects);
            }
        }
    }

    /// Gives up what was asked for before an ack, and asks again.
    fn disown(&mut self, effects: &mut Vec<Effect>) {
        let at = self.clock.now();
        if let Svids::Waiting { installed, next, .. } = self.svids {
            effects.push(Effect::Discard { id: next.id });
            self.svids = installed.map_or(Svids::None, Svids::Installed);
            self.hasten(at);
        }
        if let Phase::Asking { id, attempt, .. } = self.phase {
            effects.push(Effect::Cancel { id });
            self.phase = Phase::Retrying { attempt, at };
        }
    }

    /// Lets go of what a denied issuer signed: at once if it is not in use, else by renewing now.
    fn drop_denied(&mut self, effects: &mut Vec<Effect>) {
        let now = self.clock.now();
        if let Svids::Waiting { installed, next, .. } = self.svids
            && self.denied.contains(&next.issuer)
        {
            effects.push(Effect::Discard { id: next.id });
            self.svids = installed.map_or(Svids::None, Svids::Installed);
            self.hasten(now);
        }
        if let Svids::Installed(svid) = self.svids
            && self.denied.contains(&svid.issuer)
        {
            self.hasten(now);
        }
    }

    /// An order is told again by every stream that opens, also by another replica: what was issued
    /// since its window began has followed it, whatever its id.
    fn pull_forward(&mut self, id: u64, from: UnixTime, due: UnixTime) {
        let followed = self.svids.newest().is_some_and(|svid| svid.issued_at() >= from);
        if followed || self.pulls.iter().any(|pull| (pull.id, pull.from) == (id, from)) {
            return;
        }
        if self.pulls.len() == PULLS_MAX {
            self.pulls.pop_front();
        }
        self.pulls.push_back(Pull { id, from, due, after: self.last_id });
        self.hasten(self.clock.steady(due));
    }

    /// The next request goes out at `at`, unless it is planned for earlier or under way.
    fn hasten(&mut self, at: Steady) {
        self.phase = match self.phase {
            Phase::Retrying { attempt, at: planned } => {
                Phase::Retrying { attempt, at: planned.min(at) }
            }
            Phase::Scheduled { due } => Phase::Scheduled { due: due.min(self.clock.server(at)) },
            phase @ (Phase::Asking { .. } | Phase::Created) => phase,
        };
    }

    fn give_up_hung(&mut self, jitter: Jitter, effects: &mut Vec<Effect>) {
        if let Phase::Asking { id, attempt, sent, timeout } = self.phase
            && self.clock.now() >= sent + timeout
        {
            effects.push(Effect::Cancel { id });
            self.fail(jitter, attempt, Failure::TimedOut(timeout), effects);
        }
    }

    /// Plans the next try: the delay doubles up to a cap, and the jitter lies inside the cap.
    fn fail(&mut self, jitter: Jitter, attempt: u32, failure: Failure, effects: &mut Vec<Effect>) {
        let cap = self.retry_cap();
        let delay = doubled(RETRY_FIRST, attempt - 1, cap);
        let at = self.clock.now() + delay / 2 + jitter.of(delay / 2);
        self.phase = Phase::Retrying { attempt: attempt.saturating_add(1), at };
        effects.push(Effect::Alarm(Alarm::RenewalFailed {
            attempt,
            failure,
            next_try: self.clock.wall(at),
            not_after: self.svids.installed().map(|svid| svid.not_after),
        }));
    }

    fn request_when_due(&mut self, jitter: Jitter, effects: &mut Vec<Effect>) {
        let now = self.clock.now();
        if self.live_svid().is_none()
            && self.next_request().is_some_and(|at| at > now + RETRY_CAP_EXPIRED)
        {
            // A wait that was planned while there was a life to lose is too long now.
            self.hasten(now + RETRY_CAP_EXPIRED / 2 + jitter.of(RETRY_CAP_EXPIRED / 2));
        }
        if self.next_request().is_none_or(|at| at > now) {
            return;
        }
        let attempt = match self.phase {
            Phase::Retrying { attempt, .. } => attempt,
            Phase::Asking { .. } | Phase::Created | Phase::Scheduled { .. } => 1,
        };
        let id = RequestId(self.last_id.0.saturating_add(1));
        let timeout = self.timeout(attempt);
        self.last_id = id;
        self.last_sent = Some(now);
        self.phase = Phase::Asking { id, attempt, sent: now, timeout };
        effects.push(Effect::Request { id, attempt, timeout });
    }

    /// When the next request goes out: as planned, but never on the heels of the last one.
    fn next_request(&self) -> Option<Steady> {
        let planned = match self.phase {
            Phase::Asking { .. } | Phase::Created => return None,
            Phase::Retrying { at, .. } => at,
            Phase::Scheduled { due } => self.clock.steady(due),
        };
        Some(self.last_sent.map_or(planned, |sent| planned.max(sent + REQUEST_SPACING_MIN)))
    }

    /// Says what has become true since the last event.
    fn tell_changes(&mut self, effects: &mut Vec<Effect>) {
        let readiness = self.readiness();
        if self.told.replace(readiness) != Some(readiness) {
            if let Readiness::Expired { not_after } = readiness {
                effects.push(Effect::Alarm(Alarm::Expired { not_after }));
            }
            effects.push(Effect::Readiness(readiness));
        }
        let offset_millis = self.clock.wall_offset_millis().unwrap_or(0);
        let clock_off = offset_millis.unsigned_abs() > CLOCK_OFFSET_WARN.as_millis() as u64;
        if clock_off && !self.clock_off {
            effects.push(Effect::Alarm(Alarm::ClockOff { offset_millis }));
        }
        self.clock_off = clock_off;
    }

    fn readiness(&self) -> Readiness {
        match (self.bundle_seq, self.svids.installed()) {
            (None, _) => Readiness::NoBundle,
            (_, None) => Readiness::NoSvid,
            (_, Some(svid)) if self.is_over(svid) => {
                Readiness::Expired { not_after: svid.not_after }
            }
            _ => Readiness::Ready,
        }
    }

    /// The request `id`, if it is the one under way.
    fn asked(&self, id: RequestId) -> Option<Asked> {
        match self.phase {
            Phase::Asking { id: asked, attempt, sent, timeout } if asked == id => {
                Some(Asked { attempt, sent, timeout })
            }
            _ => None,
        }
    }

    /// The SVID that the workload lives on: the one in use, or one that only waits for its bundle.
    fn live_svid(&self) -> Option<ScheduledSvid> {
        self.svids.newest().filter(|&svid| !self.is_over(svid))
    }

    fn is_over(&self, svid: ScheduledSvid) -> bool {
        self.clock.server(self.clock.now()) >= svid.not_after
    }

    fn retry_cap(&self) -> Duration {
        self.live_svid().map_or(RETRY_CAP_EXPIRED, |svid| {
            (svid.life / RETRIES_PER_LIFE).clamp(RETRY_CAP_MIN, RETRY_CAP_MAX)
        })
    }

    /// Short lives leave little time to notice a hung replica; but one that is merely slow must be
    /// given longer each time, or a fleet that comes back would never get an answer.
    fn timeout(&self, attempt: u32) -> Duration {
        let first = self.svids.newest().map_or(TIMEOUT_BOOTSTRAP, |svid| {
            (svid.life / TIMEOUTS_PER_LIFE).clamp(TIMEOUT_MIN, TIMEOUT_MAX)
        });
        doubled(first, attempt - 1, TIMEOUT_MAX)
    }

    /// How long to wait at most before the wall clock is compared again: a clock that is set back
    /// shows only if it is looked at.
    fn look_again(&self) -> Duration {
        match (self.phase, self.svids.newest()) {
            // Nobody was asked to look.
            (Phase::Created, _) => Duration::MAX,
            (_, None) => LOOK_AGAIN_MAX,
            (_, Some(svid)) => (svid.life / RETRIES_PER_LIFE).clamp(LOOK_AGAIN_MIN, LOOK_AGAIN_MAX),
        }
    }
}

/// The request under way.
#[derive(Clone, Copy)]
struct Asked {
    attempt: u32,
    sent: Steady,
    timeout: Duration,
}

impl ScheduledSvid {
    fn issued_at(&self) -> UnixTime {
        self.not_after - self.life
    }
}

impl Pull {
    /// Whether this reply is of the order's time: made since its window began; and one that was
    /// under way when the order came was asked for since then, too, or it may just have been made
    /// by what the order is there to replace.
    fn is_followed_by(&self, issued: &Issued, sent_at: UnixTime) -> bool {
        issued.issued_at >= self.from && (issued.id > self.after || sent_at >= self.from)
    }
}

impl Svids {
    fn installed(&self) -> Option<ScheduledSvid> {
        match self {
            Self::Installed(svid) => Some(*svid),
            Self::None => None,
            Self::Waiting { installed, .. } => *installed,
        }
    }

    fn newest(&self) -> Option<ScheduledSvid> {
        match self {
            Self::Installed(svid) | Self::Waiting { next: svid, .. } => Some(*svid),
            Self::None => None,
        }
    }

    fn has(&self, id: RequestId) -> bool {
        self.installed().is_some_and(|svid| svid.id == id)
            || self.newest().is_some_and(|svid| svid.id == id)
    }
}

/// When to renew: as the server wishes, within the life, else at 60 to 70 % of it.
fn renewal_due(issued: &Issued, jitter: Jitter) -> UnixTime {
    let life = issued.not_after.since(issued.issued_at);
    match issued.renew_at {
        Some(wish) => wish.clamp(issued.issued_at + life / 10, issued.issued_at + life * 9 / 10),
        None => issued.issued_at + life * 6 / 10 + jitter.of(life / 10),
    }
}

/// `first × 2^times`, at most `cap`.
fn doubled(first: Duration, times: u32, cap: Duration) -> Duration {
    first.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX)).min(cap)
}

/// The delay before the first retry, its jitter included.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_CAP_MIN: Duration = Duration::from_secs(1);
const RETRY_CAP_MAX: Duration = Duration::from_secs(300);
/// Without a live SVID every second counts.
const RETRY_CAP_EXPIRED: Duration = Duration::from_secs(2);
/// A third of a life is left when the first try fails: some ten more fit in at the cap.
const RETRIES_PER_LIFE: u32 = 30;
const TIMEOUT_BOOTSTRAP: Duration = Duration::from_secs(5);
const TIMEOUT_MIN: Duration = Duration::from_secs(1);
const TIMEOUT_MAX: Duration = Duration::from_secs(10);
const TIMEOUTS_PER_LIFE: u32 = 5;
/// Whatever comes together, requests keep this distance.
const REQUEST_SPACING_MIN: Duration = Duration::from_millis(500);
/// When a replica comes back, all its streams do; when a time server errs, all clocks do.
const STREAM_BACK_SPREAD_MAX: Duration = Duration::from_secs(1);
const JUMP_SPREAD_MAX: Duration = Duration::from_secs(5);
/// Half of the 60 s by which the clocks of a mesh may differ.
const CLOCK_OFFSET_WARN: Duration = Duration::from_secs(30);
const LOOK_AGAIN_MIN: Duration = Duration::from_secs(1);
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(30);
/// A server repeats its newest order only.
const PULLS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_at_60_to_70_percent_of_the_life_from_issue() {
        let life = Duration::from_secs(100);
        let made = UnixTime::from_secs(1000);
        let issued = |renew_at| Issued {
            id: RequestId(1),
            issued_at: made,
            not_after: made + life,
            renew_at,
            server_time: made,
            seq: 1,
            issuer: KeyId::of_spki(b"issuer"),
        };
        let due = |renew_at, jitter| renewal_due(&issued(renew_at), jitter).since(made).as_millis();
        assert_eq!(due(None, Jitter::NONE), 60_000);
        assert_eq!(due(None, Jitter::MAX), 69_999);
        assert_eq!(due(Some(made + life / 2), Jitter::MAX), 50_000, "the server's wish");
        assert_eq!(due(Some(UnixTime::default()), Jitter::MAX), 10_000, "within the life");
        assert_eq!(due(Some(made + life * 2), Jitter::MAX), 90_000, "within the life");
    }

    #[test]
    fn retries_double_up_to_their_cap() {
        let delays = [0, 1, 2, 8, 31, 32, u32::MAX]
            .map(|times| doubled(RETRY_FIRST, times, RETRY_CAP_MAX).as_secs());
        assert_eq!(delays, [1, 2, 4, 256, 300, 300, 300]);
    }
}
