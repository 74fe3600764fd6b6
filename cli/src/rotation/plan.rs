//! What a rotation would do, told before anybody is asked: who is asked, how long it takes, what
//! can go wrong, and how it is undone.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use steadfast_api::{KeyId, UnixTime};
use steadfast_process::duration;
use steadfast_rotation_protocol::census::{Bounds, Demand, Round, tally};
use steadfast_rotation_protocol::controller::{Remedy, Standing, Timings};
use steadfast_rotation_protocol::schedule::Schedule;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, CanaryPlan, Exemption, IssuerRecord, Promise, Selector,
};
use steadfast_rotation_protocol::{Controller, TrustDomainState};

use crate::commands::anchor::given::Given;
use crate::controller::asked_at;
use crate::output::{Paint, wrap};
use crate::rotation::waiting::{Absent, halted};

/// What is planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    /// The next anchor becomes active: the standby, or this one.
    Rotate { next: Option<Given>, canary: Option<CanaryPlan> },
    /// The key of this anchor is in other hands: those who do not answer in this time are cut off.
    Emergency { anchor: KeyId, deadline: Duration },
    /// The active issuer is replaced; with a deadline, because its key is in other hands.
    Issuer { deadline: Option<Duration> },
    /// This standby goes, for a fresh one.
    Replace { standby: KeyId },
}

impl Intent {
    /// The anchor that a person brings for it.
    pub(crate) fn given(&self) -> Option<&Given> {
        match self {
            Self::Rotate { next, .. } => next.as_ref(),
            Self::Emergency { .. } | Self::Issuer { .. } | Self::Replace { .. } => None,
        }
    }

    /// Whether a key is in other hands.
    fn urgent(&self) -> bool {
        matches!(self, Self::Emergency { .. } | Self::Issuer { deadline: Some(_) })
    }
}

/// What a plan is made of beside the stored state.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    timings: Timings,
    /// The anchors whose key is gone.
    keyless: Vec<KeyId>,
    /// What everybody has answered; `None`: nobody can tell.
    round: Option<Round>,
}

impl Told {
    /// By the controller.
    pub(crate) fn of(standing: Standing, round: Option<Round>) -> Self {
        let timings = standing.timings.unwrap_or(TIMINGS_USUAL);
        Self { timings, keyless: standing.keyless, round }
    }
}

/// By none: the defaults, blindly.
impl Default for Told {
    fn default() -> Self {
        Self::of(Standing::default(), None)
    }
}

/// A rotation before it begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Plan {
    /// What it is, in a line.
    pub(crate) what: String,
    /// What it changes, step by step.
    pub(crate) changes: Vec<String>,
    /// How many must answer: proxies, our own processes, replicas of identity, or only these where
    /// an issuer is replaced as planned; `None`: nobody can tell.
    pub(crate) asked: Option<usize>,
    /// Who these are.
    pub(crate) who: &'static str,
    /// Who does not answer as it must.
    pub(crate) missing: Vec<Absent>,
    /// How long ago all of these were asked, in seconds; `None`: never.
    pub(crate) asked_s_ago: Option<u64>,
    /// What becomes of those.
    pub(crate) fate: &'static str,
    /// Holders that cannot ack, and what they mean for it.
    pub(crate) cannot_ack: Vec<String>,
    /// How long it takes if everybody answers, in seconds.
    pub(crate) expected_s: u64,
    /// How long it takes to outlive the SVIDs of who never answers, in seconds; `None`: that is not
    /// waited for.
    pub(crate) slow_path_s: Option<u64>,
    /// Whom it leaves in danger, and what would help.
    pub(crate) warnings: Vec<String>,
    /// What stands in its way at once.
    pub(crate) obstacles: Vec<String>,
    /// How it is undone.
    pub(crate) undo: &'static str,
}

impl Plan {
    /// Plans.
    pub(crate) fn of(
        intent: &Intent,
        state: &TrustDomainState,
        told: &Told,
        now: UnixTime,
    ) -> Self {
        let (timings, round) = (told.timings, told.round.as_ref());
        let emergency = Emergency::of(intent, state, told, now);
        let lives = state.anchors.iter().map(|anchor| anchor.svid_life_max);
        let svid_life_max = lives.max().unwrap_or_default();
        let bounds = Bounds { skew: timings.skew, svid_life_max };
        let demand = Demand { clocks: true, ..Demand::default() };
        // Who has not answered this very round would be waited for.
        let tally = round.map(|round| {
            let mut tally = tally(state, demand, round, round.nonce, now, bounds);
            if matches!(intent, Intent::Issuer { deadline: None }) {
                // Nobody else is asked: both issuers are of the same anchor.
                let asked = |name: &str| round.replicas.iter().any(|replica| replica.name == name);
                tally.settled.retain(|witness| asked(&witness.name));
                tally.missing.retain(|missing| asked(&missing.name));
            }
            tally
        });
        let slow_path = (timings.lease + svid_life_max + timings.skew).as_secs();
        Self {
            what: what(intent, state),
            changes: changes(intent, state, emergency.as_ref()),
            asked: tally.as_ref().map(|tally| tally.settled.len() + tally.missing.len()),
            missing: tally.iter().flat_map(|tally| Absent::all(&tally.missing, now)).collect(),
            asked_s_ago: round.map(|round| now.since(asked_at(round)).as_secs()),
            who: match intent {
                Intent::Issuer { deadline: None } => "replicas of identity",
                _ => "proxies and processes",
            },
            fate: fate(intent, emergency.as_ref()),
            cannot_ack: cannot_ack(intent, state, now),
            expected_s: expected(intent, state, timings, emergency.as_ref(), now).as_secs(),
            slow_path_s: matches!(intent, Intent::Rotate { .. }).then_some(slow_path),
            warnings: warnings(intent, state, now),
            obstacles: obstacles(intent, state, emergency.as_ref(), now),
            undo: undo(intent),
        }
    }

