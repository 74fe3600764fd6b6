//! Following a rotation to its end: on a terminal a block of lines that is drawn anew, elsewhere a
//! line for each thing that happens. The rotation does not need this: it goes on without.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use crossterm::terminal::{Clear, ClearType};
use crossterm::{cursor, queue};
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, ErrorChain, SystemClock, duration};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{AnchorState, PastRotation};
use tokio::time::{Instant, sleep};

use crate::controller::ControllerArg;
use crate::mesh::{Mesh, StoreProblem};
use crate::output::{Format, Paint};
use crate::problem::Problem;
use crate::rotation::course::{Course, ending};
use crate::rotation::look::Look;
use crate::rotation::ordered::{ISSUER, Ordered};
use crate::rotation::waiting::Waiting;
use crate::trust_domain::{self, TrustDomainError};

/// What is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Followed {
    /// Rotations of anchors from this one on, until all is quiet.
    Anchor(Ordered),
    /// The rotation of the issuer of this number.
    Issuer(u64),
}

/// Where it is shown what a look has found.
pub(crate) trait Show {
    /// How things stand at this moment.
    ///
    /// # Errors
    /// Nobody reads it any more.
    fn show(
        &mut self,
        state: &TrustDomainState,
        look: &Look,
        followed: &Followed,
        now: UnixTime,
    ) -> io::Result<()>;

    /// Why nothing can be seen, once.
    ///
    /// # Errors
    /// Nobody reads it any more.
    fn blind(&mut self, why: &str) -> io::Result<()>;
}

/// Follows until all is quiet, and tells how it is then. `None`: the person has had enough, and the
/// rotation goes on. A store that is restarted meanwhile is waited for.
///
/// # Errors
/// The store has not answered for minutes, or holds no trust domain of ours any more.
pub(crate) async fn follow(
    mesh: &Mesh,
    arg: &ControllerArg,
    followed: &Followed,
    shown: &mut impl Show,
) -> Result<Option<TrustDomainState>, Problem> {
    let watching = async {
        let mut outage = Outage::default();
        loop {
            match trust_domain::read(mesh).await {
                Ok(state) => {
                    outage = Outage::default();
                    let look = Look::at(mesh, arg).await;
                    shown.show(&state, &look, followed, SystemClock.now())?;
                    if followed.is_over(&state) {
                        return Ok::<_, Problem>(state);
                    }
                }
                Err(error) => {
                    if let Some(why) = outage.goes_on(error, Instant::now())? {
                        shown.blind(&why)?;
                    }
                }
            }
            sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        ended = watching => ended.map(Some),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            Ok(None)
        }
    }
}

/// Since when the store has not answered.
#[derive(Debug, Default)]
struct Outage(Option<Instant>);

impl Outage {
    /// Another read has failed; the first time, what is to be said of it.
    fn goes_on(
        &mut self,
        error: TrustDomainError,
        now: Instant,
    ) -> Result<Option<String>, TrustDomainError> {
        let silent = matches!(error, TrustDomainError::Store(StoreProblem::Unavailable { .. }));
        match self.0 {
            _ if !silent => Err(error),
            Some(since) if now.duration_since(since) >= PATIENCE => Err(error),
            Some(_) => Ok(None),
            None => {
                self.0 = Some(now);
                let why = ErrorChain(&error).to_string();
                let why = why.lines().next().unwrap_or_default();
                let patience = duration::show(PATIENCE);
                Ok(Some(format!("{why}; nothing moves until it does; asking on for {patience}")))
            }
        }
    }
}

impl Followed {
    fn is_over(&self, state: &TrustDomainState) -> bool {
        let stolen = state.anchors.iter().any(|anchor| anchor.taint.is_some());
        match self {
            Self::Anchor(_) => {
                let standby = state.in_state(AnchorState::Standby).next().is_some();
                state.rotation.is_none() && state.requested.is_none() && standby && !stolen
            }
            Self::Issuer(number) => {
                state.issuer_rotation.as_ref().is_none_or(|rotation| rotation.number != *number)
            }
        }
    }

    /// Those that have ended since it is followed.
    pub(crate) fn ended(&self, state: &TrustDomainState) -> Vec<PastRotation> {
        let is_followed = |past: &&PastRotation| match self {
            Self::Anchor(ordered) => ordered.is_followed(past),
            Self::Issuer(number) => past.kind == ISSUER && past.number == *number,
        };
        state.past.iter().filter(is_followed).cloned().collect()
    }

