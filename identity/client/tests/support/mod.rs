//! A certificate authority, workloads and a clock for the tests of this crate.

#![allow(dead_code)] // Each test file uses its part.

pub(crate) mod service;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use steadfast_api::{
    DnsIdentity, KeyId, SpiffeId, TrustAnchor, TrustBundle, TrustDomain, UnixTime,
};
use steadfast_identity_client::{Contexts, Issued, OwnSvid, SvidKey, TlsContext, Trust};
use steadfast_process::Clock;

/// When most tests play.
pub(crate) const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// A clock that a test sets.
pub(crate) struct TestClock(AtomicU64);

impl TestClock {
    pub(crate) fn at(now: UnixTime) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(now.as_millis())))
    }

    pub(crate) fn set(&self, now: UnixTime) {
        self.0.store(now.as_millis(), Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixTime {
        UnixTime::from_millis(self.0.load(Ordering::SeqCst))
    }

    fn since_boot(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }
}

/// An anchor or issuer.
pub(crate) struct Authority {
    pub(crate) key: SvidKey,
    pub(crate) der: Vec<u8>,
    params: CertificateParams,
    /// What is sent beneath an SVID: the issuers up to the anchor, without it.
    pub(crate) chain: Vec<Vec<u8>>,
}

/// What an SVID is made of; a test changes one thing.
#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) uris: Vec<String>,
    pub(crate) dns: Vec<String>,
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
    pub(crate) is_ca: bool,
    pub(crate) key_usages: Vec<KeyUsagePurpose>,
    pub(crate) extended: Vec<ExtendedKeyUsagePurpose>,
}

impl Leaf {
    pub(crate) fn of(name: &DnsIdentity) -> Self {
        Self {
            uris: vec![name.spiffe_id().to_string()],
            dns: vec![name.to_string()],
            not_before: NOW - Duration::from_secs(300),
            not_after: NOW + HOUR,
            is_ca: false,
            key_usages: vec![KeyUsagePurpose::DigitalSignature],
            extended: vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        }
    }
}

impl Authority {
    pub(crate) fn anchor(name: &str) -> Self {
        Self::anchor_valid(name, NOW - HOUR * 24, NOW + HOUR * 1000)
    }

    pub(crate) fn anchor_valid(name: &str, not_before: UnixTime, not_after: UnixTime) -> Self {
        let key = SvidKey::generate().unwrap();
        let params = authority_params(name, &key, not_before, not_after);
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Self { key, der, params, chain: Vec::new() }
    }

    pub(crate) fn issuer(&self, name: &str) -> Self {
        self.issuer_valid(name, NOW - HOUR, NOW + HOUR * 100)
    }

    pub(crate) fn issuer_valid(
        &self,
        name: &str,
        not_before: UnixTime,
        not_after: UnixTime,
    ) -> Self {
        let key = SvidKey::generate().unwrap();
        let params = authority_params(name, &key, not_before, not_after);
        let signer = Issuer::from_params(&self.params, &self.key);
        let der = params.signed_by(&key, &signer).unwrap().der().to_vec();
        let chain = [vec![der.clone()], self.chain.clone()].concat();
        Self { key, der, params, chain }
    }

    /// A thief of an SVID's key who plays at being an issuer.
    pub(crate) fn of_svid(key: SvidKey, chain: Vec<Vec<u8>>) -> Self {
        let mut params = authority_params("", &key, NOW - HOUR, NOW + HOUR);
        // The SVID's own subject, which is empty.
        params.distinguished_name = DistinguishedName::new();
        let der = chain.first().unwrap().clone();
        Self { key, der, params, chain }
    }

    pub(crate) fn id(&self) -> KeyId {
        self.key.id()
    }

    /// The SVID first, then its issuers.
    pub(crate) fn sign(&self, leaf: &Leaf, key: &impl PublicKeyData) -> Vec<Vec<u8>> {
        let signer = Issuer::from_params(&self.params, &self.key);
        let der = leaf_params(leaf).signed_by(key, &signer).unwrap().der().to_vec();
        [vec![der], self.chain.clone()].concat()
    }
}

