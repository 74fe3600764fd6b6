//! The service: lookups in, streams of what changes out.
//!
//! A stream holds the receiver of one snapshot and what it last sent, and computes a message only
//! when its client can take one. So a slow client costs no more than a fast one, and what it
//! missed is coalesced. Streams are bounded in number, and end when the process drains.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use linkerd2_proxy_api::destination::destination_server as api;
use linkerd2_proxy_api::destination::{DestinationProfile, GetDestination, Update};
use steadfast_process::Drain;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Request, Response, Status};

use crate::board::Board;
use crate::index::{AddressSnapshot, Existence, ServiceSnapshot};
use crate::metrics::{Metrics, OpenStream};
use crate::profile;
use crate::target::Target;
use crate::wire::Told;

/// Linkerd's destination service.
pub struct Destination {
    board: Arc<Board>,
    metrics: Metrics,
    drain: Drain,
    cluster_domain: Arc<str>,
    slots: Arc<Semaphore>,
}

/// What the service is told.
#[derive(Clone, Debug)]
pub struct DestinationSettings {
    /// What names of services end in, e.g. `cluster.local`.
    pub cluster_domain: String,
    /// At most this many streams are open at once.
    pub streams_max: usize,
}

impl Default for DestinationSettings {
    fn default() -> Self {
        Self { cluster_domain: "cluster.local".to_owned(), streams_max: STREAMS_MAX }
    }
}

type Messages<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

