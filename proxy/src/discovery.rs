//! What the control plane says of destinations, kept for the workers.
//!
//! One destination stream per target, on the control thread; workers hold a `watch::Receiver` of
//! its snapshots. A target that nobody holds is forgotten after a while. While the control plane
//! is away the last known snapshots stay in force and are counted as stale; a stream that comes
//! back replaces them with its first message. Endpoints that the control plane describes in a way
//! that cannot be understood are left out and counted: never dialled in plaintext instead.

mod authority;
mod cache;
mod endpoint;
mod link;
mod profile;
mod set;
mod stream;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use linkerd2_proxy_api::destination::destination_client::DestinationClient;
use prometheus_client::registry::Registry;
use steadfast_process::Drain;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tonic::transport::Channel;

pub use authority::{Authority, AuthorityError};
pub use endpoint::{Endpoint, Labels, ProtocolHint, Unusable};
pub use profile::Profile;
pub use set::Endpoints;
pub use steadfast_identity_client::Expected;

use cache::{Cache, Start};
use link::Link;
use stream::{Follow, FollowEndpoints, FollowProfile, follow};

/// What discovery needs to be told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sent with each lookup (`LINKERD2_PROXY_DESTINATION_CONTEXT`): says which namespace a bare
    /// name is in.
    pub context_token: String,
    /// A target that nobody holds is forgotten after this time.
    pub idle_timeout: Duration,
    /// At most this many names, and as many addresses, are watched at once.
    pub targets_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { context_token: String::new(), idle_timeout: IDLE_TIMEOUT, targets_max: TARGETS_MAX }
    }
}

/// Asks for destinations. Cheap to clone; all clones share one cache; any thread may ask.
#[derive(Clone)]
pub struct Discovery(Arc<Shared>);

/// Why a target is not watched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoveryError {
    /// Every place in the cache is taken by a target that is in use.
    #[error("{0} destinations are in use, which is the most this proxy watches at once")]
    Full(usize),
}

/// Drives the streams; belongs to the control thread.
pub struct Driver {
    shared: Arc<Shared>,
    context_token: Arc<str>,
    idle_timeout: Duration,
    client: DestinationClient<Channel>,
}

struct Shared {
    caches: Mutex<Caches>,
    /// There are starts to take.
    wanted: Notify,
    link: Link,
}

struct Caches {
    names: Cache<Authority, Endpoints>,
    addresses: Cache<SocketAddr, Profile>,
}

