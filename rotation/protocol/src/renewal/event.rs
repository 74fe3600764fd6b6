//! What happens to a renewal, and what the shell does about it: plain data.
//!
//! All of it can be written down as JSON and read back, so that a run that went wrong anywhere is
//! replayed here to the bit. Every time that the server tells is by the server's clock.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::jitter::Jitter;

/// Names one request for an SVID, and the key that was made for it. Ids ascend; none comes twice.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct RequestId(pub u64);

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The workload has answered a query with an ack, which promises which bundle it uses. A reply
    /// to a request that was sent before could break that promise, so none is used.
    AckSent,
    /// Both TLS configurations use the bundle of this sequence number. The issuers that it denies
    /// take the place of those known before.
    BundleInstalled {
        /// The bundle's sequence number.
        seq: u64,
        /// Every issuer whose SVIDs the bundle refuses.
        denied: Vec<KeyId>,
    },
    /// A request has failed; what was done for it is dropped.
    Failed {
        /// Which.
        id: RequestId,
        /// Why, for the log.
        reason: String,
    },
    /// [`Effect::Install`] could not be carried out: the SVID before stays in use.
    InstallFailed {
        /// Which.
        id: RequestId,
        /// Why, for the log.
        reason: String,
    },
    /// A request was answered with an SVID whose key and names were found right.
    Issued(Issued),
    /// The server wants the next SVID asked for earlier.
    PulledForward {
        /// Which order: with `from`, the same one, told again, changes nothing.
        id: u64,
        /// When its window begins, by the server's clock.
        from: UnixTime,
        /// How long the window is.
        window: Duration,
        /// This instance's place in the window: a hash of the instance, so that it is the same
        /// however often it is computed.
        share: Jitter,
    },
    /// The server has told its time in a message that answers nothing.
    ServerTime(UnixTime),
    /// The shell is ready to carry out effects. Before this, nothing is asked for.
    Started,
    /// The trust stream stands again: whoever serves it may serve a request that failed.
    StreamCameBack,
    /// What this issuer signed must no longer be used, though no bundle says so yet.
    Tainted {
        /// Which.
        issuer: KeyId,
    },
    /// Time has passed.
    Tick,
}

/// An SVID as the reply to a request describes it. All times are the server's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// The request that it answers.
    pub id: RequestId,
    /// When the SVID was made. Its `not_before` lies earlier and is of no interest here.
    pub issued_at: UnixTime,
    /// When it ends.
    pub not_after: UnixTime,
    /// When the server would like to be asked next.
    pub renew_at: Option<UnixTime>,
    /// The server's clock when it answered.
    pub server_time: UnixTime,
    /// The bundle that the SVID needs.
    pub seq: u64,
    /// Who signed it.
    pub issuer: KeyId,
}

/// What the shell does, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// A person should hear of this.
    Alarm(Alarm),
    /// Stop the RPC of this request and drop its key; an answer that still comes is not used.
    Cancel {
        /// Which.
        id: RequestId,
    },
    /// Drop the SVID and the key of this request.
    Discard {
        /// Which.
        id: RequestId,
    },
    /// Keep the SVID and the key of this request until told to install or discard them.
    Hold {
        /// Which.
        id: RequestId,
        /// The bundle that has to come first.
        seq: u64,
    },
    /// Use the SVID of this request from now on; only then drop the one before. If that fails, drop
    /// this one and tell [`Event::InstallFailed`] before anything else.
    Install {
        /// Which.
        id: RequestId,
    },
    /// Readiness is now this.
    Readiness(Readiness),
    /// Make a new key and ask for an SVID.
    Request {
        /// Names the request in every event and effect about it.
        id: RequestId,
        /// 1 for the first try since an SVID arrived; the n-th try goes to the n-th replica.
        attempt: u32,
        /// The deadline of the RPC, from now.
        timeout: Duration,
    },
}

/// Whether the workload can prove who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Readiness {
    /// The SVID that is held ended then (by the server's clock).
    Expired {
        /// Its end.
        not_after: UnixTime,
    },
    /// No bundle is installed.
    NoBundle,
    /// No SVID is installed.
    NoSvid,
    /// A live SVID and a bundle are installed.
    Ready,
}

/// What a person should hear of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Alarm {
    /// An SVID cannot be used yet: it needs a bundle that has not come.
    BundleBehind {
        /// What the SVID needs.
        needed_seq: u64,
        /// What is installed.
        installed_seq: Option<u64>,
    },
    /// The wall clock jumped, or the machine slept.
    ClockJumped {
        /// How far; negative is back.
        by_millis: i64,
    },
    /// The wall clock is so far from the server's that certificates begin to be refused.
    ClockOff {
        /// The wall clock less the server's.
        offset_millis: i64,
    },
    /// The SVID has ended and no other has come.
    Expired {
        /// Its end.
        not_after: UnixTime,
    },
    /// A request did not bring an SVID.
    RenewalFailed {
        /// How many in a row.
        attempt: u32,
        /// Why.
        failure: Failure,
        /// When the next one is sent, by the wall clock.
        next_try: UnixTime,
        /// The end of the SVID that is held.
        not_after: Option<UnixTime>,
    },
}

/// Why a request did not bring an SVID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// Signed by an issuer whose SVIDs are refused.
    #[error("the SVID is signed by {0}, which is denied")]
    IssuerDenied(KeyId),
    /// It ended before it began, or before it arrived.
    #[error("the SVID has no life left: made at {issued_at}, ends at {not_after}")]
    NoLife {
        /// When it was made.
        issued_at: UnixTime,
        /// When it ends.
        not_after: UnixTime,
    },
    /// The shell's own words.
    #[error("{0}")]
    Request(String),
    /// No answer within the deadline.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
}

/// One call of [`Renewal::handle`](super::Renewal::handle): what a log holds, one a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The wall clock.
    pub now: UnixTime,
    /// The share that was drawn.
    pub jitter: Jitter,
    /// What happened.
    pub event: Event,
}
