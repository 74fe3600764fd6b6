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
mod status;

mod identity;

pub use connector::{ConnectError, Connector};
pub use context::{Contexts, Expected, HANDSHAKE_TIMEOUT, TlsContext};
pub use identity::{BootstrapBundle, Config, ConfigError, Identity, RunError};
pub use incoming::{Incoming, PeerInfo, incoming};
pub use key::{KeyError, SvidKey};
pub use metrics::Refusals;
pub use observed::Observed;
pub use refusal::{Direction, Facts, PeerFacts, Refusal};
pub use status::Status;
pub use stream::{LateRefusal, Negotiated, TlsStream};
pub use svid::{Issued, OwnSvid, SvidRefused};
pub use tls::ClientAuth;
pub use trust::Trust;
pub use verify::VerifiedPeer;