    /// Whether everybody would take part, nobody stays in danger and nothing stands in the way.
    pub(crate) fn is_clear(&self) -> bool {
        self.missing.is_empty() && self.warnings.is_empty() && self.obstacles.is_empty()
    }

    /// For people.
    pub(crate) fn text(&self, paint: Paint) -> String {
        let mut text = format!("{}\n\n", paint.bold(&self.what));
        for change in &self.changes {
            let _ = writeln!(text, "  {change}");
        }
        text.push('\n');
        let show = |secs| duration::show(Duration::from_secs(secs));
        let mut row = |name: &str, value: &str| {
            let wrapped = wrap(value, "                ", 96);
            let _ =
                write!(text, "  {} {}", paint.bold(&format!("{name:<13}")), wrapped.trim_start());
        };
        row(
            "asked",
            &match self.asked {
                Some(asked) => {
                    let answered = asked - self.missing.len();
                    let when = match self.asked_s_ago {
                        Some(ago) if ago > NOW_S => format!("answered {} ago", show(ago)),
                        _ => "answer now".to_owned(),
                    };
                    format!("{asked} {}; {answered} of them {when}", self.who)
                }
                None => "unknown: nobody has been asked yet".to_owned(),
            },
        );
        for absent in &self.missing {
            row("", &format!("{}: {}; it {}", absent.name, absent.with_time(), self.fate));
        }
        for holder in &self.cannot_ack {
            row("cannot ack", holder);
        }
        let outlived = self.slow_path_s.map_or_else(String::new, |slow| {
            let slow = show(slow);
            format!(
                "; who cannot be reached once the next anchor is active is outlived after {slow}"
            )
        });
        row("takes", &format!("about {} if everybody answers{outlived}", show(self.expected_s)));
        row("can go wrong", &format!("who does not answer {}", self.fate));
        row("undo", self.undo);
        for warning in &self.warnings {
            row("warning", warning);
        }
        for obstacle in &self.obstacles {
            row("in the way", obstacle);
        }
        text
    }
}

/// What the theft of an anchor's key comes to.
struct Emergency {
    remedy: Remedy,
    /// Whether no standby is left after it.
    standby_missing: bool,
}

impl Emergency {
    /// By the choice that the controller makes; `None`: no anchor's key is stolen.
    fn of(intent: &Intent, state: &TrustDomainState, told: &Told, now: UnixTime) -> Option<Self> {
        let Intent::Emergency { anchor: stolen, .. } = intent else { return None };
        let controller = Controller::new(told.timings);
        let remedy = controller.remedy(state, *stolen, &told.keyless, now)?;
        let stays = |anchor: &AnchorRecord| {
            let goes = anchor.id == *stolen || remedy == Remedy::Replaced(Some(anchor.id));
            !goes && anchor.taint.is_none() && !told.keyless.contains(&anchor.id)
        };
        let standby_missing = !state.in_state(AnchorState::Standby).any(stays);
        Some(Self { remedy, standby_missing })
    }
}

/// What becomes of those who do not answer.
const fn fate(intent: &Intent, emergency: Option<&Emergency>) -> &'static str {
    match intent {
        Intent::Emergency { .. }
            if matches!(emergency, Some(Emergency { remedy: Remedy::Removed, .. })) =>
        {
            WAITED_FOR
        }
        Intent::Emergency { .. } | Intent::Issuer { deadline: Some(_) } => {
            "is cut off at the deadline, and comes back by itself once it can be reached"
        }
        Intent::Issuer { deadline: None } => {
            "is waited for, until it has loaded the next issuer: until then the old one signs"
        }
        Intent::Replace { .. } | Intent::Rotate { .. } => WAITED_FOR,
    }
}

const fn undo(intent: &Intent) -> &'static str {
    match intent {
        Intent::Emergency { .. } => "cannot be undone: nothing leads back to a stolen key",
        Intent::Issuer { deadline: None } => {
            "nothing is to be undone: SVIDs of both issuers are accepted; another rotation makes \
             another issuer"
        }
        Intent::Issuer { deadline: Some(_) } => {
            "cannot be undone: an issuer that is refused signs nothing any more"
        }
        Intent::Replace { .. } => "`steadfast anchor abort`, until the old standby is withdrawn",
        Intent::Rotate { .. } => {
            "`steadfast anchor abort`, until the old anchor is withdrawn; from then on the way back \
             is another rotation, to a new key"
        }
    }
}

