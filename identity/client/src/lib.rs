//! How a process of ours gets, renews and uses its SVID.
//!
//! In the order in which data flows: a key and what an issuer made of it, what we believe, whether
//! a peer's chain holds, the snapshot that TLS uses, connections and listeners that use it; and
//! around them the shell that keeps SVID and bundle fresh. Nothing here can sign a certificate,
//! and no private key is ever written anywhere.

mod key;
mod observed;
mod outcomes;
mod refusal;
mod stream;
mod svid;
mod tls;
mod trust;
pub mod verify;

mod connector;
mod context;
mod incoming;
mod metrics;
mod standing;
mod status;
mod vouched;

pub mod ack;
pub mod bundle;
mod certify;
mod dial;
mod identity;
mod mounted;
mod replicas;
mod shell;
mod token;
mod trust_stream;

pub use connector::{ConnectError, Connector};
pub use context::{Contexts, Expected, HANDSHAKE_TIMEOUT, TlsContext};
pub use dial::DialError;
pub use identity::{Config, ConfigError, Identity, IdentityError};
pub use incoming::{Incoming, PeerInfo, incoming};
pub use key::{KeyError, SvidKey};
pub use metrics::Refusals;
pub use mounted::{BootstrapBundle, MountedError};
pub use observed::{Follower, Observed};
pub use refusal::{Direction, Facts, PeerFacts, Refusal};
pub use replicas::Replicas;
pub use standing::{End, Footing, Standing};
pub use status::Status;
pub use stream::{LateRefusal, Negotiated, TlsStream};
pub use svid::{Candidate, Issued, Lapse, OwnSvid, SvidRefused};
pub use tls::ClientAuth;
pub use trust::Trust;
pub use verify::VerifiedPeer;
pub use vouched::{Vouched, WITHDRAWN_END_MAX};

/// A random share, for retries that must not come in step. The only place here that draws.
fn random_jitter() -> steadfast_rotation_protocol::Jitter {
    let mut bits = [0; 4];
    // Without randomness retries come in step, which is no reason to stop them.
    let _ = aws_lc_rs::rand::fill(&mut bits);
    steadfast_rotation_protocol::Jitter::from_bits(u32::from_ne_bytes(bits))
}
