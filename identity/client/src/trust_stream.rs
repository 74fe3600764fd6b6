//! The trust stream: opened, kept open, and opened again.
//!
//! This is only the carrier: it says hello, hands over every message and sends what it is given.
//! What a message means is decided by the shell, in the order in which messages come.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_api::trust::v1::stream_request::Message;
use steadfast_api::trust::v1::{Hello, Instance, StreamRequest, StreamResponse};
use steadfast_api_grpc::trust_client::TrustClient;
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::Jitter;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::dial::{DialError, Dialer};
use crate::random_jitter;
use crate::token::{self, TokenError};

/// What happens to the stream.
pub(crate) enum StreamEvent {
    /// The service is reached; requests may use this connection.
    Connected(Channel),
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
    /// Its message is the service's own refusal; a status's own form would repeat it.
    #[error("the identity service refused it ({:?}): {}", .0.code(), .0.message())]
    Rpc(Box<tonic::Status>),
    #[error("no {0} within {within} s", within = OPEN_TIMEOUT.as_secs())]
    Silent(&'static str),
    #[error("this process stops")]
    Stopped,
    #[error(transparent)]
    Token(#[from] TokenError),
}

impl TrustStream {
    /// Runs until the shell is gone.
    pub(crate) async fn run(self) {
        let mut failures: u32 = 0;
        loop {
            let mut opened = false;
            let error = match self.follow(failures as usize, &mut opened).await {
                Err(StreamError::Stopped) => return,
                Err(error) => error,
                Ok(()) => StreamError::Ended,
            };
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

    async fn follow(&self, replica: usize, opened: &mut bool) -> Result<(), StreamError> {
        let token = token::read(&self.token_file)?;
        let channel = self.dialer.dial(replica).await?;
        self.tell(StreamEvent::Connected(channel.clone())).await?;
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
        let (requests, outgoing) = mpsc::channel(REQUESTS_MAX);
        let hello = StreamRequest { message: Some(Message::Hello(hello)) };
        requests.try_send(hello).map_err(|_| StreamError::Stopped)?;
        let mut client = TrustClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let opening = client.stream(ReceiverStream::new(outgoing));
        let mut incoming = tokio::time::timeout(OPEN_TIMEOUT, opening)
            .await
            .map_err(|_| StreamError::Silent("answer"))?
            .map_err(refused)?
            .into_inner();
        // The service begins with the bundle: without it the stream is of no use.
        let first = tokio::time::timeout(OPEN_TIMEOUT, incoming.message())
            .await
            .map_err(|_| StreamError::Silent("first message"))?
            .map_err(refused)?;
        *opened = true;
        self.tell(StreamEvent::Up { instance, requests }).await?;
        let mut next = first;
        while let Some(message) = next {
            self.tell(StreamEvent::Message(Box::new(message))).await?;
            next = incoming.message().await.map_err(refused)?;
        }
        Ok(())
    }

    async fn tell(&self, event: StreamEvent) -> Result<(), StreamError> {
        self.events.send(event).await.map_err(|_| StreamError::Stopped)
    }
}

fn refused(status: tonic::Status) -> StreamError {
    StreamError::Rpc(Box::new(status))
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
/// Hello and a few acks; a service that takes none is too slow to count on.
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