fn one(state: &TrustDomainState, anchor: AnchorState) -> Option<KeyId> {
    state.in_state(anchor).map(|anchor| anchor.id).next()
}

fn short(id: Option<KeyId>) -> String {
    id.map_or_else(|| "none".to_owned(), |id| id.short())
}

fn what(intent: &Intent, state: &TrustDomainState) -> String {
    let domain = &state.trust_domain;
    match intent {
        Intent::Rotate { .. } => format!("Rotate the trust anchor of {domain}"),
        Intent::Emergency { .. } => {
            format!("EMERGENCY: replace a trust anchor of {domain} whose key is in other hands")
        }
        Intent::Issuer { deadline: None } => format!("Replace the issuer of {domain}"),
        Intent::Issuer { deadline: Some(_) } => {
            format!("EMERGENCY: replace the issuer of {domain}, whose key is in other hands")
        }
        Intent::Replace { .. } => format!("Replace the standby of {domain}"),
    }
}

fn changes(
    intent: &Intent,
    state: &TrustDomainState,
    emergency: Option<&Emergency>,
) -> Vec<String> {
    let (active, standby) = (one(state, AnchorState::Active), one(state, AnchorState::Standby));
    let mut changes = Vec::new();
    match intent {
        Intent::Rotate { canary, .. } => {
            let given = intent.given().map(|given| given.record.id);
            changes.push(match given {
                Some(given) => format!("+ {} joins the bundle, and is acked by all", given.short()),
                None => "+ a fresh anchor joins the bundle as the next standby".to_owned(),
            });
            if let Some(plan) = canary {
                let who = match &plan.selector {
                    Selector::Namespace(namespace) => format!("the pods of {namespace}"),
                    Selector::Percent(percent) => format!("{percent} % of the pods"),
                };
                changes.push(format!("~ {who} go first, for {}", duration::show(plan.window)));
            }
            changes.push(format!("→ {} becomes active", short(given.or(standby))));
            changes.push(format!("- {} is drained, withdrawn and destroyed", short(active)));
        }
        Intent::Emergency { anchor, deadline } => {
            let (stolen, deadline) = (anchor.short(), duration::show(*deadline));
            let remedy = emergency.map_or(Remedy::Drained, |emergency| emergency.remedy);
            changes.extend(match remedy {
                Remedy::Replaced(Some(next)) => {
                    vec![format!("→ {} becomes active at once, everybody renews", next.short())]
                }
                Remedy::Replaced(None) => vec![
                    format!(
                        "+ a fresh anchor joins the bundle, and is acked by all, at the latest \
                         after {deadline}"
                    ),
                    "→ it becomes active, everybody renews".to_owned(),
                ],
                Remedy::Drained | Remedy::Removed => Vec::new(),
            });
            changes.push(match remedy {
                Remedy::Replaced(_) => format!(
                    "- {stolen} is withdrawn when acked, at the latest {deadline} after that, and \
                     destroyed"
                ),
                Remedy::Drained => format!(
                    "- {stolen} is withdrawn when acked, at the latest after {deadline}, and \
                     destroyed"
                ),
                Remedy::Removed => format!("- {stolen} is withdrawn at once, and destroyed"),
            });
            if emergency.is_none_or(|emergency| emergency.standby_missing) {
                changes.push("+ a fresh anchor becomes the standby".to_owned());
            }
        }
        Intent::Issuer { deadline } => {
            let (anchor, old) = (short(active), state.active_issuer.short());
            changes
                .push(format!("+ an issuer under {anchor} is made, and loaded by every replica"));
            changes.push(match deadline {
                None => format!(
                    "→ it signs in the place of {old}, whose SVIDs stay good until they end"
                ),
                Some(_) => {
                    format!("→ it signs in the place of {old}, and everybody renews at once")
                }
            });
            changes.extend(deadline.map(|deadline| {
                let deadline = duration::show(deadline);
                format!("- {old} is refused once nobody uses it, at the latest after {deadline}")
            }));
        }
        Intent::Replace { standby } => {
            changes.push("+ a fresh anchor joins the bundle, and is acked by all".to_owned());
            changes.push(format!("- {} is withdrawn and destroyed", standby.short()));
        }
    }
    changes
}

/// Holders that cannot ack and hold nothing up for ever: what is done for them.
fn cannot_ack(intent: &Intent, state: &TrustDomainState, now: UnixTime) -> Vec<String> {
    if matches!(intent, Intent::Issuer { .. }) {
        // The bundle's anchors stay: nothing is to be read anew.
        return Vec::new();
    }
    let consumers = state.consumers.iter().filter_map(|consumer| {
        let (name, refresh) = (&consumer.name, consumer.refresh?);
        let fate = match intent.urgent() {
            true => "until it does, it trusts the stolen key".to_owned(),
            false => format!("it is given {}", duration::show(refresh * REFRESHES)),
        };
        Some(format!("{name} reads the bundle every {}: {fate}", duration::show(refresh)))
    });
    let outlived = promised(intent, state).filter(|promise| !is_cut_off(intent, promise, now));
    let outlived = outlived.map(|promise| {
        format!("{} holds SVIDs until {}: they are outlived", promise.holder, promise.not_after)
    });
    consumers.chain(outlived).collect()
}

