//! The shell over the real store: who leads, and the evidence that is kept before it is relied on.

#![allow(clippy::unwrap_used)] // A test may fail by panicking.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use prometheus_client::registry::Registry;
use steadfast_api::{KeyId, UnixTime};
use steadfast_identity::authority::found;
use steadfast_platform::keys::FileKeys;
use steadfast_platform::kubernetes::Namespaces;
use steadfast_platform::standalone::{Directory, Engine};
use steadfast_platform::store::{EVIDENCE_INDEX_KEY, Event, LEADER_KEY, TRUST_DOMAIN_KEY};
use steadfast_platform::{Entry, Revision, Store, StoreError};
use steadfast_process::{Clock, Drain};
use steadfast_rotation::Anchors;
use steadfast_rotation::endings::Ended;
use steadfast_rotation::event_log::EventLog;
use steadfast_rotation::evidence::{self, KeepError};
use steadfast_rotation::leader::{Candidate, Role};
use steadfast_rotation::listing::Carries;
use steadfast_rotation::metrics::Metrics;
use steadfast_rotation::shell::{Fleet, Parts, Shell};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::{Ack, Replica};
use steadfast_rotation_protocol::controller::{Now, Timings};
use steadfast_rotation_protocol::evidence::{EvidenceError, Kept, Said};
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::schedule::Schedule;
use steadfast_rotation_protocol::trust_domain::Request;

#[tokio::test]
async fn evidence_is_there_before_the_state_names_it_and_says_who_acked_what() {
    let mesh = Mesh::new().await;
    let fleet = mesh.fleet();
    let mut shell = mesh.shell("one", &fleet);
    mesh.order().await;
    let rotation = loop {
        shell.turn().await.unwrap();
        mesh.clock.pass(LEASE);
        let Some(rotation) = mesh.state().await.rotation else { continue };
        if rotation.phase.name() == PhaseName::Preparing {
            break rotation;
        }
    };
    let step = rotation.steps.iter().position(|step| step.phase == PhaseName::Staged).unwrap();
    let digest = rotation.steps[step].evidence.unwrap();
    let kept = evidence::read(&mesh.engine, rotation.number, step, digest).await.unwrap();
    assert_eq!((kept.head.seq, kept.head.phase), (2, PhaseName::Staged));
    let [witness] = kept.witnesses.as_slice() else { panic!("{kept:?}") };
    let Said::Serves(Some(ack)) = &witness.said else { panic!("{witness:?}") };
    assert_eq!((witness.name.as_str(), ack.seq), ("identity", 2));
}

#[tokio::test]
async fn keys_that_cannot_be_looked_for_are_told_and_keep_nothing_else_from_being_decided() {
    let mesh = Mesh::new().await;
    let mut shell = mesh.shell("one", &mesh.fleet());
    std::fs::remove_dir_all(mesh.directory.anchor_keys()).unwrap();
    mesh.order().await;
    for _ in 0..20 {
        let looked = shell.turn().await.unwrap();
        mesh.clock.pass(LEASE);
        assert!(looked.trouble.is_some());
        assert!(shell.standing().borrow().trouble.is_some());
        if mesh.state().await.rotation.is_some() {
            return;
        }
    }
    panic!("no rotation begins: {:?}", shell.waiting());
}

#[tokio::test]
async fn many_who_do_not_answer_are_asked_less_and_less_often_but_at_once_after_a_change() {
    let mesh = Mesh::new().await;
    mesh.pods(1000).await;
    let fleet = mesh.fleet();
    let mut shell = mesh.shell("one", &fleet);
    mesh.order().await;
    let asked_in = async |turns: u32, shell: &mut Shell| {
        let before = fleet.asked();
        for _ in 0..turns {
            shell.turn().await.unwrap();
            mesh.clock.pass(Duration::from_millis(500));
        }
        fleet.asked() - before
    };
    assert_eq!(asked_in(3, &mut shell).await, 3);
    asked_in(150, &mut shell).await;
    assert_eq!(asked_in(60, &mut shell).await, 10);
    mesh.touch().await;
    assert_eq!(asked_in(1, &mut shell).await, 1);
}

