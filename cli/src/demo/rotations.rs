//! The rotations of `--rotate`: the issuer, the trust anchor, one that is undone after activation,
//! and an emergency; ordered as a person would order them, and counted while requests flow.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome, PastRotation, Request};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::load::{Load, Tally};
use crate::controller::ControllerArg;
use crate::mesh::Mesh;
use crate::output::Paint;
use crate::rotation::course::{Course, PhaseTime, ending, phase_times};
use crate::rotation::look::Look;
use crate::rotation::ordered::{ISSUER, Ordered};
use crate::trust_domain::{self, TrustDomainError};

/// A rotation that was performed, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Performed {
    pub(crate) kind: &'static str,
    pub(crate) phases: Vec<PhaseTime>,
    pub(crate) failed_requests: u64,
    pub(crate) restarts: usize,
}

/// What is shown of it meanwhile.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shown {
    /// What is over, a line each.
    pub(crate) done: Vec<String>,
    /// What is under way.
    pub(crate) course: Vec<String>,
    /// What is over, whoever interrupts the rest.
    pub(crate) performed: Vec<Performed>,
}

/// Why the rotations were not performed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RotationsError {
    #[error("{what} has not ended after {} s:\n{course}", PATIENCE.as_secs())]
    Late { what: &'static str, course: String },
    #[error("the mesh has no active anchor")]
    NoActive,
    #[error("{what} was ordered, and {ended}")]
    Other { what: &'static str, ended: String },
    #[error(transparent)]
    TrustDomain(#[from] TrustDomainError),
}

/// What the rotations are performed on.
pub(crate) struct Rotations<'a> {
    mesh: Mesh,
    controller: ControllerArg,
    load: &'a Load,
    /// Every process of the mesh, and when it was started.
    processes: Vec<(u32, Option<u64>)>,
    shown: watch::Sender<Shown>,
}

impl<'a> Rotations<'a> {
    /// Of this mesh, whose processes these are.
    pub(crate) fn new(
        dir: &Path,
        controller: ControllerArg,
        load: &'a Load,
        processes: impl Iterator<Item = u32>,
    ) -> Self {
        let processes = processes.map(|pid| (pid, started(pid))).collect();
        let shown = watch::Sender::default();
        Self { mesh: Mesh::standalone(dir), controller, load, processes, shown }
    }

    /// Follows what is shown.
    pub(crate) fn shown(&self) -> watch::Receiver<Shown> {
        self.shown.subscribe()
    }

    /// Performs all of them, one after the other. What is over is kept in what is shown.
    ///
    /// # Errors
    /// [`RotationsError`]
    pub(crate) async fn perform(self) -> Result<(), RotationsError> {
        self.issuer().await?;
        self.anchor().await?;
        self.aborted().await?;
        self.emergency().await
    }

    async fn issuer(&self) -> Result<(), RotationsError> {
        self.load.begin_period();
        let now = SystemClock.now();
        let order =
            |state: &mut TrustDomainState| state.rotate_issuer(ORDERED_BY.to_owned(), None, now);
        let what = "the rotation of the issuer";
        let ordered = trust_domain::change(&self.mesh, order).await?;
        let number = ordered.issuer_rotation.map(|rotation| rotation.number);
        let is_it = |past: &PastRotation| past.kind == ISSUER && Some(past.number) == number;
        let mut past = None;
        self.until(what, |state| {
            past = state.past.iter().find(|past| is_it(past)).cloned();
            past.is_some()
        })
        .await?;
        let past = past.ok_or(RotationsError::Late { what, course: String::new() })?;
        self.done(ending(&past));
        self.performed(ISSUER, what, (ISSUER, Outcome::Done), &past)
    }

    async fn anchor(&self) -> Result<(), RotationsError> {
        self.load.begin_period();
        let what = "the rotation of the anchor";
        let ordered = self.request().await?;
        let past = self.ended(what, ordered).await?;
        self.performed("anchor", what, ("anchor", Outcome::Done), &past)
    }

    async fn aborted(&self) -> Result<(), RotationsError> {
        self.load.begin_period();
        let ordered = self.request().await?;
        self.until("the rotation that is to be undone", |state| {
            let phase = state.rotation.as_ref().map(|rotation| rotation.phase.name());
            phase == Some(PhaseName::Draining)
        })
        .await?;
        trust_domain::change(&self.mesh, TrustDomainState::abort).await?;
        let what = "the undoing of a rotation";
        let past = self.ended(what, ordered).await?;
        self.performed("aborted", what, ("anchor", Outcome::Aborted), &past)
    }

    async fn emergency(&self) -> Result<(), RotationsError> {
        self.load.begin_period();
        let what = "an emergency";
        let state = trust_domain::read(&self.mesh).await?;
        let active = state.active_anchor().ok_or(RotationsError::NoActive)?.id;
        trust_domain::change(&self.mesh, |state| {
            state.taint(active, ORDERED_BY.to_owned(), DEADLINE)
        })
        .await?;
        let ordered = Ordered::Emergency { after: state.rotations };
        let past = self.ended(what, ordered).await?;
        self.performed("emergency", what, ("emergency", Outcome::Done), &past)
    }

    /// Orders a rotation to the standby.
    async fn request(&self) -> Result<Ordered, RotationsError> {
        let request = Request {
            by: ORDERED_BY.to_owned(),
            at: SystemClock.now(),
            anchor: None,
            canary: None,
            replaces: None,
        };
        let order = |state: &mut TrustDomainState| state.request(request.clone());
        let after = trust_domain::change(&self.mesh, order).await?.rotations;
        Ok(Ordered::By { after, by: ORDERED_BY.to_owned() })
    }

    /// The rotation that was ordered, when it is over and a standby is there again.
    async fn ended(
        &self,
        what: &'static str,
        ordered: Ordered,
    ) -> Result<PastRotation, RotationsError> {
        let mut past = None;
        self.until(what, |state| {
            if past.is_none() {
                past = ordered.ended(state).cloned();
                past.iter().for_each(|past| self.done(ending(past)));
            }
            let standby = state.in_state(AnchorState::Standby).next().is_some();
            past.is_some() && standby && state.rotation.is_none()
        })
        .await?;
        past.ok_or(RotationsError::Late { what, course: String::new() })
    }

    async fn until(
        &self,
        what: &'static str,
        mut reached: impl FnMut(&TrustDomainState) -> bool,
    ) -> Result<(), RotationsError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let state = trust_domain::read(&self.mesh).await?;
            if reached(&state) {
                self.shown.send_modify(|shown| shown.course.clear());
                return Ok(());
            }
            let course = self.course(&state).await;
            if Instant::now() >= end {
                return Err(RotationsError::Late { what, course: course.join("\n") });
            }
            self.shown.send_modify(|shown| shown.course = course);
            sleep(LOOK_EVERY).await;
        }
    }

    async fn course(&self, state: &TrustDomainState) -> Vec<String> {
        let look = Look::at(&self.mesh, &self.controller).await;
        let now = SystemClock.now();
        let course = Course::of_anchor(state, look.wait(state), now);
        let course = course.or_else(|| Course::of_issuer(state, look.issuer_wait(state), now));
        course.map(|course| course.lines(Paint::when(false))).unwrap_or_default()
    }

    fn done(&self, line: String) {
        self.shown.send_modify(|shown| shown.done.push(line));
    }

    /// Keeps what is over, if it is what was ordered.
    fn performed(
        &self,
        kind: &'static str,
        what: &'static str,
        wanted: (&str, Outcome),
        past: &PastRotation,
    ) -> Result<(), RotationsError> {
        check(what, wanted, past)?;
        let phases = phase_times(past.started, &past.steps);
        let same = |(pid, at): &&(u32, Option<u64>)| at.is_some() && started(*pid) == *at;
        let restarts = self.processes.len() - self.processes.iter().filter(same).count();
        // What was sent meanwhile may still fail: it is counted at the end.
        let performed = Performed { kind, phases, failed_requests: 0, restarts };
        self.shown.send_modify(|shown| shown.performed.push(performed));
        Ok(())
    }
}

