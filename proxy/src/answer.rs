//! What stories tell an HTTP client when they could not get it an answer, and how the answers of
//! servers are counted.

use std::rc::Rc;

use http::header::HeaderName;
use http::{HeaderMap, Response, StatusCode};
use steadfast_api::Code;
use steadfast_process::ErrorChain;

use crate::connect::Failed;
use crate::http::error::GrpcStatus;
use crate::http::{Body, End, Frame, Observer, ProxyError, SendErrorKind};
use crate::metrics::{HttpMeter, Outcome};
use crate::refusal::Refusal;

/// What a client is told of a refusal.
pub fn of_refusal(refusal: &Refusal) -> ProxyError {
    use GrpcStatus as Grpc;
    let (status, grpc) = match refusal {
        Refusal::Denied { .. } | Refusal::Undeclared(_) => {
            (StatusCode::FORBIDDEN, Grpc::PermissionDenied)
        }
        Refusal::Loop(_) => (StatusCode::LOOP_DETECTED, Grpc::Unavailable),
        Refusal::Overloaded(_) => (StatusCode::SERVICE_UNAVAILABLE, Grpc::ResourceExhausted),
        Refusal::Unknown { code, .. } if *code == Code::NO_ENDPOINTS => {
            (StatusCode::SERVICE_UNAVAILABLE, Grpc::Unavailable)
        }
        Refusal::Unreachable { source, .. } if source.kind() == std::io::ErrorKind::TimedOut => {
            (StatusCode::GATEWAY_TIMEOUT, Grpc::Unavailable)
        }
        Refusal::Closed { .. }
        | Refusal::Distrusted { .. }
        | Refusal::Gone(_)
        | Refusal::Header(_)
        | Refusal::Peer { .. }
        | Refusal::Silent(_)
        | Refusal::Tls(_)
        | Refusal::Unknown { .. }
        | Refusal::Unreachable { .. } => (StatusCode::BAD_GATEWAY, Grpc::Unavailable),
    };
    ProxyError::new(status, grpc, ErrorChain(refusal).to_string())
}

/// What a client is told of a request that got no answer; `None`: the client itself went away.
pub fn of_failure(failed: &Failed) -> ProxyError {
    match failed {
        Failed::Connect(refusal) => of_refusal(refusal),
        Failed::Send(kind) => ProxyError::new(
            StatusCode::BAD_GATEWAY,
            GrpcStatus::Unavailable,
            ErrorChain(kind).to_string(),
        ),
    }
}

/// The metric label of a failure.
pub fn label(failed: &Failed) -> &'static str {
    match failed {
        Failed::Connect(refusal) => refusal.label(),
        Failed::Send(kind) => match kind {
            SendErrorKind::Body(_) => "client_gone",
            SendErrorKind::Closed => "closed",
            SendErrorKind::Io(_) => "io",
            SendErrorKind::Malformed(_) => "malformed",
            SendErrorKind::NotProcessed(_) => "not_processed",
            SendErrorKind::Reset(_) => "reset",
        },
    }
}

/// Counts a response when it has ended.
pub fn counted(response: Response<Body>, meter: Rc<HttpMeter>) -> Response<Body> {
    let counting = Counting {
        meter,
        status: response.status().as_u16(),
        grpc_status: grpc_status(response.headers()),
    };
    response.map(|body| body.observed(counting))
}

struct Counting {
    meter: Rc<HttpMeter>,
    status: u16,
    grpc_status: Option<u8>,
}

impl Observer for Counting {
    fn frame(&mut self, frame: &Frame) {
        if let Frame::Trailers(trailers) = frame {
            self.grpc_status = grpc_status(trailers).or(self.grpc_status);
        }
    }

    fn ended(&mut self, end: End<'_>) {
        let broken = matches!(end, End::Failed(_));
        let (status, grpc_status) = (self.status, self.grpc_status);
        self.meter.response(Outcome { status, grpc_status, broken });
    }
}

/// gRPC knows 17 statuses; a number beyond them is none, so that labels stay few.
fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    let status = headers.get(GRPC_STATUS)?.to_str().ok()?.parse::<u8>().ok()?;
    (status <= 16).then_some(status)
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_becomes_the_status_that_says_whose_fault_it_is() {
        let denied = Refusal::Denied { code: Code::POLICY_DENIED, detail: String::new() };
        assert_eq!(of_refusal(&denied).status, StatusCode::FORBIDDEN);
        let unknown = |code| Refusal::Unknown { code, target: "db:1".into(), detail: "x".into() };
        assert_eq!(of_refusal(&unknown(Code::NO_ENDPOINTS)).status, 503);
        let gone = of_refusal(&unknown(Code::NO_SUCH_DESTINATION));
        assert_eq!(gone.status, 502);
        assert!(gone.message.contains("SFT-NET-007") && gone.message.contains("db:1"), "{gone:?}");
    }
}
