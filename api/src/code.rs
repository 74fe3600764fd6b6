//! The error codes: what `SFT-<area>-<nnn>` means, and what a person does about it.
//!
//! A code is a promise: once released it keeps its meaning. Every refusal that a person may have
//! to act on has one; it stands in the log line, in the gRPC message and in `steadfast explain`.

use std::fmt;
use std::str::FromStr;

/// One stable error code.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(&'static Entry);

/// What `steadfast explain` prints.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Entry {
    code: &'static str,
    label: &'static str,
    title: &'static str,
    meaning: &'static str,
    fix: &'static str,
}

impl Code {
    /// `SFT-<area>-<nnn>`.
    pub fn as_str(self) -> &'static str {
        self.0.code
    }

    /// The metric label of the refusal: lower case, words joined by `_`.
    pub fn label(self) -> &'static str {
        self.0.label
    }

    /// The refusal in one line.
    pub fn title(self) -> &'static str {
        self.0.title
    }

    /// What has happened and why it is refused.
    pub fn meaning(self) -> &'static str {
        self.0.meaning
    }

    /// What to do about it.
    pub fn fix(self) -> &'static str {
        self.0.fix
    }

    /// Every code, in the order of its text.
    pub fn all() -> impl Iterator<Item = Self> {
        ENTRIES.iter().map(Code)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.code)
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.code)
    }
}

/// A text that is no code of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no Steadfast code: codes look like SFT-ID-001; `steadfast explain` lists them")]
pub struct UnknownCode(String);

impl FromStr for Code {
    type Err = UnknownCode;
    fn from_str(text: &str) -> Result<Self, UnknownCode> {
        Self::all()
            .find(|code| code.as_str().eq_ignore_ascii_case(text))
            .ok_or_else(|| UnknownCode(text.to_owned()))
    }
}

macro_rules! codes {
    ($($name:ident $code:literal $label:literal $title:literal $meaning:literal $fix:literal;)*) => {
        #[allow(missing_docs)]
        impl Code {
            $(#[doc = $title] pub const $name: Self = Self(&Entry {
                code: $code, label: $label, title: $title, meaning: $meaning, fix: $fix,
            });)*
        }
        static ENTRIES: &[Entry] = &[$(Entry {
            code: $code, label: $label, title: $title, meaning: $meaning, fix: $fix,
        }),*];
    };
}