/// Whether a rotation has ended as it was ordered: of this kind, and so.
fn check(
    what: &'static str,
    (kind, outcome): (&str, Outcome),
    past: &PastRotation,
) -> Result<(), RotationsError> {
    match past.kind == kind && past.outcome == outcome {
        true => Ok(()),
        false => Err(RotationsError::Other { what, ended: ending(past) }),
    }
}

/// With the requests that failed, each counted for the rotation in which it was sent.
pub(crate) fn counted(performed: Vec<Performed>, tally: &Tally) -> Vec<Performed> {
    // The first period is that before all rotations.
    let failed = tally.unanswered.iter().skip(1);
    let counted = performed.into_iter().zip(failed);
    counted.map(|(performed, failed)| Performed { failed_requests: *failed, ..performed }).collect()
}

/// When a process was started, in the kernel's ticks since boot; `None`: there is none.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name, in parentheses, may hold anything.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(START_TIME_FIELD)?.parse().ok()
}

/// How many are performed, if nobody interrupts them.
pub(crate) const ROTATIONS: usize = 4;
const ORDERED_BY: &str = "the demo";
const DEADLINE: Duration = Duration::from_secs(120);
/// A rotation takes four read leases, and one that is undone twice as long.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// proc(5): the 22nd field, counted from the third.
const START_TIME_FIELD: usize = 19;

#[cfg(test)]
mod tests {
    use steadfast_api::UnixTime;

    use super::*;

    #[test]
    fn what_ended_otherwise_than_it_was_ordered_was_not_performed() {
        let past = |kind: &str, outcome| PastRotation {
            number: 7,
            kind: kind.to_owned(),
            by: ORDERED_BY.to_owned(),
            started: UnixTime::default(),
            ended: UnixTime::default(),
            outcome,
            steps: Vec::new(),
        };
        let wanted = ("anchor", Outcome::Aborted);
        assert!(check("the undoing", wanted, &past("anchor", Outcome::Aborted)).is_ok());
        for other in [past("anchor", Outcome::Done), past("standby", Outcome::Aborted)] {
            let error = check("the undoing", wanted, &other).unwrap_err().to_string();
            assert!(error.starts_with("the undoing was ordered, and rotation 7 ("), "{error}");
        }
    }

    #[test]
    fn a_failed_request_is_that_of_the_rotation_in_which_it_was_sent() {
        let performed =
            |kind| Performed { kind, phases: Vec::new(), failed_requests: 0, restarts: 0 };
        let mut tally = Tally::for_test(0);
        // Before all, in the first, in the second, and in one that somebody has interrupted.
        tally.unanswered = vec![1, 0, 2, 3];
        let counted = counted(vec![performed(ISSUER), performed("anchor")], &tally);
        let failed: Vec<_> = counted.iter().map(|counted| counted.failed_requests).collect();
        assert_eq!(failed, [0, 2]);
    }
}