fn authority_params(
    name: &str,
    key: &SvidKey,
    not_before: UnixTime,
    not_after: UnixTime,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.key_identifier_method =
        KeyIdMethod::PreSpecified(key.id().as_bytes().get(..20).unwrap().to_vec());
    params.serial_number = Some(SerialNumber::from_slice(key.id().as_bytes().get(..8).unwrap()));
    (params.not_before, params.not_after) =
        (SystemTime::from(not_before).into(), SystemTime::from(not_after).into());
    params
}

fn leaf_params(leaf: &Leaf) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca =
        if leaf.is_ca { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
    params.key_usages = leaf.key_usages.clone();
    params.extended_key_usages = leaf.extended.clone();
    let dns = leaf.dns.iter().map(|name| SanType::DnsName(name.as_str().try_into().unwrap()));
    let uris = leaf.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap()));
    params.subject_alt_names = dns.chain(uris).collect();
    params.use_authority_key_identifier_extension = true;
    params.key_identifier_method = KeyIdMethod::PreSpecified(vec![7; 20]);
    params.serial_number = Some(SerialNumber::from_slice(&[0x4a; 16]));
    (params.not_before, params.not_after) =
        (SystemTime::from(leaf.not_before).into(), SystemTime::from(leaf.not_after).into());
    params
}

pub(crate) fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

/// A service account of the namespace `demo`.
pub(crate) fn name(service_account: &str) -> DnsIdentity {
    DnsIdentity::new(service_account, "demo", "steadfast", &trust_domain()).unwrap()
}

pub(crate) fn id(service_account: &str) -> SpiffeId {
    name(service_account).spiffe_id()
}

pub(crate) fn bundle(seq: u64, anchors: &[&Authority]) -> TrustBundle {
    let anchors = anchors.iter().map(|a| TrustAnchor::parse(&a.der).unwrap()).collect();
    TrustBundle::new(trust_domain(), seq, anchors).unwrap()
}

pub(crate) fn trust(anchors: &[&Authority]) -> Arc<Trust> {
    trust_denying(anchors, &[])
}

pub(crate) fn trust_denying(anchors: &[&Authority], denied: &[KeyId]) -> Arc<Trust> {
    Arc::new(Trust::new(&bundle(1, anchors), denied.iter().copied(), []).unwrap())
}

/// A workload that trusts `believes` and shows an SVID that `issuer` made.
pub(crate) fn workload(
    clock: Arc<dyn Clock>,
    issuer: &Authority,
    service_account: &str,
    believes: Arc<Trust>,
    anchor: &Authority,
) -> Arc<TlsContext> {
    workload_with(clock, issuer, &Leaf::of(&name(service_account)), believes, anchor)
}

/// As [`workload`], with a leaf of the test's making. The leaf must be an SVID for its own side.
pub(crate) fn workload_with(
    clock: Arc<dyn Clock>,
    issuer: &Authority,
    leaf: &Leaf,
    believes: Arc<Trust>,
    anchor: &Authority,
) -> Arc<TlsContext> {
    let key = SvidKey::generate().unwrap();
    let issued = Issued { chain: issuer.sign(leaf, &key), issued_at: leaf.not_before };
    let id: SpiffeId = leaf.uris.first().unwrap().parse().unwrap();
    // Its own check is made with a bundle and at a time that suit it: what the other side thinks
    // of it is what is tested.
    let own = Trust::new(
        &TrustBundle::new(id.trust_domain(), 1, vec![TrustAnchor::parse(&anchor.der).unwrap()])
            .unwrap(),
        [],
        [],
    )
    .unwrap();
    let svid = OwnSvid::check(issued, key, &id, &own, leaf.not_before).unwrap();
    let contexts = Contexts::new(clock);
    contexts.publish(Some(Arc::new(svid)), believes).unwrap()
}