// Grouped by area, in ascending order; new ones go to the end of their group.
codes! {
    // CFG: what a process was told at its start.
    CONFIG_INVALID "SFT-CFG-001" "config_invalid"
        "The configuration is wrong"
        "A flag, environment variable or file that the process needs is missing or has a value it cannot use. All such errors are printed at once; nothing was started."
        "Correct every line that the error lists and start the process again.";

    // ID: a request for an SVID that the identity service refused.
    TOKEN_MISSING "SFT-ID-001" "token_missing"
        "The request carries no token"
        "An SVID is issued to the workload that a token proves. The request's token field was empty."
        "Check that the token file of the workload exists and is not empty (LINKERD2_PROXY_IDENTITY_TOKEN_FILE).";
    TOKEN_MALFORMED "SFT-ID-002" "token_malformed"
        "The token is no token of this mesh"
        "The token does not parse, or its signature is not by the token issuer of this mesh."
        "Check which file the workload reads as its token. After the token issuer's key was replaced, tokens of the old key are refused until they are written anew, within a minute.";
    TOKEN_AUDIENCE "SFT-ID-003" "token_audience"
        "The token is for another audience"
        "Tokens name whom they are for. This one does not name the identity service, so presenting it here may be an attempt to reuse a token that leaked elsewhere."
        "Project the token with the audience of the identity service (by default identity.l5d.io).";
    TOKEN_EXPIRED "SFT-ID-004" "token_expired"
        "The token has expired"
        "The token's lifetime is over by the identity service's clock."
        "The token file should be renewed by itself: see whether it is (its modification time), and whether the clocks of the two machines agree.";
    TOKEN_UNBOUND "SFT-ID-005" "token_unbound"
        "The token is not bound to a workload"
        "Only tokens that name one pod (name and UID) are accepted: they end with the pod. A token of a service account alone would outlive it."
        "Use a projected token, not a long-lived service account token.";
    TOKEN_WORKLOAD_GONE "SFT-ID-006" "token_workload_gone"
        "The token's workload is not there"
        "The pod that the token is bound to was deleted, or was made again under the same name with another UID or service account."
        "Nothing, if the pod was just deleted. Otherwise compare the pod's UID and service account with those in the log line.";
    IDENTITY_MISMATCH "SFT-ID-007" "identity_mismatch"
        "The request names an identity that is not the token's"
        "A workload gets the identity of its own service account and no other. The request asked for a different name."
        "Correct LINKERD2_PROXY_IDENTITY_LOCAL_NAME of the workload: service account, namespace, control plane namespace and trust domain must be its own.";
    CSR_TOO_LARGE "SFT-ID-010" "csr_too_large"
        "The certificate request is too large"
        "A request with a P-256 key has a few hundred bytes; at most 8 KiB are read."
        "Send a plain PKCS#10 request in DER.";
    CSR_MALFORMED "SFT-ID-011" "csr_malformed"
        "The certificate request does not parse"
        "The bytes are no PKCS#10 certificate request in DER."
        "Send PKCS#10 in DER (not PEM), with nothing behind it.";
    CSR_SIGNATURE "SFT-ID-012" "csr_signature"
        "The certificate request's signature is wrong"
        "The request is not signed by the key it carries, so the sender has not proved that it holds that key."
        "Sign the request with the private key whose public key it carries.";
    CSR_KEY "SFT-ID-013" "csr_key"
        "The key is of a kind that gets no SVID"
        "SVIDs are made for ECDSA keys on P-256. RSA and other curves are refused."
        "Make a P-256 key.";
    CSR_AUTHORITY "SFT-ID-014" "csr_authority"
        "The certificate request asks to be a CA"
        "The request carries basicConstraints CA:true or a signing key usage. A workload never gets a certificate that can sign."
        "Send a request without these extensions.";
    CSR_NAMES "SFT-ID-015" "csr_names"
        "The certificate request asks for names that are not its own"
        "The request lists subject alternative names beside the workload's own SPIFFE ID and DNS identity."
        "Send a request without names, or with exactly the workload's own.";
    RATE_LIMITED "SFT-ID-020" "rate_limited"
        "Too many requests"
        "This workload, or all workloads together, ask for SVIDs faster than the identity service allows. New workloads are put off before renewals are."
        "Nothing: the proxy asks again by itself. If it lasts, see who asks most: the identity service logs each refusal with its workload, and every SVID is in its issuance log (log/issuance.jsonl).";
    LEASE_EXPIRED "SFT-ID-021" "lease_expired"
        "The identity service cannot confirm its view of the trust domain"
        "The store has not answered a read for longer than the lease (15 s). A replica with an old view must not issue."
        "Bring the store back (start steadfast-store, if it does not run); issuing goes on by itself.";
    ISSUER_UNUSABLE "SFT-ID-022" "issuer_unusable"
        "The active issuer cannot be used"
        "The key or certificate of the active issuer is missing, unreadable, does not match, has expired, or ends before an SVID could."
        "See the log line for which; `steadfast trust status` shows the issuer.";
    SELF_CHECK_FAILED "SFT-ID-023" "self_check_failed"
        "A new SVID failed its own check and was not handed out"
        "Every SVID is parsed by a second parser, and its signature verified by a second library, before it is sent. This one did not pass, which is a defect of ours or a broken issuer."
        "Report it with the log line. Nothing was issued.";
    LOG_UNWRITABLE "SFT-ID-024" "log_unwritable"
        "The issuance log cannot be written"
        "An SVID that is not in the issuance log is not handed out."
        "Make room on the disk, or correct the permissions of the log's directory; issuing goes on by itself.";
    CLOCK_OFF "SFT-ID-025" "clock_off"
        "The identity service's clock is wrong"
        "Its wall clock and the store's differ by more than 60 s. An SVID that is dated by a wrong clock would be refused, or live too long."
        "Correct the clock of the machine that is wrong (see the log line for the difference); issuing goes on by itself.";
    HALTED "SFT-ID-026" "halted"
        "Nothing is issued until a person has looked"
        "A workload holds a bundle that the stored trust domain has never published: the store was put back from a backup, or emptied. SVIDs issued now could be refused by whoever holds the newer bundle, so issuing has stopped. Bundles are still served, and SVIDs that are held stay valid."
        "Run `steadfast trust recover`: it shows what is wrong, and puts together what is stored and what workloads hold. Or put the newest copy of the store's file back.";
    ACK_FOREIGN "SFT-ID-030" "ack_foreign"
        "An ack names another workload than the stream's token"
        "A workload may only speak for itself: a forged ack would break every census. The stream was closed."
        "If the named proxy is yours, restart it; otherwise find out who runs it.";
    STREAM_PROTOCOL "SFT-ID-031" "stream_protocol"
        "The trust stream does not follow its protocol"
        "The first message was no hello or none came in time, a second hello was sent, or what came is no message or a longer one than is taken."
        "Check that the proxy's version and the control plane's are at most one apart.";
    NOT_THE_CONTROLLER "SFT-ID-032" "not_the_controller"
        "Somebody else than the rotation controller asks about the fleet"
        "Only the rotation controller (the service account steadfast-rotation of the control plane's namespace) may query the members of the mesh and read what they hold. The token is another workload's."
        "If the caller is meant to be the controller, give it that service account. Otherwise find out why this workload asks.";

    // NET: what the proxy refused for reasons other than certificates.
    PLAINTEXT_REFUSED "SFT-NET-001" "plaintext_refused"
        "A plaintext connection to a port that asks for mutual TLS"
        "The port's policy asks for an authenticated peer, and the peer did not speak TLS of this mesh."
        "Mesh the client, or let the port take unauthenticated clients (config.linkerd.io/default-inbound-policy).";
    PORT_UNDECLARED "SFT-NET-002" "port_undeclared"
        "A connection for a port that the workload does not declare"
        "The inbound proxy forwards to declared ports only, and this one is not among them."
        "Add the port to the workload (its container ports, or LINKERD2_PROXY_INBOUND_PORTS).";
    LOOP_REFUSED "SFT-NET-003" "loop_refused"
        "A connection that would lead back into the proxy itself"
        "The destination is one of the proxy's own listeners; forwarding it would never end."
        "Correct the address that the client dials or the redirection rules.";
    POLICY_DENIED "SFT-NET-004" "policy_denied"
        "The peer is not authorised for this port"
        "The port's policy does not let this peer in; the log line names the policy and the peer."
        "Change the policy if the peer should be let in.";
    TRANSPORT_HEADER "SFT-NET-005" "transport_header"
        "A connection to the proxy's own port that does not say what it is for"
        "A peer that dials the inbound port of a proxy directly must speak mutual TLS of this mesh and begin with the transport header, which names the application's port. This one did not, or its header was malformed."
        "Check that the peer is a sidecar whose version is at most one apart; an application should dial the service, not the proxy.";
    UNREACHABLE "SFT-NET-006" "unreachable"
        "The destination cannot be reached"
        "The proxy could not open a connection to the address: refused, no route, or no answer in time."
        "Check that something listens at the address in the log line, and that the network between lets it through.";
    NO_SUCH_DESTINATION "SFT-NET-007" "no_such_destination"
        "Discovery knows no such destination"
        "The control plane says that there is no Service of this name and port, or has not answered yet."
        "Check the name and port the application uses; `steadfast-control` must be reachable (see /metrics of the proxy).";
    NO_ENDPOINTS "SFT-NET-008" "no_endpoints"
        "The destination has no endpoint that can be used"
        "The Service exists, but none of its endpoints is ready, or the control plane describes them in a way this proxy cannot use; those are never dialled in plaintext instead."
        "See the pods behind the Service: whether they are ready, and their ports.";
    PEER_SILENT "SFT-NET-009" "peer_silent"
        "The peer did not say in time what it speaks"
        "The connection stayed silent, or its handshake or first line stayed incomplete, for ten seconds."
        "Find out what dials there: a load balancer's health check that only connects is the usual cause.";
    OVERLOADED "SFT-NET-010" "overloaded"
        "A limit of the proxy is reached"
        "The proxy has as many connections, destinations or waiting requests as it takes; it sheds what is new, so that what runs can finish."
        "Find out who sends so much; raise the open-file limit if it is the cause.";
    PEER_CLOSED "SFT-NET-011" "peer_closed"
        "The peer broke off a new connection without a word"
        "The peer broke the connection before it sent a byte: its proxy refused what the connection is for (plaintext where it takes mutual TLS only, a policy, a port that is not declared), or the peer ended at that moment."
        "Look into the peer's log at that time: its line names the reason, with a code of its own.";

    // STO: the standalone store.
    STORE_UNAVAILABLE "SFT-STO-001" "store_unavailable"
        "The store does not answer"
        "The store's socket cannot be reached, or did not answer in time. What runs goes on; nothing new is issued or changed."
        "Start steadfast-store, and check that this process may open its socket.";
    STORE_WRITE_FAILED "SFT-STO-002" "store_write_failed"
        "The store could not write"
        "The disk is full or broken. The store goes on answering reads and refuses writes; nothing that was acknowledged is lost."
        "Make room on the disk; the store writes again by itself.";
    MANIFEST_INVALID "SFT-STO-003" "manifest_invalid"
        "A manifest cannot be used"
        "The file has a line that is no YAML or no valid resource. The last good version of the whole file stays in force."
        "Correct the line that the message names; the file is read again by itself.";
    STORE_CORRUPT "SFT-STO-004" "store_corrupt"
        "The store's file cannot be opened"
        "The store's file is no store of ours, was cut short, or is of a version this binary does not know."
        "Put a backup back; do not delete the file, the trust domain's state is in it.";

    // TLS: a peer whose certificate was refused. The same on both sides of a connection.
    PEER_UNKNOWN_ISSUER "SFT-TLS-001" "unknown_issuer"
        "The peer's chain ends in no trust anchor of ours"
        "The peer's SVID is signed by an authority that is not in this workload's trust bundle: another mesh, or one side holds an old bundle."
        "Compare the anchors of both sides (`steadfast identity <workload>`). If only one lacks the anchor, see why its trust stream is behind.";
    PEER_EXPIRED "SFT-TLS-002" "expired"
        "The peer's certificate has expired"
        "The SVID or its issuer is past its end by our clock."
        "See why the peer does not renew: its /ready, its log, and whether it reaches the identity service. If its SVID is fresh, compare the clocks.";
    PEER_NOT_YET_VALID "SFT-TLS-003" "not_yet_valid"
        "The peer's certificate is not valid yet"
        "The SVID or its issuer begins in the future by our clock: the clocks differ by more than five minutes."
        "Correct the clock of the machine that is wrong.";
    PEER_NOT_SVID "SFT-TLS-004" "not_an_svid"
        "The peer's certificate is no X.509-SVID"
        "An SVID is a leaf with exactly one URI SAN, which is a SPIFFE ID. This certificate breaks that rule; the log line says how."
        "Find out who issued it: Steadfast never makes such a certificate.";
    PEER_TRUST_DOMAIN "SFT-TLS-005" "wrong_trust_domain"
        "The peer belongs to another trust domain"
        "The chain is good, but the SPIFFE ID is of a trust domain that this workload does not deal with."
        "Check that both sides are configured for the same trust domain.";
    PEER_WRONG_IDENTITY "SFT-TLS-006" "wrong_identity"
        "The peer is not who it should be"
        "Discovery said which identity answers at this address, and the peer has another: an address that was reused, or an impostor."
        "If the pod at this address was just replaced, the next try finds the new one. Otherwise find out what answers there.";
    PEER_NO_CERTIFICATE "SFT-TLS-007" "no_certificate"
        "The peer has shown no certificate"
        "Mutual TLS needs a certificate of both sides."
        "Mesh the client. If it is the identity service that shows none, its /ready and its log say why it has none that is valid.";
    PEER_BAD_SIGNATURE "SFT-TLS-008" "bad_signature"
        "A signature in the peer's chain or handshake is wrong"
        "The certificate was altered, or the peer does not hold its key."
        "Treat it as an attack until shown otherwise.";
    PEER_ISSUER_DENIED "SFT-TLS-009" "issuer_denied"
        "The peer's issuer has been denied"
        "The key of the issuer of this SVID is considered stolen; what it signed is refused."
        "The peer gets a new SVID by itself; see why it has not yet.";
    PEER_REFUSED_US "SFT-TLS-010" "refused_by_peer"
        "The peer has refused our certificate"
        "The TLS alert of the peer says that it does not accept our SVID. Its own log says why."
        "See the log of the peer at this time; compare our SVID (`steadfast identity <workload>`) with what it trusts.";
    PEER_NOT_TLS "SFT-TLS-011" "not_tls"
        "The peer does not speak TLS of this mesh"
        "Discovery says that the peer is meshed, but what answers speaks no TLS 1.3, or broke the handshake off."
        "Check that the sidecar of the peer runs, and that nothing between them ends TLS.";
    PEER_MALFORMED "SFT-TLS-012" "malformed"
        "The peer's certificate or handshake is malformed"
        "The bytes are no certificate, or break the TLS protocol."
        "Find out what answers or dials there.";
    PEER_ANCHOR_WITHDRAWN "SFT-TLS-013" "anchor_withdrawn"
        "The peer's trust anchor has been withdrawn"
        "The connection was made while the bundle held the anchor that the peer's chain ends in. Requests end in good order; opaque connections and tunnels may go on until STEADFAST_PROXY_WITHDRAWN_TCP_DEADLINE and are cut then."
        "Nothing, if the peer comes back by itself. Otherwise have the application open a new connection, and see why the peer's SVID is still of the old anchor.";
    PEER_NO_PROTOCOL "SFT-TLS-014" "no_protocol"
        "The peer and we have no protocol in common"
        "What answers or dials speaks TLS, but none of the protocols that it was offered (ALPN). Nothing was sent."
        "Compare the versions of the two: they may be one release apart. If they are the same, find out what answers or dials there.";

    // TRU: the workload's own trust.
    SVID_EXPIRED "SFT-TRU-001" "svid_expired"
        "The workload's own SVID has expired"
        "It could not be renewed before its end. New connections fail until it is; the proxy goes on trying every few seconds."
        "See why the identity service does not issue: the proxy's log has the reason of the last try.";
    BOOTSTRAP_BUNDLE_STALE "SFT-TRU-002" "bootstrap_bundle_stale"
        "The mounted bundle does not fit the identity service"
        "The identity service's chain ends in an anchor that the mounted bundle lacks. The file is read again on change and every minute."
        "Publish the current bundle to the file (`steadfast trust bundle`).";
    BUNDLE_SEQ_LOWER "SFT-TRU-003" "bundle_seq_lower"
        "A bundle with a lower sequence number was refused"
        "The workload has a newer bundle than the identity service serves: the store was restored from a backup, or a replica is behind."
        "If a backup was put back, put the newer state of the store back; if it is lost, restart the workloads, which then take the bundle that is served.";
    BUNDLE_INVALID "SFT-TRU-004" "bundle_invalid"
        "A bundle cannot be used"
        "The bundle is empty or does not parse. The last good one stays in force."
        "See which file or replica sent it, and correct it.";
    RENEWAL_FAILED "SFT-TRU-005" "renewal_failed"
        "An SVID could not be renewed"
        "The identity service did not issue. The SVID that is held stays in use; the proxy tries again by itself."
        "See the reason in the log line. It hurts only when the SVID expires; the line says when.";
    SVID_MISSING "SFT-TRU-006" "svid_missing"
        "The workload has no SVID yet"
        "It has started and not been issued its first SVID, so it can neither dial nor accept as a member of the mesh."
        "See /ready and the log of the proxy for what it waits for: the token file, the mounted bundle, or the identity service.";
    SVID_ISSUER_DENIED "SFT-TRU-007" "own_issuer_denied"
        "The issuer of the workload's own SVID has been denied"
        "The key of the issuer that signed our SVID is considered stolen. Connections that were made with that SVID are cut at once, since nobody can tell us from the thief."
        "Nothing: a new SVID is asked for at once, and applications connect again. If it lasts, the proxy's log has the reason why it gets none.";
    SVID_ANCHOR_WITHDRAWN "SFT-TRU-008" "own_anchor_withdrawn"
        "The trust anchor of the workload's own SVID has been withdrawn"
        "The connection was made with an SVID whose anchor is no longer in the bundle. Requests end in good order; opaque connections and tunnels may go on until STEADFAST_PROXY_WITHDRAWN_TCP_DEADLINE and are cut then."
        "Nothing, if the SVID has been renewed since: new connections use the new one. Otherwise the proxy's log has the reason why it was not.";
    ANCHOR_PUT_BACK "SFT-TRU-009" "anchor_put_back"
        "An anchor was put back that is withdrawn for ever"
        "A mounted bundle, the trust domain in the store, or a bundle in the environment brings back an anchor that a rotation has withdrawn: an old backup, manifest or Helm value, or somebody who has its key. It is not believed, and nobody who stands on it is let in."
        "Find out who put it back, and take it out there (the line names the anchor and where it is). If the store was put back from a backup, `steadfast trust recover` puts it right.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_ascend_and_no_label_or_code_stands_twice() {
        let codes: Vec<_> = Code::all().collect();
        assert!(codes.windows(2).all(|pair| pair[0].as_str() < pair[1].as_str()));
        let mut labels: Vec<_> = codes.iter().map(|code| code.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), codes.len());
    }

    #[test]
    fn every_code_reads_back_in_any_case() {
        for code in Code::all() {
            assert_eq!(code.as_str().to_lowercase().parse(), Ok(code));
        }
        assert!("SFT-XX-999".parse::<Code>().is_err());
    }
}
