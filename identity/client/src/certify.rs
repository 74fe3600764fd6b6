//! One request for an SVID: token, new key, RPC, and whether the answer is meant for us.

use std::net::SocketAddr;
use std::time::Duration;

use steadfast_api::trust::v1::{CertifyRequest, CertifyResponse};
use steadfast_api::{SpiffeId, UnixTime};
use steadfast_api_grpc::trust_client::TrustClient;
use tonic::Code;

use crate::dial::{DialError, Dialer};
use crate::key::{KeyError, SvidKey};
use crate::svid::{Candidate, Issued, SvidRefused};
use crate::token::{self, TokenError};

/// Everything a request needs.
pub(crate) struct Request {
    pub(crate) local: SpiffeId,
    pub(crate) token_file: std::path::PathBuf,
    /// Where the trust stream goes: for a first try there, for others elsewhere.
    pub(crate) address: Option<SocketAddr>,
    /// From 1.
    pub(crate) attempt: u32,
    pub(crate) timeout: Duration,
}

/// A reply that is meant for us.
pub(crate) struct Reply {
    pub(crate) candidate: Candidate,
    pub(crate) issued_at: UnixTime,
    pub(crate) renew_at: Option<UnixTime>,
    pub(crate) server_time: UnixTime,
    pub(crate) seq: u64,
}

/// Why a request brought no SVID.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertifyError {
    #[error("the identity service cannot be reached")]
    Dial(#[from] DialError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the reply has no {0}")]
    Reply(&'static str),
    /// Its message is the service's own refusal; a status's own form would repeat it.
    #[error("the identity service refused ({:?}): {}", .0.code(), .0.message())]
    Rpc(Box<tonic::Status>),
    #[error("what was issued cannot be used")]
    Svid(#[from] SvidRefused),
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    #[error(transparent)]
    Token(#[from] TokenError),
}

impl CertifyError {
    /// The metric label.
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Dial(DialError::Stale(_)) => "bootstrap_bundle_stale",
            Self::Dial(_) => "unreachable",
            Self::Key(_) => "key",
            Self::Reply(_) => "reply",
            Self::Rpc(_) => "refused",
            Self::Svid(_) => "svid",
            Self::TimedOut(_) => "timeout",
            Self::Token(_) => "token",
        }
    }
}

/// Asks once, under the deadline.
pub(crate) async fn certify(dialer: &Dialer, request: Request) -> Result<Reply, CertifyError> {
    let timeout = request.timeout;
    tokio::time::timeout(timeout, ask(dialer, request))
        .await
        .unwrap_or(Err(CertifyError::TimedOut(timeout)))
}

async fn ask(dialer: &Dialer, request: Request) -> Result<Reply, CertifyError> {
    let token = token::read(&request.token_file)?;
    let key = SvidKey::generate()?;
    let csr = key.request()?;
    let address = match request.address.filter(|_| request.attempt == 1) {
        Some(address) => address,
        None => {
            let replica = request.attempt.saturating_sub(1) as usize;
            dialer.replica(replica, request.address).await.map_err(DialError::from)?
        }
    };
    let channel = dialer.channel_at(address).await?;
    let mut message = tonic::Request::new(CertifyRequest { token, csr });
    // Told to the service too, so that it does not sign for who has given up.
    message.set_timeout(request.timeout);
    let reply = TrustClient::new(channel)
        .max_decoding_message_size(REPLY_BYTES_MAX)
        .certify(message)
        .await
        .map_err(|status| failed(status, request.timeout))?;
    read(reply.into_inner(), key, &request.local)
}

/// Whoever of the three that keep the same deadline notices first, it is one: we, our transport,
/// or the service.
fn failed(status: tonic::Status, timeout: Duration) -> CertifyError {
    match status.code() {
        Code::Cancelled | Code::DeadlineExceeded => CertifyError::TimedOut(timeout),
        _ => CertifyError::Rpc(Box::new(status)),
    }
}

fn read(reply: CertifyResponse, key: SvidKey, local: &SpiffeId) -> Result<Reply, CertifyError> {
    let issued_at = reply.issued_at.ok_or(CertifyError::Reply("issued_at"))?.into();
    let server_time = reply.server_time.ok_or(CertifyError::Reply("server_time"))?.into();
    let issued = Issued { chain: reply.chain, issued_at };
    // The certificate's own not_after counts: the one beside it is for who cannot parse.
    let candidate = Candidate::parse(issued, key, local)?;
    Ok(Reply {
        candidate,
        issued_at,
        renew_at: reply.renew_at.map(UnixTime::from),
        server_time,
        seq: reply.seq,
    })
}

/// A chain of two certificates is some 1.5 KiB.
const REPLY_BYTES_MAX: usize = 256 * 1024;