/// What holders that cannot ack have under the anchor that goes.
fn promised<'a>(
    intent: &Intent,
    state: &'a TrustDomainState,
) -> impl Iterator<Item = &'a Promise> + use<'a> {
    let goes = match intent {
        Intent::Emergency { anchor, .. } => Some(*anchor),
        Intent::Issuer { .. } | Intent::Replace { .. } => None,
        Intent::Rotate { .. } => one(state, AnchorState::Active),
    };
    state.promised.iter().filter(move |promise| Some(promise.anchor_id) == goes)
}

/// Past an emergency's deadline nobody waits for an SVID to end.
fn is_cut_off(intent: &Intent, promise: &Promise, now: UnixTime) -> bool {
    matches!(intent, Intent::Emergency { deadline, .. } if promise.not_after > now + *deadline)
}

fn warnings(intent: &Intent, state: &TrustDomainState, now: UnixTime) -> Vec<String> {
    let mut warnings = match intent {
        Intent::Emergency { .. } => {
            let fixed = fixed(state).map(|name| {
                format!(
                    "{name} has read the bundle once and for all, and nobody waits for it: it \
                     trusts the stolen key until it is given the new bundle, and the next standby \
                     waits until it is removed (`steadfast consumer remove {name}`)"
                )
            });
            let cut_off = promised(intent, state).filter(|p| is_cut_off(intent, p, now));
            let cut_off = cut_off.map(|Promise { holder, not_after, .. }| {
                format!(
                    "{holder} cannot ack, and holds SVIDs until {not_after}: they are refused from \
                     the deadline on"
                )
            });
            fixed.chain(cut_off).collect()
        }
        Intent::Issuer { deadline: Some(_) } => undeniable(state),
        Intent::Issuer { deadline: None } | Intent::Replace { .. } | Intent::Rotate { .. } => {
            Vec::new()
        }
    };
    // Both issuers are of the same anchor: nobody can be left behind.
    if !matches!(intent, Intent::Issuer { deadline: None }) {
        warnings.extend(state.exemptions.iter().map(exempt));
    }
    warnings
}

fn exempt(exemption: &Exemption) -> String {
    let (name, Exemption { reason, by, .. }) = (exemption.shown_name(), exemption);
    format!(
        "{name} is exempt ({reason}; by {by}): nobody waits for it, and until it answers or starts \
         anew, others may refuse it"
    )
}

/// A consumer holds anchors and knows of no denied issuer. A bundle in a form that is SPIFFE's or PEM
/// has no room for one.
fn undeniable(state: &TrustDomainState) -> Vec<String> {
    if state.consumers.is_empty() {
        return Vec::new();
    }
    let names: Vec<_> = state.consumers.iter().map(|consumer| consumer.name.as_str()).collect();
    let ends =
        state.active_issuer().map(|issuer| format!(" until it ends at {}", issuer.not_after));
    vec![format!(
        "{} cannot deny an issuer: whoever has the stolen key stays trusted there{}. `steadfast \
         anchor rotate --emergency` takes the anchor from it, and with it the issuer",
        names.join(", "),
        ends.unwrap_or_default()
    )]
}

/// The consumers that never read the bundle again by themselves.
fn fixed(state: &TrustDomainState) -> impl Iterator<Item = &str> {
    let fixed = state.consumers.iter().filter(|consumer| consumer.refresh.is_none());
    fixed.map(|consumer| consumer.name.as_str())
}

/// The fences, the making of keys, the window in which renewals are spread, and the SVIDs of holders
/// that cannot ack: these are outlived, in an emergency until its deadline.
fn expected(
    intent: &Intent,
    state: &TrustDomainState,
    timings: Timings,
    emergency: Option<&Emergency>,
    now: UnixTime,
) -> Duration {
    let Timings { lease, skew, renew_window, renew_window_urgent, .. } = timings;
    let promised = promised(intent, state).map(|promise| promise.not_after + skew);
    let promised = promised.max().map(|until| until.since(now)).unwrap_or_default();
    let refreshes = state.consumers.iter().filter_map(|consumer| consumer.refresh);
    let consumers = refreshes.max().unwrap_or_default() * REFRESHES;
    let staged = lease.max(consumers);
    match intent {
        Intent::Rotate { canary, .. } => {
            let canary = canary.as_ref().map(|plan| plan.window.max(lease)).unwrap_or_default();
            let drained = staged + canary + lease + lease.max(renew_window);
            drained.max(promised) + lease + ROUNDS
        }
        Intent::Emergency { deadline, .. } => {
            let standby_missing = emergency.is_none_or(|emergency| emergency.standby_missing);
            let standby = if standby_missing { staged } else { Duration::ZERO };
            let drained = |active: Duration| {
                let renewed = active + lease + lease.max(renew_window_urgent);
                renewed.max(promised.min(active + *deadline))
            };
            let drained = match emergency.map(|emergency| emergency.remedy) {
                Some(Remedy::Removed) => Duration::ZERO,
                Some(Remedy::Replaced(None)) => drained(lease.max(consumers.min(*deadline))),
                Some(Remedy::Drained | Remedy::Replaced(Some(_))) | None => drained(Duration::ZERO),
            };
            drained + lease + standby + ROUNDS
        }
        Intent::Issuer { deadline: None } => ROUNDS,
        Intent::Issuer { deadline: Some(_) } => {
            lease + lease.max(renew_window_urgent) + lease + ROUNDS
        }
        Intent::Replace { .. } => staged + lease + ROUNDS,
    }
}