    /// How the course of it is, and what is in the way of it or of its beginning.
    fn course(
        &self,
        state: &TrustDomainState,
        look: &Look,
        now: UnixTime,
    ) -> (Option<Course>, Option<String>) {
        let course = match self {
            Self::Anchor(_) => Course::of_anchor(state, look.wait(state), now),
            Self::Issuer(_) => Course::of_issuer(state, look.issuer_wait(state), now),
        };
        let before = match self {
            Self::Anchor(_) => before_it_begins(state, look, now).map(|(what, _)| what),
            Self::Issuer(_) => None,
        };
        (course, look.trouble(state).or(before))
    }
}

/// What a rotation of an anchor waits for that there is reason for, be it an order, the schedule or
/// a key that is lost, and that has not begun; and whether that lasts until somebody does something.
pub(crate) fn before_it_begins(
    state: &TrustDomainState,
    look: &Look,
    now: UnixTime,
) -> Option<(String, bool)> {
    let wait = look.wait(state).filter(|_| state.rotation.is_none())?;
    let waiting = Waiting::of(wait, state, None, now);
    let names = waiting.missing.iter().map(|m| format!("{}: {}", m.name, m.reason));
    let what = format!(
        "the next rotation waits: {} {}",
        waiting.guard,
        names.collect::<Vec<_>>().join("; ")
    );
    (!waiting.guard.is_empty()).then(|| (what.trim_end().to_owned(), waiting.stalled))
}

/// What is on the screen already; nothing ever, where a program reads.
pub(crate) struct Shown {
    output: Format,
    terminal: bool,
    paint: Paint,
    /// Lines of the block that is drawn anew.
    block: u16,
    /// What was told last, where each line is told once.
    told: Vec<String>,
    ended: u64,
}

impl Shown {
    /// For this form of the answer.
    pub(crate) fn new(output: Format) -> Self {
        let terminal = io::stdout().is_terminal();
        let (paint, told) = (Paint::stdout(), Vec::new());
        Self { output, terminal, paint, block: 0, told, ended: 0 }
    }
}

impl Show for Shown {
    fn show(
        &mut self,
        state: &TrustDomainState,
        look: &Look,
        followed: &Followed,
        now: UnixTime,
    ) -> io::Result<()> {
        if self.output != Format::Table {
            return Ok(());
        }
        let (course, trouble) = followed.course(state, look, now);
        let ended: Vec<_> =
            followed.ended(state).into_iter().filter(|p| p.number > self.ended).collect();
        for past in &ended {
            self.ended = past.number;
        }
        let ends = ended.iter().map(|past| format!("{} {}", self.paint.green("✓"), ending(past)));
        match self.terminal {
            true => self.redraw(ends.collect(), course.as_ref(), trouble),
            false => self.tell(ends.collect(), course.as_ref(), trouble),
        }
    }

    fn blind(&mut self, why: &str) -> io::Result<()> {
        match (self.output, self.terminal) {
            (Format::Table, true) => self.redraw(Vec::new(), None, Some(why.to_owned())),
            (Format::Table, false) => {
                // What was told is told no second time when the store answers again.
                let told = std::mem::take(&mut self.told);
                let said = self.tell(Vec::new(), None, Some(why.to_owned()));
                self.told = told;
                said
            }
            _ => writeln!(io::stderr(), "{why}"),
        }
    }
}

