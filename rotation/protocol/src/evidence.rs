//! The evidence of a rotation: who was asked before a phase was left, and what each of them said.
//!
//! It is text, a line of JSON for the head and one for each witness, and too much of it for the
//! stored state. So the state keeps its SHA-256, in the step that relied on it, and the text lies
//! beside it in pieces. Whoever reads it later compares the two: [`Evidence::parse`] takes no text
//! but the one that was relied on.

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::census::Ack;
use crate::instance::Instance;
use crate::rotation::PhaseName;
use crate::trust_domain::{Exemption, TrustDomainState};

/// What a phase was left on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// What it is about.
    pub head: Head,
    /// Who was asked and had settled.
    pub witnesses: Vec<Witness>,
}

/// What evidence is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The rotation's number.
    pub rotation: u64,
    /// Which of its steps, from 0.
    pub step: usize,
    /// The phase that was left.
    pub phase: PhaseName,
    /// When.
    pub at: UnixTime,
    /// The bundle that every ack had to name: its sequence number.
    pub seq: u64,
    /// The bundle that every ack had to name: its digest.
    pub digest: Option<KeyId>,
    /// Only answers to queries from this one on counted.
    pub floor: u64,
    /// Whom nobody waited for.
    pub exempt: Vec<Exemption>,
    /// How many lines follow.
    pub witnesses: usize,
}

/// Somebody who had settled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// Its pod's name, or the replica's.
    pub name: String,
    /// Which start of it.
    pub instance: Instance,
    /// Why it counted as settled.
    pub said: Said,
}

/// Why somebody counted as settled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// It said so itself.
    Acked {
        /// What it said.
        ack: Ack,
        /// The query that this answers.
        answered: u64,
        /// When it was last heard of.
        last_heard: UnixTime,
    },
    /// It vanished so long ago that nothing of it can be valid.
    Outlived {
        /// When it was last heard of.
        last_heard: UnixTime,
    },
    /// A replica of identity, of what it serves itself.
    Serves(Option<Ack>),
}

/// Evidence as it is kept: its text, and by what the state names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The rotation's number.
    pub rotation: u64,
    /// Which of its steps, from 0.
    pub step: usize,
    /// SHA-256 of the text.
    pub digest: KeyId,
    /// One line for the head, one for each witness.
    pub text: String,
}

/// Why a text is not the evidence that it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// Another text.
    #[error(
        "the evidence has the SHA-256 {found}, and the state relied on {expected}: it was changed, \
         or a part of it is missing"
    )]
    Differs {
        /// What the state says.
        expected: KeyId,
        /// What it is.
        found: KeyId,
    },
    /// The text that was relied on, written by another version.
    #[error("line {line} of the evidence is none: {reason} (written by a newer version?)")]
    Malformed {
        /// From 1.
        line: usize,
        /// What the parser says.
        reason: String,
    },
}

impl Evidence {
    /// Reads a text, if it is the one with this SHA-256.
    ///
    /// # Errors
    /// [`EvidenceError`]
    pub fn parse(text: &[u8], expected: KeyId) -> Result<Self, EvidenceError> {
        let found = sha256(text);
        if found != expected {
            return Err(EvidenceError::Differs { expected, found });
        }
        let mut lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let head: Head = line(1, lines.next().unwrap_or_default())?;
        let witnesses = lines.enumerate().map(|(index, text)| line(index + 2, text));
        let witnesses = witnesses.collect::<Result<Vec<_>, _>>()?;
        if head.witnesses != witnesses.len() {
            let reason = format!("the head says {} of them", head.witnesses);
            return Err(EvidenceError::Malformed { line: witnesses.len() + 1, reason });
        }
        Ok(Self { head, witnesses })
    }
}

/// Who has settled, asked from a query on; nobody where nobody is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) floor: u64,
    pub(crate) witnesses: Vec<Witness>,
}

