//! A request that was refused: one code, one sentence, and the one log line about it.
//!
//! Every module has an error type of its own; at the edge each becomes a [`Refusal`], whose code
//! decides the gRPC status and the label of the counter.

use std::fmt;

use steadfast_api::Code;
use tonic::metadata::MetadataValue;
use tonic::{Code as GrpcCode, Status};

use crate::csr::CsrError;
use crate::issuance_log::LogError;
use crate::issue::IssueError;
use crate::signer::SignerError;
use steadfast_platform::TokenRefusal;

/// Why a request got no SVID, or a stream was closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of refusal.
    pub code: Code,
    /// What was wrong with this very request, in one sentence without a full stop.
    pub what: String,
}

impl Refusal {
    /// A refusal of this kind.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self { code, what: what.into() }
    }

    /// What the caller gets: the code in the message and as metadata `sft-code`.
    pub fn status(&self) -> Status {
        let mut status = Status::new(grpc_code(self.code), self.to_string());
        // A code is letters, digits and dashes: always a valid value.
        if let Ok(value) = MetadataValue::try_from(self.code.as_str()) {
            status.metadata_mut().insert(CODE_METADATA, value);
        }
        status
    }
}

/// `SFT-ID-003: <what was wrong>. <What to do about it>`
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}. {}", self.code, self.what, self.code.fix())
    }
}

impl std::error::Error for Refusal {}

impl From<TokenRefusal> for Refusal {
    fn from(error: TokenRefusal) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

impl From<CsrError> for Refusal {
    fn from(error: CsrError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

impl From<IssueError> for Refusal {
    fn from(error: IssueError) -> Self {
        Self::new(error.code(), steadfast_process::ErrorChain(&error).to_string())
    }
}

impl From<SignerError> for Refusal {
    fn from(error: SignerError) -> Self {
        Self::new(Code::ISSUER_UNUSABLE, steadfast_process::ErrorChain(&error).to_string())
    }
}

impl From<LogError> for Refusal {
    fn from(error: LogError) -> Self {
        Self::new(Code::LOG_UNWRITABLE, error.to_string())
    }
}

/// The gRPC status of a code. A status that invites another try (`UNAVAILABLE`,
/// `RESOURCE_EXHAUSTED`) is given only where trying again can help.
fn grpc_code(code: Code) -> GrpcCode {
    match code {
        Code::TOKEN_MISSING | Code::TOKEN_MALFORMED | Code::TOKEN_EXPIRED => {
            GrpcCode::Unauthenticated
        }
        Code::TOKEN_AUDIENCE
        | Code::IDENTITY_MISMATCH
        | Code::CSR_AUTHORITY
        | Code::CSR_NAMES
        | Code::ACK_FOREIGN => GrpcCode::PermissionDenied,
        Code::TOKEN_UNBOUND => GrpcCode::FailedPrecondition,
        Code::TOKEN_WORKLOAD_GONE => GrpcCode::NotFound,
        Code::CSR_TOO_LARGE => GrpcCode::OutOfRange,
        Code::CSR_MALFORMED | Code::CSR_SIGNATURE | Code::CSR_KEY | Code::STREAM_PROTOCOL => {
            GrpcCode::InvalidArgument
        }
        Code::RATE_LIMITED => GrpcCode::ResourceExhausted,
        Code::LEASE_EXPIRED
        | Code::ISSUER_UNUSABLE
        | Code::LOG_UNWRITABLE
        | Code::STORE_UNAVAILABLE => GrpcCode::Unavailable,
        _ => GrpcCode::Internal,
    }
}

/// The metadata key that carries the code, for clients that act on it.
pub const CODE_METADATA: &str = "sft-code";
