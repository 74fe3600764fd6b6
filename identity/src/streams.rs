//! The trust streams: one per proxy, bundles and queries one way, acks the other.
//!
//! A stream speaks for one instance of one workload: the pod is the token's, never what a message
//! says, and an ack that names another closes the stream (a forged ack would break every census).
//! What a member acked last is kept in memory, by instance, also for a while after its stream has
//! ended; nothing is written to the store. Between messages a stream holds no buffer. A bundle is
//! encoded once for all of them.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use steadfast_api::trust::v1;
use steadfast_api::trust::v1::stream_request::Message as FromProxy;
use steadfast_api::trust::v1::stream_response::Message as ToProxy;
use steadfast_api::{Code, SpiffeId, UnixTime};
use steadfast_api_grpc::stream::{HEARTBEAT, SILENT_BEATS_MAX, Wire, WireError, framed};
use steadfast_process::{Drain, ErrorChain};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, Interval};
use tonic::Status;

use crate::certify::Certifier;
use crate::member::{Ack, Instance, Member};
use crate::members::{Bounds, Joined, Members};
use crate::metrics::RefusalLabels;
use crate::orders::{Orders, Owed, Sent};
use crate::refusal::Refusal;
use crate::replica::View;

/// All trust streams of this replica.
pub struct Streams {
    certifier: Arc<Certifier>,
    members: Mutex<Members>,
    orders: watch::Sender<Orders>,
    /// By pod UID.
    hellos: DefaultKeyedRateLimiter<String>,
    drain: Drain,
}

impl Streams {
    /// No stream yet.
    pub fn new(certifier: Arc<Certifier>, drain: Drain) -> Arc<Self> {
        let members =
            Mutex::new(Members::new(Bounds { members: MEMBERS_MAX, streams: STREAMS_MAX }));
        let hellos = RateLimiter::keyed(Quota::per_minute(HELLOS_PER_MINUTE));
        let orders = watch::Sender::default();
        Arc::new(Self { certifier, members, orders, hellos, drain })
    }

    /// Asks every member for an ack that carries this nonce.
    ///
    /// # Errors
    /// The nonce of a query that is as new or newer: answers to this one could not be told from
    /// its own.
    pub fn query(&self, nonce: u64) -> Result<(), u64> {
        let mut taken = Ok(());
        self.orders.send_modify(|orders| taken = orders.query(nonce));
        taken
    }

    /// The newest query; 0: none yet.
    pub fn newest_query(&self) -> u64 {
        self.orders.borrow().newest_query()
    }

    /// Pulls every renewal forward into a window that begins at `from`. Returns the order's id,
    /// which is a time: an order of another replica, or from before a restart, has another one.
    pub fn renew(&self, from: UnixTime, window: Duration) -> u64 {
        let (now, life) = (self.certifier.clock.now(), self.certifier.profile.svid_lifetime);
        let mut id = 0;
        self.orders.send_modify(|orders| id = orders.renew(now, from, window, life));
        id
    }

    /// Reads the table of members. Nothing else happens to it meanwhile, so it must not take long.
    pub fn look<T>(&self, look: impl FnOnce(&Members) -> T) -> T {
        look(&self.lock())
    }

    /// Every member that is known, by pod UID.
    pub fn members(&self) -> Vec<Member> {
        self.lock().all()
    }

    /// When the last of the members was seen that had to go because there are too many: see
    /// [`crate::members`].
    pub fn forgotten(&self) -> Option<UnixTime> {
        self.lock().forgotten()
    }

    /// Forgets members whose stream ended so long ago that their SVID has, too.
    pub fn tidy(&self, now: UnixTime) {
        let kept = self.certifier.profile.svid_lifetime + crate::authority::SKEW;
        self.lock().tidy(now - kept);
        self.hellos.retain_recent();
        self.hellos.shrink_to_fit();
    }

    /// Serves a stream to its end: the first message says whose it is. Whoever is still there is
    /// told why it ends.
    pub async fn serve<IO>(self: Arc<Self>, io: IO, peer: SocketAddr)
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin,
    {
        let mut wire = Wire::new(io, HELLO_BYTES_MAX);
        // A future for days should have no room for what it awaits once.
        let end = match Box::pin(Arc::clone(&self).open(&mut wire, peer)).await {
            Ok(session) => {
                wire.take_up_to(MESSAGE_BYTES_MAX);
                session.run(&mut wire).await
            }
            Err(end) => end,
        };
        if let Some(status) = end {
            let (code, message) = (status.code() as i32, status.message().to_owned());
            let end = self.response(Some(ToProxy::End(v1::End { code, message })));
            wire.end(&framed(&end, &[])).await;
        }
    }