impl Asked {
    /// As evidence of a step, where there is any. `published` is the state that was acked, and
    /// `exempt` whom nobody waited for, those among them who were cut off by this very step.
    pub(crate) fn keep(
        self,
        (rotation, step, phase): (u64, usize, PhaseName),
        published: &TrustDomainState,
        exempt: &[Exemption],
        at: UnixTime,
    ) -> Option<Kept> {
        if self.witnesses.is_empty() {
            return None;
        }
        let head = Head {
            rotation,
            step,
            phase,
            at,
            seq: published.seq,
            digest: KeyId::from_slice(&published.digest()),
            floor: self.floor,
            exempt: exempt.to_vec(),
            witnesses: self.witnesses.len(),
        };
        // Strings and numbers alone: serialising them cannot fail.
        let mut text = serde_json::to_string(&head).unwrap_or_default() + "\n";
        for witness in &self.witnesses {
            text.push_str(&serde_json::to_string(witness).unwrap_or_default());
            text.push('\n');
        }
        Some(Kept { rotation, step, digest: sha256(text.as_bytes()), text })
    }
}

impl Kept {
    /// The text in pieces that every store takes: etcd refuses more than 1.5 MiB, a ConfigMap more
    /// than one.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.text.as_bytes().chunks(PIECE_BYTES_MAX)
    }
}

fn line<'a, T: Deserialize<'a>>(line: usize, text: &'a [u8]) -> Result<T, EvidenceError> {
    serde_json::from_slice(text)
        .map_err(|error| EvidenceError::Malformed { line, reason: error.to_string() })
}

fn sha256(text: &[u8]) -> KeyId {
    KeyId::of_spki(text)
}

/// Of one piece.
pub const PIECE_BYTES_MAX: usize = 512 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust_domain::{AnchorRecord, IssuerRecord};

    fn kept(witnesses: usize) -> Kept {
        let issuer = IssuerRecord {
            id: KeyId::of_spki(b"issuer"),
            anchor_id: KeyId::of_spki(b"anchor"),
            der: Vec::new(),
            chain: Vec::new(),
            not_before: UnixTime::default(),
            not_after: UnixTime::default(),
            key_ref: String::new(),
        };
        let anchors: Vec<AnchorRecord> = Vec::new();
        let domain = "m".parse().unwrap();
        let state = TrustDomainState::founded(domain, anchors, issuer, UnixTime::default());
        let witness = |n: usize| Witness {
            name: format!("demo/web-{n}"),
            instance: Instance { pod_uid: n.to_string(), started_at: UnixTime::from_secs(1) },
            said: Said::Outlived { last_heard: UnixTime::from_secs(2) },
        };
        let asked = Asked { floor: 7, witnesses: (0..witnesses).map(witness).collect() };
        asked.keep((3, 1, PhaseName::Staged), &state, &[], UnixTime::from_secs(9)).unwrap()
    }

    #[test]
    fn what_was_kept_is_read_again_from_its_pieces() {
        let kept = kept(10_000);
        assert!(kept.pieces().count() > 1);
        assert!(kept.pieces().all(|piece| piece.len() <= PIECE_BYTES_MAX));
        let text: Vec<u8> = kept.pieces().flatten().copied().collect();
        let evidence = Evidence::parse(&text, kept.digest).unwrap();
        assert_eq!((evidence.head.rotation, evidence.head.floor), (3, 7));
        assert_eq!(evidence.witnesses.len(), 10_000);
        assert_eq!(evidence.witnesses[9_999].name, "demo/web-9999");
    }

    #[test]
    fn a_text_that_is_not_the_one_relied_on_is_refused() {
        let kept = kept(3);
        let bent = kept.text.replace("web-1", "web-9");
        let cut: String = kept.text.lines().take(2).collect();
        for text in [bent, cut, String::new()] {
            let error = Evidence::parse(text.as_bytes(), kept.digest).unwrap_err();
            assert!(matches!(error, EvidenceError::Differs { .. }), "{error}");
        }
        let nothing = Evidence::parse(b"", sha256(b"")).unwrap_err();
        assert!(matches!(nothing, EvidenceError::Malformed { line: 1, .. }), "{nothing}");
    }
}
