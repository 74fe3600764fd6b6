//! What proves an identity: certificates, requests for them, bundles, and the messages that carry
//! them.

use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::executor::block_on;
use prost::Message;
use rustls_pki_types::CertificateDer;
use steadfast_api::trust::v1::{
    Ack, AnchorUse, Bundle, CertifyRequest, CertifyResponse, DeniedIssuer, Hello, Instance, Query,
    Renew, StreamRequest, StreamResponse, stream_request, stream_response,
};
use steadfast_api::{KeyId, Svid, TrustAnchor, TrustBundle, TrustDomain, UnixTime, bundle};
use steadfast_api_grpc::stream::{Wire, framed};
use steadfast_identity::{authority, import};
use steadfast_identity_client::Trust;
use steadfast_identity_client::verify::{Role, check_chain};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::IssuerRequest;

use crate::certificates::{ID, NOW_SECS, pki};

/// One certificate, as a leaf and as an anchor.
pub(crate) fn svid(input: &[u8]) -> bool {
    if let Ok(anchor) = TrustAnchor::parse(input) {
        assert_eq!(anchor.der(), input);
        assert!(Svid::parse(input).is_err(), "an anchor is no SVID");
    }
    let Ok(svid) = Svid::parse(input) else { return false };
    assert!(!svid.spiffe_id.path().is_empty());
    assert!(!svid.serial_hex().is_empty());
    true
}

pub(crate) fn svid_seeds() -> Vec<Vec<u8>> {
    let pki = pki();
    let mut seeds = vec![pki.svid.clone(), pki.issuer.clone(), pki.anchor.clone()];
    seeds.extend(pki.others.iter().cloned());
    seeds
}

/// Any chain that is accepted ends in the one anchor that is believed, and names a workload of its
/// trust domain.
pub(crate) fn chain(input: &[u8]) -> bool {
    static TRUST: OnceLock<Trust> = OnceLock::new();
    let trust = TRUST.get_or_init(|| {
        let anchor = TrustAnchor::parse(&pki().anchor).unwrap();
        let bundle = TrustBundle::new(trust_domain(), 1, vec![anchor]).unwrap();
        Trust::new(&bundle, [], []).unwrap()
    });
    let certificates = pieces(input);
    let Some((leaf, intermediates)) = certificates.split_first() else { return false };
    let now = UnixTime::from_secs(NOW_SECS);
    let mut accepted = false;
    for role in [Role::Client, Role::Server] {
        match check_chain(role, leaf, intermediates, trust, now, None) {
            Ok(peer) => {
                assert!(peer.id.is_member_of(&trust_domain()));
                assert_eq!(peer.anchor, trust.anchors()[0].id());
                assert!(peer.not_before <= now && now <= peer.not_after);
                // Nobody but the issuer can have signed it, and it signed one SVID alone.
                assert_eq!(peer.id.as_str(), ID);
                accepted = true;
            }
            Err(refused) => assert!(!refused.detail.is_empty()),
        }
    }
    accepted
}

pub(crate) fn chain_seeds() -> Vec<Vec<u8>> {
    let pki = pki();
    let mut seeds = vec![joined(&[&pki.svid, &pki.issuer]), joined(&[&pki.svid])];
    seeds.push(joined(&[&pki.svid, &pki.issuer, &pki.anchor]));
    seeds.extend(pki.others.iter().map(|leaf| joined(&[leaf, &pki.issuer])));
    seeds
}

pub(crate) fn csr(input: &[u8]) -> bool {
    match steadfast_identity::csr::check(input) {
        Ok(_) => true,
        Err(error) => {
            assert!(error.to_string().len() < 4096, "an error shows the beginning of what it saw");
            false
        }
    }
}

pub(crate) fn csr_seeds() -> Vec<Vec<u8>> {
    vec![pki().csr.clone(), pki().svid.clone()]
}

