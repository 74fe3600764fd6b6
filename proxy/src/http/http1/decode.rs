//! The content of one message off its connection, however it is framed. Pure.

use bytes::BytesMut;

use super::chunk::{ChunkDecoder, split_up_to};
use super::parse::Framing;
use crate::http::body::{BodyError, Frame, Length};

/// What a decoder makes of the bytes at hand.
#[derive(Debug)]
pub enum Decoded {
    /// The content is over.
    End,
    /// A frame.
    Frame(Frame),
    /// More bytes must come first.
    NeedMore,
}

#[derive(Debug)]
pub(super) enum Decoder {
    Chunked(ChunkDecoder),
    /// Until the peer closes; tunnels too.
    Close {
        ended: bool,
    },
    Length {
        remaining: u64,
    },
}

impl Decoder {
    pub(super) fn new(framing: Framing) -> Self {
        match framing {
            Framing::Chunked => Self::Chunked(ChunkDecoder::new()),
            Framing::Close | Framing::Tunnel => Self::Close { ended: false },
            Framing::Empty => Self::Length { remaining: 0 },
            Framing::Length(bytes) => Self::Length { remaining: bytes },
        }
    }

    /// Takes what it can off the front of `input`; `ended` is whether nothing follows it.
    pub(super) fn decode(
        &mut self,
        input: &mut BytesMut,
        ended: bool,
    ) -> Result<Decoded, BodyError> {
        let decoded = match self {
            Self::Chunked(chunks) => chunks.decode(input).map_err(BodyError::Malformed)?,
            Self::Close { ended: known } => {
                *known = ended && input.is_empty();
                match (input.is_empty(), ended) {
                    (true, true) => Decoded::End,
                    (true, false) => Decoded::NeedMore,
                    (false, _) => Decoded::Frame(Frame::Data(split_up_to(input, u64::MAX))),
                }
            }
            Self::Length { remaining: 0 } => Decoded::End,
            Self::Length { remaining } if !input.is_empty() => {
                let data = split_up_to(input, *remaining);
                *remaining -= data.len() as u64;
                Decoded::Frame(Frame::Data(data))
            }
            Self::Length { .. } => Decoded::NeedMore,
        };
        match decoded {
            Decoded::NeedMore if ended => Err(BodyError::Closed),
            decoded => Ok(decoded),
        }
    }

    pub(super) fn length(&self) -> Length {
        match self {
            Self::Chunked(chunks) if chunks.is_done() => Length::Exact(0),
            Self::Close { ended: true } => Length::Exact(0),
            Self::Chunked(_) | Self::Close { .. } => Length::Unknown,
            Self::Length { remaining } => Length::Exact(*remaining),
        }
    }
}