/// How a connection to the control plane is kept: one that has died without a word is noticed,
/// also when nothing is asked.
pub fn transport() -> tonic::transport::Endpoint {
    // The connector knows the address; the URI only gives requests their authority.
    tonic::transport::Endpoint::from_static("http://destination")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// Discovery over this channel, and what must run for it to work.
pub fn new(config: Config, channel: Channel, registry: &mut Registry) -> (Discovery, Driver) {
    let caches =
        Caches { names: Cache::new(config.targets_max), addresses: Cache::new(config.targets_max) };
    let link = Link::new(registry);
    let shared = Arc::new(Shared { caches: Mutex::new(caches), wanted: Notify::new(), link });
    let client = DestinationClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let driver = Driver {
        shared: shared.clone(),
        context_token: config.context_token.into(),
        idle_timeout: config.idle_timeout,
        client,
    };
    (Discovery(shared), driver)
}

impl Discovery {
    /// The endpoints of a name; [`Endpoints::Pending`] until the control plane has answered. The
    /// target is watched for as long as somebody holds the receiver.
    ///
    /// # Errors
    /// [`DiscoveryError::Full`].
    pub fn endpoints(
        &self,
        authority: &Authority,
    ) -> Result<watch::Receiver<Arc<Endpoints>>, DiscoveryError> {
        let found = self.0.lock().names.subscribe(authority);
        self.0.wanted.notify_one();
        found.ok_or_else(|| self.full())
    }

    /// What stands behind an original destination; [`Profile::Pending`] until the control plane
    /// has answered.
    ///
    /// # Errors
    /// [`DiscoveryError::Full`].
    pub fn profile(
        &self,
        orig_dst: SocketAddr,
    ) -> Result<watch::Receiver<Arc<Profile>>, DiscoveryError> {
        let found = self.0.lock().addresses.subscribe(&orig_dst);
        self.0.wanted.notify_one();
        found.ok_or_else(|| self.full())
    }

    fn full(&self) -> DiscoveryError {
        self.0.link.full();
        DiscoveryError::Full(self.0.lock().names.capacity())
    }
}

impl Driver {
    /// Runs until the drain has started and everybody who holds it is done: what still finishes
    /// may yet need to know where to go.
    ///
    /// # Errors
    /// None: a stream that fails is tried again.
    pub async fn run(self, drain: Drain) -> Result<(), Infallible> {
        let mut streams = JoinSet::new();
        let finished = async {
            drain.wait().await;
            drain.finished(Duration::MAX).await;
        };
        tokio::pin!(finished);
        loop {
            self.start(&mut streams);
            tokio::select! {
                () = self.shared.wanted.notified() => {}
                Some(ended) = streams.join_next() => {
                    if let Err(error) = ended {
                        // Its target stays as it was last known until nobody holds it any more.
                        tracing::error!(%error, "a discovery stream panicked");
                    }
                }
                () = &mut finished => return Ok(()),
            }
        }
    }

    /// Opens a stream for each target that was asked for since.
    fn start(&self, streams: &mut JoinSet<()>) {
        let (names, addresses) = {
            let mut caches = self.shared.lock();
            (caches.names.take_starts(), caches.addresses.take_starts())
        };
        for start in names {
            let (key, sender) = (start.key.clone(), start.sender.clone());
            let shared = self.shared.clone();
            let remove = move || shared.lock().names.remove_idle(&key, &sender);
            streams.spawn(self.stream(FollowEndpoints::of(start.key.clone()), start, remove));
        }
        for start in addresses {
            let (key, sender) = (start.key, start.sender.clone());
            let shared = self.shared.clone();
            let remove = move || shared.lock().addresses.remove_idle(&key, &sender);
            streams.spawn(self.stream(FollowProfile::of(start.key), start, remove));
        }
    }

    /// Follows a target until nobody wants it any more.
    fn stream<K, F: Follow, R: Fn() -> bool>(
        &self,
        target: F,
        start: Start<K, F::Snapshot>,
        remove: R,
    ) -> impl Future<Output = ()> + use<K, F, R> {
        let Start { sender, evicted, .. } = start;
        let idle = idle(sender.clone(), self.idle_timeout, remove);
        let (link, client) = (self.shared.link.clone(), self.client.clone());
        let following = follow(link, client, self.context_token.clone(), target, sender);
        async move {
            tokio::select! {
                () = following => {}
                () = idle => {}
                () = evicted.cancelled() => {}
            }
        }
    }
}

/// Ends when nobody has held a target for a while and `remove` has agreed that it is so still.
async fn idle<V>(sender: watch::Sender<Arc<V>>, idle_timeout: Duration, remove: impl Fn() -> bool) {
    loop {
        sender.closed().await;
        tokio::time::sleep(idle_timeout).await;
        if remove() {
            return;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Caches> {
        // A panic leaves nothing half done in a map.
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const TARGETS_MAX: usize = 4096;
/// A thousand endpoints are some 400 KB; other control planes may send more in one message.
const MESSAGE_BYTES_MAX: usize = 32 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_target_that_is_first_asked_for_in_a_drain_is_followed_all_the_same() {
        let control = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let uri = format!("http://{}", control.local_addr().unwrap());
        let channel = tonic::transport::Endpoint::from_shared(uri).unwrap().connect_lazy();
        let (discovery, driver) = new(Config::default(), channel, &mut Registry::default());
        let drain = Drain::new();
        let connection = drain.hold();
        drain.start();
        let asking = async {
            let target = Authority::new("web.demo.svc.cluster.local", 80).unwrap();
            let _updates = discovery.endpoints(&target).unwrap();
            control.accept().await.unwrap();
            drop(connection);
        };
        let ended = tokio::time::timeout(Duration::from_secs(60), async {
            tokio::join!(driver.run(drain), asking)
        });
        assert!(ended.await.is_ok());
    }
}