/// What is imported as an anchor is one, and an issuer is of the key that was asked for, under its
/// anchor, and does not outlive it.
pub(crate) fn import(input: &[u8]) -> bool {
    static STATE: OnceLock<(TrustDomainState, IssuerRequest)> = OnceLock::new();
    let (state, request) = STATE.get_or_init(|| {
        let now = UnixTime::from_secs(NOW_SECS);
        let mut state = authority::found(&trust_domain(), now).unwrap().state;
        let anchor = import::anchor(&trust_domain(), &pem(&[&pki().anchor]), now).unwrap();
        let anchor_id = state.import_anchor(anchor).unwrap();
        let number = state.request_issuer(anchor_id, 1).unwrap().number;
        let key_id = TrustAnchor::parse(&pki().issuer).unwrap().id();
        (
            state,
            IssuerRequest { number, anchor_id, key_id, csr: Vec::new(), key_ref: String::new() },
        )
    });
    let now = UnixTime::from_secs(NOW_SECS);
    let mut taken = false;
    match import::anchor(&trust_domain(), input, now) {
        Ok(record) => {
            let anchor = TrustAnchor::parse(&record.der).unwrap();
            assert_eq!((anchor.id(), anchor.not_after()), (record.id, record.not_after));
            taken = true;
        }
        Err(error) => assert!(error.to_string().len() < 4096, "{error}"),
    }
    match import::issuer(state, std::slice::from_ref(request), input, now) {
        Ok((_, issuer)) => {
            let anchor = state.anchor(request.anchor_id).unwrap();
            assert_eq!((issuer.id, issuer.anchor_id), (request.key_id, anchor.id));
            assert!(issuer.not_after < anchor.not_after);
            taken = true;
        }
        Err(error) => assert!(error.to_string().len() < 4096, "{error}"),
    }
    taken
}

pub(crate) fn import_seeds() -> Vec<Vec<u8>> {
    let pki = pki();
    vec![
        pem(&[&pki.anchor]),
        pem(&[&pki.issuer]),
        pem(&[&pki.issuer, &pki.anchor]),
        pem(&[&pki.svid, &pki.issuer]),
    ]
}

fn pem(ders: &[&[u8]]) -> Vec<u8> {
    let block = |der: &&[u8]| {
        let text = STANDARD.encode(der);
        let lines =
            text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned());
        let lines = lines.collect::<Vec<_>>().join("\n");
        format!("-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n")
    };
    ders.iter().map(block).collect::<String>().into_bytes()
}

/// A bundle that is read prints as one that reads the same.
pub(crate) fn bundle(input: &[u8]) -> bool {
    let Ok(bundle) = TrustBundle::parse(&trust_domain(), input) else { return false };
    assert!(!bundle.anchors().is_empty());
    let again = TrustBundle::parse(&trust_domain(), bundle.to_jwks().as_bytes());
    assert_eq!(again.as_ref(), Ok(&bundle));
    true
}

pub(crate) fn bundle_seeds() -> Vec<Vec<u8>> {
    let anchor = TrustAnchor::parse(&pki().anchor).unwrap();
    let bundle = TrustBundle::new(trust_domain(), 7, vec![anchor]).unwrap();
    let jwks = bundle.to_jwks();
    let x5c = jwks.split('"').find(|text| text.len() > 300).unwrap();
    let pem = String::from_utf8(pem(&[&STANDARD.decode(x5c).unwrap()])).unwrap();
    let empty = r#"{"keys":[],"spiffe_sequence":1}"#.to_owned();
    let other = r#"{"keys":[{"kty":"EC","use":"jwt-svid","kid":"a"}],"spiffe_refresh_hint":60}"#;
    [jwks, pem, empty, other.to_owned()].map(String::into_bytes).into()
}

/// The first byte picks the message. What decodes encodes to what decodes the same, and its
/// content is brought into our types without a panic.
pub(crate) fn trust_messages(input: &[u8]) -> bool {
    let Some((kind, bytes)) = input.split_first() else { return false };
    match kind % 5 {
        0 => decoded::<StreamRequest>(bytes).is_some_and(|request| match request.message {
            Some(stream_request::Message::Ack(ack)) => {
                times([ack.svid_not_after]);
                KeyId::from_slice(&ack.svid_issuer).is_some()
                    && ack.handshakes.iter().all(|u| KeyId::from_slice(&u.anchor_id).is_some())
            }
            Some(stream_request::Message::Hello(hello)) => {
                times([hello.instance.and_then(|instance| instance.started_at)]);
                true
            }
            None => false,
        }),
        1 => decoded::<StreamResponse>(bytes).is_some_and(|response| {
            times([response.server_time]);
            match response.message {
                Some(stream_response::Message::Bundle(bundle)) => taken(&bundle),
                Some(stream_response::Message::Renew(renew)) => {
                    times([renew.from]);
                    true
                }
                Some(stream_response::Message::Query(_) | stream_response::Message::End(_)) => true,
                None => false,
            }
        }),
        2 => decoded::<CertifyRequest>(bytes)
            .is_some_and(|request| steadfast_identity::csr::check(&request.csr).is_ok()),
        3 => decoded::<CertifyResponse>(bytes).is_some_and(|response| {
            times([response.issued_at, response.not_after, response.renew_at]);
            response.chain.first().is_some_and(|leaf| Svid::parse(leaf).is_ok())
        }),
        _ => framed_messages(bytes),
    }
}

