//! Who may ask control: only a workload of the trust domain, and it knows that it asks control.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test's helpers fail as it does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use linkerd2_proxy_api::destination::GetDestination;
use linkerd2_proxy_api::destination::destination_client::DestinationClient;
use prometheus_client::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyUsagePurpose, SanType, SerialNumber,
};
use steadfast_api::{DnsIdentity, TrustAnchor, TrustBundle, TrustDomain, UnixTime};
use steadfast_control::index::MeshNames;
use steadfast_control::{Board, Destination, DestinationSettings, Metrics, follow, serve};
use steadfast_identity_client::{
    ClientAuth, Connector, Contexts, Expected, Incoming, Issued, OwnSvid, Refusals, SvidKey,
    TlsContext, Trust, incoming,
};
use steadfast_platform::Store;
use steadfast_platform::standalone::{Directory, Engine};
use steadfast_process::{Clock, Drain, Readiness, SystemClock};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Status};

const HOUR: Duration = Duration::from_secs(3600);

/// A mesh of its own: an anchor that signs SVIDs.
struct Authority {
    key: SvidKey,
    params: CertificateParams,
    der: Vec<u8>,
}

impl Authority {
    fn new() -> Self {
        let key = SvidKey::generate().unwrap();
        let mut params = params(&key);
        params.distinguished_name.push(DnType::CommonName, "anchor");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Self { key, params, der }
    }

    fn trust(&self) -> Trust {
        let anchors = vec![TrustAnchor::parse(&self.der).unwrap()];
        Trust::new(&TrustBundle::new(trust_domain(), 1, anchors).unwrap(), [], []).unwrap()
    }

    /// What a workload of this mesh uses, if it believes in `believes`.
    fn workload(&self, name: &DnsIdentity, believes: &Self) -> watch::Receiver<Arc<TlsContext>> {
        let key = SvidKey::generate().unwrap();
        let mut params = params(&key);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![
            SanType::DnsName(name.to_string().try_into().unwrap()),
            SanType::URI(name.spiffe_id().as_str().try_into().unwrap()),
        ];
        let signer = Issuer::from_params(&self.params, &self.key);
        let leaf = params.signed_by(&key, &signer).unwrap().der().to_vec();
        let now = SystemClock.now();
        let issued = Issued { chain: vec![leaf], issued_at: now };
        let svid = OwnSvid::check(issued, key, &name.spiffe_id(), &self.trust(), now).unwrap();
        let contexts = Contexts::new(Arc::new(SystemClock));
        let receiver = contexts.subscribe();
        contexts.publish(Some(Arc::new(svid)), Arc::new(believes.trust())).unwrap();
        receiver
    }
}

fn params(key: &SvidKey) -> CertificateParams {
    let at = |time: UnixTime| SystemTime::from(time).into();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.use_authority_key_identifier_extension = true;
    params.key_identifier_method =
        KeyIdMethod::PreSpecified(key.id().as_bytes().get(..20).unwrap().to_vec());
    params.serial_number = Some(SerialNumber::from_slice(key.id().as_bytes().get(..8).unwrap()));
    params.not_before = at(SystemClock.now() - HOUR);
    params.not_after = at(SystemClock.now() + HOUR);
    params
}

fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn name(account: &str, namespace: &str) -> DnsIdentity {
    DnsIdentity::new(account, namespace, "steadfast", &trust_domain()).unwrap()
}

/// Control with this identity, over an empty store.
struct Control {
    addr: SocketAddr,
    _dir: tempfile::TempDir,
    _work: JoinSet<()>,
}

impl Control {
    async fn start(contexts: watch::Receiver<Arc<TlsContext>>) -> Self {
        let (dir, drain, mut work) = (tempfile::tempdir().unwrap(), Drain::new(), JoinSet::new());
        let directory = Directory::new(dir.path());
        directory.create().unwrap();
        let (engine, writer) = Engine::open(&directory, drain.clone()).unwrap();
        work.spawn(async move { writer.await.unwrap() });
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        let names =
            MeshNames { trust_domain: trust_domain(), control_namespace: "steadfast".to_owned() };
        let board = Arc::new(Board::new(names));
        let settings = DestinationSettings::default();
        let destination = Destination::new(board.clone(), metrics.clone(), drain.clone(), settings);
        let (store, clock): (Arc<dyn Store>, Arc<dyn Clock>) =
            (Arc::new(engine), Arc::new(SystemClock));
        let synced = Readiness::new().component("resources", "not read yet");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = incoming(Incoming {
            listener,
            contexts,
            client_auth: ClientAuth::Required,
            alpns: &[b"h2"],
            refusals: Refusals::new(&mut registry, clock.clone()),
            drain: drain.clone(),
        });
        work.spawn(async move { match follow(store, board, metrics, clock, synced).await {} });
        work.spawn(async move { serve(destination, connections, drain).await.unwrap() });
        Self { addr, _dir: dir, _work: work }
    }

    /// Asks as this workload, expecting this server.
    async fn ask(
        &self,
        contexts: watch::Receiver<Arc<TlsContext>>,
        expected: &DnsIdentity,
    ) -> Result<bool, Status> {
        let expected = Expected { server_name: expected.clone(), id: expected.spiffe_id() };
        let refusals = Refusals::new(&mut Registry::default(), Arc::new(SystemClock));
        let connector = Connector::new(contexts, &self.addr.to_string(), expected, refusals);
        let endpoint = tonic::transport::Endpoint::from_static("http://control");
        exists(endpoint.connect_with_connector_lazy(connector)).await
    }
}

async fn exists(channel: Channel) -> Result<bool, Status> {
    let path = "web.demo:80".to_owned();
    let lookup = GetDestination { path, ..GetDestination::default() };
    let mut stream = DestinationClient::new(channel).get(lookup).await?.into_inner();
    let first = stream.message().await?.unwrap();
    Ok(!matches!(
        first.update,
        Some(linkerd2_proxy_api::destination::update::Update::NoEndpoints(none)) if !none.exists
    ))
}

#[tokio::test]
async fn only_a_workload_of_the_trust_domain_is_answered() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let ourselves = name("steadfast-control", "steadfast");
    let control = Control::start(ours.workload(&ourselves, &ours)).await;
    let web = name("web", "demo");

    assert!(!control.ask(ours.workload(&web, &ours), &ourselves).await.unwrap());
    // Another mesh's workload, which believes in ours.
    let foreign = control.ask(theirs.workload(&web, &ours), &ourselves).await.unwrap_err();
    assert_ne!(foreign.code(), Code::Ok);
    // Somebody else answers where control should be.
    let impostor = control.ask(ours.workload(&web, &ours), &name("other", "steadfast")).await;
    assert!(impostor.is_err());
    // No TLS at all.
    let address = format!("http://{}", control.addr);
    let plain = Channel::from_shared(address).unwrap().connect_lazy();
    assert!(exists(plain).await.is_err());
    // And still the first is answered.
    assert!(!control.ask(ours.workload(&web, &ours), &ourselves).await.unwrap());
}
