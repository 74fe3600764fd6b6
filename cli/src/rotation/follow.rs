//! Following a rotation to its end: on a terminal a block of lines that is drawn anew, elsewhere a
//! line for each thing that happens. The rotation does not need this: it goes on without.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::time::Duration;

use crossterm::terminal::{Clear, ClearType};
use crossterm::{cursor, queue};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Standing;
use steadfast_rotation_protocol::trust_domain::{AnchorState, PastRotation};
use tokio::time::sleep;

use crate::controller::{Controller, ControllerArg, ControllerError};
use crate::output::{Format, Paint};
use crate::problem::Problem;
use crate::rotation::course::{Course, ending};
use crate::trust_domain;

/// What is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Followed {
    /// Rotations of anchors with a higher number than this, until all is quiet.
    AnchorsAfter(u64),
    /// The rotation of the issuer.
    Issuer,
}

/// Follows until all is quiet, and tells which rotations have ended meanwhile. `None`: the person
/// has had enough, and the rotation goes on.
///
/// # Errors
/// The store does not answer.
pub(crate) async fn follow(
    dir: &Path,
    arg: &ControllerArg,
    followed: Followed,
    output: Format,
) -> Result<Option<Vec<PastRotation>>, Problem> {
    let mut shown = Shown::new(output);
    let watching = async {
        loop {
            let state = trust_domain::read(dir).await?;
            let standing = Controller::find(dir, arg).await.map(|(_, standing)| standing);
            shown.show(&state, &standing, followed)?;
            if followed.is_over(&state) {
                return Ok::<_, Problem>(followed.ended(&state));
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

impl Followed {
    fn is_over(self, state: &TrustDomainState) -> bool {
        let stolen = state.anchors.iter().any(|anchor| anchor.taint.is_some());
        match self {
            Self::AnchorsAfter(_) => {
                let standby = state.in_state(AnchorState::Standby).next().is_some();
                state.rotation.is_none() && state.requested.is_none() && standby && !stolen
            }
            Self::Issuer => state.issuer_rotation.is_none(),
        }
    }

    fn ended(self, state: &TrustDomainState) -> Vec<PastRotation> {
        match self {
            Self::AnchorsAfter(number) => {
                state.past.iter().filter(|past| past.number > number).cloned().collect()
            }
            Self::Issuer => Vec::new(),
        }
    }
}

/// What is on the screen already.
struct Shown {
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
    fn new(output: Format) -> Self {
        let terminal = io::stdout().is_terminal();
        let (paint, told) = (Paint::stdout(), Vec::new());
        Self { output, terminal, paint, block: 0, told, ended: 0 }
    }

    fn show(
        &mut self,
        state: &TrustDomainState,
        standing: &Result<Standing, ControllerError>,
        followed: Followed,
    ) -> io::Result<()> {
        if self.output != Format::Table {
            return Ok(());
        }
        let (course, trouble) = course(state, standing, followed);
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

/// The course, and what keeps the controller from its work.
fn course(
    state: &TrustDomainState,
    standing: &Result<Standing, ControllerError>,
    followed: Followed,
) -> (Option<Course>, Option<String>) {
    let now = SystemClock.now();
    let wait = match standing {
        Ok(standing) => standing.waiting.as_ref().filter(|_| same_phase(state, standing)),
        Err(_) => None,
    };
    let course = match followed {
        Followed::AnchorsAfter(_) => Course::of_anchor(state, wait, now),
        Followed::Issuer => Course::of_issuer(state, wait, now),
    };
    let trouble = match standing {
        Ok(standing) => standing.trouble.clone(),
        Err(error) => Some(steadfast_process::ErrorChain(error).to_string()),
    };
    let waiting_to_begin = match (&course, &state.requested, wait) {
        (None, Some(_), Some(wait)) => {
            let waiting = crate::rotation::waiting::Waiting::of(wait, state, now);
            let names: Vec<_> =
                waiting.missing.iter().map(|m| format!("{}: {}", m.name, m.reason)).collect();
            let what = format!("before it begins: {} {}", waiting.guard, names.join("; "));
            (!waiting.guard.is_empty()).then(|| what.trim_end().to_owned())
        }
        _ => None,
    };
    (course, trouble.or(waiting_to_begin))
}

/// What the controller waits for is about what the store holds now.
pub(crate) fn same_phase(state: &TrustDomainState, standing: &Standing) -> bool {
    let phase = |state: &TrustDomainState| {
        let rotation = state.rotation.as_ref().map(|r| (r.number, r.phase.name(), r.turned_back));
        (rotation, state.issuer_rotation.as_ref().map(|r| r.phase), state.paused)
    };
    standing.state.as_ref().is_some_and(|seen| phase(seen) == phase(state))
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