impl Destination {
    /// The service over what is on this board.
    pub fn new(
        board: Arc<Board>,
        metrics: Metrics,
        drain: Drain,
        settings: DestinationSettings,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(settings.streams_max));
        Self { board, metrics, drain, cluster_domain: settings.cluster_domain.into(), slots }
    }

    /// As a tonic service.
    pub fn into_service(self) -> api::DestinationServer<Self> {
        api::DestinationServer::new(self).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    fn target(&self, method: &'static str, request: &GetDestination) -> Result<Target, Status> {
        Target::parse(&request.path, &request.context_token, &self.cluster_domain).map_err(
            |error| {
                self.metrics.refused(method, "invalid");
                Status::invalid_argument(error.to_string())
            },
        )
    }

    fn slot(&self, method: &'static str) -> Result<OwnedSemaphorePermit, Status> {
        self.slots.clone().try_acquire_owned().map_err(|_| {
            self.metrics.refused(method, "streams_max");
            Status::resource_exhausted("too many streams are open; try again later")
        })
    }

    /// Nothing is said of what is not there before the resources were read once: a client that was
    /// told "does not exist" would drop the endpoints that it has.
    async fn synced(&self) -> Result<(), Status> {
        let mut synced = self.board.synced();
        tokio::select! {
            _ = synced.wait_for(|synced| *synced) => Ok(()),
            () = self.drain.wait() => Err(draining()),
        }
    }

    fn stream<S, M>(
        &self,
        method: &'static str,
        slot: OwnedSemaphorePermit,
        snapshots: watch::Receiver<Arc<S>>,
        next: impl FnMut(&S) -> Vec<M> + Send + 'static,
    ) -> Response<Messages<M>>
    where
        S: Send + Sync + 'static,
        M: Send + 'static,
    {
        let following = Following {
            snapshots,
            next,
            ready: VecDeque::new(),
            drain: self.drain.clone(),
            open: self.metrics.open(method),
            _slot: slot,
        };
        let messages = futures::stream::unfold(Some(following), |following| async move {
            let mut following = following?;
            match following.message().await {
                Ok(message) => Some((Ok(message), Some(following))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Response::new(Box::pin(messages))
    }
}

/// One open stream.
struct Following<S, M, F> {
    snapshots: watch::Receiver<Arc<S>>,
    /// The messages that lead from what was sent to this snapshot.
    next: F,
    /// What is left of them: bounded by the snapshot that they came from.
    ready: VecDeque<M>,
    drain: Drain,
    open: OpenStream,
    _slot: OwnedSemaphorePermit,
}

impl<S, M, F: FnMut(&S) -> Vec<M>> Following<S, M, F> {
    async fn message(&mut self) -> Result<M, Status> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                self.open.sent();
                return Ok(message);
            }
            tokio::select! {
                biased;
                () = self.drain.wait() => return Err(draining()),
                changed = self.snapshots.changed() => changed.map_err(|_| draining())?,
            }
            let snapshot = self.snapshots.borrow_and_update().clone();
            self.ready = (self.next)(&snapshot).into();
        }
    }
}

#[tonic::async_trait]
impl api::Destination for Destination {
    type GetStream = Messages<Update>;

    async fn get(
        &self,
        request: Request<GetDestination>,
    ) -> Result<Response<Self::GetStream>, Status> {
        let (method, request) = ("Get", request.into_inner());
        let Target::Service { name, hostname, port } = self.target(method, &request)? else {
            self.metrics.refused(method, "address");
            let path = &request.path;
            let message = format!("{path:?} is an address; endpoints are looked up by name");
            return Err(Status::invalid_argument(message));
        };
        let slot = self.slot(method)?;
        self.synced().await?;
        let mut snapshots = self.board.service(&name);
        refuse_external(&snapshots.borrow())?;
        snapshots.mark_changed();
        let mut told = Told::nothing(port, hostname);
        Ok(self.stream(method, slot, snapshots, move |snapshot: &ServiceSnapshot| {
            told.update(snapshot)
        }))
    }

    type GetProfileStream = Messages<DestinationProfile>;

    async fn get_profile(
        &self,
        request: Request<GetDestination>,
    ) -> Result<Response<Self::GetProfileStream>, Status> {
        let (method, request) = ("GetProfile", request.into_inner());
        let target = self.target(method, &request)?;
        let slot = self.slot(method)?;
        self.synced().await?;
        let domain = self.cluster_domain.clone();
        let mut told = None;
        match target {
            Target::Address(addr) => {
                let opaque = self.board.opaque_by_default(addr.port());
                let mut snapshots = self.board.address(addr.ip());
                snapshots.mark_changed();
                Ok(self.stream(method, slot, snapshots, move |snapshot: &AddressSnapshot| {
                    news(&mut told, profile::of_address(addr, snapshot, &domain, opaque))
                }))
            }
            Target::Service { name, hostname, port } => {
                let opaque = self.board.opaque_by_default(port);
                let mut snapshots = self.board.service(&name);
                refuse_external(&snapshots.borrow())?;
                snapshots.mark_changed();
                Ok(self.stream(method, slot, snapshots, move |snapshot: &ServiceSnapshot| {
                    let profile = match &hostname {
                        Some(hostname) => profile::of_host(snapshot, hostname, port, opaque),
                        None => profile::of_service(snapshot, port, &domain, opaque),
                    };
                    news(&mut told, profile)
                }))
            }
        }
    }
}

/// The profile, unless it is what was told last.
fn news(told: &mut Option<DestinationProfile>, new: DestinationProfile) -> Vec<DestinationProfile> {
    if told.as_ref() == Some(&new) {
        return Vec::new();
    }
    *told = Some(new.clone());
    vec![new]
}

/// As Linkerd: a CNAME is for DNS to resolve, and a client that knows so does not ask again.
fn refuse_external(snapshot: &ServiceSnapshot) -> Result<(), Status> {
    if snapshot.existence == Existence::ExternalName {
        let name = &snapshot.name;
        let message = format!("the Service {name} is of type ExternalName: it has no endpoints");
        return Err(Status::invalid_argument(message));
    }
    Ok(())
}

fn draining() -> Status {
    Status::unavailable("control is shutting down; ask again")
}

/// A stream takes some 2 KiB.
const STREAMS_MAX: usize = 65_536;
/// A path and a context token.
const REQUEST_BYTES_MAX: usize = 16 * 1024;

#[cfg(test)]
mod tests;
