//! The trust stream: opened, kept open, and opened again.
//!
//! This is only the carrier: it says hello, hands over every message and sends what it is given.
//! What a message means is decided by the shell, in the order in which messages come.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_api::trust::v1::stream_request::Message;
use steadfast_api::trust::v1::stream_response::Message as Said;
use steadfast_api::trust::v1::{End, Hello, Instance, StreamRequest, StreamResponse};
use steadfast_api_grpc::stream::{SERVICE_SILENT_MAX, SIGN_OF_LIFE, Wire, WireError, framed};
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::Jitter;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::Code;

use crate::dial::{DialError, Dialer};
use crate::random_jitter;
use crate::token::{self, TokenError};
use crate::vouched::Vouched;

/// What happens to the stream.
pub(crate) enum StreamEvent {
    /// The service is reached, here.
    Connected(SocketAddr),
    /// The stream broke, or could not be opened.
    Down { reason: String, stale: bool },
    /// The service has sent something.
    Message(Box<StreamResponse>),
    /// The service has taken our hello; acks go this way.
    Up { instance: Instance, requests: mpsc::Sender<StreamRequest> },
}

/// Keeps one stream open.
pub(crate) struct TrustStream {
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) token_file: PathBuf,
    pub(crate) version: String,
    pub(crate) started_at: UnixTime,
    pub(crate) events: mpsc::Sender<StreamEvent>,
}

#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("the identity service cannot be reached")]
    Dial(#[from] DialError),
    #[error("the identity service ended it")]
    Ended,
    /// In the service's own words.
    #[error("the identity service refused it ({code:?}): {message}")]
    Refused { code: Code, message: String },
    #[error("the identity service has said nothing for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("this process stops")]
    Stopped,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl TrustStream {
    /// Runs until the shell is gone.
    pub(crate) async fn run(self) {
        let mut failures: u32 = 0;
        loop {
            let mut opened = false;
            let Err(error) = self.follow(failures as usize, &mut opened).await;
            if matches!(error, StreamError::Stopped) {
                return;
            }
            // The next try goes to the next replica, at once only if this one had worked.
            failures = if opened { 1 } else { failures.saturating_add(1) };
            let stale = matches!(error, StreamError::Dial(DialError::Stale(_)));
            let reason = ErrorChain(&error).to_string();
            if self.events.send(StreamEvent::Down { reason, stale }).await.is_err() {
                return;
            }
            tokio::time::sleep(backoff(failures, random_jitter())).await;
        }
    }

    async fn follow(&self, replica: usize, opened: &mut bool) -> Result<Infallible, StreamError> {
        let token = token::read(&self.token_file)?;
        let address = self.dialer.replica(replica, None).await.map_err(DialError::from)?;
        let io = self.dialer.stream_at(address).await?;
        self.tell(StreamEvent::Connected(address)).await?;
        let instance = Instance {
            pod_uid: token::pod_uid(&token).unwrap_or_default(),
            started_at: Some(self.started_at.into()),
        };
        let held = self.dialer.contexts.current().bundle.clone();
        let hello = Hello {
            token,
            instance: Some(instance.clone()),
            seq: held.as_ref().map_or(0, |held| held.sequence()),
            digest: held.map_or_else(Vec::new, |held| held.digest().to_vec()),
            version: self.version.clone(),
        };
        let hello = StreamRequest { message: Some(Message::Hello(hello)) };
        let mut wire = Wire::new(io, MESSAGE_BYTES_MAX);
        wire.send(&framed(&hello, &[])).await?;
        // The service begins with the bundle: without it the stream is of no use.
        let opening = tokio::time::timeout(OPEN_TIMEOUT, wire.next());
        let first = opening.await.map_err(|_| StreamError::Silent(OPEN_TIMEOUT))?;
        let first = said(first?)?;
        *opened = true;
        let (requests, outgoing) = mpsc::channel(REQUESTS_MAX);
        self.tell(StreamEvent::Up { instance, requests }).await?;
        self.tell(StreamEvent::Message(Box::new(first))).await?;
        self.carry(wire, outgoing).await
    }

    /// Hands over what comes and sends what it is given, until one of the two ends.
    async fn carry(
        &self,
        mut wire: Wire<Vouched<TcpStream>>,
        mut outgoing: mpsc::Receiver<StreamRequest>,
    ) -> Result<Infallible, StreamError> {
        let mut alive = tokio::time::interval_at(Instant::now() + SIGN_OF_LIFE, SIGN_OF_LIFE);
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent_by = Instant::now() + SERVICE_SILENT_MAX;
        loop {
            tokio::select! {
                // What has come is heard before it is late.
                biased;
                next = wire.next() => {
                    self.tell(StreamEvent::Message(Box::new(said(next?)?))).await?;
                    silent_by = Instant::now() + SERVICE_SILENT_MAX;
                }
                request = outgoing.recv() => {
                    wire.send(&framed(&request.ok_or(StreamError::Stopped)?, &[])).await?;
                    alive.reset();
                }
                _ = alive.tick() => wire.send(&framed(&StreamRequest::default(), &[])).await?,
                () = tokio::time::sleep_until(silent_by) => {
                    return Err(StreamError::Silent(SERVICE_SILENT_MAX));
                }
            }
        }
    }

    async fn tell(&self, event: StreamEvent) -> Result<(), StreamError> {
        self.events.send(event).await.map_err(|_| StreamError::Stopped)
    }
}

/// What the service says, if that is not that it is the end.
fn said(next: Option<StreamResponse>) -> Result<StreamResponse, StreamError> {
    match next {
        Some(StreamResponse { message: Some(Said::End(End { code, message })), .. }) => {
            Err(StreamError::Refused { code: Code::from(code), message })
        }
        Some(said) => Ok(said),
        None => Err(StreamError::Ended),
    }
}

/// Doubles up to a cap; the jitter lies inside it.
fn backoff(failures: u32, jitter: Jitter) -> Duration {
    let doubled = RETRY_FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10));
    let delay = doubled.min(RETRY_CAP);
    delay / 2 + jitter.of(delay / 2)
}

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(5);
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// A few acks; a service that takes none is too slow to count on.
const REQUESTS_MAX: usize = 8;
/// A bundle of a hundred anchors is some 100 KiB.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_up_to_its_cap_and_jitter_stays_inside() {
        let (least, most) = (|n| backoff(n, Jitter::NONE), |n| backoff(n, Jitter::MAX));
        assert_eq!(least(1), RETRY_FIRST / 2);
        assert!(most(1) < RETRY_FIRST);
        assert_eq!(least(u32::MAX), RETRY_CAP / 2);
        assert!(most(u32::MAX) < RETRY_CAP);
    }
}