#[tokio::test]
async fn evidence_that_was_changed_is_refused_and_what_nobody_names_any_more_is_deleted() {
    let mesh = Mesh::new().await;
    let (one, other) = (kept(1, "one\n"), kept(1, "other\n"));
    // Two controllers that decided the same step on different acks, one of them twice.
    for kept in [&one, &other, &one] {
        evidence::keep(&mesh.engine, kept).await.unwrap();
    }
    let missing = evidence::read(&mesh.engine, 1, 7, one.digest).await.unwrap_err();
    assert!(matches!(missing, KeepError::Missing { step: 7, .. }), "{missing}");
    let key = format!("trust/evidence/1/0/{}/0", one.digest);
    let entry = mesh.engine.get(&key).await.unwrap().unwrap();
    let bent = Some(Bytes::from_static(b"bent\n"));
    mesh.engine.compare_and_swap(&key, Some(entry.revision), bent).await.unwrap();
    let refused = evidence::read(&mesh.engine, 1, 0, one.digest).await.unwrap_err();
    assert!(matches!(refused, KeepError::Evidence(EvidenceError::Differs { .. })), "{refused}");
    let foreign = evidence::keep(&mesh.engine, &one).await.unwrap_err();
    assert!(matches!(foreign, KeepError::Foreign(_)), "{foreign}");
    // A rotation that this state does not know yet may be another controller's.
    let mut state = mesh.state().await;
    assert_eq!(evidence::tidy(&mesh.engine, &state).await.unwrap(), 0);
    state.rotations = 1;
    assert_eq!(evidence::tidy(&mesh.engine, &state).await.unwrap(), 2);
    let (left, _) = mesh.engine.list("trust/evidence/").await.unwrap();
    assert!(left.is_empty(), "{left:?}");
    let index = mesh.engine.get(EVIDENCE_INDEX_KEY).await.unwrap().unwrap();
    assert_eq!(index.value, "[]");
}

#[tokio::test]
async fn one_controller_asks_and_the_other_takes_over_at_once_when_it_goes() {
    let mesh = Mesh::new().await;
    let fleets = [mesh.fleet(), mesh.fleet()];
    let mut one = mesh.shell("one", &fleets[0]);
    let mut two = mesh.shell("two", &fleets[1]);
    mesh.order().await;
    for _ in 0..4 {
        one.turn().await.unwrap();
        two.turn().await.unwrap();
    }
    assert!(fleets[0].asked() > 0 && fleets[1].asked() == 0);
    let standing = two.standing().borrow().clone();
    assert_eq!((standing.leader.as_deref(), standing.leads), (Some("one"), false));
    assert!(standing.state.is_some() && standing.waiting.is_none());
    one.resign().await;
    for _ in 0..4 {
        two.turn().await.unwrap();
    }
    assert!(fleets[1].asked() > 0);
    assert!(two.standing().borrow().leads);
}

#[tokio::test]
async fn a_lead_that_is_not_renewed_lapses_and_its_holder_follows() {
    let mesh = Mesh::new().await;
    let mut one = Candidate::new("one".to_owned());
    let mut two = Candidate::new("two".to_owned());
    let follows = |leader: &str| Role::Follows { leader: leader.to_owned() };
    assert_eq!(one.role(&mesh.engine, mesh.now()).await.unwrap(), Role::Leads);
    assert_eq!(two.role(&mesh.engine, mesh.now()).await.unwrap(), follows("one"));
    mesh.clock.pass(Duration::from_secs(7));
    assert_eq!(two.role(&mesh.engine, mesh.now()).await.unwrap(), follows("one"));
    mesh.clock.pass(Duration::from_secs(2));
    assert_eq!(two.role(&mesh.engine, mesh.now()).await.unwrap(), Role::Leads);
    assert_eq!(one.role(&mesh.engine, mesh.now()).await.unwrap(), follows("two"));
    // A lease from the future, by a clock that was set back, is none.
    mesh.clock.set_back(Duration::from_secs(3600));
    assert_eq!(one.role(&mesh.engine, mesh.now()).await.unwrap(), Role::Leads);
}

