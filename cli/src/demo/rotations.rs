//! The rotations of `--rotate`: the issuer, the trust anchor, one that is undone after activation,
//! and an emergency; ordered as a person would order them, and counted while requests flow.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, PastRotation, Request};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::load::Load;
use crate::controller::ControllerArg;
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
}

/// Why the rotations were not performed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RotationsError {
    #[error("{what} has not ended after {} s:\n{course}", PATIENCE.as_secs())]
    Late { what: &'static str, course: String },
    #[error("the mesh has no active anchor")]
    NoActive,
    #[error(transparent)]
    TrustDomain(#[from] TrustDomainError),
}

/// What the rotations are performed on.
pub(crate) struct Rotations<'a> {
    dir: PathBuf,
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
        Self { dir: dir.to_owned(), controller, load, processes, shown }
    }

    /// Follows what is shown.
    pub(crate) fn shown(&self) -> watch::Receiver<Shown> {
        self.shown.subscribe()
    }

    /// Performs all of them, one after the other.
    ///
    /// # Errors
    /// [`RotationsError`]
    pub(crate) async fn perform(self) -> Result<Vec<Performed>, RotationsError> {
        Ok(vec![
            self.issuer().await?,
            self.anchor().await?,
            self.aborted().await?,
            self.emergency().await?,
        ])
    }

    async fn issuer(&self) -> Result<Performed, RotationsError> {
        let (failed, now) = (self.load.tally().failed, SystemClock.now());
        let order =
            |state: &mut TrustDomainState| state.rotate_issuer(ORDERED_BY.to_owned(), None, now);
        let what = "the rotation of the issuer";
        let ordered = trust_domain::change(&self.dir, order).await?;
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
        Ok(self.performed(ISSUER, phase_times(past.started, &past.steps), failed))
    }

    async fn anchor(&self) -> Result<Performed, RotationsError> {
        let failed = self.load.tally().failed;
        let ordered = self.request().await?;
        let past = self.ended("the rotation of the anchor", ordered).await?;
        Ok(self.performed("anchor", phase_times(past.started, &past.steps), failed))
    }

    async fn aborted(&self) -> Result<Performed, RotationsError> {
        let failed = self.load.tally().failed;
        let ordered = self.request().await?;
        self.until("the rotation that is to be undone", |state| {
            let phase = state.rotation.as_ref().map(|rotation| rotation.phase.name());
            phase == Some(PhaseName::Draining)
        })
        .await?;
        trust_domain::change(&self.dir, TrustDomainState::abort).await?;
        let past = self.ended("the undoing of a rotation", ordered).await?;
        Ok(self.performed("aborted", phase_times(past.started, &past.steps), failed))
    }

    async fn emergency(&self) -> Result<Performed, RotationsError> {
        let failed = self.load.tally().failed;
        let state = trust_domain::read(&self.dir).await?;
        let active = state.active_anchor().ok_or(RotationsError::NoActive)?.id;
        trust_domain::change(&self.dir, |state| {
            state.taint(active, ORDERED_BY.to_owned(), DEADLINE)
        })
        .await?;
        let ordered = Ordered::Emergency { after: state.rotations };
        let past = self.ended("the emergency", ordered).await?;
        Ok(self.performed("emergency", phase_times(past.started, &past.steps), failed))
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
        let after = trust_domain::change(&self.dir, order).await?.rotations;
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
            let state = trust_domain::read(&self.dir).await?;
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
        let look = Look::at(&self.dir, &self.controller, state).await;
        let now = SystemClock.now();
        let course = Course::of_anchor(state, look.wait(state), now);
        let course =
            course.or_else(|| Course::of_issuer(state, look.issuer_wait(state, now).as_ref(), now));
        course.map(|course| course.lines(Paint::when(false))).unwrap_or_default()
    }

    fn done(&self, line: String) {
        self.shown.send_modify(|shown| shown.done.push(line));
    }

    fn performed(&self, kind: &'static str, phases: Vec<PhaseTime>, failed: u64) -> Performed {
        let failed_requests = self.load.tally().failed - failed;
        let same = |(pid, at): &&(u32, Option<u64>)| at.is_some() && started(*pid) == *at;
        let restarts = self.processes.len() - self.processes.iter().filter(same).count();
        Performed { kind, phases, failed_requests, restarts }
    }
}

/// When a process was started, in the kernel's ticks since boot; `None`: there is none.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name, in parentheses, may hold anything.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(START_TIME_FIELD)?.parse().ok()
}

const ORDERED_BY: &str = "the demo";
const DEADLINE: Duration = Duration::from_secs(120);
/// A rotation takes four read leases, and one that is undone twice as long.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// proc(5): the 22nd field, counted from the third.
const START_TIME_FIELD: usize = 19;
