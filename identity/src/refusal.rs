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
    /// A refusal of this kind. Bounded: parts of it are words of whoever asked, whom nobody has
    /// authenticated.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        let mut what = what.into();
        if let Some((end, _)) = what.char_indices().nth(WHAT_CHARS_MAX) {
            what.truncate(end);
            what.push('…');
        }
        Self { code, what }
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

/// The gRPC status of a code. There are fewer statuses than reasons, so a status says what the
/// client should do, and `sft-code` tells the reasons apart: bring another token
/// (`UNAUTHENTICATED`), have the workload set up otherwise (`FAILED_PRECONDITION`, `NOT_FOUND`),
/// ask for no more than its own (`PERMISSION_DENIED`), send less (`OUT_OF_RANGE`) or another
/// request (`INVALID_ARGUMENT`), or try again (`UNAVAILABLE`, `RESOURCE_EXHAUSTED`): these two are
/// given only where that can help.
fn grpc_code(code: Code) -> GrpcCode {
    match code {
        Code::TOKEN_AUDIENCE
        | Code::TOKEN_EXPIRED
        | Code::TOKEN_MALFORMED
        | Code::TOKEN_MISSING => GrpcCode::Unauthenticated,
        Code::IDENTITY_MISMATCH
        | Code::CSR_AUTHORITY
        | Code::CSR_NAMES
        | Code::ACK_FOREIGN
        | Code::NOT_THE_CONTROLLER => GrpcCode::PermissionDenied,
        Code::TOKEN_UNBOUND => GrpcCode::FailedPrecondition,
        Code::TOKEN_WORKLOAD_GONE => GrpcCode::NotFound,
        Code::CSR_TOO_LARGE => GrpcCode::OutOfRange,
        Code::CSR_MALFORMED | Code::CSR_SIGNATURE | Code::CSR_KEY | Code::STREAM_PROTOCOL => {
            GrpcCode::InvalidArgument
        }
        Code::RATE_LIMITED => GrpcCode::ResourceExhausted,
        Code::CLOCK_OFF
        | Code::HALTED
        | Code::LEASE_EXPIRED
        | Code::ISSUER_UNUSABLE
        | Code::LOG_UNWRITABLE
        | Code::STORE_UNAVAILABLE => GrpcCode::Unavailable,
        _ => GrpcCode::Internal,
    }
}

/// Two names of the longest kind and some words.
const WHAT_CHARS_MAX: usize = 600;
/// The metadata key that carries the code, for clients that act on it.
pub const CODE_METADATA: &str = "sft-code";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stranger_wrote_is_cut_short_between_two_characters() {
        let refusal = Refusal::new(Code::TOKEN_MALFORMED, "é".repeat(12 * 1024));
        assert_eq!(refusal.what.chars().count(), WHAT_CHARS_MAX + 1);
        assert!(refusal.what.ends_with("é…"));
        assert_eq!(Refusal::new(Code::TOKEN_MALFORMED, "short").what, "short");
    }
}
