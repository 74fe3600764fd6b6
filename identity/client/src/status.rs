//! What a person or `/identity.json` is shown about a workload's own identity.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use steadfast_api::{KeyId, SpiffeId, UnixTime};

/// The identity of this process at one moment. Times are in milliseconds since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Our SPIFFE ID; `None` before the first SVID.
    pub spiffe_id: Option<SpiffeId>,
    /// The SVID's serial number in hex.
    pub serial: Option<String>,
    /// The SVID and its issuers, as PEM.
    pub chain_pem: String,
    /// When the SVID was made, by the issuer's clock.
    pub issued_at: Option<UnixTime>,
    /// It is valid from this second on.
    pub not_before: Option<UnixTime>,
    /// It is valid to the end of this second.
    pub not_after: Option<UnixTime>,
    /// When the next one is asked for; `None` while a request is under way.
    pub next_renewal: Option<UnixTime>,
    /// How many SVIDs came after the first.
    pub renewals: u64,
    /// Requests that brought no SVID, since the start.
    pub failures: u64,
    /// Why the last of them failed; `None` once one succeeded.
    pub last_failure: Option<String>,
    /// The anchor that the SVID's chain ends in.
    pub anchor: Option<KeyId>,
    /// The key that signed it.
    pub issuer: Option<KeyId>,
    /// The sequence number of the live bundle.
    pub bundle_seq: Option<u64>,
    /// The anchors of the live bundle.
    pub bundle_anchors: Vec<KeyId>,
    /// Our clock less the identity service's.
    pub clock_offset_ms: Option<i64>,
}

/// Certificates as PEM (RFC 7468).
pub(crate) fn pem(chain: &[CertificateDer<'_>]) -> String {
    let mut text = String::new();
    for certificate in chain {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let body = STANDARD.encode(certificate);
        for line in body.as_bytes().chunks(PEM_LINE_CHARS) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

const PEM_LINE_CHARS: usize = 64;