#[tokio::test]
async fn who_cannot_renew_his_lead_stops_when_it_has_run_out() {
    let mesh = Mesh::new().await;
    let store = Away { engine: mesh.engine.clone(), away: AtomicBool::new(false) };
    let mut one = Candidate::new("one".to_owned());
    assert_eq!(one.role(&store, mesh.now()).await.unwrap(), Role::Leads);
    store.away.store(true, Ordering::Relaxed);
    mesh.clock.pass(Duration::from_secs(7));
    assert_eq!(one.role(&store, mesh.now()).await.unwrap(), Role::Leads, "it still holds");
    mesh.clock.pass(Duration::from_secs(2));
    let error = one.role(&store, mesh.now()).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    store.away.store(false, Ordering::Relaxed);
    assert_eq!(one.role(&store, mesh.now()).await.unwrap(), Role::Leads);
    one.resign(&store).await.unwrap();
    assert_eq!(mesh.engine.get(LEADER_KEY).await.unwrap(), None);
}

/// A store with a trust domain, and clocks that go as the test says.
struct Mesh {
    engine: Engine,
    clock: Arc<Hands>,
    directory: Directory,
    _dir: tempfile::TempDir,
    _writer: tokio::task::JoinSet<()>,
}

impl Mesh {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path());
        directory.create().unwrap();
        let (engine, writer) = Engine::open(&directory, Drain::new()).unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { drop(writer.await) });
        let clock = Arc::new(Hands::default());
        let founding = found(&"cluster.local".parse().unwrap(), clock.now()).unwrap();
        let keys = FileKeys::open(directory.anchor_keys()).unwrap();
        for made in [&founding.active, &founding.standby] {
            keys.put_new(made.id, made.pkcs8.clone()).await.unwrap();
        }
        let state = serde_json::to_vec(&founding.state).unwrap();
        engine.compare_and_swap(TRUST_DOMAIN_KEY, None, Some(state.into())).await.unwrap();
        Self { engine, clock, directory, _dir: dir, _writer: tasks }
    }

    fn now(&self) -> Now {
        Now { wall: self.clock.now(), boot: self.clock.since_boot() }
    }

    fn fleet(&self) -> Arc<OneReplica> {
        Arc::new(OneReplica { engine: self.engine.clone(), asked: AtomicU64::new(0) })
    }

    fn shell(&self, name: &str, fleet: &Arc<OneReplica>) -> Shell {
        let store: Arc<dyn Store> = Arc::new(self.engine.clone());
        let keys = Arc::new(FileKeys::open(self.directory.anchor_keys()).unwrap());
        Shell::new(Parts {
            listed: Box::new(|_| Vec::new()),
            anchors: Anchors::new(keys, [], Arc::clone(&store)),
            fleet: fleet.clone(),
            store,
            clock: self.clock.clone(),
            clock_offset_ms: Box::new(|| None),
            held: Box::new(|| None),
            timings: Timings {
                lease: LEASE,
                skew: Duration::from_secs(60),
                renew_window: LEASE,
                renew_window_urgent: LEASE,
                issuer_life: DAY * 30,
                issuer_left_min: DAY * 10,
                schedule: Schedule { anchor_period: DAY * 365, window: None },
            },
            anchor_lifetime: DAY * 761,
            namespaces: Namespaces {
                control: "steadfast".to_owned(),
                anchors: "steadfast".to_owned(),
            },
            carries: Carries::Unless,
            ended: Box::new(Ended::default),
            mirrors_show: Box::new(|_| true),
            event_log: EventLog::default(),
            name: name.to_owned(),
            metrics: Metrics::new(&mut Registry::default()),
        })
    }

    async fn state(&self) -> TrustDomainState {
        let entry = self.engine.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
        serde_json::from_slice(&entry.value).unwrap()
    }

    /// So many pods that nobody hears of.
    async fn pods(&self, count: u32) {
        let put = |number| async move {
            let key = format!("resources/Pod/demo/web-{number}");
            let pod = format!("{{\"metadata\":{{\"uid\":\"{number}\"}}}}");
            self.engine.compare_and_swap(&key, None, Some(pod.into())).await.unwrap();
        };
        futures::future::join_all((0..count).map(put)).await;
    }

    /// Somebody writes the state as it is.
    async fn touch(&self) {
        let entry = self.engine.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
        let (revision, value) = (Some(entry.revision), Some(entry.value));
        self.engine.compare_and_swap(TRUST_DOMAIN_KEY, revision, value).await.unwrap();
    }

    /// Somebody wants the anchor rotated.
    async fn order(&self) {
        let entry = self.engine.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
        let mut state: TrustDomainState = serde_json::from_slice(&entry.value).unwrap();
        let by = "a test".to_owned();
        let request =
            Request { by, at: self.clock.now(), anchor: None, canary: None, replaces: None };
        state.request(request).unwrap();
        let value = serde_json::to_vec(&state).unwrap();
        let revision = Some(entry.revision);
        self.engine.compare_and_swap(TRUST_DOMAIN_KEY, revision, Some(value.into())).await.unwrap();
    }
}