impl Shown {
    /// The block once more, in the place of the one before.
    fn redraw(
        &mut self,
        ends: Vec<String>,
        course: Option<&Course>,
        trouble: Option<String>,
    ) -> io::Result<()> {
        let (columns, rows) = crossterm::terminal::size().unwrap_or((80, 24));
        let mut lines = course.map(|course| course.lines(self.paint)).unwrap_or_default();
        lines.extend(trouble.map(|trouble| format!("  {} {trouble}", self.paint.red("!"))));
        // A block higher than the screen cannot be taken back.
        lines.truncate(usize::from(rows.saturating_sub(2)));
        let mut out = io::stdout().lock();
        if self.block > 0 {
            queue!(out, cursor::MoveUp(self.block), cursor::MoveToColumn(0))?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))?;
        for line in ends.iter().chain(&lines) {
            writeln!(out, "{}", cut(line, usize::from(columns)))?;
        }
        self.block = u16::try_from(lines.len()).unwrap_or(0);
        out.flush()
    }

    /// Only what is new.
    fn tell(
        &mut self,
        ends: Vec<String>,
        course: Option<&Course>,
        trouble: Option<String>,
    ) -> io::Result<()> {
        let mut lines = Vec::new();
        if let Some(course) = course {
            let all = course.lines(self.paint);
            // The title and the phases behind; then where it stands, without what changes with time.
            lines.extend(all.into_iter().take(1 + course.phases.len()));
            if !course.waiting.guard.is_empty() {
                lines.push(format!("  ▸ {:<12} {}", course.phase, course.waiting.guard));
            }
            for absent in &course.waiting.missing {
                lines.push(format!("      missing {}: {}", absent.name, absent.reason));
            }
        }
        lines.extend(trouble.map(|trouble| format!("  ! {trouble}")));
        let mut out = io::stdout().lock();
        for line in ends.iter().chain(lines.iter().filter(|line| !self.told.contains(line))) {
            writeln!(out, "{line}")?;
        }
        out.flush()?;
        self.told = lines;
        Ok(())
    }
}

/// To so many columns, colours not counted.
fn cut(line: &str, columns: usize) -> String {
    let (mut kept, mut wide, mut escape) = (String::new(), 0, false);
    for c in line.chars() {
        match (escape, c) {
            (true, _) => escape = !c.is_ascii_alphabetic(),
            (false, '\x1b') => escape = true,
            (false, _) => wide += 1,
        }
        if wide > columns {
            return kept + "\x1b[0m";
        }
        kept.push(c);
    }
    kept
}

const LOOK_EVERY: Duration = Duration::from_millis(300);
/// A store that is restarted, or moves to another machine, is back by then.
const PATIENCE: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use steadfast_rotation_protocol::controller::{Standing, Wait};
    use steadfast_rotation_protocol::trust_domain::Halt;

    use super::*;

    fn silent() -> TrustDomainError {
        let (dir, why) = ("mesh".into(), "Connection refused".to_owned());
        StoreProblem::Unavailable { dir, why }.into()
    }

    #[test]
    fn a_store_that_does_not_answer_is_told_once_and_waited_for_for_a_while() {
        let (mut outage, began) = (Outage::default(), Instant::now());
        let told = outage.goes_on(silent(), began).unwrap().unwrap();
        assert!(told.contains("Connection refused") && !told.contains('\n'), "{told}");
        let later = began + PATIENCE - Duration::from_secs(1);
        assert_eq!(outage.goes_on(silent(), later).unwrap(), None, "once");
        let error = outage.goes_on(silent(), began + PATIENCE).unwrap_err();
        assert!(error.to_string().contains("Connection refused"), "{error}");
    }

    #[test]
    fn a_store_with_nothing_of_ours_is_an_error_at_once() {
        let mut outage = Outage::default();
        let error = TrustDomainError::NoTrustDomain("mesh".into());
        assert!(outage.goes_on(error, Instant::now()).is_err());
    }

    #[test]
    fn a_halted_trust_domain_is_shown_as_that_while_an_emergency_is_followed() {
        let now = UnixTime::from_secs(1_800_000_000);
        let domain = "cluster.local".parse().unwrap();
        let mut state = steadfast_identity::authority::found(&domain, now).unwrap().state;
        let halt = Halt::Restored { seen_seq: 9 };
        state.halted = Some(halt);
        let stolen = state.active_anchor().unwrap().id;
        state.taint(stolen, "ann".to_owned(), Duration::from_secs(600)).unwrap();
        let followed = Followed::Anchor(Ordered::Emergency { after: 0 });
        assert!(!followed.is_over(&state));
        let waiting = Some(Wait::Halted(halt));
        let standing = Standing { state: Some(state.clone()), waiting, ..Standing::default() };
        let look = Look::for_test(standing);
        let (course, trouble) = followed.course(&state, &look, now);
        assert_eq!(course, None);
        assert!(trouble.as_ref().is_some_and(|t| t.contains("trust recover")), "{trouble:?}");
    }
}
