//! One target's streams: opened, followed, and opened again with backoff when they end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use linkerd2_proxy_api::destination::destination_client::DestinationClient;
use linkerd2_proxy_api::destination::{DestinationProfile, GetDestination, Update};
use steadfast_process::ErrorChain;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::authority::Authority;
use super::link::{Link, Standing};
use super::profile::Profile;
use super::set::{Endpoints, Set};

type Client = DestinationClient<Channel>;

/// What makes snapshots of the messages of one kind of lookup.
pub(super) trait Follow: Send {
    /// What a stream carries.
    type Message;
    /// What workers see.
    type Snapshot: PartialEq;

    /// What is asked for.
    fn path(&self) -> String;

    /// Asks.
    fn open(
        client: &mut Client,
        request: GetDestination,
    ) -> impl Future<Output = Result<Streaming<Self::Message>, Status>> + Send;

    /// Another stream begins.
    fn reconnected(&mut self);

    /// What is known after this message.
    fn apply(&mut self, message: Self::Message, link: &Link) -> Self::Snapshot;

    /// The control plane says that asking again is of no use.
    fn refused(&self, status: &Status) -> Self::Snapshot;
}

/// Follows a target until dropped.
pub(super) async fn follow<F: Follow>(
    link: Link,
    mut client: Client,
    context_token: Arc<str>,
    mut target: F,
    sender: watch::Sender<Arc<F::Snapshot>>,
) {
    let mut standing = link.target();
    let mut returns = link.returns();
    let mut failures = 0;
    loop {
        returns.mark_unchanged();
        target.reconnected();
        let request = GetDestination {
            path: target.path(),
            context_token: context_token.to_string(),
            ..GetDestination::default()
        };
        let heard = |message| publish(&sender, target.apply(message, &link));
        let (status, spoken) = once::<F>(&mut client, request, &mut standing, heard).await;
        let path = target.path();
        if matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition) {
            tracing::debug!(path, reason = status.message(), "no such destination");
            publish(&sender, target.refused(&status));
            // Nothing more will be said. Who holds the target keeps the answer.
            standing.settled();
            return std::future::pending().await;
        }
        standing.failed(&status);
        failures = if spoken { 0 } else { failures + 1 };
        let pause = backoff(failures, random());
        tracing::debug!(path, error = %ErrorChain(&status), ?pause, "a discovery stream ended");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // Another stream got through: no need to wait any longer, but not all at once.
            Ok(()) = returns.changed() => {
                failures = 0;
                tokio::time::sleep(backoff(0, random())).await;
            }
        }
    }
}

/// One stream to its end: why it ended, and whether it had spoken.
async fn once<F: Follow>(
    client: &mut Client,
    request: GetDestination,
    standing: &mut Standing,
    mut heard: impl FnMut(F::Message),
) -> (Status, bool) {
    let first = async {
        let mut stream = F::open(client, request).await?;
        let message = stream.message().await?;
        Ok((stream, message))
    };
    let (mut stream, mut message) = match tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, first).await {
        Ok(Ok(first)) => first,
        Ok(Err(status)) => return (status, false),
        Err(_) => return (Status::deadline_exceeded("no first message in time"), false),
    };
    let mut spoken = false;
    while let Some(known) = message {
        spoken = true;
        standing.heard();
        heard(known);
        message = match stream.message().await {
            Ok(message) => message,
            Err(status) => return (status, true),
        };
    }
    (Status::unavailable("the control plane ended the stream"), spoken)
}

/// Says only what is new.
fn publish<S: PartialEq>(sender: &watch::Sender<Arc<S>>, snapshot: S) {
    sender.send_if_modified(|known| {
        let new = **known != snapshot;
        if new {
            *known = Arc::new(snapshot);
        }
        new
    });
}

/// Endpoints of a name.
pub(super) struct FollowEndpoints {
    authority: Authority,
    set: Set,
}