/// A replica of identity that serves what is stored, and no workload.
struct OneReplica {
    engine: Engine,
    asked: AtomicU64,
}

impl OneReplica {
    fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

#[async_trait::async_trait]
impl Fleet for OneReplica {
    async fn ask(&self, nonce: u64) -> Vec<Replica> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let entry = self.engine.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
        let state: TrustDomainState = serde_json::from_slice(&entry.value).unwrap();
        let own = Ack {
            seq: state.seq,
            digest: KeyId::from_slice(&state.digest()),
            mounted: None,
            svid: None,
            clock_offset_ms: 0,
            held: None,
        };
        let (name, loaded) = ("identity".to_owned(), vec![state.active_issuer]);
        let own = Some(own);
        vec![Replica {
            name,
            reached: true,
            newest_nonce: nonce,
            loaded,
            own,
            ..Replica::default()
        }]
    }
}

/// A store that can be out of reach.
struct Away {
    engine: Engine,
    away: AtomicBool,
}

impl Away {
    fn reach(&self) -> Result<(), StoreError> {
        match self.away.load(Ordering::Relaxed) {
            true => Err(StoreError::Unavailable("it is away".to_owned())),
            false => Ok(()),
        }
    }
}

#[async_trait::async_trait]
impl Store for Away {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.reach()?;
        self.engine.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        self.reach()?;
        self.engine.list(prefix).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        self.reach()?;
        self.engine.compare_and_swap(key, expected, value).await
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
        self.reach()?;
        self.engine.watch(prefix, from).await
    }
}

/// Clocks that go as the test says.
struct Hands(Mutex<(UnixTime, Duration)>);

impl Default for Hands {
    fn default() -> Self {
        Self(Mutex::new((UnixTime::from_secs(1_800_000_000), Duration::from_secs(1000))))
    }
}

impl Hands {
    fn pass(&self, time: Duration) {
        let mut hands = self.0.lock().unwrap();
        *hands = (hands.0 + time, hands.1 + time);
    }

    fn set_back(&self, by: Duration) {
        let mut hands = self.0.lock().unwrap();
        hands.0 = hands.0 - by;
    }
}

impl Clock for Hands {
    fn now(&self) -> UnixTime {
        self.0.lock().unwrap().0
    }

    fn since_boot(&self) -> Duration {
        self.0.lock().unwrap().1
    }
}

fn kept(rotation: u64, text: &str) -> Kept {
    let digest = KeyId::of_spki(text.as_bytes());
    Kept { rotation, step: 0, digest, text: text.to_owned() }
}

const LEASE: Duration = Duration::from_secs(15);
const DAY: Duration = Duration::from_secs(86_400);
