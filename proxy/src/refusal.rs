//! Why a connection or request goes no further: one value, logged and counted once, at one place.
//!
//! Stages return a [`Refusal`]; the caller of a story's `serve` gives it to the worker's
//! [`Reporter`], which counts it always and logs it under a rate limit. What a peer does to itself
//! (it breaks off, it resets) is a [`Refusal::Gone`]: no refusal of ours, and no line at the
//! default level.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use steadfast_api::{Code, SpiffeId};
use steadfast_identity_client::Refusals;
use steadfast_policy::Name;
use steadfast_process::ErrorChain;

use crate::metrics::{Direction, Metrics};
use crate::standing::Stand;
use crate::transport::HeaderError;

/// Why a connection or request goes no further.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A server broke the connection off before it sent a byte.
    #[error("{code} peer_closed: {addr} broke off without a word; its log says why", code = Code::PEER_CLOSED)]
    Closed {
        /// Where the peer is.
        addr: SocketAddr,
        /// How the connection ended.
        #[source]
        source: io::Error,
    },
    /// The inbound policy does not let the peer in.
    #[error("{code} {}: {} ({detail})", code.label(), code.title())]
    Denied {
        /// Plaintext, or not authorised, or without a certificate.
        code: Code,
        /// The policy, the port and the peer.
        detail: String,
    },
    /// The trust bundle of now does not vouch for an open connection any more.
    #[error("{code} {}: {} ({detail})", code.label(), code.title())]
    Distrusted {
        /// What has become of whose anchor or issuer.
        code: Code,
        /// Both ends and the key.
        detail: String,
    },
    /// The peer broke the connection off: its business.
    #[error("the connection broke")]
    Gone(#[source] io::Error),
    /// A direct connection without a transport header that can be used.
    #[error("{code} transport_header: {title}", code = Code::TRANSPORT_HEADER, title = Code::TRANSPORT_HEADER.title())]
    Header(#[source] HeaderError),
    /// The destination is the proxy's own listener.
    #[error("{code} loop_refused: the destination {0} is a listener of this proxy itself", code = Code::LOOP_REFUSED)]
    Loop(SocketAddr),
    /// A limit is reached.
    #[error("{code} overloaded: {0}", code = Code::OVERLOADED)]
    Overloaded(&'static str),
    /// The peer's proxy answered instead of its application.
    #[error("{code} {}: the peer's proxy answers: {said}", code.label())]
    Peer {
        /// Why, as the peer says.
        code: Code,
        /// All that it says.
        said: String,
    },
    /// The peer did not say in time what it speaks.
    #[error("{code} peer_silent: no {0} within ten seconds", code = Code::PEER_SILENT)]
    Silent(&'static str),
    /// The peer's certificate, or ours in the peer's eyes.
    #[error(transparent)]
    Tls(#[from] steadfast_identity_client::Refusal),
    /// The port is not declared.
    #[error("{code} port_undeclared: the workload does not declare the port {0}", code = Code::PORT_UNDECLARED)]
    Undeclared(u16),
    /// No endpoint of the destination can be used.
    #[error("{code} {}: {target}: {detail}", code.label())]
    Unknown {
        /// No such destination, or no endpoints.
        code: Code,
        /// What was asked for.
        target: String,
        /// What discovery says.
        detail: String,
    },
    /// The destination cannot be reached.
    #[error("{code} unreachable: {addr} cannot be reached", code = Code::UNREACHABLE)]
    Unreachable {
        /// What was dialled.
        addr: SocketAddr,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Refusal {
    /// Its stable code; `None` if the peer itself broke off.
    pub fn code(&self) -> Option<Code> {
        Some(match self {
            Self::Closed { .. } => Code::PEER_CLOSED,
            Self::Denied { code, .. }
            | Self::Distrusted { code, .. }
            | Self::Peer { code, .. }
            | Self::Unknown { code, .. } => *code,
            Self::Gone(_) => return None,
            Self::Header(_) => Code::TRANSPORT_HEADER,
            Self::Loop(_) => Code::LOOP_REFUSED,
            Self::Overloaded(_) => Code::OVERLOADED,
            Self::Silent(_) => Code::PEER_SILENT,
            Self::Tls(refusal) => refusal.code,
            Self::Undeclared(_) => Code::PORT_UNDECLARED,
            Self::Unreachable { .. } => Code::UNREACHABLE,
        })
    }

    /// The label that counts it.
    pub fn label(&self) -> &'static str {
        self.code().map_or("gone", Code::label)
    }
}

/// Logs and counts refusals, for one worker.
pub struct Reporter {
    metrics: Metrics,
    /// Counts and logs handshakes, here and where the control plane is dialled.
    handshakes: Refusals,
    lines: Cell<Lines>,
    audits: Cell<Lines>,
    withdrawals: Cell<Lines>,
}

/// A bucket of log lines.
#[derive(Clone, Copy, Debug)]
struct Lines {
    left: u32,
    refilled: Duration,
    withheld: u64,
}

impl Reporter {
    /// Counts in these metrics.
    pub fn new(metrics: Metrics, handshakes: Refusals) -> Self {
        let lines = Lines { left: LINES_MAX, refilled: Duration::ZERO, withheld: 0 };
        let [lines, audits, withdrawals] = [0; 3].map(|_| Cell::new(lines));
        Self { metrics, handshakes, lines, audits, withdrawals }
    }

    /// Counts a refusal, and logs it if the last second had few. `now` is since boot.
    pub fn report(&self, now: Duration, direction: Direction, peer: SocketAddr, refusal: &Refusal) {
        if let Refusal::Tls(handshake) = refusal {
            return self.handshakes.report(Some(peer), handshake);
        }
        let Some(code) = refusal.code() else {
            tracing::debug!(
                direction = direction.label(), %peer, error = %ErrorChain(refusal),
                "a connection broke"
            );
            return;
        };
        self.metrics.refused(direction, code.label(), code.as_str());
        if let Some(withheld) = take(&self.lines, now) {
            tracing::warn!(
                direction = direction.label(), %peer, code = code.as_str(), reason = code.label(),
                withheld, "{}", ErrorChain(refusal)
            );
        }
    }

    /// Logs that a connection outlives an anchor that it stands on, for so long at most. `false`:
    /// there were too many such lines just now, so that this one has to wait for its turn.
    pub fn withdrawn(&self, now: Duration, stand: &Stand, deadline: Duration) -> bool {
        let Some(_) = take(&self.withdrawals, now) else { return false };
        let ((direction, peer), refusal) = (stand.place(), stand.refusal());
        let code = refusal.code().map_or("", Code::as_str);
        tracing::warn!(
            direction = direction.label(), %peer, code, reason = refusal.label(),
            deadline_secs = deadline.as_secs(), "{refusal}; it is cut at the deadline"
        );
        true
    }

    /// Logs, under a limit of its own, who was let in to a port only because its policy is being
    /// tried out.
    pub fn audited(
        &self,
        now: Duration,
        client: SocketAddr,
        id: Option<&SpiffeId>,
        port: u16,
        policy: &Name,
    ) {
        if let Some(withheld) = take(&self.audits, now) {
            let id = id.map_or("unauthenticated", SpiffeId::as_str);
            tracing::info!(
                %client, id, port, %policy, withheld,
                "let in under audit: no authorization names this client, so it would be refused"
            );
        }
    }
}

fn take(bucket: &Cell<Lines>, now: Duration) -> Option<u64> {
    let mut lines = bucket.get();
    let taken = lines.take(now);
    bucket.set(lines);
    taken
}

impl Lines {
    /// Whether a line may be written, and how many were not since the last.
    fn take(&mut self, now: Duration) -> Option<u64> {
        let whole_secs = now.saturating_sub(self.refilled).as_secs();
        if whole_secs > 0 {
            let refill =
                u32::try_from(whole_secs).unwrap_or(u32::MAX).saturating_mul(LINES_PER_SEC);
            (self.left, self.refilled) = (self.left.saturating_add(refill).min(LINES_MAX), now);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.withheld))
            }
            None => {
                self.withheld += 1;
                None
            }
        }
    }
}

const LINES_PER_SEC: u32 = 10;
const LINES_MAX: u32 = 50;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_limited_and_what_was_withheld_is_told() {
        let mut lines = Lines { left: 2, refilled: Duration::ZERO, withheld: 0 };
        let now = Duration::from_millis(500);
        assert_eq!([lines.take(now), lines.take(now)], [Some(0), Some(0)]);
        assert_eq!([lines.take(now), lines.take(now)], [None, None]);
        assert_eq!(lines.take(Duration::from_secs(2)), Some(2));
        assert_eq!(lines.left, 2 * LINES_PER_SEC - 1);
    }

    #[test]
    fn a_refusal_names_its_code_and_label_in_its_line() {
        let refusal = Refusal::Undeclared(81);
        let line = refusal.to_string();
        assert!(line.starts_with("SFT-NET-002 port_undeclared"), "{line}");
        assert_eq!(refusal.label(), "port_undeclared");
    }
}