impl FollowEndpoints {
    pub(super) fn of(authority: Authority) -> Self {
        Self { authority, set: Set::default() }
    }
}

impl Follow for FollowEndpoints {
    type Message = Update;
    type Snapshot = Endpoints;

    fn path(&self) -> String {
        self.authority.to_string()
    }

    async fn open(
        client: &mut Client,
        request: GetDestination,
    ) -> Result<Streaming<Update>, Status> {
        Ok(client.get(request).await?.into_inner())
    }

    fn reconnected(&mut self) {
        self.set.reconnected();
    }

    fn apply(&mut self, message: Update, link: &Link) -> Endpoints {
        let unusable = self.set.apply(message);
        unusable.iter().for_each(|(_, reason)| link.unusable(reason.label()));
        // One line says what is wrong; the counter says how often.
        if let Some((addr, reason)) = unusable.first() {
            let addr = addr.map(|addr| addr.to_string()).unwrap_or_default();
            tracing::warn!(
                authority = %self.authority,
                endpoint = addr,
                others = unusable.len() - 1,
                reason = %ErrorChain(reason),
                "an endpoint cannot be used and is left out"
            );
        }
        self.set.snapshot()
    }

    fn refused(&self, status: &Status) -> Endpoints {
        Endpoints::Refused(status.message().into())
    }
}

/// The profile of an address.
pub(super) struct FollowProfile(SocketAddr);

impl FollowProfile {
    pub(super) fn of(orig_dst: SocketAddr) -> Self {
        Self(orig_dst)
    }
}

impl Follow for FollowProfile {
    type Message = DestinationProfile;
    type Snapshot = Profile;

    fn path(&self) -> String {
        self.0.to_string()
    }

    async fn open(
        client: &mut Client,
        request: GetDestination,
    ) -> Result<Streaming<DestinationProfile>, Status> {
        Ok(client.get_profile(request).await?.into_inner())
    }

    fn reconnected(&mut self) {}

    fn apply(&mut self, message: DestinationProfile, link: &Link) -> Profile {
        Profile::parse(self.0, message).unwrap_or_else(|reason| {
            link.unusable(reason.label());
            let error = ErrorChain(&reason).to_string();
            tracing::warn!(address = %self.0, %error, "an address cannot be used");
            Profile::Unusable(error.into())
        })
    }

    /// As Linkerd's proxy takes it: there is no profile.
    fn refused(&self, _: &Status) -> Profile {
        Profile::Foreign { opaque: false }
    }
}

/// How long to wait after this many failures in a row: doubles up to the cap, with jitter inside.
fn backoff(failures: u32, random: u64) -> Duration {
    let whole = BACKOFF_MIN.saturating_mul(1 << failures.min(DOUBLINGS_MAX)).min(BACKOFF_MAX);
    let half = whole / 2;
    let jitter_millis = (u128::from(random) * (half.as_millis() + 1)) >> 64;
    half + Duration::from_millis(jitter_millis as u64)
}

#[allow(clippy::disallowed_methods)] // The edge of the shell: the decision takes it as an argument.
fn random() -> u64 {
    use rand::RngCore as _;
    rand::rng().next_u64()
}

/// Linkerd's.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Beyond the cap already.
const DOUBLINGS_MAX: u32 = 12;
/// For the whole of the dial, the request and its first answer.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_doubles_up_to_its_cap_and_its_jitter_stays_inside() {
        let mut last = Duration::ZERO;
        for failures in 0..=40 {
            let (low, high) = (backoff(failures, 0), backoff(failures, u64::MAX));
            assert!(low >= last / 2 && low >= BACKOFF_MIN / 2, "{failures}: {low:?}");
            assert!(high <= BACKOFF_MAX && low < high, "{failures}: {low:?}, {high:?}");
            last = low;
        }
        assert_eq!(backoff(40, u64::MAX), BACKOFF_MAX);
        assert!(backoff(0, u64::MAX) <= BACKOFF_MIN);
    }
}
