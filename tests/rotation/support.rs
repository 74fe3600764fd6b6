//! What the tests here have in common: a mesh with two workloads, a rotation in it, and its keys.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use serde_json::Value;
use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, CanaryPlan, Outcome, PastRotation, Request, Selector,
};
use steadfast_test_rig::app::App;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::peer::{Leaf, Peer, TestIssuer, dns_identity};
use steadfast_test_rig::process::free_addr;
use steadfast_test_rig::{Load, Mesh, MeshConfig, Pod, PodSpec, Report, until};

/// A mesh in which web asks api, and an application behind api for bytes.
pub(crate) struct Field {
    pub(crate) web: Pod,
    pub(crate) api: Pod,
    pub(crate) http: App,
    pub(crate) tcp: App,
    // Last, so that the logs are there while the others end.
    pub(crate) mesh: Mesh,
}

impl Field {
    pub(crate) async fn start(config: MeshConfig) -> Self {
        let mesh = Mesh::start(config).await;
        let http = App::http(free_addr()).await.unwrap();
        let tcp = App::tcp(free_addr()).await.unwrap();
        let ports = [http.addr.port(), tcp.addr.port()];
        let api = PodSpec {
            opaque_ports: vec![ports[1]],
            ..PodSpec::new("api", &ports).policy("all-authenticated")
        };
        let (api, web) = (mesh.pod(api), mesh.pod(PodSpec::new("web", &[])));
        api.ready().await;
        web.ready().await;
        Self { web, api, http, tcp, mesh }
    }

    /// Requests from web to api, some over HTTP/1.1 and some over HTTP/2.
    pub(crate) fn load(&self) -> [Load; 2] {
        let load = |http2| Load {
            to: self.web.outbound,
            authority: self.api.spec.authority(self.http.addr.port()),
            http2,
            connections: 2,
            rate: 20,
            duration_ms: 0,
        };
        [load(false), load(true)]
    }

    /// A peer of api's with an SVID of this issuer.
    pub(crate) fn peer(&self, issuer: &TestIssuer) -> Peer {
        let port = self.tcp.addr.port();
        issuer.peer(&Leaf::of("ops"), self.api.inbound, &dns_identity("api"), port)
    }

    /// Waits until api uses the bundle of this sequence number.
    pub(crate) async fn api_uses(&self, seq: u64) {
        until("api uses the bundle", DEADLINE, || async {
            let used = self.api.metrics().await.sum("steadfast_bundle_seq", &[]);
            (used == seq as f64).then_some(()).ok_or_else(|| format!("it uses {used}"))
        })
        .await;
    }
}

/// Runs both loads to the end of a story; not one request may fail.
pub(crate) async fn without_a_failed_request<T>(
    [http1, http2]: [Load; 2],
    story: impl Future<Output = T>,
) -> T {
    let (first, (second, told)) = http1.during(http2.during(story)).await;
    for report in [&first, &second] {
        assert_well(report);
    }
    told
}

fn assert_well(report: &Report) {
    assert_eq!(report.failed, 0, "{report:#?}");
    assert!(report.requests > 20, "{report:#?}");
}

/// Orders a rotation to the standby.
pub(crate) async fn rotate(mesh: &Mesh) {
    rotate_with(mesh, None).await;
}

/// The same, with everybody as a canary first, for a moment.
pub(crate) async fn rotate_by_canaries(mesh: &Mesh) {
    let selector = Selector::Namespace("demo".to_owned());
    rotate_with(mesh, Some(CanaryPlan { selector, window: Duration::from_secs(4) })).await;
}

async fn rotate_with(mesh: &Mesh, canary: Option<CanaryPlan>) {
    mesh.order(|state| {
        let (by, at, canary) = ("a test".to_owned(), state.activated_at, canary.clone());
        state
            .request(Request { by, at, anchor: None, canary, replaces: None })
            .expect("it is taken");
    })
    .await;
}

pub(crate) fn phase(state: &TrustDomainState) -> Option<PhaseName> {
    state.rotation.as_ref().map(|rotation| rotation.phase.name())
}

/// Waits until the rotation has come to this phase.
pub(crate) async fn in_phase(mesh: &Mesh, name: PhaseName) -> TrustDomainState {
    let what = format!("the rotation is {name:?}");
    mesh.state_where(&what, DEADLINE, |state| phase(state) == Some(name)).await
}

/// Waits until no rotation is under way or asked for, and so many are over.
pub(crate) async fn over(mesh: &Mesh, count: usize) -> (TrustDomainState, PastRotation) {
    let what = format!("{count} rotations are over");
    let over = |state: &TrustDomainState| {
        state.past.len() >= count && state.rotation.is_none() && state.requested.is_none()
    };
    let state = mesh.state_where(&what, DEADLINE, over).await;
    let past = state.past[count - 1].clone();
    (state, past)
}

/// Checks that a trust domain is as it should be between two rotations: two anchors, one of them
/// active and one a standby, and a key for each and for nothing else.
pub(crate) async fn assert_idle(mesh: &Mesh, state: &TrustDomainState) {
    let states: Vec<_> = state.anchors.iter().map(|anchor| anchor.state).collect();
    let count = |wanted| states.iter().filter(|state| **state == wanted).count();
    let expected = (2, 1, 1);
    let found = (states.len(), count(AnchorState::Active), count(AnchorState::Standby));
    assert_eq!(found, expected, "{states:?}");
    let named: BTreeSet<_> = state.anchors.iter().map(|anchor| anchor.id).collect();
    until("each anchor has its key, and nothing else has", DEADLINE, || async {
        let keys = keys(mesh);
        (keys == named).then_some(()).ok_or_else(|| format!("{keys:?}, not {named:?}"))
    })
    .await;
}

/// The keys of anchors that there are.
pub(crate) fn keys(mesh: &Mesh) -> BTreeSet<KeyId> {
    let files = fs::read_dir(mesh.dir().join("keys/anchors")).expect("the anchors' keys");
    let name = |file: fs::DirEntry| file.file_name().to_string_lossy().into_owned();
    let names = files.map(|file| name(file.expect("a file")));
    names.filter_map(|name| name.strip_suffix(".key")?.parse().ok()).collect()
}

pub(crate) fn in_state(state: &TrustDomainState, wanted: AnchorState) -> AnchorRecord {
    state.in_state(wanted).next().unwrap_or_else(|| panic!("an anchor is {wanted:?}")).clone()
}

/// `/rotation.json`.
pub(crate) async fn page(mesh: &Mesh) -> Result<Value, String> {
    let (_, text) = get(mesh.rotation_admin, "/rotation.json").await?;
    serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))
}

pub(crate) fn assert_outcome(past: &PastRotation, outcome: Outcome) {
    assert_eq!(past.outcome, outcome, "{past:#?}");
}

/// For whatever has to happen: all of these tests run at once, on two cores.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// The time on this machine's clock, which the mesh under test goes by.
pub(crate) fn now() -> UnixTime {
    #[allow(clippy::disallowed_methods)] // What really expires at a real time.
    std::time::SystemTime::now().into()
}
