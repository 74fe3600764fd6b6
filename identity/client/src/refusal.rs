//! A refused connection, told so that a person need not guess.
//!
//! A refusal has one stable [`Code`] and every fact that was known when it happened: both ids, the
//! fingerprints of issuer and anchor, the validity, our clock and how far it is from the identity
//! service's. Its `Display` is the one line that is logged. Nothing here decides anything.

use std::fmt;

use steadfast_api::{Code, KeyId, SpiffeId, UnixTime};

/// Why a connection was refused, by us or by the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What happened, as a stable code.
    pub code: Code,
    /// All that was known; boxed, since a refusal travels in many a `Result`.
    pub facts: Box<Facts>,
}

/// What was known when a connection was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Who dialled whom.
    pub direction: Direction,
    /// What exactly is wrong, in words that follow the code's title.
    pub detail: String,
    /// Who we are; `None` before the first SVID.
    pub local: Option<SpiffeId>,
    /// Who the peer should be; `None` where any member of the trust domain may come.
    pub expected: Option<SpiffeId>,
    /// What the peer's certificate told.
    pub peer: PeerFacts,
    /// Our time.
    pub now: UnixTime,
    /// Our clock less the identity service's; `None` while it is not known.
    pub clock_offset_ms: Option<i64>,
}

/// What a presented certificate told, as far as it could be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerFacts {
    /// Its SPIFFE ID, if it has exactly one.
    pub id: Option<SpiffeId>,
    /// The anchor that its chain ends in.
    pub anchor: Option<KeyId>,
    /// The key that signed it.
    pub issuer: Option<KeyId>,
    /// Valid from this second on.
    pub not_before: Option<UnixTime>,
    /// Valid to the end of this second.
    pub not_after: Option<UnixTime>,
}

/// Who dialled whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The peer dialled us.
    Inbound,
    /// We dialled the peer.
    Outbound,
}

impl Refusal {
    /// The label that counts this refusal.
    pub fn label(&self) -> &'static str {
        self.code.label()
    }

    /// Who dialled whom.
    pub fn direction(&self) -> Direction {
        self.facts.direction
    }
}

impl Direction {
    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// The explained line: fields that are not known are there all the same, as `unknown`.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Facts { direction, detail, local, expected, peer, now, clock_offset_ms } =
            self.facts.as_ref();
        let short = |id: &Option<KeyId>| id.map(|id| id.short());
        write!(f, "{} {}: {}", self.code, self.code.label(), self.code.title())?;
        if !detail.is_empty() {
            write!(f, " ({detail})")?;
        }
        write!(f, "; direction={} local={}", direction.label(), Known(local))?;
        write!(f, " peer={}", Known(&peer.id))?;
        match expected {
            Some(id) => write!(f, " expected={id}")?,
            None => f.write_str(" expected=any")?,
        }
        write!(
            f,
            " anchor={} issuer={}",
            Known(&short(&peer.anchor)),
            Known(&short(&peer.issuer))
        )?;
        write!(f, " not_before={}", Known(&peer.not_before))?;
        write!(f, " not_after={} now={now}", Known(&peer.not_after))?;
        match clock_offset_ms {
            Some(offset) => write!(f, " clock_offset={offset:+}ms"),
            None => f.write_str(" clock_offset=unknown"),
        }
    }
}

impl std::error::Error for Refusal {}

/// A value, or `unknown`.
struct Known<'a, T>(&'a Option<T>);

impl<T: fmt::Display> fmt::Display for Known<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_every_fact_and_says_which_are_unknown() {
        let refusal = Refusal {
            code: Code::PEER_EXPIRED,
            facts: Box::new(Facts {
                direction: Direction::Inbound,
                detail: "the SVID ended 5 s ago".to_owned(),
                local: "spiffe://td/ns/a/sa/b".parse().ok(),
                expected: None,
                peer: PeerFacts {
                    issuer: Some(KeyId::of_spki(b"issuer")),
                    not_after: Some(UnixTime::from_secs(60)),
                    ..PeerFacts::default()
                },
                now: UnixTime::from_secs(65),
                clock_offset_ms: Some(-12),
            }),
        };
        assert_eq!(
            refusal.to_string(),
            "SFT-TLS-002 expired: The peer's certificate has expired (the SVID ended 5 s ago); \
             direction=inbound local=spiffe://td/ns/a/sa/b peer=unknown expected=any \
             anchor=unknown issuer=535c6f8e not_before=unknown not_after=1970-01-01T00:01:00Z \
             now=1970-01-01T00:01:05Z clock_offset=-12ms"
        );
    }
}