fn obstacles(
    intent: &Intent,
    state: &TrustDomainState,
    emergency: Option<&Emergency>,
    now: UnixTime,
) -> Vec<String> {
    let mut obstacles = Vec::new();
    obstacles.extend(state.halted.map(halted));
    if let Intent::Issuer { .. } = intent {
        obstacles.extend(issuer_obstacles(intent, state, now));
        return obstacles;
    }
    let urgent = intent.urgent();
    if let Some(rotation) = state.rotation.as_ref().filter(|_| !urgent) {
        obstacles.push(format!("rotation {} is under way", rotation.number));
    }
    if let Some(request) = state.requested.as_ref().filter(|_| !urgent) {
        obstacles.push(format!(
            "a rotation is ordered already, by {}; `steadfast anchor abort` takes the order back",
            request.by
        ));
    }
    if state.paused && !urgent {
        obstacles.push("rotations are paused: `steadfast anchor resume` first".to_owned());
    }
    if !urgent {
        obstacles.extend(fixed(state).map(|name| {
            format!(
                "{name} reads the bundle once and for all: it holds the rotation up until it has \
                 been given the new one and is removed (`steadfast consumer remove {name}`)"
            )
        }));
    }
    let next = match intent {
        Intent::Rotate { .. } => {
            let given = intent.given().map(|given| given.record.id);
            given.or_else(|| one(state, AnchorState::Standby))
        }
        _ => None,
    };
    if let Some(next) = next.and_then(|id| state.anchor(id)) {
        if next.not_after <= now {
            obstacles.push(format!("anchor {} has expired", next.id.short()));
        } else if next.not_after < now + LITTLE {
            let left = duration::show(next.not_after.since(now));
            obstacles.push(format!("anchor {} has only {left} left", next.id.short()));
        }
        let signed = |issuer: &IssuerRecord| issuer.anchor_id == next.id && issuer.not_after > now;
        if next.is_external() && !state.issuers.iter().any(signed) {
            obstacles.push(unsigned(next.id));
        }
    }
    if matches!(intent, Intent::Rotate { .. }) && one(state, AnchorState::Standby).is_none() {
        obstacles.push("there is no standby yet: one is made and acked first".to_owned());
    }
    if emergency.is_some_and(|emergency| emergency.remedy == Remedy::Replaced(None)) {
        obstacles.push(
            "no other anchor is acked by all and signs without a person: until a fresh one is, the \
             stolen one stays active"
                .to_owned(),
        );
    }
    obstacles
}

fn issuer_obstacles(intent: &Intent, state: &TrustDomainState, now: UnixTime) -> Vec<String> {
    let mut obstacles = Vec::new();
    if let Some(rotation) = state.issuer_rotation.as_ref().filter(|_| !intent.urgent()) {
        obstacles.push(format!("rotation {} replaces the issuer already", rotation.number));
    }
    let Some(anchor) = state.active_anchor() else {
        obstacles.push("there is no active anchor that could sign an issuer".to_owned());
        return obstacles;
    };
    let other = |issuer: &IssuerRecord| {
        let fresh = issuer.id != state.active_issuer && !state.denies(issuer.id);
        fresh && issuer.anchor_id == anchor.id && issuer.not_after > now
    };
    if anchor.is_external() && !state.issuers.iter().any(other) {
        let id = anchor.id.short();
        obstacles.push(format!(
            "anchor {id} is external, and no other issuer under it is signed: `steadfast issuer \
             request --anchor {id}` prints what its CA is to sign, and `steadfast issuer import \
             FILE` takes the answer{}",
            match intent.urgent() {
                true => "; an anchor of our own is faster: `steadfast anchor rotate --emergency`",
                false => "",
            }
        ));
    }
    obstacles
}

fn unsigned(anchor: KeyId) -> String {
    let id = anchor.short();
    format!(
        "no issuer under the external anchor {id} is signed: it would be waited for. Once the \
         anchor is imported (`steadfast anchor import FILE`), `steadfast issuer request --anchor \
         {id}` prints what its CA is to sign, and `steadfast issuer import FILE` takes the answer"
    )
}