/// A trust stream's bytes: what is read of them is read again from what it is sent as.
fn framed_messages(bytes: &[u8]) -> bool {
    let read = |bytes: &[u8]| {
        let mut wire = Wire::new(bytes, FRAMED_BYTES_MAX);
        let next = || block_on(wire.next::<StreamRequest>()).ok().flatten();
        std::iter::from_fn(next).collect::<Vec<_>>()
    };
    let messages = read(bytes);
    let sent: Vec<u8> = messages.iter().flat_map(|message| framed(message, &[])).collect();
    assert_eq!(read(&sent), messages);
    !messages.is_empty()
}

pub(crate) fn trust_messages_seeds() -> Vec<Vec<u8>> {
    let time = Some(UnixTime::from_secs(NOW_SECS).into());
    let id = KeyId::of_spki(b"issuer").as_bytes().to_vec();
    let instance = Some(Instance { pod_uid: "uid".to_owned(), started_at: time });
    let hello = Hello { token: b"token".to_vec(), instance: instance.clone(), ..Hello::default() };
    let ack = Ack {
        instance,
        nonce: 7,
        seq: 3,
        svid_issuer: id.clone(),
        handshakes: vec![AnchorUse { anchor_id: id.clone(), count: 2 }],
        ..Ack::default()
    };
    let bundle = Bundle {
        trust_domain: trust_domain().to_string(),
        seq: 3,
        anchors: vec![pki().anchor.clone()],
        denied_issuers: vec![DeniedIssuer { issuer_id: id.clone(), until: time }],
        tombstones: vec![id],
    };
    let renew = Renew { id: 1, from: time, window: None };
    let up = |message| StreamRequest { message: Some(message) };
    let request = |message| up(message).encode_to_vec();
    let stream = [up(stream_request::Message::Ack(ack.clone())), StreamRequest::default()];
    let response =
        |message| StreamResponse { server_time: time, message: Some(message) }.encode_to_vec();
    let certify = CertifyRequest { token: b"token".to_vec(), csr: pki().csr.clone() };
    let certified = CertifyResponse {
        chain: vec![pki().svid.clone(), pki().issuer.clone()],
        issued_at: time,
        not_after: time,
        server_time: time,
        seq: 3,
        ..CertifyResponse::default()
    };
    let numbered = |number: u8, bytes: Vec<u8>| [vec![number], bytes].concat();
    vec![
        numbered(0, request(stream_request::Message::Hello(hello))),
        numbered(0, request(stream_request::Message::Ack(ack))),
        numbered(1, response(stream_response::Message::Bundle(bundle))),
        numbered(1, response(stream_response::Message::Query(Query { nonce: 7 }))),
        numbered(1, response(stream_response::Message::Renew(renew))),
        numbered(2, certify.encode_to_vec()),
        numbered(3, certified.encode_to_vec()),
        numbered(4, stream.iter().flat_map(|message| framed(message, &[])).collect()),
    ]
}

/// As the identity service takes them.
const FRAMED_BYTES_MAX: usize = 64 * 1024;

/// A published bundle, as a workload takes it.
fn taken(message: &Bundle) -> bool {
    let Ok(trust_domain) = message.trust_domain.parse::<TrustDomain>() else { return false };
    let Ok(anchors) = bundle::parse_anchors(&message.anchors) else { return false };
    let Ok(bundle) = TrustBundle::new(trust_domain, message.seq, anchors) else { return false };
    let ids = |ids: Vec<&Vec<u8>>| ids.into_iter().filter_map(|id| KeyId::from_slice(id)).collect();
    let denied: Vec<KeyId> = ids(message.denied_issuers.iter().map(|d| &d.issuer_id).collect());
    let tombstones: Vec<KeyId> = ids(message.tombstones.iter().collect());
    match Trust::new(&bundle, denied, tombstones.iter().copied()) {
        Ok(trust) => {
            assert!(trust.anchors().iter().all(|anchor| !tombstones.contains(&anchor.id())));
            true
        }
        Err(_) => false,
    }
}

fn decoded<M: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    assert_eq!(M::decode(message.encode_to_vec().as_slice()).as_ref(), Ok(&message));
    Some(message)
}

fn times<T: Into<UnixTime>, const N: usize>(times: [Option<T>; N]) {
    for time in times.into_iter().flatten() {
        let _ = time.into().to_string();
    }
}

fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

/// Certificates, each behind its length in two bytes.
fn joined(certificates: &[&Vec<u8>]) -> Vec<u8> {
    certificates
        .iter()
        .flat_map(|der| [&(der.len() as u16).to_be_bytes()[..], der].concat())
        .collect()
}

fn pieces(mut input: &[u8]) -> Vec<CertificateDer<'_>> {
    let mut pieces = Vec::new();
    while let Some((length, rest)) = input.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (piece, behind) = rest.split_at(length);
        pieces.push(CertificateDer::from(piece));
        input = behind;
    }
    pieces
}