    /// Reads the hello.
    ///
    /// # Errors
    /// How it ends instead: with a word, or with nobody there to hear one.
    async fn open<IO: AsyncRead + Send + Unpin>(
        self: Arc<Self>,
        wire: &mut Wire<IO>,
        peer: SocketAddr,
    ) -> Result<Session, Option<Status>> {
        let first = tokio::select! {
            first = tokio::time::timeout(HELLO_TIMEOUT, wire.next::<v1::StreamRequest>()) => first,
            () = self.drain.wait() => return Err(Some(stopping())),
        };
        let first = match first {
            Ok(Ok(Some(first))) => Ok(first),
            // It has gone again: an end, not an event.
            Ok(Ok(None) | Err(WireError::Io(_))) => return Err(None),
            Ok(Err(error)) => Err(protocol(&format!("no hello came: {}", ErrorChain(&error)))),
            Err(_) => Err(protocol("no hello came in time")),
        };
        let mut known = None;
        let hello = match first {
            Ok(first) => self.hello(first, &mut known).await,
            Err(refusal) => Err(refusal),
        };
        let (instance, namespace, joined) = hello.map_err(|refusal| {
            self.refused(&refusal, known.as_ref(), peer);
            Some(refusal.status())
        })?;
        Ok(Session {
            views: self.certifier.replica.subscribe(),
            orders: self.orders.subscribe(),
            heartbeat: heartbeat(),
            silent: 0,
            sent: Sent::default(),
            streams: self,
            instance,
            namespace,
            id: joined.id,
            replaced: joined.replaced,
            peer,
        })
    }

    /// Makes the sender of a hello a member.
    async fn hello(
        &self,
        first: v1::StreamRequest,
        known: &mut Option<SpiffeId>,
    ) -> Result<(Instance, String, Joined), Refusal> {
        let Some(FromProxy::Hello(hello)) = first.message else {
            return Err(protocol("the first message is no hello"));
        };
        let pod = self.certifier.reviews.review(&hello.token).await?;
        let view = self.certifier.replica.current()?;
        let spiffe_id = self.certifier.subject(&view, &pod)?.spiffe_id().clone();
        *known = Some(spiffe_id.clone());
        if self.hellos.check_key(&pod.pod_uid).is_err() {
            let what = format!("the pod says hello more than {HELLOS_PER_MINUTE} times a minute");
            return Err(Refusal::new(Code::RATE_LIMITED, what));
        }
        let said = hello.instance.ok_or_else(|| protocol("the hello names no instance"))?;
        if said.pod_uid != pod.pod_uid {
            return Err(foreign(&said.pod_uid, &pod.pod_uid));
        }
        let started_at = said.started_at.map(UnixTime::from).unwrap_or_default();
        let instance = Instance { pod_uid: pod.pod_uid.clone(), started_at };
        let now = self.certifier.clock.now();
        let version: String = hello.version.chars().take(VERSION_CHARS_MAX).collect();
        let member = Member::new(instance.clone(), spiffe_id, &pod, version, now);
        let joined = self.lock().join(member)?;
        self.count_open();
        Ok((instance, pod.namespace.clone(), joined))
    }

    fn acked(&self, instance: &Instance, id: u64, ack: v1::Ack) -> Result<(), Refusal> {
        let now = self.certifier.clock.now();
        let said = ack.instance.as_ref();
        let said = said.ok_or_else(|| protocol("an ack names no instance"))?;
        let started_at = said.started_at.map(UnixTime::from).unwrap_or_default();
        if said.pod_uid != instance.pod_uid || started_at != instance.started_at {
            return Err(foreign(&said.pod_uid, &instance.pod_uid));
        }
        let view = self.certifier.replica.newest();
        let ack = Ack::new(&ack, now, view.as_deref().map(|view| &view.state));
        let not_after = ack.svid_not_after;
        if self.lock().acked(instance, id, ack)
            && let Some(not_after) = not_after
        {
            // Its own word, so within what it can have been issued.
            let latest = now + self.certifier.profile.svid_lifetime;
            self.certifier.limits.holds(&instance.pod_uid, not_after.min(latest));
        }
        Ok(())
    }

    /// The one line about a stream that was refused or closed.
    fn refused(&self, refusal: &Refusal, workload: Option<&SpiffeId>, peer: SocketAddr) {
        let labels = RefusalLabels { reason: refusal.code.label() };
        self.certifier.metrics.stream_refusals.get_or_create(&labels).inc();
        tracing::warn!(
            code = %refusal.code,
            reason = refusal.code.label(),
            %peer,
            workload = workload.map(tracing::field::display),
            error = %refusal.what,
            "trust stream closed"
        );
    }

    fn closed(&self, instance: &Instance, id: u64) {
        let now = self.certifier.clock.now();
        self.lock().leave(instance, id, now);
        self.count_open();
    }