const WAITED_FOR: &str = "is waited for, until it answers, has ended, or is exempted by name";
/// As many of its own periods is a holder given that cannot ack.
const REFRESHES: u32 = 4;
/// Answers that are no older are those of this moment.
const NOW_S: u64 = 3;
/// Making keys, loading issuers, asking everybody.
const ROUNDS: Duration = Duration::from_secs(8);
/// An anchor with less is no good choice.
const LITTLE: Duration = Duration::from_secs(90 * 86_400);

/// As steadfast-rotation has them unless told otherwise: for a plan while none answers.
const TIMINGS_USUAL: Timings = Timings {
    lease: Duration::from_secs(15),
    skew: Duration::from_secs(60),
    renew_window: Duration::from_secs(600),
    renew_window_urgent: Duration::from_secs(60),
    issuer_life: Duration::from_secs(30 * 86_400),
    issuer_left_min: Duration::from_secs(10 * 86_400),
    schedule: Schedule { anchor_period: Duration::from_secs(365 * 86_400), window: None },
};

#[cfg(test)]
mod tests {
    use steadfast_rotation_protocol::Instance;
    use steadfast_rotation_protocol::census::{Listed, ProxyStatus, Replica};
    use steadfast_rotation_protocol::trust_domain::{Consumer, EXTERNAL};

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);
    /// Of a query at that time.
    const NONCE: u64 = NOW.as_millis() * 1000;

    fn state() -> TrustDomainState {
        let domain = "cluster.local".parse().unwrap();
        steadfast_identity::authority::found(&domain, NOW).unwrap().state
    }

    fn told(round: Round) -> Told {
        Told::of(Standing::default(), Some(round))
    }

    fn plan(intent: &Intent, state: &TrustDomainState) -> Plan {
        let listed = Listed {
            pod_uid: "u".to_owned(),
            name: "demo/web-0".to_owned(),
            proxy: ProxyStatus::Running,
        };
        let round = Round { nonce: NONCE, listed: vec![listed], ..Round::default() };
        Plan::of(intent, state, &told(round), NOW)
    }

    #[test]
    fn a_plan_names_who_would_be_waited_for_and_who_cannot_ack() {
        let mut state = state();
        for (name, refresh) in [("vault", Some(Duration::from_secs(300))), ("old", None)] {
            state.add_consumer(Consumer { name: name.to_owned(), refresh });
        }
        let plan = plan(&Intent::Rotate { next: None, canary: None }, &state);
        assert!(!plan.is_clear());
        let text = plan.text(Paint::plain());
        for words in [
            "demo/web-0: has never connected; it is waited for",
            "vault reads the bundle every 5m00s: it is given 20m00s",
            "old reads the bundle once and for all",
            "1 proxies and processes; 0 of them answer now",
            "about 30m",
            "steadfast anchor abort",
        ] {
            let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(flat.contains(words), "{words:?} is not in\n{text}");
        }
    }

    #[test]
    fn an_emergency_says_who_is_cut_off_and_that_nothing_leads_back() {
        let state = state();
        let anchor = state.active_anchor().unwrap().id;
        let deadline = Duration::from_secs(600);
        let plan = plan(&Intent::Emergency { anchor, deadline }, &state);
        assert!(plan.fate.starts_with("is cut off at the deadline"));
        assert!(plan.undo.contains("cannot be undone"));
        assert!(plan.changes.iter().any(|change| change.contains(&anchor.short())));
    }

    #[test]
    fn an_emergency_names_the_anchor_that_the_controller_chooses() {
        let mut state = state();
        let emergency = emergency(&state);
        let [active, standby] = [AnchorState::Active, AnchorState::Standby]
            .map(|wanted| one(&state, wanted).expect("an anchor in this state"));
        let next = |state: &TrustDomainState, told: &Told| {
            let plan = Plan::of(&emergency, state, told, NOW);
            (plan.changes.join("\n"), plan.is_clear(), plan.expected_s)
        };
        let (changes, clear, soon) = next(&state, &Told::default());
        assert!(changes.contains(&format!("→ {} becomes active at once", standby.short())));
        assert!(clear, "everybody holds the standby");

        // Its key is gone, it is stolen too, not everybody holds it, a person must sign for it.
        let keyless = Told { keyless: vec![standby], ..Told::default() };
        let bent = |bend: &dyn Fn(&mut TrustDomainState)| {
            let mut state = state.clone();
            bend(&mut state);
            (state, Told::default())
        };
        let by = || "ann".to_owned();
        for (state, told) in [
            (state.clone(), keyless),
            bent(&|state| state.taint(standby, by(), Duration::ZERO).expect("it is there")),
            bent(&|state| state.unsettled.push(standby)),
            bent(&|state| {
                let mut anchors = state.anchors.iter_mut();
                anchors.find(|anchor| anchor.id == standby).expect("one").key_ref =
                    EXTERNAL.to_owned();
            }),
        ] {
            let (changes, clear, later) = next(&state, &told);
            for words in ["+ a fresh anchor joins the bundle", "→ it becomes active, everybody"] {
                assert!(changes.contains(words), "{words:?} is not in {changes}");
            }
            assert!(!clear && later >= soon, "the stolen one signs meanwhile");
        }

        // The one that is drained goes first, as everybody still holds it; the standby stays.
        let retiring = AnchorRecord {
            id: KeyId::of_spki(b"retiring"),
            state: AnchorState::Retiring,
            ..state.anchor(active).expect("the active one").clone()
        };
        let first = format!("→ {} becomes active at once", retiring.id.short());
        state.anchors.push(retiring);
        let (changes, clear, _) = next(&state, &Told::default());
        assert!(changes.contains(&first) && clear, "{changes}");
        assert!(!changes.contains("a fresh anchor"), "{changes}");
    }

    #[test]
    fn a_plan_takes_as_long_as_what_holders_that_cannot_ack_were_promised() {
        let mut state = state();
        let rotate = Intent::Rotate { next: None, canary: None };
        let takes = |intent: &Intent, state: &TrustDomainState| {
            Duration::from_secs(Plan::of(intent, state, &Told::default(), NOW).expected_s)
        };
        let [fast, urgent] = [&rotate, &emergency(&state)].map(|intent| takes(intent, &state));
        let (anchor_id, hour) = (one(&state, AnchorState::Active).unwrap(), 3600);
        for secs in [5, 3 * hour] {
            let not_after = NOW + Duration::from_secs(secs);
            state.promised.push(Promise { anchor_id, holder: "linkerd".to_owned(), not_after });
            let outlived = Duration::from_secs(secs);
            assert!(takes(&rotate, &state) >= outlived.max(fast), "{outlived:?}");
        }
        let takes = takes(&emergency(&state), &state);
        assert!(takes > urgent && takes < Duration::from_secs(hour), "the deadline: {takes:?}");
    }

    #[test]
    fn whoever_is_exempt_is_named_and_the_plan_is_not_clear() {
        let mut state = state();
        let instance = Instance { pod_uid: "u".to_owned(), started_at: NOW };
        let [name, reason, by] = ["demo/web-0", "its node is mended", "ann"].map(str::to_owned);
        state.exempt(instance, name, reason, by, NOW);
        for (intent, clear) in [
            (Intent::Rotate { next: None, canary: None }, false),
            (emergency(&state), false),
            (Intent::Issuer { deadline: None }, true),
        ] {
            let plan = Plan::of(&intent, &state, &Told::default(), NOW);
            assert_eq!(plan.is_clear(), clear, "{intent:?}");
            let named = flat(&plan).contains("demo/web-0 is exempt (its node is mended; by ann)");
            assert_eq!(named, !clear, "{intent:?}");
        }
    }

    #[test]
    fn a_stolen_standby_goes_at_once_and_nobody_has_a_deadline() {
        let mut state = state();
        let anchor = one(&state, AnchorState::Standby).expect("a standby");
        let intent = Intent::Emergency { anchor, deadline: Duration::from_secs(600) };
        let text = flat(&plan(&intent, &state));
        for words in ["withdrawn at once, and destroyed", "a fresh anchor becomes the standby"] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
        assert!(text.contains("who does not answer is waited for"), "{text}");
        assert!(!text.contains("at the latest") && !text.contains("deadline"), "{text}");
        // After a store was put back it may have issued.
        state.recovered_at = Some(NOW);
        let text = flat(&plan(&intent, &state));
        assert!(text.contains("at the latest after 10m") && text.contains("cut off"), "{text}");
    }

    fn emergency(state: &TrustDomainState) -> Intent {
        let anchor = one(state, AnchorState::Active).expect("an active anchor");
        Intent::Emergency { anchor, deadline: Duration::from_secs(600) }
    }

    #[test]
    fn an_emergency_says_which_holders_that_cannot_ack_are_cut_off() {
        let mut state = state();
        let active = state.active_anchor().unwrap().id;
        for (name, refresh) in [("vault", Some(Duration::from_secs(300))), ("old", None)] {
            state.add_consumer(Consumer { name: name.to_owned(), refresh });
        }
        for (holder, anchor_id, secs) in [
            ("brief", active, 60),
            ("linkerd", active, 3600),
            ("of another", KeyId::of_spki(b"other"), 3600),
        ] {
            let not_after = NOW + Duration::from_secs(secs);
            state.promised.push(Promise { anchor_id, holder: holder.to_owned(), not_after });
        }
        let emergency = Intent::Emergency { anchor: active, deadline: Duration::from_secs(600) };
        let plan = Plan::of(&emergency, &state, &Told::default(), NOW);
        assert!(!plan.is_clear());
        let (text, warnings) = (flat(&plan), plan.warnings.join("\n"));
        for words in
            ["old has read the bundle once and for all, and nobody waits", "linkerd cannot"]
        {
            assert!(warnings.contains(words), "{words:?} is not in {warnings}");
        }
        for words in
            ["brief holds SVIDs until", "vault reads the bundle every 5m00s: until it does"]
        {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
        for words in ["of another", "holds the rotation up", "once the next anchor is active"] {
            assert!(!text.contains(words), "{words:?} is in {text}");
        }
    }

    #[test]
    fn a_holder_that_never_reads_again_is_in_the_way_and_one_that_does_is_not() {
        let mut state = state();
        let rotate = Intent::Rotate { next: None, canary: None };
        let clear =
            |state: &TrustDomainState| Plan::of(&rotate, state, &Told::default(), NOW).is_clear();
        let refresh = Some(Duration::from_secs(300));
        state.add_consumer(Consumer { name: "vault".to_owned(), refresh });
        assert!(clear(&state));
        state.add_consumer(Consumer { name: "legacy".to_owned(), refresh: None });
        assert!(!clear(&state), "it is waited for until somebody removes it");
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let mut state = state();
        state.pause(true);
        let standby = state.in_state(AnchorState::Standby).next().unwrap().id;
        state.anchors.retain(|anchor| anchor.id != standby);
        let plan = plan(&Intent::Rotate { next: None, canary: None }, &state);
        let text = plan.obstacles.join("\n");
        for words in ["paused", "no standby yet"] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
    }

    /// Two replicas of identity, one of which is away, and a workload that has never connected.
    fn round() -> Round {
        let listed = Listed {
            pod_uid: "u".to_owned(),
            name: "demo/web-0".to_owned(),
            proxy: ProxyStatus::Running,
        };
        let replica =
            |name: &str, reached| Replica { name: name.to_owned(), reached, ..Replica::default() };
        let replicas = vec![
            replica("identity 192.0.2.1:8080", true),
            replica("identity 192.0.2.2:8080", false),
        ];
        Round { nonce: NONCE, listed: vec![listed], replicas, ..Round::default() }
    }

    #[test]
    fn answers_of_before_are_told_as_such() {
        let intent = Intent::Issuer { deadline: None };
        for (later, words) in [(2, "1 of them answer now"), (9, "1 of them answered 9s ago")] {
            let now = NOW + Duration::from_secs(later);
            let text = flat(&Plan::of(&intent, &state(), &told(round()), now));
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
    }

    fn flat(plan: &Plan) -> String {
        plan.text(Paint::plain()).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn of_an_issuer_as_planned_only_replicas_are_asked_and_no_consumer_is_in_danger() {
        let mut state = state();
        state.add_consumer(Consumer { name: "vault".to_owned(), refresh: None });
        let intent = Intent::Issuer { deadline: None };
        let plan = Plan::of(&intent, &state, &told(round()), NOW);
        let text = flat(&plan);
        for words in [
            "Replace the issuer of cluster.local",
            "2 replicas of identity; 1 of them answer now",
            "identity 192.0.2.2:8080: has never connected; it is waited for",
            "about 8s if everybody answers",
            "undo nothing is to be undone",
        ] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        assert!(!text.contains("vault") && !text.contains("demo/web-0"), "{text}");
        assert!(plan.obstacles.is_empty(), "{:?}", plan.obstacles);
    }

    #[test]
    fn a_stolen_issuer_is_an_emergency_that_names_who_cannot_deny_it_and_the_cure() {
        let mut state = state();
        for name in ["vault", "gateway"] {
            state.add_consumer(Consumer { name: name.to_owned(), refresh: None });
        }
        let intent = Intent::Issuer { deadline: Some(Duration::from_secs(600)) };
        let plan = Plan::of(&intent, &state, &Told::default(), NOW);
        assert!(!plan.is_clear());
        let text = flat(&plan);
        for words in [
            "vault, gateway cannot deny an issuer",
            "`steadfast anchor rotate --emergency`",
            "at the latest after 10m",
            "cut off at the deadline",
            "cannot be undone",
        ] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        state.consumers.clear();
        assert!(Plan::of(&intent, &state, &Told::default(), NOW).is_clear());
    }

    #[test]
    fn an_external_anchor_without_a_signed_issuer_is_in_the_way() {
        let mut state = state();
        let standby = state.in_state(AnchorState::Standby).next().unwrap().id;
        let rotate = Intent::Rotate { next: None, canary: None };
        let obstacles = |state: &TrustDomainState| {
            Plan::of(&rotate, state, &Told::default(), NOW).obstacles.join("\n")
        };
        assert_eq!(obstacles(&state), "");
        for anchor in &mut state.anchors {
            anchor.key_ref = EXTERNAL.to_owned();
        }
        let text = obstacles(&state);
        let command = format!("issuer request --anchor {}", standby.short());
        assert!(text.contains(&command), "{text}");
        let issuer = state.active_issuer().unwrap().clone();
        let id = KeyId::of_spki(b"its issuer");
        state.issuers.push(IssuerRecord { id, anchor_id: standby, ..issuer });
        assert_eq!(obstacles(&state), "");
        let issuer = Intent::Issuer { deadline: Some(Duration::from_secs(600)) };
        let text = Plan::of(&issuer, &state, &Told::default(), NOW).obstacles.join("\n");
        for words in ["no other issuer under it is signed", "steadfast anchor rotate --emergency"] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
    }
}