    fn count_open(&self) {
        let open = self.lock().open();
        self.certifier.metrics.streams.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    fn response(&self, message: Option<ToProxy>) -> v1::StreamResponse {
        v1::StreamResponse { server_time: Some(self.certifier.clock.now().into()), message }
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One open stream.
struct Session {
    streams: Arc<Streams>,
    views: watch::Receiver<Option<Arc<View>>>,
    orders: watch::Receiver<Orders>,
    heartbeat: Interval,
    /// Heartbeats since anything came. No time: when the whole process was frozen, what came
    /// meanwhile is still unread.
    silent: u32,
    instance: Instance,
    namespace: String,
    id: u64,
    /// Ends when a newer stream has taken this one's place.
    replaced: oneshot::Receiver<()>,
    sent: Sent,
    peer: SocketAddr,
}

impl Session {
    /// Says what is owed and hears what comes, until it ends: with a word for the proxy, or because
    /// that has gone.
    async fn run<IO>(mut self, wire: &mut Wire<IO>) -> Option<Status>
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin,
    {
        loop {
            while let Some(message) = self.owed() {
                wire.send(&message).await.ok()?;
            }
            tokio::select! {
                received = wire.next() => {
                    self.silent = 0;
                    let taken = match received {
                        Ok(Some(request)) => self.receive(request),
                        Ok(None) | Err(WireError::Io(_)) => return None,
                        Err(error) => Err(protocol(&ErrorChain(&error).to_string())),
                    };
                    if let Err(refusal) = taken {
                        return Some(self.end(&refusal));
                    }
                }
                Ok(()) = self.views.changed() => {}
                Ok(()) = self.orders.changed() => {}
                _ = self.heartbeat.tick() => {
                    self.silent += 1;
                    if self.silent > SILENT_BEATS_MAX {
                        return Some(Status::deadline_exceeded("the proxy has gone silent"));
                    }
                    let alive = self.streams.response(None);
                    wire.send(&framed(&alive, &[])).await.ok()?;
                }
                _ = &mut self.replaced => {
                    return Some(Status::aborted("the workload has opened a newer stream"));
                }
                () = self.streams.drain.wait() => return Some(stopping()),
            }
        }
    }

    fn owed(&mut self) -> Option<Vec<u8>> {
        let Certifier { replica, clock, .. } = &*self.streams.certifier;
        let (current, orders) = (replica.current().ok(), self.orders.borrow());
        let who = (self.namespace.as_str(), self.instance.pod_uid.as_str());
        let owed = self.sent.owed(who, current.as_deref(), &orders, clock.now())?;
        let (message, encoded) = match &owed {
            Owed::Bundle(view) => (None, &*view.encoded),
            Owed::Query(nonce) => (Some(ToProxy::Query(v1::Query { nonce: *nonce })), &[][..]),
            Owed::Renew(order) => {
                let window = prost_types::Duration::try_from(order.window).ok();
                let (id, from) = (order.id, Some(order.from.into()));
                (Some(ToProxy::Renew(v1::Renew { id, from, window })), &[][..])
            }
        };
        Some(framed(&self.streams.response(message), encoded))
    }

    fn receive(&self, request: v1::StreamRequest) -> Result<(), Refusal> {
        match request.message {
            Some(FromProxy::Ack(ack)) => self.streams.acked(&self.instance, self.id, ack),
            Some(FromProxy::Hello(_)) => Err(protocol("a second hello came")),
            None => Ok(()),
        }
    }

    fn end(&self, refusal: &Refusal) -> Status {
        let workload = {
            let mut members = self.streams.lock();
            members.of(&self.instance).map(|member| member.spiffe_id.clone())
        };
        self.streams.refused(refusal, workload.as_ref(), self.peer);
        refusal.status()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.streams.closed(&self.instance, self.id);
    }
}

fn heartbeat() -> Interval {
    let mut heartbeat = tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    heartbeat
}

fn protocol(what: &str) -> Refusal {
    Refusal::new(Code::STREAM_PROTOCOL, what)
}

fn stopping() -> Status {
    Status::unavailable("this replica is stopping")
}

fn foreign(said: &str, own: &str) -> Refusal {
    let said: String = said.chars().take(UID_CHARS_SHOWN).collect();
    let what = format!("a message speaks for the pod {said:?}, the token is of {own:?}");
    Refusal::new(Code::ACK_FOREIGN, what)
}

/// Also of a request over gRPC: one of 8 KiB must still arrive, to be refused by its own code.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Of whom nobody knows yet who it is. A token has a few KiB.
const HELLO_BYTES_MAX: usize = 16 * 1024;
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Per replica: 17 KiB each make some 340 MiB.
pub const STREAMS_MAX: usize = 20_000;
/// With those whose stream has ended.
const MEMBERS_MAX: usize = 100_000;
/// A proxy that is refused at once comes again every few seconds; one that is well, hardly ever.
const HELLOS_PER_MINUTE: NonZeroU32 = NonZeroU32::new(60).unwrap();
const VERSION_CHARS_MAX: usize = 64;
const UID_CHARS_SHOWN: usize = 64;
